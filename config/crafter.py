# The embedded default: Crafter on a CPU, the values that train.py has anyway. Copy it for your own.
data = "data/crafter"
out_dir = "out/crafter"
n_annotated = 64  # of 500 training episodes
T = 16
batch_size = 64
micro_batch = 16
n_layer = 3
n_head = 4
n_embd = 128
K = 8
stride = 4
predict_weight = 0.5
pseudo_labels = True
learning_rate = 1e-3
max_iters = 400

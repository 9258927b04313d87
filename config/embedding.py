# An embedding of your own, packed as docs/guide.md says. `python -m bench.public` trains with it.
#
#     python train.py config/embedding.py --data=data/mine --out_dir=out/mine
data = "data/mine"
out_dir = "out/mine"
n_annotated = 1000  # all that have captions
T = 32  # half of it, 16 steps, must hold what a caption depends on
n_layer = 2
n_head = 4
n_embd = 64
batch_size = 32
max_iters = 800
predict_weight = 0.0  # no predictor; 0.5 is the idea, and slower

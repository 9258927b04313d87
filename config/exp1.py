# Experiment 1: Minecraft. Observations are VPT embeddings (data/vpt, made by domains/vpt), encoder
# and predictor are pythia-160m.
#
#     python train.py config/exp1.py
#     torchrun --nproc_per_node=8 --max-restarts=3 train.py config/exp1.py
#
# Never run with real weights or recordings yet.
data = "data/vpt"
out_dir = "out/exp1"
init_from = "EleutherAI/pythia-160m"
n_annotated = 50  # of some 200 training recordings in 20 hours: the others have no caption
T = 64  # 12.8 seconds at 5 steps a second
K = 8
stride = 2
batch_size = 64
learning_rate = 1e-4
projector_lr = 1e-3  # it starts from nothing
max_iters = 20000
warmup_iters = 500
eval_interval = 1000
feature_power = 0.0  # measured on Crafter's one-hot view only: VPT's numbers are dense, try it

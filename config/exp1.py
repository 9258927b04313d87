# Experiment 1: Minecraft. Observations are VPT embeddings (data/vpt, made by domains/vpt), encoder
# and predictor are pythia-160m.
#
#     python train.py config/exp1.py
#     torchrun --nproc_per_node=8 --max-restarts=3 train.py config/exp1.py
#
# For 100 hours of recordings; `python -m bench.exp1` prints what they take. Never run with real
# weights or recordings yet.
data = "data/vpt"
out_dir = "out/exp1"
init_from = "EleutherAI/pythia-160m"
n_annotated = 100  # of some 1,080 training recordings: 8 hours have captions, 82 have none
T = 128  # 25.6 seconds at 5 steps a second, as far back as VPT's network looks
K = 16  # a caption is 3 to 11 of Pythia's tokens: a whole one that starts within a second
stride = 4  # as many tokens ahead as K = 4 from every step
batch_size = 64
micro_batch = 16  # windows: fits 24 GB
learning_rate = 1e-4
projector_lr = 1e-3  # it starts from nothing
max_iters = 4000  # each recording comes round about ten times
warmup_iters = 200
eval_interval = 500

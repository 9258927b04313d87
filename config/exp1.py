# Experiment 1: Minecraft. Observations are VPT embeddings (data/vpt, made by domains/vpt.py), encoder and predictor are pythia-160m.
#
#     python train.py config/exp1.py                                   one 80 GB GPU
#     torchrun --nproc_per_node=8 train.py config/exp1.py              eight of them, the same global batch
#
# Never run with real weights or recordings yet. What to expect, from arithmetic (`python bench/speed.py exp1` prints it): a step of 64
# windows of 64 steps is 24,576 rows, 16.9 TFLOP of training and 1.0 of writing, about a tenth of a second at 20 % of an H100, beside the
# latency of the target's 64 decoding steps. Memory: 5.2 GB of weights, gradients and moments, 0.6 GB of target, 7.7 GB of activations;
# the logits exist 166 rows at a time.
data = "data/vpt"
out_dir = "out/exp1"
init_from = "EleutherAI/pythia-160m"
n_annotated = 1000                    # recordings whose captions may be read
T = 64                                # 12.8 seconds at 5 steps a second
K = 8
ahead_stride = 2
batch_size = 64
lr = 1e-4
predictor_lr = 1e-4
projector_lr = 1e-3                   # it starts from nothing
max_iters = 20000
warmup = 500
write_from = 2000
eval_interval = 1000
ema = 0.999
brevity = 0.0                         # measured on Crafter's one-hot view only: VPT's numbers are dense, try it

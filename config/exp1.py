# Experiment 1: Minecraft. Observations are VPT embeddings (data/vpt, made by domains/vpt.py), encoder and predictor are pythia-160m.
#
#     python train.py config/exp1.py                                   one 80 GB GPU
#     torchrun --nproc_per_node=8 train.py config/exp1.py              eight of them, the same global batch
#
# Never run with real weights or recordings yet. What to expect, from arithmetic (`python bench/speed.py` and --help print the measures):
# 162 M parameters each, of which 85 M in the layers. A step has 64 windows of 64 steps: 4,096 rows in the encoder and, with a block from
# every second step, 4,096 + 16,384 in the predictor: 6 * 85 M * 24,576 = 12.5 TFLOP in the layers and 6 * 39 M * 20,480 = 4.7 TFLOP in
# the output matrices, so about a tenth of a second at 20 % of a GPU's 989 TFLOP/s in bfloat16, beside the target's 64 decoding steps.
# Memory: 2 * 162 M * 16 bytes (weights, gradients, two moments) and the target's 0.6 GB: 6 GB; activations about 25,000 rows * 12 layers *
# 34 * 768 bytes = 8 GB; the logits exist 330 rows at a time.
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

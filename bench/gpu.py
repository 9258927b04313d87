"""
Checks a GPU, then measures it: one command, less than ten minutes. On a CPU the same in miniature.

    python -m bench.gpu

A check prints how far a result is from its definition. Where one is too far the exit code is 1.
"""

from configurator import run
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from bench.exp1 import PYTHIA, Shape, memory, operations
from bench.faults import make_data
from data import Batch
from encoder import Encoder, Features
from model import Config, GPTNeoX, linear_cross_entropy
from train import Grounding, Predictor, ahead_attention, ahead_mask

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MINIATURE = Shape(2, 64, 4, 503)
SIZES = ((64, 16), (64, 128), (8, 512)) if CUDA else ((2, 16),)  # windows in a pass, T
K, D = (8, 1024) if CUDA else (4, 8)
DECODED = 128 if CUDA else 16  # steps
# how train.py multiplies, and how far such products may be off
NATIVE = CUDA and torch.cuda.is_bf16_supported(including_emulation=False)
AUTOCAST = torch.autocast(DEVICE, torch.bfloat16, enabled=NATIVE)
DTYPE, ROUNDING = (torch.bfloat16, 2e-2) if NATIVE else (torch.float32, 1e-4)

# -----------------------------------------------------------------------------
# checks: each yields what it checks, the most that is right, and a function that finds the figure


def distance(ours, theirs):
    """The largest of |a - b| / |b|."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


def from_the_mask(B, H, T, K, stride, hs):
    """The fast path, forward and backward, in the dtype of training, against float32."""
    N = T + len(range(0, T - 1, stride)) * K
    q, k, v, grad = torch.randn(4, B, H, N, hs, device=DEVICE, dtype=DTYPE)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    mask = ahead_mask(T, (N - T) // K, K, stride, DEVICE)
    ours, theirs = ahead_attention(*qkv, T, K, stride), F.scaled_dot_product_attention(*exact, mask)
    gradients = [torch.autograd.grad(ours, qkv, grad)]
    gradients += [torch.autograd.grad(theirs, exact, grad.float())]
    if CUDA:
        torch._dynamo.reset()  # or it gives up compiling after eight shapes
    return distance((ours, *gradients[0]), (theirs, *gradients[1]))


def attention():
    for hs in (32, 64, 80, 128, 256):  # those of Pythia
        yield f"fast attention, heads of {hs}", ROUNDING, from_the_mask, 2, 3, 67, 8, 4, hs
    many = 8193, 8, 2, 2, 1, 64 if CUDA else 8  # a grid of CUDA has 65,535 blocks across
    yield "fast attention, T=2, 65,544 rows", ROUNDING, from_the_mask, *many


def from_pytorch():
    rows, d, words = (4096, 512, 50304) if CUDA else (64, 32, 503)
    hidden = torch.randn(rows, d, device=DEVICE, requires_grad=True)
    matrix = torch.randn(words, d, device=DEVICE).mul_(d**-0.5).requires_grad_()
    target, weight = torch.randint(words, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE)
    with AUTOCAST:
        ours, _ = linear_cross_entropy(hidden, matrix, target, weight)
    theirs = (F.cross_entropy(hidden @ matrix.T, target, reduction="none") * weight).sum()
    gradients = [torch.autograd.grad(loss, (hidden, matrix)) for loss in (ours, theirs)]
    return distance((ours, *gradients[0]), (theirs, *gradients[1]))


def cross_entropy():
    yield "cross-entropy in chunks", ROUNDING, from_pytorch


@torch.no_grad()
def from_one_pass(context):
    """Decoded token by token with a cache, against one pass in float32."""
    layers, d, heads, words = PYTHIA["160m"] if CUDA else MINIATURE
    lm = GPTNeoX(Config(words, d, layers, heads)).to(DEVICE)
    tok = torch.randint(words, (4, DECODED), device=DEVICE)
    half = DECODED // 2
    with context:
        cache = lm.new_cache(4, DECODED)
        pieces = [lm(part, cache) for part in tok.split([half] + [1] * half, 1)]
    return distance([torch.cat(pieces, 1)], [lm(tok)])


def decoding():
    yield "cached decoding, float32", 1e-4, from_one_pass, contextlib.nullcontext()
    half = torch.autocast(DEVICE, torch.bfloat16)
    yield "cached decoding, bfloat16", 3e-2, from_one_pass, half


def last_losses(folder, name, processes, *arguments):
    """Runs train.py for 20 steps. Returns the losses that it logs last."""
    program = ["train.py"]
    if processes > 1:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
        program = [*torchrun.split(), "train.py"]
    size = "--n_embd=64 --n_layer=2 --n_head=2 --T=16 --K=4 --batch_size=8 --n_annotated=4"
    length = "--max_iters=20 --warmup_iters=5 --eval_interval=10"
    places = f"--data={folder / 'data'}", f"--out_dir={folder / name}"
    command = [sys.executable, *program, *size.split(), *length.split(), *places, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"train.py {' '.join(arguments)}: {done.stderr[-2000:].strip()}")
    row = json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])
    return [torch.tensor(row[f"loss_{loss}"]) for loss in ("ground", "predict", "pseudo")]


def training():
    """Whole runs of train.py, all compared with the first."""
    with tempfile.TemporaryDirectory() as folder:
        folder, here = Path(folder), f"--device={DEVICE}"
        make_data(folder / "data")
        first = last_losses(folder, "first", 1, here)
        shutil.rmtree(folder / "first/step-000020")

        def from_first(*arguments):
            return distance(last_losses(folder, *arguments), first)

        again = "first", 1, here, "--resume"
        yield "train.py, 10 steps and 10 resumed", 2e-2 if CUDA else 0.0, from_first, *again
        if CUDA:
            yield "train.py, 20 steps on a CPU", 5e-2, from_first, "cpu", 1, "--device=cpu"
        if torch.cuda.device_count() > 1:
            yield "train.py, 20 steps of two processes", 2e-2, from_first, "two", 2, here


def check(name, limit, figure, *arguments):
    """Prints a line. Returns whether all is well."""
    try:
        found = figure(*arguments)
    except Exception as error:  # whatever a kernel, a compiler or a driver says
        found, reason = float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"  {reason}")
    verdict = "ok" if found <= limit else f"WRONG, at most {limit:.0e}"
    print(f"{name:36} {found:8.1e}  {verdict}", flush=True)
    return found <= limit


# -----------------------------------------------------------------------------
# measurements


def seconds(function, repeats=5):
    """Of one call, after a first that compiles."""
    function()
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak():
    """Operations a second of a large product in the dtype of training."""
    n = 8192 if CUDA else 512
    a = torch.ones(n, n, device=DEVICE, dtype=DTYPE)
    return 2 * n**3 / seconds(lambda: a @ a, 20)


def a_model(shape, windows, T):
    """Encoder and predictor with random weights, and windows all of whose steps are annotated."""
    config = Config(shape.words, shape.width, shape.layers, shape.heads)
    with torch.device(DEVICE):
        encoder = Encoder(GPTNeoX(config), Features(D), T)
        model = Grounding(encoder, Predictor(GPTNeoX(config), shape.width, K))
        tok, known = torch.randint(shape.words, (windows, T)), torch.ones(windows, T).bool()
        obs, noise = torch.randn(windows, T, D), torch.rand(windows, 2 * T)
        step = torch.arange(T).expand(windows, T)  # a slot a step
        batch = Batch(obs, tok, step, known, ~known, known, noise)
    return model, batch


def measure(shape, windows, T, best):
    """Milliseconds of encoder, predictor, predictor by mask, optimiser; share of best; GB."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
    model, batch = a_model(shape, windows, T)
    optimizer = train.configure_optimizer(model)
    counts = train.Losses(*torch.ones(3, device=DEVICE))

    def step(predict_weight, dense):
        train.predict_weight, train.DENSE = predict_weight, dense
        with AUTOCAST:
            loss, _ = model(batch, counts)
        loss.backward()

    encoder = seconds(lambda: step(0.0, 0))
    fast = seconds(lambda: step(1.0, 0))
    optimise = seconds(optimizer.step)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
    mask = seconds(lambda: step(1.0, T + 1))
    share = windows * sum(operations(shape, T, K, 1)) / fast / best
    return [1e3 * x for x in (encoder, fast - encoder, mask - encoder, optimise)], share, gigabytes


def table(windows, T):
    best = peak()
    print(f"{windows} windows, T={T}, K={K}; {best / 1e12:.3g} TFLOP/s in one large product; ms:")
    print("        encoder  predictor    by mask  optimiser   of that     GB   reckoned")
    shapes = {x: PYTHIA[x] for x in ("70m", "160m", "410m", "1b")} if CUDA else {"tiny": MINIATURE}
    for name, shape in shapes.items():
        try:
            times, share, gigabytes = measure(shape, windows, T, best)
        except torch.OutOfMemoryError:
            print(f"{name:6} does not fit")
            continue
        print(f"{name:6}" + "".join(f"{x:9.1f}  " for x in times), end="")
        print(f"{share:7.0%} {gigabytes:8.1f}", end="")
        print(f"  {sum(memory(shape, T, K, 1, windows)):8.1f}", flush=True)


def main():
    print(torch.cuda.get_device_name() if CUDA else "no GPU: in miniature, on the CPU", flush=True)
    checks = [case for group in (attention, cross_entropy, decoding) for case in group()]
    right = [check(*case) for case in checks] + [check(*case) for case in training()]
    for windows, T in SIZES:
        table(windows, T)
    if not all(right):
        sys.exit(f"{right.count(False)} of {len(right)} checks are wrong")


if __name__ == "__main__":
    run(main)

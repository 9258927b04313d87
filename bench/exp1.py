"""
What experiment 1 takes, by arithmetic alone, and how much memory each Pythia needs.

    python -m bench.exp1                config/exp1.py
    python -m bench.exp1 --hours=20     of fewer recordings
"""

from configurator import check_range, configure, run
from typing import NamedTuple

import train

hours = 100.0  # of recordings

STEPS_PER_HOUR = 3600 * 5  # domains/vpt/embed.py takes every 4th of 20 frames a second
RECORDING = 1 / 12  # hours, the longest there are
VIDEO, LATENT = 2.2, 1024 * 2  # GB an hour; bytes a step of VPT's 1x network
TRAIN = 0.9  # share of recordings in the split train
H100 = 989e12 * 0.4  # bfloat16 operations a second: 40 % of what its maker says
COPY = 2  # bytes a parameter of autocast's bfloat16 copy, which the backward needs too
STATE = 4 + 4 + 8  # and of the rest: itself, gradient, AdamW's moments
AT_WORK = 4 + 4 + COPY  # of a sharded one that is gathered: itself, gradient, copy
SAVED = 40  # bytes that a layer keeps for the backward, a row and dimension, under autocast
CHUNK = 10 * 2**27  # bytes of the cross-entropy's logits (model.LOGITS)
CARDS = 24, 80, 141  # GB


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    words: int  # rows of the embedding


# https://huggingface.co/EleutherAI/pythia-*/blob/main/config.json
PYTHIA = {
    "70m": Shape(6, 512, 8, 50304),
    "160m": Shape(12, 768, 12, 50304),
    "410m": Shape(24, 1024, 16, 50304),
    "1b": Shape(16, 2048, 8, 50304),
    "1.4b": Shape(24, 2048, 16, 50304),
    "2.8b": Shape(32, 2560, 32, 50304),
    "6.9b": Shape(32, 4096, 32, 50432),
    "12b": Shape(36, 5120, 40, 50688),
}


def parameters(shape):
    """Of one language model."""
    layers, d, _, words = shape
    return layers * (12 * d * d + 13 * d) + 2 * d + 2 * words * d


def blocks(T, K, stride):
    """Tokens of all the predictor's blocks of a window."""
    return len(range(0, T - 1, stride)) * K


def operations(shape, T, K, stride):
    """Of encoder and of predictor, forward and backward, for one window of T steps."""
    layers, d, _, words = shape
    ahead = blocks(T, K, stride)
    matrices = 6 * layers * 12 * d * d  # 2 operations a weight, and twice that backward
    scores = 12 * layers * d  # of a query with a key
    encoder = T * (matrices + 6 * words * d) + T * T / 2 * scores
    predictor = (T + ahead) * matrices + 6 * ahead * words * d
    return encoder, predictor + (T * T / 2 + ahead * (T + K) / 2) * scores


def memory(shape, T, K, stride, windows):
    """GB: of the state of encoder and predictor, and of what `windows` at a time add to it."""
    rows = windows * (2 * T + blocks(T, K, stride))
    state = 2 * (STATE + COPY) * parameters(shape)
    return state / 1e9, (rows * shape.layers * shape.width * SAVED + CHUNK) / 1e9


def sharded(shape, processes):
    """GB a process of the state with --shard. The embeddings are gathered from a step's forward to
    its backward, layers one at a time, the next ahead; but their copies stay."""
    layers, d, _, words = shape
    inside, embeddings = parameters(shape) - 2 * words * d, 2 * words * d
    parts = 2 * STATE * parameters(shape) / processes
    gathered = 2 * AT_WORK * embeddings + 2 * COPY * inside + 2 * AT_WORK * inside / layers
    return (parts + gathered) / 1e9


def recordings(annotated):
    """Prints what there is."""
    n = hours / RECORDING
    annotated = min(annotated, TRAIN * n)
    others = TRAIN * n - annotated
    latents = hours * STEPS_PER_HOUR * LATENT
    print(f"{hours:g} hours: {n:,.0f} recordings of five minutes, {TRAIN * n:,.0f} to train on")
    print(f"{hours * VIDEO:,.0f} GB of video become {latents / 1e9:.1f} GB of embeddings")
    print(f"{annotated:,.0f} keep their captions ({annotated * RECORDING:.1f} hours)", end="")
    print(f", {others:,.0f} do not ({others * RECORDING:.1f} hours)")


def experiment(config):
    """Prints recordings, passes over them, targets, operations and hours."""
    recordings(config["n_annotated"])
    T, K, stride = (config[name] for name in ("T", "K", "stride"))
    windows = config["max_iters"] * config["batch_size"]
    targets = windows * T / 2  # the first half of a window has none
    passes = targets / (TRAIN * hours * STEPS_PER_HOUR)
    ahead = windows * blocks(T, K, stride)
    print(f"{windows:,} windows of {T} steps: {passes:.0f} passes, ", end="")
    print(f"{targets / 1e6:.0f} million targets for the encoder, {ahead / 1e6:.0f} to look ahead")
    shape = PYTHIA[config["init_from"].rpartition("-")[2]]
    total = windows * sum(operations(shape, T, K, stride))
    one = total / H100 / 3600
    print(f"{total:.1e} operations: {one:.2f} hours on one H100 at 40 %, {one / 8:.3f} on eight")


def table(config):
    """Prints the memory of each Pythia at the windows of the config."""
    shape_of = [config[name] for name in ("T", "K", "stride")]
    print(f"GB        state   + 1 window   + {config['micro_batch']} windows   one fits", end="")
    print("   --shard on 4   on 8")
    for name, shape in PYTHIA.items():
        state, least = memory(shape, *shape_of, 1)
        _, more = memory(shape, *shape_of, config["micro_batch"])
        fits = [f"{card} GB" for card in CARDS if 1.1 * (state + least) < card]
        one = (fits or ["none"])[0]
        print(f"{name:5} {state:9.1f} {least:12.1f} {more:14.1f}   {one:8}", end="")
        four, eight = (sharded(shape, n) + least for n in (4, 8))
        print(f"{four:15.1f} {eight:6.1f}")


def main():
    configure(globals())
    check_range(globals(), 1, "hours")
    config = configure(vars(train), ["config/exp1.py"])
    experiment(config)
    print()
    table(config)


if __name__ == "__main__":
    run(main)

"""
Captions a stream of raw embeddings as it arrives on stdin, at constant cost and memory.

    producer | python -m scripts.stream out/mine

A line per caption: when, confidence (its least sure token), text. Times are seconds ("2.1 s")
where the run's data set is at hand and says how many steps a second has, else steps.
"""

from configurator import configure, run
import sys
import time
from collections import deque
from json import dumps
from pathlib import Path

import numpy as np
import torch

from data import spans
from encoder import load
from runtime.distributed import pick_device
from runtime.shards import read_meta
from sample import timestamp

out_dir = "out/crafter"  # the run to load
dtype = "float32"  # of the numbers on stdin: 'float32' | 'float16'
json = False  # a JSON object per caption instead of text
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'


def arriving(source, D, clock):
    """Observations (D,) from a binary stream; clock[0] is when the last one came."""
    size, step = D * np.dtype(dtype).itemsize, 0
    while raw := source.read(size):
        if len(raw) < size:
            here = f"{len(raw)} of its {size} bytes; a step is {D} numbers of {dtype}"
            raise ValueError(f"stdin ended inside step {step}: {here}")
        obs = np.frombuffer(raw, dtype).astype(np.float32)
        if not np.isfinite(obs).all():
            raise ValueError(f"stdin, step {step}: not a finite number; {D} numbers of {dtype}?")
        clock[0] = time.perf_counter()
        yield torch.from_numpy(obs)
        step += 1
    if step == 0:
        raise ValueError(f"stdin was empty: a step is {D} numbers of {dtype}")


def follow_stdin(encoder, tokenizer, rate=None):
    """Prints what is said at each step, and at the end how long a step took."""
    device, D = encoder.device, encoder.obs_dim
    clock, seconds = [0.0], deque(maxlen=10_000)  # the latest steps: constant memory
    observations = (obs.to(device) for obs in arriving(sys.stdin.buffer, D, clock))
    for step, (ids, probs) in enumerate(encoder.stream(observations)):
        seconds.append(time.perf_counter() - clock[0])
        for first, last in spans(ids):
            text, sure = tokenizer.decode(ids[first:last]), min(probs[first:last])
            start, end = timestamp(step, rate), timestamp(step + 1, rate)
            line = dict(start=start, end=end, unit="seconds" if rate else "steps", text=text)
            line = dumps(line | dict(sure=round(sure, 3)))
            when = f"{start:9.3f} s" if rate else f"{start:7}"
            print(line if json else f"{when}  {sure:.2f}  {text}", flush=True)
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    latest = f"{p50:.2f} ms (p50), {p99:.2f} ms (p99); latest {len(seconds)} steps"
    print(f"a step took {latest}", file=sys.stderr)


def rate_of(data):
    """Steps per second of a run's data set; None where it says nothing, or is not at hand."""
    if Path(data, "meta.json").exists():
        return read_meta(data)["steps_per_second"]
    print(f"{data}: no data set, so times are steps, not seconds", file=sys.stderr)


def main():
    configure(globals(), bare="out_dir")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"--dtype={dtype}: one of float32, float16")
    if sys.stdin.isatty():
        raise ValueError("embeddings come on stdin: python -m scripts.stream < raw")
    encoder, tokenizer, _, config = load(out_dir, pick_device(device))
    follow_stdin(encoder, tokenizer, rate_of(config["data"]))


if __name__ == "__main__":
    run(main)

"""
Captions a stream of raw embeddings as it arrives on stdin, at constant cost and memory.

    producer | python -m scripts.stream out/mine
    python -m scripts.stream out/mine < episode.npy

A line per caption: when, confidence (its least sure token), text. Times are seconds ("2.1 s")
where the run's data set is at hand and says how many steps a second has, else steps.
"""

from configurator import configure, run
import io
import math
import re
import sys
import time
import types
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
dtype = "float32"  # of raw numbers on stdin: 'float32' | 'float16' | 'float64'
json = False  # a JSON object per caption instead of text
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'

FAR = 20  # deviations that a step's numbers may lie from what the run was trained on, on the mean
NO_NUMBERS = rb'PK\x03\x04.*|....\x00{4}\{"|[\d.,;+\-e\s]+'  # a .npz, a .safetensors, a table
TEXT = rb"[\t\n\r -~]{20,}"  # numbers have other bytes too
WANTED = "raw numbers or a .npy are wanted"


def rewound(head, source):
    """A binary stream, from its head on, which was read."""
    start = io.BytesIO(head)

    def read(n):
        begun = start.read(n)
        return begun + source.read(n - len(begun))

    return types.SimpleNamespace(read=read)


def read_npy_header(source, D):
    """The dtype of a .npy, and its steps. Raises ValueError."""
    major, _ = np.lib.format.read_magic(source)
    if major not in (1, 2):
        raise ValueError(f"stdin: a .npy of version {major}; save it anew with np.save")
    header = getattr(np.lib.format, f"read_array_header_{major}_0")
    shape, by_columns, kind = header(source)
    if shape[1:] != (D,) or not shape[0] or not (kind.kind in "fiub" or kind == "V2"):
        raise ValueError(f"stdin: a .npy of {shape} {kind}; real numbers (steps, {D}) are wanted")
    if by_columns:
        raise ValueError("stdin: a .npy saved by columns; save np.ascontiguousarray(x)")
    return kind, shape[0]


def arriving(source, D, clock):
    """Observations (D,) from a binary stream; clock[0] is when the last one came."""
    head = source.read(10)
    source, kind, steps = rewound(head, source), np.dtype(dtype), math.inf
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        kind, steps = read_npy_header(source, D)
    elif re.fullmatch(NO_NUMBERS, head, re.S):
        raise ValueError(f"stdin: a table, a .npz or .safetensors? {WANTED}")
    size, step = D * kind.itemsize, 0
    numbers = f"a step is {D} numbers of {kind}"
    while step < steps:
        raw = source.read(size)
        if not raw and step and steps == math.inf:
            return
        if len(raw) < size:
            there = f"ended inside step {step}: {len(raw)} of its {size} bytes; {numbers}"
            raise ValueError(f"stdin {there if step or raw else f'was empty: {numbers}'}")
        if not step and re.fullmatch(TEXT, raw):
            raise ValueError(f"stdin: text? {WANTED}")
        obs = np.frombuffer(raw, kind)
        if kind == "V2":  # bfloat16, as ml_dtypes saves it
            obs = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).float().numpy()
        obs = obs.astype(np.float32)
        if not np.isfinite(obs).all():
            raise ValueError(f"stdin, step {step}: not a finite number; {numbers}?")
        clock[0] = time.perf_counter()
        yield torch.from_numpy(obs)
        step += 1
    if source.read(1):
        raise ValueError(f"stdin: more than the {steps} steps of its .npy")


def warned(observations, features):
    """The observations (D,). Says once where they are not like those that the run was trained on:
    features has mean and scale of these."""
    mean, scale, told = features.mean.cpu(), features.scale.cpu(), False
    for step, obs in enumerate(observations):
        far = 0 if told else ((obs - mean) * scale).abs().mean()
        if far > FAR:
            what = f"numbers lie {far:.1g} deviations from what the run was trained on"
            print(f"warning: stdin, step {step}: {what}: is --dtype right?", file=sys.stderr)
            told = True
        yield obs


def follow_stdin(encoder, tokenizer, rate=None):
    """Prints what is said at each step, and at the end how long a step took."""
    device, D = encoder.device, encoder.obs_dim
    clock, seconds = [0.0], deque(maxlen=10_000)  # the latest steps: constant memory
    observations = warned(arriving(sys.stdin.buffer, D, clock), encoder.projector.features)
    observations = (obs.to(device) for obs in observations)
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
    if dtype not in ("float32", "float16", "float64"):
        raise ValueError(f"--dtype={dtype}: one of float32, float16, float64")
    if sys.stdin.isatty():
        raise ValueError("embeddings come on stdin: python -m scripts.stream < raw")
    encoder, tokenizer, _, config = load(out_dir, pick_device(device))
    follow_stdin(encoder, tokenizer, rate_of(config["data"]))


if __name__ == "__main__":
    run(main)

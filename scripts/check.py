"""
Reads a data set whole and prints every fault in it; exit code 1 if there is any.

    python -m scripts.check data/crafter
"""

import os
import sys
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import run
from data import read_meta, record_faults
from runtime.shards import Shard, shard_path

CHUNK = 16384  # steps read at a time
ABSURD = 1e6  # times the size that a feature has in half of the steps, and at least this
FEW_BYTES = 2e9  # up to here one process is faster: others take seconds to start


def absurd(rows):
    """Which numbers of rows (N, D) are most likely mistakes: (N, D) bool."""
    size = rows.abs()
    if not (size > ABSURD).any():  # nearly always, and the median takes long
        return torch.zeros_like(rows, dtype=torch.bool)
    return size > ABSURD * size.median(0).values.clamp(min=1)


def absurd_warning(rows, name, start=0):
    """A line where an episode holds absurd numbers; rows (N, D) are its steps from start on."""
    places = absurd(rows).nonzero().tolist()
    if places:
        step, feature = places[0]
        value = f"{rows[step, feature]:.3g} at step {start + step}, feature {feature}"
        more = f" and {len(places) - 1} more" * (len(places) > 1)
        yield f"episode {name}: {value}{more}: over a million times what is usual, a mistake?"


def read_episode(shard, n, record, faults, warnings):
    """Adds the faults of a shard's n-th episode, and warnings, a line each."""
    first, stop = shard.offsets[n : n + 2].tolist()
    text_faults = list(record_faults(record, stop - first))
    for fault in text_faults:
        faults.append(f"{shard.path.with_suffix('.jsonl')}, line {n + 1}: {fault}")
    name = f"number {n}" if text_faults else record["id"]
    for start in range(first, stop, CHUNK):
        end = min(start + CHUNK, stop)
        obs, broken, infinite = shard.read(start, end)
        for problem, rows in {"are not as written": broken, "are NaN or Inf": infinite}.items():
            if rows.any():
                steps = f"{int(rows.sum())} of steps {start - first} .. {end - first}"
                faults.append(f"{shard.path}, episode {name}: {steps} {problem}")
        if not (broken | infinite).any():
            for warning in absurd_warning(obs, name, start - first):
                warnings.append(f"warning: {shard.path}, {warning}")
    if not text_faults:
        shard.pictures(name)  # raises where they are not as written


def read_shard(job):
    """The faults of the shard (path, meta), and warnings, a line each."""
    path, meta = job
    if not path.exists():
        return [f"{path} is missing"], []
    faults, warnings = [], []
    try:
        shard = Shard(path, meta["obs_dim"], meta["dtype"])
        for n, record in enumerate(shard.records()):
            read_episode(shard, n, record, faults, warnings)
    except ValueError as error:
        faults.append(str(error))
    return faults, warnings


def check(folder):
    """Prints every fault of a data set. Returns the exit code."""
    try:
        meta = read_meta(folder)
    except ValueError as error:
        print(error)
        return 1
    first_paths = {split: shard_path(folder, split, 0) for split in meta["splits"]}
    faults = [
        f"{folder}: meta.json names the split {split}, but {path.name} is missing"
        for split, path in first_paths.items()
        if not path.exists() and not path.with_suffix(".jsonl").exists()
    ]
    texts = Path(folder).glob("*-?????.jsonl")  # a text without its shard is a fault as well
    shards = Path(folder).glob("*-?????.safetensors")
    paths = sorted({*shards, *(path.with_suffix(".safetensors") for path in texts)})
    sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
    many = sum(sizes) > FEW_BYTES
    each = get_context("spawn").Pool(min(os.cpu_count(), len(paths))).imap if many else map
    results = each(read_shard, [(path, meta) for path in paths])
    warnings = []
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="checking", disable=None) as bar:
        for size, in_shard in zip(sizes, results, strict=True):
            faults += in_shard[0]
            warnings += in_shard[1]
            bar.update(size)
    size = f"{len(paths)} shards, {sum(sizes) / 1e9:.1f} GB"
    print("\n".join([*warnings, *(faults or [f"{folder}: {size}, no fault"])]))
    return 1 if faults else 0


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError(__doc__.strip())
    sys.exit(check(sys.argv[1]))


if __name__ == "__main__":
    run(main)

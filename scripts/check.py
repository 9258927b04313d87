"""
Reads a data set whole and prints every fault in it; exit code 1 if there is any.

    python -m scripts.check data/crafter
"""

import os
import sys
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from configurator import run
from data import read_meta, record_faults
from runtime.shards import Shard, shard_path

CHUNK = 16384  # steps read at a time
FEW_BYTES = 2e9  # up to here one process is faster: others take seconds to start


def episode_faults(shard, n, record):
    """The faults of a shard's n-th episode, a line each."""
    first, stop = shard.offsets[n : n + 2].tolist()
    text_faults = list(record_faults(record, stop - first))
    for fault in text_faults:
        yield f"{shard.path.with_suffix('.jsonl')}, line {n + 1}: {fault}"
    name = f"number {n}" if text_faults else record["id"]
    for start in range(first, stop, CHUNK):
        end = min(start + CHUNK, stop)
        _, broken, infinite = shard.read(start, end)
        for problem, rows in {"are not as written": broken, "are NaN or Inf": infinite}.items():
            if rows.any():
                steps = f"{int(rows.sum())} of steps {start - first} .. {end - first}"
                yield f"{shard.path}, episode {name}: {steps} {problem}"
    if not text_faults:
        shard.pictures(name)  # raises where they are not as written


def shard_faults(job):
    """The faults of the shard (path, meta), a line each."""
    path, meta = job
    if not path.exists():
        return [f"{path} is missing"]
    faults = []
    try:
        shard = Shard(path, meta["obs_dim"], meta["dtype"])
        for n, record in enumerate(shard.records()):
            faults += episode_faults(shard, n, record)
    except ValueError as error:
        faults.append(str(error))
    return faults


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
    results = each(shard_faults, [(path, meta) for path in paths])
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="checking", disable=None) as bar:
        for size, in_shard in zip(sizes, results, strict=True):
            faults += in_shard
            bar.update(size)
    size = f"{len(paths)} shards, {sum(sizes) / 1e9:.1f} GB"
    print("\n".join(faults) or f"{folder}: {size}, no fault")
    return 1 if faults else 0


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError(__doc__.strip())
    sys.exit(check(sys.argv[1]))


if __name__ == "__main__":
    run(main)

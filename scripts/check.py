"""
Reads a data set whole and prints every fault in it; exit code 1 if there is any.

    python -m scripts.check data/crafter
"""

from configurator import docstring, run
import functools
import os
import sys
from pathlib import Path

from tqdm import tqdm

from runtime.dataset import record_faults
from runtime.program import workers
from runtime.shards import read_meta, read_shard, shard_path, shard_paths

FEW_BYTES = 2e9  # up to here one process is faster: others take seconds to start


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
        if not path.exists()
        and not path.with_suffix(".jsonl").exists()
        and path.name not in meta.get("parts", {})
    ]
    texts = shard_paths(folder, "jsonl")  # a text without its shard is a fault as well
    paths = {*shard_paths(folder), *(path.with_suffix(".safetensors") for path in texts)}
    paths |= {Path(folder, name) for name in meta.get("parts", {})}
    paths = sorted(paths)
    sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
    many = sum(sizes) > FEW_BYTES
    each = workers(min(os.cpu_count(), len(paths))).imap if many else map
    read = functools.partial(read_shard, record_faults=record_faults, meta=meta)
    results = each(read, paths)
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
        raise ValueError(docstring(__file__))
    sys.exit(check(sys.argv[1]))


if __name__ == "__main__":
    run(main)

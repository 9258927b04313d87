"""
The log of a run: a row of numbers whenever it was evaluated, in log.jsonl.
"""

import json
from pathlib import Path

from runtime.distributed import RANK, print0
from runtime.files import parse_json, replace


def open_log(out_dir, step, config, wandb, first):
    """What takes a row {name: value} of the log: to out_dir/log.jsonl, where rows beyond `step` are
    removed first, to the terminal, and to Weights & Biases if `wandb` names a project. The first
    row, of step 0, has what `first` says."""
    if RANK > 0:
        return print0  # which is silent here
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    kept = [line for line in lines if 0 < logged_step(line) <= step]
    kept.insert(0, json.dumps(dict(step=0) | first))
    replace(path, lambda beside: beside.write_text("".join(line + "\n" for line in kept)))
    file = open(path, "a", buffering=1)
    if wandb:
        wandb_run = start_wandb(wandb, out_dir, config)

    def log(row):
        try:
            file.write(json.dumps(row) + "\n")
        except OSError as error:
            refused = f"{path} cannot be written: {error.strerror}"
            raise ValueError(f"{refused}: make room, then go on with --resume") from None
        numbers = (f"{x:.3f}" if isinstance(x, float) else x for x in row.values())
        print0("  ".join(f"{name} {x}" for name, x in zip(row, numbers, strict=True)))
        if wandb:
            wandb_run.log(row, step=row["step"])

    return log


def start_wandb(project, out_dir, config):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"{error}; pip install -r requirements-extra.txt") from None
    return wandb.init(project=project, dir=out_dir, config=config)


def logged_step(line):
    """The step of a line of the log; infinite where a kill left half a line."""
    try:
        return float(parse_json(line.encode())["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")

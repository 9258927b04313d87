"""
Checkpoints: one folder per save, out/<run>/step-000800, complete on disk before it has its name.

    encoder/  predictor/  reader/     weights, as each part's save_pretrained writes them
    tokenizer.json  config.json       the words, and the settings
    state.pt                          optimizer and all else that resuming needs
    checksums.json                    size and CRC-32 of every file: a changed byte is an error

A run keeps its two newest and the best on validation, whose name is in out/<run>/best.
"""

import math
import os
import re
import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.distributed import RANK, WORLD, broadcast, full_tensor, gathered, local_part, print0
from runtime.files import checksum, flush, lock, read_json, replace, write_json

KEEP = 2

# -----------------------------------------------------------------------------
# which checkpoints there are


def step_folders(out_dir):
    """Oldest first. What a user renamed is none."""
    paths = Path(out_dir).glob("step-*")
    paths = [path for path in paths if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def checkpoints(out_dir):
    """The checkpoints of a run, oldest first."""
    return [path for path in step_folders(out_dir) if (path / "checksums.json").exists()]


def newest(out_dir):
    return max(checkpoints(out_dir), key=lambda path: int(path.name[5:]), default=None)


def best_folder(out_dir):
    """The checkpoint of a run that is best on validation, else the newest. Raises ValueError."""
    paths = checkpoints(out_dir)
    if not paths:
        hint = f"`python train.py --out_dir={out_dir}` makes one"
        if any(Path(out_dir, x).exists() for x in ("checksums.json", "meta.json")):
            hint = "the folder of a run is wanted, as --out_dir names it"
        raise ValueError(f"{out_dir}: no checkpoint; {hint}")
    name = Path(out_dir, "best")
    chosen = name.read_text(errors="replace") if name.is_file() else ""
    return next((path for path in paths if path.name == chosen), paths[-1])


def open_best(out_dir):
    """The folder of a run's best checkpoint, whole, and its settings. A relative `data` is found
    here, else in the nearest folder above the run. Raises ValueError."""
    folder = best_folder(out_dir)
    verify(folder)
    config = read_json(folder / "config.json")
    places = [Path(), *folder.resolve().parents]
    found = (str(place / config["data"]) for place in places)
    found = (data for data in found if Path(data, "meta.json").exists())
    return folder, config | dict(data=next(found, config["data"]))


LOCK = []  # the open file whose lock is this run's lock


def resume_from(out_dir, resume, config, fixed, identity):
    """The checkpoint in out_dir, or None. Raises ValueError where one is there that is not to be
    resumed, has a changed byte, another value of a `fixed` setting, or other data."""
    folder = newest(out_dir) if RANK == 0 else None
    if not folder:
        if resume:
            print0(f"{out_dir}: no checkpoint, so from the start")
        return None
    if not resume:
        raise ValueError(
            f"{folder} is there: --resume goes on from it, another --out_dir starts anew"
        )
    verify(folder)
    changed = changed_settings(folder, config)
    other = [changed[name] for name in fixed if name in changed]
    if other:
        raise ValueError(f"{folder} is of another run ({', '.join(other)}): another --out_dir")
    if read_state(folder)["identity"] != identity:
        raise ValueError(f"{folder} was trained on other data than {config['data']} holds now")
    return folder


def lock_run(out_dir, *same):
    """Makes out_dir this run's alone until the process ends. Returns what to resume from, or None.

    Raises ValueError where another run writes, or as resume_from() does.
    """
    if RANK > 0:
        return broadcast(None)
    out_dir = Path(out_dir)
    while LOCK:
        os.close(LOCK.pop())
    LOCK.append(lock(out_dir))
    for stale in out_dir.glob(".step-*"):
        shutil.rmtree(stale)
    for path in step_folders(out_dir):
        if any(path.iterdir()) and not (path / "checksums.json").exists():
            raise ValueError(f"{path} has lost its checksums.json: remove or rename it")
    return broadcast(resume_from(out_dir, *same))


# -----------------------------------------------------------------------------
# writing


def threads_and_processes():
    return [torch.get_num_threads(), WORLD]


def full_state(optimizer):
    """Its state_dict() as one process would have it, on the first one."""
    saved = optimizer.state_dict()
    for i, moments in saved["state"].items():
        moments = {name: full_tensor(x) for name, x in moments.items()}
        saved["state"][i] = {name: x.cpu() for name, x in moments.items() if RANK == 0}
    return saved


def save(out_dir, parts, tokenizer, optimizer, config, state):
    """Writes out_dir/step-<state["step"]>, then removes old checkpoints.

    parts: {name: module with save_pretrained}. The first process writes, and only if they are
    sharded do the others call it too. Raises ValueError where the disk refuses.
    """
    final = Path(out_dir) / f"step-{state['step']:06d}"
    beside = final.with_name(f".{final.name}")
    state = state | dict(optimizer=full_state(optimizer), machine=threads_and_processes())
    try:
        for name, part in parts.items():
            with gathered(part):
                if RANK == 0:
                    part.save_pretrained(beside / name)
        if RANK > 0:
            return
        tokenizer.save(beside / "tokenizer.json")
        write_json(config, beside / "config.json")
        torch.save(state, beside / "state.pt")
        write_json(checksums(beside), beside / "checksums.json")
        for path in [*beside.rglob("*"), beside]:
            flush(path)
        os.rename(beside, final)
        prune(out_dir, state["best_step"])
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have theirs
        free = shutil.disk_usage(out_dir).free / 1e6
        shutil.rmtree(beside, ignore_errors=True)
        raise ValueError(
            f"{final} cannot be saved: {error}; {free:.1f} MB are free. What was saved before "
            f"({newest(out_dir)}) is whole: make room, then go on with --resume"
        ) from None


def check_finite(out_dir, step, value, bad):
    """How many steps in a row were not finite, and so are skipped. Raises ValueError after ten."""
    if math.isfinite(value):
        return 0
    print0(f"step {step}: loss or gradient is not finite, the step is skipped")
    if bad == 9:
        last = newest(out_dir) or "none there; `python -m scripts.show` looks at the data"
        raise ValueError(f"step {step}: ten steps in a row not finite; last checkpoint: {last}")
    return bad + 1


def prune(out_dir, best_step):
    """Names the best checkpoint, and removes all but it and the newest."""
    out_dir = Path(out_dir)
    best_name = f"step-{best_step:06d}"
    if (out_dir / best_name).exists():
        replace(out_dir / "best", lambda beside: beside.write_text(best_name))
    for old in checkpoints(out_dir)[:-KEEP]:
        if old.name != best_name:
            hidden = old.with_name(f".{old.name}")  # never half a checkpoint under its own name
            os.rename(old, hidden)
            shutil.rmtree(hidden)
    flush(out_dir)


# -----------------------------------------------------------------------------
# reading


def checksums(folder):
    """{path within folder: [size, CRC-32]} of all files but checksums.json and what people add."""
    sums = {}
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() or path.name in ("checksums.json", "README.md", ".DS_Store"):
            continue
        sums[path.relative_to(folder).as_posix()] = [path.stat().st_size, checksum(path)]
    return sums


def verify(folder):
    """Raises ValueError if a file of a checkpoint, or of a part of one, is not as it was saved."""
    folder = Path(folder)
    root = folder if (folder / "checksums.json").exists() else folder.parent
    if not (root / "checksums.json").exists():
        return  # not saved by `save`: a published model
    prefix = "" if root == folder else folder.name + "/"
    saved = read_json(root / "checksums.json")
    saved = {name[len(prefix) :]: x for name, x in saved.items() if name.startswith(prefix)}
    now = checksums(folder)
    wrong = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if wrong:
        names = ", ".join(wrong[:3])
        raise ValueError(
            f"{folder}: {names} not as saved; remove {root}, then the one before counts"
        )


def restore(part, folder):
    """Copies saved weights into a module: model.safetensors into .lm, x.safetensors into .x."""
    stored = {}
    for path in Path(folder).glob("*.safetensors"):
        prefix = "lm" if path.name.startswith("model") else path.stem
        stored |= {f"{prefix}.{name}": tensor for name, tensor in load_file(path).items()}
    saved_names = part.state_dict()
    named = chain(part.named_parameters(), part.named_buffers())
    own = {name: x for name, x in named if name in saved_names}  # tied weights once
    other = sorted(stored.keys() ^ own.keys())
    if other:
        raise ValueError(f"{folder} has other weights than this model: {', '.join(other[:3])}")
    for name, x in own.items():
        x.data.copy_(local_part(stored[name], x))


def restore_optimizer(optimizer, saved):
    """load_state_dict() of what full_state() gave."""
    weights = chain(*(group["params"] for group in optimizer.param_groups))
    for i, weight in enumerate(weights):
        moments = saved["state"].get(i, {})
        moments.update({name: local_part(x, weight) for name, x in moments.items() if x.dim()})
    optimizer.load_state_dict(saved)


def changed_settings(folder, config):
    """{name: what it was and is} of the settings that are not as in a checkpoint."""
    saved = read_json(folder / "config.json")
    return {
        name: f"{name} {saved[name]!r} -> {value!r}"
        for name, value in config.items()
        if saved.get(name, value) != value and name != "resume"
    }


def read_state(folder):
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)


def restore_run(folder, parts, optimizer, config):
    """Puts weights {name: module} and optimizer back as saved. Returns the rest of the state."""
    changed, state = changed_settings(folder, config), read_state(folder)
    for name, part in parts.items():
        restore(part, folder / name)
    restore_optimizer(optimizer, state.pop("optimizer"))
    machine = state.pop("machine")
    if machine != threads_and_processes():
        changed["machine"] = f"{machine} threads and processes before: the same but for rounding"
    print0("; ".join([f"resuming from {folder}", *changed.values()]))
    return state

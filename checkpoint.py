"""
Checkpoints: one folder per save, out/<run>/step-000800, written beside and renamed when complete and flushed.

    encoder/  predictor/  target/     weights in the published layout, and what the projector and the condition add
    tokenizer.json  config.json       the words, and the resolved settings
    state.pt                          the optimizer and all else that resuming needs, for torch.load(weights_only=True)
    checksums.json                    size and CRC-32 of every file: a changed byte is an error, never a wrong load

A run keeps its newest few and the best on validation, whose name is in out/<run>/best.
"""
import json
import os
import shutil
import time
import zlib
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configurator import Fault

# ---------------------------------------------------------------------------------------------------------------------
# writing


def flush(path):
    """Makes a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try: os.fsync(descriptor)
    finally: os.close(descriptor)


def put(path, text):
    """Replaces a small file at once, or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text)
    flush(beside)
    os.replace(beside, path)


CLAIMED = []                              # the open file whose lock is this process's claim


def claim(out_dir, resume):
    """Makes out_dir this run's alone, tidies what a killed run left; returns the checkpoint to resume from, or None.

    The claim holds until this process ends, or claims another. Raises Fault where another run writes, or an unresumed one has.
    """
    import fcntl  # not on Windows, where a run can still be loaded
    out_dir = Path(out_dir)
    while CLAIMED: os.close(CLAIMED.pop())
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        CLAIMED.append(os.open(out_dir / ".lock", os.O_CREAT | os.O_RDWR))
    except OSError as error: raise Fault(f"{out_dir} cannot be written: {error.strerror}; choose another --out_dir") from None
    try: fcntl.flock(CLAIMED[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: raise Fault(f"{out_dir}: another run is writing there; wait for it or choose another --out_dir") from None
    for stale in out_dir.glob(".step-*"): shutil.rmtree(stale)
    found = newest(out_dir)
    if found and not resume:
        raise Fault(f"{found} is there already: --resume=True continues it, another --out_dir starts anew (or remove {out_dir})")
    return found


def save(out_dir, model, target, optimizer, tokenizer, config, state, keep):
    """Writes out_dir/step-<state["step"]>, then removes all but the newest `keep` and the best; returns a line on it.

    state: tensors, numbers, strings, lists and dicts; state["best"] is (score, step) or None. Raises Fault where the disk refuses.
    """
    started, final = time.perf_counter(), Path(out_dir) / f"step-{state['step']:06d}"
    beside = final.with_name(f".{final.name}.writing")
    try:
        for name, part in dict(encoder=model.encoder, predictor=model.predictor, target=target).items():
            part.save_pretrained(beside / name)
        tokenizer.save(beside / "tokenizer.json")
        (beside / "config.json").write_text(json.dumps(config, indent=2))
        torch.save(state | dict(optimizer=optimizer.state_dict()), beside / "state.pt")
        files = checksums(beside)
        (beside / "checksums.json").write_text(json.dumps(files, indent=2))
        for path in [*beside.rglob("*"), beside]: flush(path)
        os.rename(beside, final)
        tidy(out_dir, state["best"], keep)
        flush(out_dir)
    except (OSError, RuntimeError, SafetensorError) as error:                           # torch and safetensors have their own
        free = shutil.disk_usage(out_dir).free / 1e6
        shutil.rmtree(beside, ignore_errors=True)
        raise Fault(f"{final} cannot be saved: {error}; {free:.1f} MB were free. What was saved before ({newest(out_dir)}) is intact: "
                    f"make room, then continue with --resume=True") from None
    size = sum(size for size, _ in files.values())
    return f"{final}: {size / 1e6:.1f} MB saved in {time.perf_counter() - started:.2f} s"


def tidy(out_dir, best, keep):
    """Names the best checkpoint and removes all but it and the newest `keep`."""
    out_dir = Path(out_dir)
    best = best and f"step-{best[1]:06d}"
    if best and (out_dir / best).exists(): put(out_dir / "best", best)
    for old in sorted(out_dir.glob("step-*"))[:-keep]:
        if old.name == best: continue
        os.rename(old, out_dir / f".{old.name}.removed")     # never half a checkpoint under its own name
        shutil.rmtree(out_dir / f".{old.name}.removed")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def checksums(folder):
    """{path within folder: [size, CRC-32]} of all files but checksums.json."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() or path == Path(folder) / "checksums.json": continue
        crc = 0
        with open(path, "rb") as f:
            while block := f.read(1 << 20): crc = zlib.crc32(block, crc)
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return found


def verify(folder):
    """Raises Fault if a file of a checkpoint, or of one of its parts, is missing, added or changed; a folder without checksums passes."""
    folder = Path(folder)
    root = next((f for f in (folder, folder.parent) if (f / "checksums.json").exists()), None)
    if root is None and not folder.name.startswith("step-"): return
    try: listed = json.loads((root or folder).joinpath("checksums.json").read_bytes())
    except (OSError, ValueError): listed = {}
    part = "" if root in (folder, None) else folder.name + "/"
    listed = {name[len(part):]: found for name, found in listed.items() if name.startswith(part)}
    found = checksums(folder)
    wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    if wrong: raise Fault(f"{folder}: {', '.join(wrong[:3])} {'..' if wrong[3:] else ''} not as saved: corrupted; "
                          f"remove that checkpoint, the one before it then counts")


def newest(out_dir):
    """The newest checkpoint of a run, or None."""
    return max(Path(out_dir).glob("step-*"), default=None)


def chosen(out_dir):
    """The best checkpoint of a run on validation, the newest where none was chosen; Fault where there is none."""
    found = newest(out_dir)
    if not found: raise Fault(f"{out_dir}: no checkpoint there; `python train.py --out_dir={out_dir}` makes one")
    name = found.with_name("best").read_text(errors="replace") if found.with_name("best").exists() else ""
    return found.with_name(name) if name in {path.name for path in found.parent.glob("step-*")} else found


def restore(part, folder):
    """Copies a part's saved tensors into it: model*.safetensors are its language model's, others belong to the module of their name."""
    stored, kept = {}, part.state_dict()
    for path in folder.glob("*.safetensors"):
        prefix = "lm" if path.name.startswith("model") else path.stem
        stored |= {f"{prefix}.{name}": tensor for name, tensor in load_file(path).items()}
    here = {name: x for name, x in chain(part.named_parameters(), part.named_buffers()) if name in kept}   # tied weights once
    other = sorted(stored.keys() ^ here.keys())
    if other: raise Fault(f"{folder} has other weights than this version's model: {', '.join(other[:3])}")
    for name, x in here.items(): x.data.copy_(stored[name])


FIXED = {"n_annotated", "seed", "T", "init_from", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "K", "ahead_stride", "ahead", "context", "through", "condition"}                # what makes another model, or other captions


def resume(folder, model, target, optimizer, config, identity):
    """Puts weights and optimizer back as they were saved; returns the rest of the state, and which settings have changed, as texts.

    Raises Fault for a changed byte, another model or another data set, before anything is loaded.
    """
    verify(folder)
    before, state = json.loads((folder / "config.json").read_text()), torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    changed = {name: f"{name} {before[name]!r} -> {value!r}" for name, value in config.items() if before.get(name, value) != value}
    other = ", ".join(changed[name] for name in sorted(FIXED & changed.keys()))
    if other: raise Fault(f"{folder} is of another model ({other}): take back the change, or choose another --out_dir")
    if state["data"] != identity: raise Fault(f"{folder} was trained on other data than {config['data']} holds now")
    for name, part in dict(encoder=model.encoder, predictor=model.predictor, target=target).items(): restore(part, folder / name)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state, [text for name, text in changed.items() if name != "resume"]


def open_log(out_dir, step):
    """out_dir/log.jsonl without the lines beyond `step`, to append to."""
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    put(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
    return open(path, "a")

"""
Checkpoints: one folder per save, out/<run>/step-000800, written beside and renamed when complete.

    encoder/  predictor/  target/     weights in the published layout, and what the projector and the condition add
    tokenizer.json  config.json       the words, and the resolved settings
"""
import json
import os
import shutil
from pathlib import Path


def flush(path):
    """Makes a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try: os.fsync(descriptor)
    finally: os.close(descriptor)


def save(out_dir, step, model, target, tokenizer, config):
    """Writes out_dir/step-<step>, then removes the older ones."""
    out_dir = Path(out_dir)
    final, beside = out_dir / f"step-{step:06d}", out_dir / f".step-{step:06d}.{os.getpid()}"
    for name, part in dict(encoder=model.encoder, predictor=model.predictor, target=target).items():
        part.save_pretrained(beside / name)
    tokenizer.save(beside / "tokenizer.json")
    (beside / "config.json").write_text(json.dumps(config, indent=2))
    for path in [*beside.rglob("*"), beside]: flush(path)
    if final.exists(): shutil.rmtree(final)
    os.rename(beside, final)
    flush(out_dir)
    for other in out_dir.glob("*step-*"):
        if other != final: shutil.rmtree(other)
    return final


def latest(out_dir):
    """The newest complete checkpoint of a run; FileNotFoundError where there is none."""
    found = sorted(Path(out_dir).glob("step-*"))
    if not found: raise FileNotFoundError(f"{out_dir}: no checkpoint there; `python train.py --out_dir={out_dir}` makes one")
    return found[-1]

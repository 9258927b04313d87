"""
Episodes on disk: a folder of shards (observations as safetensors, text as json lines) and a meta.json.

    meta.json                   obs_dim, dtype, steps_per_second, source, licence, splits, format
    train-00000.safetensors     obs (N, D), episodes back to back; offsets (E+1,) int64; crc (N,) uint32 of each step's bytes
    train-00000.jsonl           a line per episode: id, annotated ("all" or [[start, end], ..]), captions [{start, end, text}], crc

Whatever is read is checked as it is read; a fault is one line with file, episode and field. A line edited by hand needs no crc.
"""
import json
import os
import zlib
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from configurator import Fault
from files import replace, save_tensors

FORMAT = 1                                # of the data sets on disk
DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}   # of observations, as safetensors names them
LONGEST = 1000                            # characters of a caption: more is a mistake
UNREADABLE = (OSError, ValueError, SafetensorError)
CHUNK = 16384                             # steps that `check` reads at a time


class Episode(NamedTuple):
    """What a domain hands to write_shard; obs (N, D) numpy or torch, annotated "all" or [[start, end], ..] in steps."""
    id: str
    obs: np.ndarray
    captions: list
    annotated: object = "all"
    pictures: np.ndarray = None           # (N, h, w, 3) uint8, kept in <split>-<index>-pictures.safetensors


def shard_path(folder, split, index):
    return Path(folder) / f"{split}-{index:05d}.safetensors"


def checksums(rows):
    """CRC-32 of the bytes of each row: (N, ..) tensor -> (N,) uint32."""
    return np.array([zlib.crc32(row) for row in rows.contiguous().view(torch.uint8).numpy()], np.uint32)


def write_shard(folder, split, index, episodes):
    """Writes one shard under temporary names and renames, the safetensors file last: with it the shard is complete.

    Raises Fault for what a reader would refuse.
    """
    path = shard_path(folder, split, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(id=e.id, annotated=e.annotated, captions=[c._asdict() for c in e.captions]) for e in episodes]
    for e, record in zip(episodes, records, strict=True):
        for fault in record_faults(record, len(e.obs)): raise Fault(f"{path}, episode {e.id}: {fault}")
    obs = torch.cat([torch.as_tensor(e.obs) for e in episodes]).contiguous()
    offsets = torch.tensor([0] + [len(e.obs) for e in episodes]).cumsum(0)
    pictures = {e.id: torch.as_tensor(e.pictures).contiguous() for e in episodes if e.pictures is not None}
    crc = {name: int(checksums(x[None])[0]) for name, x in pictures.items()}
    if pictures: save_tensors(pictures, path.with_name(path.stem + "-pictures.safetensors"), {"crc": json.dumps(crc)})
    replace(path.with_suffix(".jsonl"), lambda p: p.write_text("".join(map(write_line, records)), encoding="utf-8"))
    kept = {"index": json.dumps(dict(format=FORMAT, offsets=int(checksums(offsets[None])[0])))}    # one entry: their order is random
    save_tensors({"obs": obs, "offsets": offsets, "crc": torch.from_numpy(checksums(obs))}, path, kept)


def write_meta(folder, **meta):
    """meta.json, written last: obs_dim, dtype, steps_per_second, source, licence, splits; a folder without it is not yet a data set."""
    replace(Path(folder) / "meta.json", lambda p: p.write_text(json.dumps(dict(format=FORMAT) | meta, indent=2)))


def write_line(record):
    line = json.dumps(record)[:-1]
    return f'{line}, "crc": {zlib.crc32(line.encode())}}}\n'


def read_line(line, steps):
    """A json line of an episode of that many steps -> (its record, its faults); the record is None if it cannot be read at all."""
    try: record = json.loads(line)
    except ValueError as error: return None, [f"is not json ({error})"]
    if not isinstance(record, dict): return None, ["is not an object {..}"]
    faults = list(record_faults(record, steps))
    if record.pop("crc", None) not in (None, zlib.crc32(line[:line.rfind(b', "crc"')])):
        faults.append('does not match its crc: corrupted, or edited by hand (then remove "crc" from it)')
    return record, faults


def record_faults(record, steps):
    """What is wrong with an episode's id, annotated spans and captions, a line for each."""
    if steps < 1: yield "has no steps"
    if not isinstance(record.get("id"), str): yield f"id {record.get('id')!r} is not a text"
    whole = lambda a, b: type(a) is int and type(b) is int and 0 <= a < b <= steps
    annotated, captions = record.get("annotated"), record.get("captions")
    span = lambda s: isinstance(s, (list, tuple)) and len(s) == 2 and whole(*s)
    if annotated != "all" and not (isinstance(annotated, list) and all(map(span, annotated))):
        yield f'annotated {annotated!r} is neither "all" nor a list of [start, end] within 0 .. {steps}'
    if not isinstance(captions, list): return (yield f"captions {captions!r} is not a list")
    for n, c in enumerate(captions):
        if not isinstance(c, dict) or c.keys() != {"start", "end", "text"}: yield f"caption {n} has not just start, end and text: {c!r:.80}"
        elif not whole(c["start"], c["end"]): yield f"caption {n}: {c['start']} .. {c['end']} is no span within 0 .. {steps}"
        elif not isinstance(c["text"], str) or not c["text"].strip(): yield f"caption {n}: text {c['text']!r} is empty"
        elif len(c["text"]) > LONGEST: yield f"caption {n}: a text of {len(c['text']):,} characters (at most {LONGEST:,})"


def read_meta(folder):
    path = Path(folder) / "meta.json"
    if not path.exists(): raise Fault(f"{path} is missing: not a data set, or one that was never finished")
    try: meta = json.loads(path.read_bytes())
    except ValueError as error: raise Fault(f"{path} is not json ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise Fault(f"{path}: not format {FORMAT}, which this version reads; make the data set again")
    if type(meta.get("obs_dim")) is not int or meta.get("dtype") not in DTYPES.values():
        raise Fault(f"{path}: obs_dim {meta.get('obs_dim')!r} is no number, or dtype {meta.get('dtype')!r} none of {[*DTYPES.values()]}")
    return meta


class Shard:
    """One shard: its index, and reads of rows that are checked one by one. Nothing stays open or mapped: memory stays flat."""

    def __init__(self, path, meta):
        self.path, self.dim, self.dtype = path, meta["obs_dim"], getattr(torch, meta["dtype"])
        try:
            with safe_open(path, "pt") as f:
                kept, obs, names = json.loads((f.metadata() or {}).get("index", "{}")), f.get_slice("obs"), f.keys()
                self.offsets = f.get_tensor("offsets").clone()                          # else the file stays mapped
        except UNREADABLE as error: raise Fault(f"{path}: truncated or garbled ({error}); make it again") from None
        if kept.get("format", FORMAT) != FORMAT: raise Fault(f"{path}: format {kept['format']}, this version reads {FORMAT}")
        (N, *D), dtype = obs.get_shape(), DTYPES.get(obs.get_dtype())
        if D != [self.dim] or dtype != meta["dtype"]: raise Fault(f"{path}: obs is {D} {dtype}, meta.json [{self.dim}] {meta['dtype']}")
        start, steps = self.offsets, self.offsets.diff()
        if start.dtype != torch.int64 or start.dim() != 1 or len(start) < 2 or start[0] != 0 or start[-1] != N or steps.min() < 0 or (
                kept.get("offsets") not in (None, checksums(start[None])[0])):
            raise Fault(f"{path}: offsets are wrong: they must rise from 0 to the {N} rows of obs; make it again")
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            at = {name: 8 + size + x["data_offsets"][0] for name, x in json.loads(f.read(size)).items() if name in names}
        self.obs_at, self.crc_at = at["obs"], at.get("crc")       # byte of the first row; data sets made before have no crc

    def read(self, start, stop):
        """Rows start .. stop as they are, (n, D), and which of them are not what was written, or not finite, (n,) bool."""
        width = self.dim * self.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, (stop - start) * width, offset=self.obs_at + start * width)
        if len(raw) != (stop - start) * width: raise Fault(f"{self.path}: ends before row {stop}: truncated while being read")
        rows = torch.from_numpy(raw).view(self.dtype).view(-1, self.dim)
        broken = np.zeros(len(rows), bool)
        if self.crc_at is not None:
            broken |= checksums(rows) != np.fromfile(self.path, np.uint32, stop - start, offset=self.crc_at + 4 * start)
        infinite = ~rows.abs().amax(1).isfinite().numpy() if self.dtype.is_floating_point else np.zeros(len(rows), bool)
        return rows, broken, infinite

    def lines(self):
        """[(record or None, faults)] of the text; Fault if it is missing or has not a line per episode."""
        path, steps = self.path.with_suffix(".jsonl"), self.offsets.diff().tolist()
        if not path.exists(): raise Fault(f"{path} is missing: the text of {self.path.name}")
        lines = path.read_bytes().splitlines()
        if len(lines) != len(steps): raise Fault(f"{path}: {len(lines)} lines, but {self.path.name} has {len(steps)} episodes")
        return [read_line(line, n) for line, n in zip(lines, steps, strict=True)]

    def pictures(self, name):
        """The pictures of an episode, (N, h, w, 3) uint8, or None where none were kept."""
        path = self.path.with_name(self.path.stem + "-pictures.safetensors")
        if not path.exists(): return None
        try:
            with safe_open(path, "pt") as f:
                if name not in f.keys(): return None
                frames, crc = f.get_tensor(name), json.loads((f.metadata() or {}).get("crc", "{}")).get(name)
        except UNREADABLE as error: raise Fault(f"{path}: truncated or garbled ({error}); make it again") from None
        if crc not in (None, checksums(frames[None])[0]): raise Fault(f"{path}, episode {name}: pictures are not what was written")
        return frames


# ---------------------------------------------------------------------------------------------------------------------
# python data.py check <folder>


def shard_faults(job):
    """Reads a shard whole: (its size in bytes, every fault in it)."""
    path, meta = job
    size, found = path.stat().st_size, []
    try:
        shard = Shard(path, meta)
        lines, offsets = shard.lines(), shard.offsets.tolist()
        for n, ((record, faults), first, stop) in enumerate(zip(lines, offsets, offsets[1:], strict=False), 1):
            found += [f"{path.with_suffix('.jsonl')}, line {n}: {fault}" for fault in faults]
            name = record["id"] if record and not faults else f"number {n - 1}"
            for a in range(first, stop, CHUNK):
                _, broken, infinite = shard.read(a, min(a + CHUNK, stop))
                found += [f"{path}, episode {name}: {where.sum()} of steps {a - first} .. {min(a + CHUNK, stop) - first} {what}"
                          for what, where in (("are not what was written", broken), ("are NaN or Inf", infinite)) if where.any()]
            if record and not faults: shard.pictures(name)
    except Fault as fault: found.append(str(fault))
    return size, found


def check(folder):
    """Prints every fault of a data set, with a progress bar; returns the exit code, 1 if there is any."""
    try: meta = read_meta(folder)
    except Fault as fault: return print(fault) or 1
    paths = sorted(Path(folder).glob("*-?????.safetensors"))
    found = [f"{folder}: meta.json names the split {split}, but {shard_path(folder, split, 0).name} is missing"
             for split in meta.get("splits", ()) if not shard_path(folder, split, 0).exists()]
    size = sum(path.stat().st_size for path in paths)
    pool = get_context("spawn").Pool(min(os.cpu_count(), len(paths))) if size > 2e9 else None   # a process takes seconds to start
    with tqdm(total=size, unit="B", unit_scale=True, desc="checking", disable=None) as progress:
        for bytes_read, faults in (pool.imap_unordered if pool else map)(shard_faults, [(path, meta) for path in paths]):
            found += faults
            progress.update(bytes_read)
    print("\n".join(found) or f"{folder}: {len(paths)} shards, {size / 1e9:.1f} GB, no fault")
    return min(len(found), 1)

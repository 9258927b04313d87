"""
Rows of numbers on disk, with a JSON record for each run of rows. Whatever is read is checked.

    train-00000.safetensors            rows (N, D); offsets (E+1,) of the runs; crc (N,) of each row
    train-00000.jsonl                  E records, a line each, with crc (none: edited by hand)
    train-00000-pictures.safetensors   optional, larger things by name
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from runtime.checkpoint import parse_json, replace, save_tensors

FORMAT = 1
DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
UNREADABLE = OSError, ValueError, SafetensorError


def shard_path(folder, split, index):
    return Path(folder) / f"{split}-{index:05d}.safetensors"


def pictures_path(path):
    return path.with_name(path.stem + "-pictures.safetensors")


def checksums(rows):
    """CRC-32 of the bytes of each row: (N, ..) tensor -> (N,) int64."""
    return torch.tensor([zlib.crc32(row) for row in rows.contiguous().view(torch.uint8).numpy()])


def write(path, runs, records, pictures):
    """Writes a shard of runs [(n, D), ..], the .safetensors last: with it the shard is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {name: torch.as_tensor(x).contiguous() for name, x in pictures.items()}
    if pictures:
        crc = {name: int(checksums(x[None])[0]) for name, x in pictures.items()}
        save_tensors(pictures, pictures_path(path), {"crc": json.dumps(crc)})
    lines = "".join(write_line(record) for record in records)
    replace(path.with_suffix(".jsonl"), lambda beside: beside.write_text(lines))
    rows = torch.cat(runs).contiguous()
    offsets = torch.tensor([0] + [len(run) for run in runs]).cumsum(0)
    crc = torch.from_numpy(checksums(rows).numpy().astype(np.uint32))
    index = json.dumps(dict(format=FORMAT, offsets=int(checksums(offsets[None])[0])))
    save_tensors(dict(obs=rows, offsets=offsets, crc=crc), path, {"index": index})


def write_line(record):
    line = json.dumps(record)[:-1]
    return f'{line}, "crc": {zlib.crc32(line.encode())}}}\n'


def read_line(line):
    """A line -> its record, or a text that says why it is none."""
    try:
        record = parse_json(line)
    except ValueError as error:
        return f"is not JSON ({error})"
    if not isinstance(record, dict):
        return "is not an object {..}"
    if record.pop("crc", None) not in (None, zlib.crc32(line[: line.rfind(b', "crc"')])):
        return 'does not match its crc: corrupted, or edited by hand (then remove "crc" from it)'
    return record


def open_tensors(path, key):
    """A .safetensors file, and the JSON object that its metadata has under a key."""
    if not path.is_file():  # to open a pipe would hang
        raise ValueError("it is no file")
    file = safe_open(path, "pt")
    about = parse_json((file.metadata() or {}).get(key, "{}").encode())
    if not isinstance(about, dict):
        raise ValueError(f"its {key} is no object {{..}}")
    return file, about


class Shard:
    """One shard, mapped: rows are copied and checked as they are read. Raises ValueError."""

    def __init__(self, path, width=None, dtype=None):
        """width, dtype: what rows are to be; None: whatever they are."""
        self.path = path
        try:
            self.file, index = open_tensors(path, "index")
            self.offsets = self.file.get_tensor("offsets").clone()
            self.rows = self.file.get_slice("obs")
            shape, stored = self.rows.get_shape(), DTYPES.get(self.rows.get_dtype())
            self.crc = self.file.get_slice("crc") if "crc" in self.file.keys() else None
            if self.offsets.dtype != torch.int64 or self.offsets.dim() != 1:
                raise ValueError("offsets are no list of int64")
            if self.crc and (self.crc.get_shape(), self.crc.get_dtype()) != (shape[:1], "U32"):
                raise ValueError("crc is no list of uint32, one a step")
            crc = int(checksums(self.offsets[None])[0])
        except UNREADABLE as error:
            raise ValueError(f"{path}: truncated or garbled ({error}); make it again") from None
        if index.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{path}: format {index['format']}, {FORMAT} is read here")
        if len(shape) != 2 or width not in (None, shape[1]) or dtype not in (None, stored):
            raise ValueError(f"{path}: obs is {shape} {stored}, meta.json has [{width}] {dtype}")
        ends = self.offsets.tolist()
        rising = ends == sorted(ends) and [*ends[:1], *ends[-1:]] == [0, shape[0]]
        if not rising or index.get("offsets", crc) != crc:
            raise ValueError(f"{path}: offsets must rise from 0 to {shape[0]}; make it again")

    def read(self, start, stop):
        """Rows start .. stop (n, D), and which are not as written, or not finite, (n,) bool."""
        rows = self.rows[start:stop].clone()
        broken = torch.zeros(len(rows), dtype=torch.bool)
        if self.crc is not None:
            broken = checksums(rows) != self.crc[start:stop].to(torch.int64)
        return rows, broken, ~rows.isfinite().all(1)

    def records(self):
        """A record per run, or a text that says what is wrong with its line."""
        path = self.path.with_suffix(".jsonl")
        if not path.is_file():
            raise ValueError(f"{path} is missing: the text of {self.path.name}")
        lines = path.read_bytes().splitlines()
        if len(lines) != len(self.offsets) - 1:
            raise ValueError(f"{path}: {len(lines)} lines for {len(self.offsets) - 1} episodes")
        return [read_line(line) for line in lines]

    def pictures(self, name):
        """(N, h, w, 3) uint8 of that name, or None where none were kept."""
        path = pictures_path(self.path)
        if not path.exists():
            return None
        try:
            file, crcs = open_tensors(path, "crc")
            if name not in file.keys():
                return None
            frames = file.get_tensor(name)
            if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
                raise ValueError(f"{name} is no (N, h, w, 3) uint8")
        except UNREADABLE as error:
            raise ValueError(f"{path}: truncated or garbled ({error}); make it again") from None
        if crcs.get(name) not in (None, int(checksums(frames[None])[0])):
            raise ValueError(f"{path}, episode {name}: pictures are not as written")
        return frames

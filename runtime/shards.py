"""
Rows of numbers on disk, with a JSON record for each run of rows. Whatever is read is checked.

    meta.json                          format, width and dtype of rows, splits; parts, what each
                                       shard holds, so that none of another set passes; written last
    train-00000.safetensors            rows (N, D); offsets (E+1,) of the runs; crc (N,) of each row
    train-00000.jsonl                  E records, a line each, with crc (none: edited by hand)
    train-00000-pictures.safetensors   optional, larger things by name
"""

import contextlib
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from runtime.files import parse_json, read_json, regular_file, replace, save_tensors, write_json
from runtime.program import one_line

FORMAT = 1
SPLITS = "train", "val", "test"
PART = r"(train|val|test)-\d{5}\.safetensors"
DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
CHUNK = 16384  # rows checked at a time
ABSURD = 1e6  # times the size that a feature has in half of the rows, and at least this


def write_meta(folder, paths=None, **meta):
    """meta.json, written last: a folder without it is not yet a data set. paths: of its shards,
    where they are not yet all in the folder."""
    paths = shard_paths(folder) if paths is None else paths
    parts = {path.name: Shard(path).mark for path in sorted(paths, key=lambda path: path.name)}
    write_json(dict(format=FORMAT) | meta | dict(parts=parts), Path(folder) / "meta.json")


def read_meta(folder):
    """Raises ValueError where a folder is no data set of this format."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such data set; python -m scripts.pack makes one")
    path = Path(folder) / "meta.json"
    meta = read_json(path)
    splits, rate, parts = meta.get("splits"), meta.get("steps_per_second"), meta.get("parts", {})
    for key, right in dict(
        format=meta.get("format") == FORMAT,
        obs_dim=type(meta.get("obs_dim")) is int,
        dtype=meta.get("dtype") in list(DTYPES.values()),
        splits=isinstance(splits, list) and all(split in SPLITS for split in splits),
        parts=isinstance(parts, dict) and all(re.fullmatch(PART, name) for name in parts),
        steps_per_second=rate is None or (type(rate) in (int, float) and 0 < rate <= 1e6),
    ).items():
        if not right:
            raise ValueError(f"{path}: {key} is {meta.get(key)!r:.80}; make the data set again")
    return meta


def shard_path(folder, split, index):
    return Path(folder) / f"{split}-{index:05d}.safetensors"


def shard_paths(folder, ending="safetensors"):
    """The shards in a folder, and no other file that happens to be there."""
    return sorted(path for x in SPLITS for path in Path(folder).glob(f"{x}-?????.{ending}"))


def split_paths(folder, split, meta):
    """The shards of a split, in order. Raises ValueError where one is missing."""
    paths = [path for path in shard_paths(folder) if path.name.startswith(f"{split}-")]
    wanted = {shard_path(folder, split, n).name for n in range(len(paths))}
    wanted |= {name for name in meta.get("parts", {}) if name.startswith(f"{split}-")}
    for name in sorted(wanted - {path.name for path in paths}):
        raise ValueError(f"{Path(folder, name)} is missing")
    return paths


def pictures_path(path):
    return path.with_name(path.stem + "-pictures.safetensors")


def row_checksums(rows):
    """CRC-32 of the bytes of each row: (N, ..) tensor -> (N,) int64."""
    return torch.tensor([zlib.crc32(row) for row in rows.contiguous().view(torch.uint8).numpy()])


def finite(rows):
    """Which rows (N, D) are finite, (N,) bool: NaN and Inf have the exponent of infinity, and bits
    are compared 25 times as fast as torch tells it of float16."""
    if not rows.is_floating_point():
        return torch.ones(len(rows), dtype=torch.bool)
    integer = torch.int16 if rows.element_size() == 2 else torch.int32
    infinity = torch.tensor(torch.inf, dtype=rows.dtype).view(integer).numpy()
    exponents = rows.view(integer).numpy() & infinity
    if exponents.max(initial=0) < infinity:  # nearly always, and quicker told of all at once
        return torch.ones(len(rows), dtype=torch.bool)
    return torch.from_numpy((exponents < infinity).all(1))


def write_rows(path, runs, records, pictures):
    """Writes a shard of runs [(n, D), ..], the .safetensors last: with it the shard is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {name: torch.as_tensor(x).contiguous() for name, x in pictures.items()}
    shown = json.dumps({name: int(row_checksums(x[None])[0]) for name, x in pictures.items()})
    if pictures:
        save_tensors(pictures, pictures_path(path), {"crc": shown})
    lines = "".join(write_line(record) for record in records)
    replace(path.with_suffix(".jsonl"), lambda beside: beside.write_text(lines))
    rows = torch.cat(runs).contiguous()
    offsets = torch.tensor([0] + [len(run) for run in runs]).cumsum(0)
    crc = torch.from_numpy(row_checksums(rows).numpy().astype(np.uint32))
    index = dict(format=FORMAT, offsets=int(row_checksums(offsets[None])[0]))
    index |= dict(rows=zlib.crc32(crc.numpy()), lines=lines_sum(lines.encode().splitlines()))
    index |= dict(pictures=zlib.crc32(shown.encode()))
    tensors = dict(obs=rows, offsets=offsets, crc=crc)
    save_tensors(tensors, path, {"index": json.dumps(index)})


def lines_sum(lines):
    return zlib.crc32(b"\n".join(lines))


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


@contextlib.contextmanager
def open_tensors(path, key):
    """A .safetensors file, and the JSON object that its metadata has under a key. What is wrong
    with them, here or in the block, is a ValueError that names the file."""
    regular_file(path)
    try:
        file = safe_open(path, "pt")
        about = parse_json((file.metadata() or {}).get(key, "{}").encode())
        if not isinstance(about, dict):
            raise ValueError(f"its {key} is no object {{..}}")
        yield file, about
    except (OSError, ValueError, SafetensorError) as error:
        why = one_line(error)
        raise ValueError(f"{path}: truncated or garbled ({why}); make it again") from None


class Shard:
    """One shard, mapped: rows are copied and checked as they are read. Raises ValueError."""

    def __init__(self, path, meta=None):
        """meta: of the data set that it is to be a part of; None: of any."""
        meta = meta or {}
        width, dtype, parts = meta.get("obs_dim"), meta.get("dtype"), meta.get("parts")
        self.path = path
        with open_tensors(path, "index") as (file, index):
            self.offsets = file.get_tensor("offsets").clone()
            self.rows = file.get_tensor("obs")  # mapped
            shape, stored = list(self.rows.shape), str(self.rows.dtype).removeprefix("torch.")
            self.crc = file.get_tensor("crc") if "crc" in file.keys() else None
            if self.offsets.dtype != torch.int64 or self.offsets.dim() != 1:
                raise ValueError("offsets are no list of int64")
            about = None if self.crc is None else (list(self.crc.shape), self.crc.dtype)
            if about not in (None, (shape[:1], torch.uint32)):
                raise ValueError("crc is no list of uint32, one a step")
            crc = int(row_checksums(self.offsets[None])[0])
        if index.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{path}: format {index['format']}, {FORMAT} is read here")
        if len(shape) != 2 or width not in (None, shape[1]) or dtype not in (None, stored):
            raise ValueError(f"{path}: obs is {shape} {stored}, meta.json has [{width}] {dtype}")
        self.width, self.lines, self.stat = shape[1], index.get("lines"), os.stat(path)
        self.shown = index.get("pictures")
        ends = self.offsets.tolist()
        rising = ends == sorted(ends) and [*ends[:1], *ends[-1:]] == [0, shape[0]]
        if not rising or index.get("offsets", crc) != crc:
            raise ValueError(f"{path}: offsets must rise from 0 to {shape[0]}; make it again")
        self.mark = zlib.crc32(json.dumps(index).encode()) if "rows" in index else None
        if parts and (path.name not in parts or self.mark not in (None, parts[path.name])):
            raise ValueError(f"{path}: of another data set than meta.json; make it again")

    def sum(self):
        """A number that changes with the rows; None where they have no checksums."""
        return None if self.crc is None else zlib.crc32(self.crc.numpy())

    def read(self, start, stop):
        """Rows start .. stop (n, D), and which are not as written, or not finite, (n,) bool."""
        with contextlib.suppress(FileNotFoundError):  # what is mapped stays where it is replaced
            now = os.stat(self.path)
            if now.st_ino == self.stat.st_ino and now.st_size < self.stat.st_size:
                raise ValueError(f"{self.path}: cut off since it was opened; make it again")
        rows = self.rows[start:stop].clone()
        broken = torch.zeros(len(rows), dtype=torch.bool)
        if self.crc is not None:
            broken = row_checksums(rows) != self.crc[start:stop].to(torch.int64)
        return rows, broken, ~finite(rows)

    def records(self):
        """A record per run, or a text that says what is wrong with its line."""
        path = regular_file(self.path.with_suffix(".jsonl"))
        lines = path.read_bytes().splitlines()
        if len(lines) != len(self.offsets) - 1:
            raise ValueError(f"{path}: {len(lines)} lines for {len(self.offsets) - 1} episodes")
        records = [read_line(line) for line in lines]
        by_hand = not all(b', "crc"' in line for line in lines)
        whole = not by_hand and all(isinstance(record, dict) for record in records)
        if whole and self.lines not in (None, lines_sum(lines)):
            raise ValueError(f"{path}: captions of another data set; make it again")
        return records

    def pictures(self, name):
        """(N, h, w, 3) uint8 of that name, or None where none were kept."""
        path = pictures_path(self.path)
        if not path.exists():
            return None
        with open_tensors(path, "crc") as (file, crcs):
            if self.shown not in (None, zlib.crc32(json.dumps(crcs).encode())):
                raise ValueError("pictures of another data set")
            if name not in file.keys():
                return None
            frames = file.get_tensor(name)
            if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
                raise ValueError(f"{name} is no (N, h, w, 3) uint8")
        if crcs.get(name) not in (None, int(row_checksums(frames[None])[0])):
            raise ValueError(f"{path}, episode {name}: pictures are not as written")
        return frames


# -----------------------------------------------------------------------------
# reading all of a shard


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


def read_run(shard, n, record, record_faults, faults, warnings):
    """Adds the faults of a shard's n-th run, and warnings, a line each."""
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


def read_shard(path, record_faults, meta=None):
    """Reads all of a shard: its faults, and warnings, a line each.

    meta: of the data set that it is to be a part of.
    record_faults(record, rows): what is wrong with the record of a run of so many rows.
    """
    faults, warnings = [], []
    try:
        shard = Shard(path, meta)
        for n, record in enumerate(shard.records()):
            read_run(shard, n, record, record_faults, faults, warnings)
    except ValueError as error:
        faults.append(str(error))
    return faults, warnings

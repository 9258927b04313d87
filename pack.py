"""
Packs a user's own observations and captions into a data set (data.py says what that is).

    python data.py pack --obs='episodes/*.npy' --captions=captions.csv --out=data/mine
    python data.py pack --obs='episodes/*.npy' --captions=captions.csv --out=data/mine --fps=5      times in seconds

Observations: .npy, .npz or .safetensors, an array (steps, dims) per episode. A file's only array is the episode named like the
file without its ending; several are the episodes file/array.
Captions: .csv with the columns episode,start,text and optionally end, or .jsonl with the same keys, as `sample.py --json` writes.
A line with an episode and nothing else says that nothing happens in it; episodes that no line names count as not annotated. Of several
files, --captions=captions.csv,said.jsonl, a later one replaces what earlier ones say of an episode; what an encoder wrote (its lines have
"sure"), corrected or not, trains and is never the truth of val or test. The same call again goes on where it was stopped.
"""
import csv
import difflib
import glob
import hashlib
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from configurator import Fault, configure, stop
from data import Caption, Episode, shard_path, write_meta, write_shard
from files import replace

obs = ""                              # the observations' files, e.g. 'episodes/*.npy'
captions = ""                         # .csv or .jsonl, several with commas between; without it nothing is annotated
out = ""                              # folder of the data set, e.g. data/mine
fps = 0.0                             # steps per second; with it the captions' times are seconds, else steps
annotated = "all"                     # an episode with captions is annotated: 'all' of it | 'captions', only where they are
val = 0.1                             # share of the annotated episodes that validate, at least one
test = 0.1                            # share that test, at least one
source = ""                           # where the observations come from, for meta.json
licence = ""                          # and what may be done with them

SHARD = 256 * 2 ** 20                 # bytes of observations in a shard
KEPT = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}   # others become float32


def arrays(path):
    """The arrays of a file: [(name, shape, dtype as text)], from its header alone."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as f: slices = {name: f.get_slice(name) for name in f.keys()}
        return [(name, tuple(x.get_shape()), str(x[:0].dtype)[6:]) for name, x in slices.items()]
    if path.endswith(".npy"):
        array = np.load(path, mmap_mode="r")
        return [("", array.shape, array.dtype.name)]
    if not path.endswith(".npz"): raise ValueError("neither .npy, .npz nor .safetensors")
    with zipfile.ZipFile(path) as files:
        return [(name[:-4], *header(files.open(name))) for name in files.namelist()]


def header(file):
    version = np.lib.format.read_magic(file)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    return shape, dtype.name


def load(path, name, dtype):
    """One episode's observations (N, D), finite."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as f: x = f.get_tensor(name)
    else:
        x = np.load(path)
        if path.endswith(".npz"): x = x[name]
        x = torch.from_numpy(np.ascontiguousarray(x, x.dtype.newbyteorder("=")))
    x = x.to(KEPT[dtype])
    bad = ~torch.isfinite(x).all(1)
    if bad.any(): stop(f"{path}{':' + name if name else ''}, step {int(bad.nonzero()[0])}: not a finite number, or too large for {dtype}")
    return x


def find():
    """The episodes: [(id, path, name, steps)] in order of their ids, the dims, and the dtype."""
    found, kinds, dims = [], set(), {}
    for path in sorted(glob.glob(os.path.expanduser(obs), recursive=True)):
        try: inside = arrays(path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error: stop(f"{path}: not observations: {error}")
        for name, shape, dtype in inside:
            where = path + (f", array {name}" if name else "")
            if len(shape) != 2 or not all(shape): stop(f"{where}: shape {shape}; observations are (steps, dims)")
            if not dtype.startswith(("float", "bfloat", "int", "uint", "bool")): stop(f"{where}: {dtype}; observations are real numbers")
            dims.setdefault(shape[1], where)
            kinds.add("uint8" if dtype == "bool" else dtype if dtype in KEPT else "float32")
            found.append((Path(path).stem + (f"/{name}" if len(inside) > 1 else ""), path, name, shape[0]))
    if not found: stop(f"--obs={obs}: no such files; quote the pattern, e.g. --obs='episodes/*.npy'")
    if len(dims) > 1: stop("observations differ in dims: " + ", ".join(f"{d} in {where}" for d, where in list(dims.items())[:2]))
    found.sort()
    for a, b in zip(found, found[1:], strict=False):
        if a[0] == b[0]: stop(f"{a[1]} and {b[1]}: two episodes called {a[0]!r}; rename one")
    return found, min(dims), kinds.pop() if len(kinds) == 1 else "float32"


def lines(path):
    """(line number, dict) of a captions file."""
    try: file = open(path, newline="", encoding="utf-8-sig")
    except OSError as error: stop(f"{path}: {error.strerror}")
    with file:
        if path.endswith(".csv"):
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            missing = sorted({"episode", "start", "text"} - set(reader.fieldnames))
            if missing: stop(f"{path}, line 1: the columns are episode,start,end,text; missing, or no commas between: {', '.join(missing)}")
            for row in reader:
                if None in row: stop(f"{path}, line {reader.line_num}: more fields than columns; a text with a comma wants \"quotes\"")
                yield reader.line_num, row
        else:
            for number, line in enumerate(file, 1):
                if not line.strip(): continue
                try: row = json.loads(line)
                except ValueError as error: stop(f"{path}, line {number}: not a JSON object: {error}")
                if not isinstance(row, dict): stop(f"{path}, line {number}: not a JSON object")
                missing = {"episode", "start", "text"} - set(row) if len(row) > 1 else {"episode"} - set(row)
                if missing: stop(f"{path}, line {number}: missing: {', '.join(sorted(missing))}")
                yield number, row


def read_captions(path, steps):
    """{episode id: captions in order} of a file, and whether an encoder wrote them; steps: {episode id: its length}."""
    found, written, ended = {}, False, False
    for number, row in lines(path):
        where, name, text = f"{path}, line {number}", str(row["episode"]), " ".join(str(row.get("text") or "").split())
        rate = 1 if row.get("unit") == "steps" or not fps else fps
        written, ended = written or "sure" in row, ended or row.get("end") not in (None, "")
        if name not in steps:
            near = difflib.get_close_matches(name, steps, 1)
            stop(f"{where}: no episode {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; the first is {next(iter(steps))!r}"))
        if row.get("start") in (None, "") and not text:
            found.setdefault(name, [])                          # nothing happens in it
            continue
        try: start, end = float(row["start"]), float(row["start"] if row.get("end") in (None, "") else row["end"])
        except (TypeError, ValueError): stop(f"{where}: start {row['start']!r}, end {row.get('end')!r}: not numbers")
        if not text: stop(f"{where}: no text; leave the line out")
        if not 0 <= start * rate < steps[name] or not start <= end < math.inf:
            hint = f"; --fps={fps:g} makes times seconds" if fps else "; times are steps, --fps=.. makes them seconds"
            stop(f"{where}: start {row['start']}, end {row.get('end')}; episode {name} has steps 0 .. {steps[name] - 1}{hint}")
        if rate == 1 and start % 1: stop(f"{where}: start {row['start']}: a step is a whole number; --fps=.. makes times seconds")
        first = int(start * rate + 1e-6)
        last = min(max(math.ceil(end * rate - 1e-6), first + 1), steps[name])
        found.setdefault(name, []).append(Caption(first, last, text))
    if not found: stop(f"{path}: no captions in it")
    if annotated == "captions" and not ended: stop(f"{path}: --annotated=captions wants to know where captions end; no line has an end")
    return {name: sorted(said) for name, said in found.items()}, written


def read_all(paths, steps):
    """{episode id: captions} of all files, and the episodes whose captions a person made."""
    said, person = {}, set()
    for path in filter(None, paths.split(",")):
        try: found, written = read_captions(path, steps)
        except UnicodeDecodeError as error: stop(f"{path}: not UTF-8 ({error}); save it as UTF-8")
        said |= found
        person = person - found.keys() if written else person | found.keys()
    return said, person or set(said)


def divide(ids, named, total):
    """{split: ids}: shares of the `total` annotated episodes are for val and test, at least one each, drawn from those `named` by their
    ids, so that more of them move few; the others are for training."""
    order = sorted(named, key=lambda i: hashlib.sha256(i.encode()).digest())
    if named and total < 3: stop(f"{total} annotated episodes: to train, validate and test takes three; cut one up")
    n_val, n_test = (min(max(round(share * total), 1), len(order) // 2) if order else 0 for share in (val, test))
    if order and n_val + n_test >= total: stop(f"--val={val} --test={test}: nothing annotated is left for training")
    held = {"val": set(order[:n_val]), "test": set(order[len(order) - n_test:])}   # at both ends: one does not move the other
    return {split: [i for i in ids if (i in held[split] if split in held else not any(i in h for h in held.values()))]
            for split in ("train", "val", "test")}


def plan(found, said, person, dims, dtype):
    """{shard: its episodes [(id, path, name, steps)]}; a shard is (split, index)."""
    splits = divide([e[0] for e in found], person, len(said))
    shards, room = {}, SHARD // (dims * KEPT[dtype].itemsize)
    for split, ids in splits.items():
        index, rows, ids = 0, 0, set(ids)
        for episode in (e for e in found if e[0] in ids):
            if rows and rows + episode[3] > room: index, rows = index + 1, 0
            rows += episode[3]
            shards.setdefault((split, index), []).append(episode)
    return shards


def fingerprint(episodes, said, dtype):
    """Changes when a shard's files, captions or settings do."""
    about = [(name, os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns, key) for name, path, key, _ in episodes]
    return hashlib.sha256(json.dumps([about, [said.get(e[0]) for e in episodes], annotated, dtype]).encode()).hexdigest()


def packed(folder, shards):
    """What an earlier call packed of these shards: {shard file: fingerprint}."""
    done = folder / "packed.json"
    if not done.exists() and any(folder.glob("*.safetensors")): stop(f"{folder}: a data set that was not packed here; choose another --out")
    kept = json.loads(done.read_text()) if done.exists() else {}
    planned = {shard_path(folder, *shard).name for shard in shards}
    return {name: key for name, key in kept.items() if name in planned and (folder / name).exists()}


def pack_shard(folder, shard, episodes, said, dtype):
    span = lambda e: "all" if annotated == "all" and e[0] in said else [[c.start, c.end] for c in said.get(e[0], [])]
    ready = [Episode(e[0], load(e[1], e[2], dtype), said.get(e[0], []), span(e)) for e in episodes]
    (folder / "meta.json").unlink(missing_ok=True)              # from here on it is neither the old data set nor yet the new one
    try: write_shard(folder, *shard, ready)
    except Fault as fault: stop(str(fault))


def finish(folder, shards, **meta):
    """Removes the shards of an earlier call that are no longer wanted; then it is a data set."""
    planned = {shard_path(folder, *shard).name for shard in shards}
    for path in folder.glob("*-?????.safetensors"):
        if path.name in planned: continue
        (folder / "meta.json").unlink(missing_ok=True)
        path.unlink()
        path.with_suffix(".jsonl").unlink(missing_ok=True)
    write_meta(folder, splits=list(dict.fromkeys(split for split, _ in shards)), **meta)


def main():
    for name in ("obs", "out"):
        if not globals()[name]: stop(f"--{name} is needed; python data.py pack --help")
    if annotated not in ("all", "captions"): stop(f"--annotated={annotated}: 'all' or 'captions'")
    if fps < 0: stop(f"--fps={fps}: steps per second, above 0")
    if not (0 <= val < 1 and 0 <= test < 1): stop(f"--val={val} --test={test}: shares between 0 and 1")
    found, dims, dtype = find()
    said, person = read_all(captions, {e[0]: e[3] for e in found})
    shards, folder = plan(found, said, person, dims, dtype), Path(out)
    try: folder.mkdir(parents=True, exist_ok=True)
    except OSError as error: stop(f"--out={out}: {error.strerror}")
    done = packed(folder, shards)
    for shard, episodes in tqdm(shards.items(), desc="packing", unit="shard", disable=None):
        name, key = shard_path(folder, *shard).name, fingerprint(episodes, said, dtype)
        if done.get(name) == key: continue
        pack_shard(folder, shard, episodes, said, dtype)
        done[name] = key
        replace(folder / "packed.json", lambda path: path.write_text(json.dumps(done)))
    finish(folder, shards, obs_dim=dims, dtype=dtype, steps_per_second=fps or None, source=source, licence=licence)
    print(f"{out}: {len(found)} episodes, {sum(e[3] for e in found):,} steps of {dims} {dtype}, {len(said)} episodes annotated with "
          f"{sum(map(len, said.values()))} captions; look at it: python data.py show {out}")


if __name__ == "__main__":
    configure(globals())
    main()

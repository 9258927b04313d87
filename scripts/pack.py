r"""
Packs your observations and captions into a data set (data.py says what that is).

    python -m scripts.pack --obs='episodes/*.npy' --captions=captions.csv --out=data/mine
    python -m scripts.pack .. --fps=5      the captions' times are seconds, a second has 5 steps

Observations: .npy, .npz or .safetensors, an array (steps, dims) per episode. A file's only array
is the episode named like the file without its ending; several are the episodes file/array.
An episode's pictures for the page are beside it: NAME-pictures.npy, (steps, h, w, 3) uint8.

Captions: .csv with the columns episode,start,text and optionally end, or .jsonl with the same keys,
as `sample.py --json` writes. A line with an episode and nothing else says that nothing happens in
it; episodes that no line names are not annotated. Of several files, as in
--captions=captions.csv,corrected.jsonl, a later one replaces what earlier ones say of an episode.
What an encoder wrote (its lines have "sure") trains, corrected or not; val and test are a person's.

With --group='(subject\d+)' episodes in whose names the same is found stay in one split.

The same call again goes on where it was stopped, and packs again what is no longer as written.
"""

import glob
import hashlib
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from configurator import check_range, configure, run
from data import Episode, record_faults, write_shard
from runtime.checkpoint import read_json, regular_file, write_json
from runtime.shards import DTYPES, SPLITS, read_shard, shard_path, shard_paths, write_meta
from scripts.captions import read_all_captions

obs = ""  # the observations' files, e.g. 'episodes/*.npy'
captions = ""  # .csv or .jsonl, several with commas between; without it nothing is annotated
out = ""  # folder of the data set, e.g. data/mine
fps = 0.0  # steps per second; with it the captions' times are seconds, else steps
annotated = "all"  # of an episode with captions: 'all' | 'captions', only where they are
group = ""  # regular expression: what it finds in an episode's name, one split has alone
val = 0.1  # share of the annotated episodes (or groups) that validate, at least one
test = 0.1  # share that test, at least one
source = ""  # where the observations come from, for meta.json
licence = ""  # what may be done with them, for meta.json

SHARD = 256 * 2**20  # bytes of observations in a shard
REAL = "float", "bfloat", "int", "uint", "bool"

# -----------------------------------------------------------------------------
# observations


class Recording(NamedTuple):
    """An episode's observations: array `name` of a file, of that many steps."""

    id: str
    path: str
    name: str
    steps: int

    def pictures(self):
        """The file of its pictures, if it has any."""
        return Path(self.path).parent / f"{self.id}-pictures.npy"


def open_arrays(path):
    """{name: array} of a file; rows of .npy and .safetensors are read as they are used."""
    if path.endswith(".npy"):  # np.load would go by the content, and unpickle if it could
        x = np.lib.format.open_memmap(path, mode="r")
        if x.offset + x.nbytes != os.path.getsize(path):
            raise ValueError("more in it than one array")
        return {"": x}
    if path.endswith(".npz"):
        return np.lib.npyio.NpzFile(path)
    if path.endswith(".safetensors"):
        return load_file(path)
    raise ValueError("neither .npy, .npz nor .safetensors")


def describe_arrays(path):
    """[(name, shape, dtype as text), ..]. Raises ValueError for what are no observations."""
    regular_file(path)
    try:
        arrays = [
            (name, tuple(x.shape), getattr(x.dtype, "name", str(x.dtype)[6:]))
            for name, x in open_arrays(path).items()
        ]
    except Exception as error:  # whatever the libraries raise for a garbled file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not observations ({reason})") from None
    for name, shape, dtype in arrays:
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"{path}:{name} shape {shape}; observations are (steps, dims)")
        if not dtype.startswith(REAL):
            raise ValueError(f"{path}:{name} {dtype}; observations are real numbers")
    return arrays


def stored_dtype(dtypes):
    """The dtype for observations of these dtypes: theirs if it is one and can be stored."""
    dtypes = {"uint8" if dtype == "bool" else dtype for dtype in dtypes}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES.values()) else "float32"


def find_recordings():
    """All episodes in order of their ids, their dims, and the dtype in which they are stored."""
    recordings, dims, dtypes = [], {}, set()
    paths = sorted(glob.glob(os.path.expanduser(obs), recursive=True))
    beside = {str(Path(path).with_suffix("")) + "-pictures.npy" for path in paths}
    for path in [path for path in paths if path not in beside]:
        arrays = describe_arrays(path)
        for name, (steps, D), dtype in arrays:
            suffix = f"/{name}" if len(arrays) > 1 else ""
            recordings.append(Recording(Path(path).stem + suffix, path, name, steps))
            dims.setdefault(D, path)
            dtypes.add(dtype)
    if not recordings:
        raise ValueError(f"--obs={obs}: no such files; quote it, as in --obs='episodes/*.npy'")
    if len(dims) > 1:
        examples = ", ".join(f"{D} in {path}" for D, path in list(dims.items())[:2])
        raise ValueError(f"observations differ in dims: {examples}")
    for recording in recordings:
        record = dict(id=recording.id, annotated="all", captions=[])
        for fault in record_faults(record, recording.steps):
            raise ValueError(f"{recording.path!r}: {fault}; rename it")
    recordings.sort()
    for a, b in pairwise(recordings):
        if a.id == b.id:
            raise ValueError(f"{a.path} and {b.path}: two episodes called {a.id!r}; rename one")
    return recordings, min(dims), stored_dtype(dtypes)


def load(recording, dtype):
    """The observations of an episode (N, D). Raises ValueError where one is not finite."""
    x = open_arrays(recording.path)[recording.name]
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):  # what is too large is told below
            x = torch.from_numpy(x.astype(dtype))
    x = x.to(getattr(torch, dtype))
    bad = ~x.isfinite().all(1)
    if bad.any():
        place = f"{recording.path}:{recording.name}".rstrip(":")
        step = int(bad.nonzero()[0])
        raise ValueError(f"{place}, step {step}: not a finite number, or too large for {dtype}")
    return x


def load_pictures(recording):
    """(steps, h, w, 3) uint8, mapped, or None where there are none. Raises ValueError."""
    path = recording.pictures()
    if not path.exists():
        return None
    try:
        x = np.lib.format.open_memmap(regular_file(path), mode="c")
    except Exception as error:  # whatever numpy raises for a garbled file
        raise ValueError(f"{path}: not pictures ({error})") from None
    if x.dtype != np.uint8 or x.shape != (recording.steps, *x.shape[1:3], 3) or not x.size:
        right = f"({recording.steps}, h, w, 3) uint8"
        raise ValueError(f"{path}: {x.shape} {x.dtype}; the pictures are {right}")
    return x


def picture_bytes(recordings):
    """Of the largest picture. Raises ValueError for what are no pictures."""
    pictures = [load_pictures(recording) for recording in recordings]
    return max(0 if x is None else x[0].nbytes for x in pictures)


# -----------------------------------------------------------------------------
# shards


def group_of(name):
    """What --group finds in an episode's name; without it, an episode is its own group."""
    found = re.search(group or ".+", name)
    if not found:
        raise ValueError(f"--group={group}: nothing found in the name {name!r}")
    return found[min(found.re.groups, 1)]


def held_out(by_person, annotated):
    """{group: "val" or "test"}: shares of the annotated episodes' groups, at least one each.

    They are drawn from a hash of their names, so that more move few from split to split.
    """
    groups = {group_of(name) for name in annotated}
    drawn = groups - {group_of(name) for name in annotated - by_person} or groups
    total, kind = len(groups), "groups" if group else "episodes"
    if not total:
        return {}
    if total < 3:
        raise ValueError(f"{total} annotated {kind}: train, val and test take three; cut one up")
    order = sorted(drawn, key=lambda name: hashlib.sha256(name.encode()).digest())
    n_val, n_test = (min(max(round(x * total), 1), len(order) // 2) for x in (val, test))
    if n_val + n_test >= total:
        raise ValueError(f"--val={val} --test={test}: nothing annotated is left for training")
    at_ends = order[:n_val], order[len(order) - n_test :]  # so one does not move the other
    return dict.fromkeys(at_ends[0], "val") | dict.fromkeys(at_ends[1], "test")


def plan(recordings, splits, room):
    """{(split, index of the shard): its recordings}, at most `room` steps in a shard.

    splits: {group: "val" or "test"}; the others are for training.
    """
    shards = {}
    for split in SPLITS:
        index = steps = 0
        for recording in recordings:
            if splits.get(group_of(recording.id), "train") != split:
                continue
            if steps and steps + recording.steps > room:
                index, steps = index + 1, 0
            steps += recording.steps
            shards.setdefault((split, index), []).append(recording)
    return shards


def fingerprint(recordings, texts, dtype):
    """Changes when a shard's files, captions or settings do."""
    about = [annotated, dtype]
    for recording in recordings:
        stat = os.stat(recording.path)
        about += [recording.id, os.path.abspath(recording.path), recording.name]
        about += [stat.st_size, stat.st_mtime_ns, texts.get(recording.id)]
        if recording.pictures().exists():
            stat = os.stat(recording.pictures())
            about += [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def find_intact(folder, wanted, meta):
    """Of the wanted {path: fingerprint}, {name: fingerprint} of those packed before and intact."""
    path = folder / "packed.json"
    if not path.is_file() and (path.exists() or any(folder.glob("*.safetensors"))):
        raise ValueError(f"{folder}: a data set that was not packed here; choose another --out")
    try:
        packed = read_json(path)
    except ValueError:  # none yet, or broken: all is packed again
        packed = {}
    return {
        path.name: key
        for path, key in tqdm(wanted.items(), desc="checking", leave=False, disable=None)
        if packed.get(path.name) == key
        and not read_shard(path, record_faults, meta["obs_dim"], meta["dtype"])[0]
    }


def make_episode(recording, texts, dtype):
    in_episode = texts.get(recording.id, [])
    known = [[caption.start, caption.end] for caption in in_episode]
    in_episode = [caption for caption in in_episode if caption.text]
    if annotated == "all" and recording.id in texts:
        known = "all"
    pictures = load_pictures(recording)
    return Episode(recording.id, load(recording, dtype), in_episode, known, pictures)


def pack(folder, shards, texts, meta):
    """Makes the data set consist of these shards. Those packed before and intact stay as they are.

    shards: {(split, index): its recordings}; texts: {episode id: captions}; meta: of meta.json.
    """
    dtype = meta["dtype"]
    paths = {shard: shard_path(folder, *shard) for shard in shards}
    wanted = {paths[shard]: fingerprint(shards[shard], texts, dtype) for shard in shards}
    packed = find_intact(folder, wanted, meta)
    missing = [shard for shard, path in paths.items() if path.name not in packed]
    surplus = set(shard_paths(folder)) - wanted.keys()

    # what cannot be packed raises here, while the old data set is still whole
    for path in filter(Path.is_dir, folder.glob("*-?????.*")):
        raise ValueError(f"{path} is a folder: remove it")
    for shard in tqdm(missing, desc="reading", unit="shard", leave=False, disable=None):
        for recording in shards[shard]:
            load(recording, dtype)

    # from here on it is no data set, and an interrupted call does not trust the shards it replaces
    if missing or surplus:
        (folder / "meta.json").unlink(missing_ok=True)
        write_json(packed, folder / "packed.json")
    for shard in tqdm(missing, desc="packing", unit="shard", disable=None):
        write_shard(folder, *shard, [make_episode(r, texts, dtype) for r in shards[shard]])
        packed[paths[shard].name] = wanted[paths[shard]]
        write_json(packed, folder / "packed.json")
    for path in surplus:
        path.unlink()
        path.with_suffix(".jsonl").unlink(missing_ok=True)
    write_meta(folder, **meta)


def check_settings():
    for name in ("obs", "out"):
        if not globals()[name]:
            raise ValueError(f"--{name} is needed; python -m scripts.pack --help")
    if annotated not in ("all", "captions"):
        raise ValueError(f"--annotated={annotated}: 'all' or 'captions'")
    check_range(globals(), 0, "fps", most=1e6)
    check_range(globals(), 0, "val test", most=0.5)
    try:
        re.compile(group)
    except re.error as error:
        raise ValueError(f"--group={group}: {error}") from None


def make():
    """The data set that the settings describe."""
    check_settings()
    recordings, D, dtype = find_recordings()
    paths = filter(None, captions.split(","))
    lengths = {r.id: r.steps for r in recordings}
    texts, by_person = read_all_captions(paths, lengths, fps, annotated)
    room = SHARD // (D * getattr(torch, dtype).itemsize + picture_bytes(recordings))
    splits = held_out(by_person, texts.keys())
    found = len(recordings)  # what nobody annotated neither scores nor gives its group away
    recordings = [r for r in recordings if r.id in texts or group_of(r.id) not in splits]
    if len(recordings) < found:
        left = f"{found - len(recordings)} episodes without annotations"
        print(f"left out: {left}, in groups that validate or test", file=sys.stderr)
    shards = plan(recordings, splits, room)
    meta = dict(obs_dim=D, dtype=dtype, steps_per_second=fps or None)
    meta |= dict(
        source=source, licence=licence, splits=list(dict.fromkeys(split for split, _ in shards))
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pack(folder, shards, texts, meta)
    steps = sum(recording.steps for recording in recordings)
    count = sum(bool(caption.text) for of in texts.values() for caption in of)
    print(
        f"{out}: {len(recordings)} episodes, {steps:,} steps of {D} {dtype}, "
        f"{len(texts)} episodes annotated with {count} captions; "
        f"look at it: python -m scripts.show {out}"
    )


def main():
    configure(globals())
    make()


if __name__ == "__main__":
    run(main)

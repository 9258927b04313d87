"""
Reads files of observations, and the pictures beside them, for scripts.pack, which says what is in
them. What is wrong with one is a ValueError.
"""

import difflib
import functools
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from runtime.dataset import id_fault
from runtime.files import read_json, regular_file
from runtime.patterns import composed, matching
from runtime.shards import DTYPES, finite
from scripts.annotations import decoded
from scripts.oddities import lost_changes, time_is_second

FEW_LOST = 0.1  # of a feature's changes
# bytes of the machine
MEMORY = math.prod(map(os.sysconf, ("SC_PAGE_SIZE", "SC_PHYS_PAGES")))
REAL = "float", "bfloat", "int", "uint", "bool"


class Recording(NamedTuple):
    """An episode's observations: every stride-th row of array `name` of a file, so many steps."""

    id: str
    path: str
    name: str
    steps: int
    stride: int = 1

    def pictures_path(self):
        """The file of its pictures, if it has any."""
        stem = Path(self.path).stem
        of_file = self.id[len(composed(stem)) :]  # '' or /array
        return Path(self.path).parent / f"{stem}{of_file}-pictures.npy"


def open_arrays(path):
    """{name: array} of a file; rows of .npy and .safetensors are read as they are used."""
    stat = os.stat(path)
    return opened(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a file of many arrays takes long to open
def opened(path, size, mtime):
    ending = Path(path).suffix.lower()
    if ending == ".npy":  # np.load would go by the content, and unpickle if it could
        x = np.lib.format.open_memmap(path, mode="r")
        if x.offset + x.nbytes != size:
            raise ValueError("more in it than one array")
        return {"": x}
    if ending == ".npz":
        return np.lib.npyio.NpzFile(path)
    if ending == ".safetensors":
        return load_file(path)
    raise ValueError("neither .npy, .npz nor .safetensors")


def dtype_name(x):
    """Of an array, numpy or torch; two bytes of no type are how ml_dtypes saves bfloat16."""
    return "bfloat16" if x.dtype == "V2" else getattr(x.dtype, "name", str(x.dtype)[6:])


def chosen_arrays(path, array):
    """{name: array} of a file; of one with names only `array`, if that is given."""
    arrays = open_arrays(path)
    if array and array not in arrays and "" not in arrays:
        raise ValueError(f"no array {array!r:.80} in it")
    return {array: arrays[array]} if array in arrays else arrays


def describe_arrays(path, array=""):
    """[(name, shape, dtype as text), ..]. Raises ValueError for what are no observations."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; its files are --obs='{path}/*'")
    regular_file(path)
    try:
        arrays = chosen_arrays(path, array)
        arrays = [(name, tuple(x.shape), dtype_name(x)) for name, x in arrays.items()]
    except Exception as error:  # whatever the libraries raise for a garbled file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not observations ({reason})") from None
    for name, shape, dtype in arrays:
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"{path}:{name} shape {shape}; observations are (steps, dims)")
        if 4 * math.prod(shape) > MEMORY:
            size = f"{4 * math.prod(shape) / 1e9:.0f} GB, and memory is {MEMORY / 1e9:.0f}"
            raise ValueError(f"{path}:{name} as float32 has {size}: cut it into episodes")
        if not dtype.startswith(REAL):
            raise ValueError(f"{path}:{name} {dtype}; observations are real numbers")
    return arrays


def stored_dtype(dtypes):
    """The dtype for observations of these dtypes: theirs if it is one and can be stored."""
    dtypes = {"uint8" if dtype == "bool" else dtype for dtype in dtypes}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES.values()) else "float32"


def find_recordings(obs, array="", stride=1):
    """All episodes in order of their ids, their dims, and the dtype in which they are stored.

    obs: the files, a pattern. array: the one that is read of files with several. stride: of rows.
    """
    recordings, dims, dtypes = [], {}, {}
    paths = matching(obs)
    beside = {str(Path(path).with_suffix("")) + "-pictures.npy" for path in paths}
    for path in [
        path for path in paths if path not in beside and Path(path).name != "features.txt"
    ]:
        arrays = describe_arrays(path, array)
        for name, (rows, D), dtype in arrays:
            name_of_episode = composed(Path(path).stem + (f"/{name}" if len(arrays) > 1 else ""))
            steps = math.ceil(rows / stride)
            recordings.append(Recording(name_of_episode, path, name, steps, stride))
            dims.setdefault(D, f"{path}:{name}".rstrip(":"))
            dtypes.setdefault(dtype, path)
    if not recordings:
        raise ValueError(f"--obs={obs}: no such files; quote it, as in --obs='episodes/*.npy'")
    lengths = {r.steps for r in recordings}
    if len(dims) > 1:
        examples = ", ".join(f"{D} in {place}" for D, place in list(dims.items())[:2])
        hint = "; is time the second axis?" * (len(lengths) == 1 and max(lengths) < min(dims))
        raise ValueError(f"observations differ in dims: {examples}{hint}")
    for recording in recordings:
        if fault := id_fault(recording.id):
            raise ValueError(f"{recording.path!r}: {fault}; rename it")
    recordings.sort()
    for a, b in pairwise(recordings):
        if a.id == b.id:
            raise ValueError(f"{a.path} and {b.path}: two episodes called {a.id!r}; rename one")
    D, steps = min(dims), max(lengths)
    if len({"float" in dtype for dtype in dtypes}) > 1:
        kinds = ", ".join(f"{dtype} in {path}" for dtype, path in dtypes.items())
        print(f"warning: {kinds}: is their scale the same?", file=sys.stderr)
    if len(lengths) == 1 and 1 < steps < D and time_is_second(raw(recordings[0])):
        shape = f"arrays are all ({steps}, {D}), a row a step"
        print(f"warning: {shape}: is time the second axis? then transpose them", file=sys.stderr)
    return recordings, D, stored_dtype(dtypes)


def check_rate(recordings, fps):
    """Raises ValueError where scripts.frames made episodes with another number of rows a second
    than --fps and the stride say."""
    rate = fps * recordings[0].stride
    for path in sorted({Path(recording.path).with_name("frames.json") for recording in recordings}):
        made = read_json(path).get("fps", rate) if path.is_file() else rate
        if fps and made != rate:
            raise ValueError(f"--fps={fps:g}: scripts.frames made them with --fps={made} ({path})")


def raw(recording):
    """The observations of an episode as its file has them (N, D), numpy or torch."""
    x = open_arrays(recording.path)[recording.name][:: recording.stride]
    if x.dtype == "V2":
        return torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16)
    return x


def lost_in(recording, stored, kept):
    """A line where a cast to what is stored, the kept features, has lost changes of them."""
    x = raw(recording)
    if x.dtype.itemsize < 4 or dtype_name(x) == "float32":
        return
    feature, share = lost_changes(x, kept, stored)
    if share > FEW_LOST:
        what = f"{share:.0%} of the changes of feature {feature} are lost in float32"
        yield f"episode {recording.id}: {what}: subtract its mean first, and save it again"


def feature_names(path):
    try:
        return composed(decoded(path)).splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_features(recordings, D, drop):
    """The names of the D features in features.txt beside the recordings, [] where there is none,
    and the numbers of those that are not dropped. drop: names or numbers, with commas between."""
    paths = {Path(recording.path).with_name("features.txt") for recording in recordings}
    paths = sorted(path for path in paths if path.is_file())
    names = feature_names(paths[0]) if paths else []
    for path in paths[1:]:
        if feature_names(path) != names:
            raise ValueError(f"{paths[0]} and {path} differ: episodes have the same features")
    if names and len(names) != D:
        raise ValueError(f"{paths[0]}: {len(names)} lines; {D} features want a name each")
    called = {name: [k for k in range(D) if names[k] == name] for name in names}
    called |= {str(k): [k] for k in range(D)}
    dropped = [composed(name.strip()) for name in drop.split(",") if name.strip()]
    for name in dropped:
        if name not in called:
            near = difflib.get_close_matches(name, called, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are 0 .. {D - 1}"
            raise ValueError(f"--drop={drop:.80}: no feature {name!r:.80}; {hint}")
    kept = sorted(set(range(D)).difference(*(called[name] for name in dropped)))
    if not kept:
        raise ValueError(f"--drop={drop:.80}: no feature is left")
    return names, kept


def load_observations(recording, dtype, kept):
    """The kept features of an episode (N, D). Raises ValueError where one is not finite."""
    x = raw(recording)
    x = x if len(kept) == x.shape[1] else x[:, kept]
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):  # what is too large is told below
            x = torch.from_numpy(x.astype(dtype))
    x = x.to(getattr(torch, dtype))
    bad = ~finite(x)
    if bad.any():
        place = f"{recording.path}:{recording.name}".rstrip(":")
        step = int(bad.nonzero()[0])
        raise ValueError(f"{place}, step {step}: not a finite number, or too large for {dtype}")
    return x


def load_pictures(recording):
    """(steps, h, w, 3) uint8, mapped, or None where there are none. Raises ValueError."""
    path = recording.pictures_path()
    if not path.exists():
        return None
    try:
        x = np.lib.format.open_memmap(regular_file(path), mode="c")[:: recording.stride]
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

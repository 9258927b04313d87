"""
What the world does, for bench.faults_cases: other units, encodings, names, links and numbers,
environments, disks that refuse, programs that are killed, and two of them at once.

Each is drawn from a random generator and changes a file, as an injury does, or returns what is to
be so while the program runs. What it leaves says the same: another result is wrong.
"""

import contextlib
import errno
import functools
import importlib
import os
import shutil
import stat
from pathlib import Path
from unicodedata import normalize
from unittest import mock

import numpy as np
from safetensors import SafetensorError

from bench.faults import fork, wait
from runtime import distributed
from scripts import pack

UNITS = "Steps step STEPS frames ms sec seconds s Seconds h".split() + ["", " steps"]
RANKS = dict(RANK=["", "0", "1", "x", "-1"], WORLD_SIZE=["", "1", "3", "x"], LOCAL_RANK=["1", "x"])


def unit(path, rng):
    head, *lines = path.read_text().splitlines()
    word = rng.choice(UNITS)
    path.write_text("\n".join([f"{head},unit", *(f"{line},{word}" for line in lines)]) + "\n")


def encoding(path, rng):
    kind = rng.choice(["latin-1", "utf-16", "utf-32", "cp037", "utf-8-sig"])
    path.write_bytes(path.read_text().replace("\n", rng.choice(["\n", "\r\n"])).encode(kind))


def decomposed(path, rng):
    path.write_text(normalize("NFD", path.read_text()))


def renamed(path, rng):
    path.rename(path.with_name(normalize("NFD", path.name)))


def linked(path, rng):
    """The file, or its folder, is elsewhere."""
    path = rng.choice([path, path.parent if path.parent.name == "raw" else path])
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def linked_below(path, rng):
    """The file is in a folder that is a link, among the others."""
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.mkdir()
    shutil.move(path, elsewhere)
    (path.parent / "more").symlink_to(elsewhere)


def numbers(path, rng):
    """The same numbers, kept otherwise; or times and features changed round."""
    x = np.load(path)
    np.save(path, rng.choice([x.astype("<f8"), x.astype(">f4"), np.asfortranarray(x), x.T]))


def environment(path, rng):
    """Ranks left over from elsewhere."""
    names = rng.sample(list(RANKS), rng.randrange(1, 4))

    @contextlib.contextmanager
    def left_over():
        with mock.patch.dict(os.environ, {name: rng.choice(RANKS[name]) for name in names}):
            importlib.reload(distributed)
            yield
        importlib.reload(distributed)

    return left_over()


# -----------------------------------------------------------------------------
# disks, kills, and two programs: a shard is gone, and so written again

REFUSED = {
    "os.fsync": [OSError(x, os.strerror(x)) for x in (errno.EINVAL, errno.EIO, errno.ENOSPC)],
    "fcntl.flock": [OSError(x, os.strerror(x)) for x in (errno.ENOLCK, errno.EOPNOTSUPP)],
    "pathlib.Path.chmod": [PermissionError(errno.EPERM, "Operation not permitted")],
    "pathlib.Path.write_text": [OSError(errno.ENOSPC, "No space left on device")],
    "runtime.files.save_file": [SafetensorError("I/O error: No space left on device")],
}


def after(n, call, error):
    """A patch: from the n-th time on a call raises, or without an error ends the process; os.fsync
    where it is of a folder."""
    module, _, name = call.rpartition(".")
    owner = Path if module == "pathlib.Path" else importlib.import_module(module)
    real, left = getattr(owner, name), [n]

    def refuses(*arguments, **options):
        left[0] -= 1
        file = call == "os.fsync" and not stat.S_ISDIR(os.fstat(*arguments).st_mode)
        if left[0] >= 0 or file:
            return real(*arguments, **options)
        raise error or os._exit(9)

    return mock.patch.object(owner, name, refuses)


def storage(path, rng):
    path.unlink()
    call = rng.choice(list(REFUSED))
    return after(rng.randrange(6), call, rng.choice(REFUSED[call]))


def killed(path, rng):
    """An earlier call that was killed where it gives a file its name."""
    path.unlink()
    with after(rng.randrange(12), "os.replace", None):
        wait(fork(functools.partial(pack_otherwise, path), path.parents[1] / "output.txt"))


def at_once(path, rng):
    """Another program that would write there, while a shard is written."""
    path.unlink()
    real, left = pack.write_shard, [rng.randrange(2)]

    def both(*arguments):
        left[0] -= 1
        if left[0] == -1:
            with contextlib.suppress(ValueError):
                pack_otherwise(path)
        return real(*arguments)

    return mock.patch.object(pack, "write_shard", both)


def pack_otherwise(path):
    """The episodes without their captions, into the data set of a shard."""
    with mock.patch.dict(vars(pack), obs=f"{path.parents[1]}/raw/**", out=str(path.parent)):
        pack.make()

"""
Files that are whole or not there at all, tensors in them, and JSON that may hold anything.
"""

import contextlib
import errno
import json
import os
import re
import sys
import time
import zlib
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by being set

FULL = errno.ENOSPC, errno.EDQUOT
UNFINISHED = r"\..+\.\d+\.new|\.tmp\w{6}"  # files of replace(), and of safetensors within it

IDLE = 3600  # seconds for which a file that is being written never stays as it is


def flush(path):
    """Brings a file onto the disk, or the names in a folder. Not all that is mounted can do it."""
    folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        cannot = error.errno not in FULL if folder else error.errno == errno.EINVAL
        if not cannot:
            raise


def replace(path, fill):
    """fill(path) writes a file beside, which then takes path's place: whole, or not at all.

    Raises OSError with one line where the disk refuses.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, a file is to be written there: remove it")
    beside = path.with_name(f".{path.name[:40]}.{os.getpid()}.new")
    try:
        fill(beside)
        with contextlib.suppress(OSError):  # some mounts have no modes
            beside.chmod(0o666 & ~UMASK)  # safetensors' files are for their owner alone
        flush(beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        told = OSError(f"{path} cannot be written: {reason}")
        told.errno = getattr(error, "errno", None)
        raise told from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def lock(folder, wait=False):
    """Makes a folder, and it this process's alone. Returns the open file that keeps it so.

    What a killed process left unfinished there is removed. Raises ValueError where another process
    has it, unless that is to be waited for: then others may write there without it as well.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(Path(folder, ".lock"), os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; choose another") from None
    try:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{folder}: another run writes there; choose another") from None
    except (OSError, ImportError) as error:  # of a network, which may have no locks
        one = "see that no other program writes there"
        print(f"warning: {folder} cannot be locked ({error}): {one}", file=sys.stderr)
        return descriptor
    before = time.time() - (IDLE if wait else 0)
    for path in Path(folder).iterdir():
        if re.fullmatch(UNFINISHED, path.name) and path.stat().st_mtime <= before:
            path.unlink(missing_ok=True)
    return descriptor


@contextlib.contextmanager
def alone(folder, wait=False):
    """Around what writes into a folder: as lock(), until the block ends."""
    descriptor = lock(folder, wait)
    try:
        yield
    finally:
        os.close(descriptor)


def check_empty(folder):
    """Raises ValueError where something is in a folder that is to be written, but its lock."""
    if Path(folder).exists() and (Path(folder).is_file() or {*os.listdir(folder)} - {".lock"}):
        raise ValueError(f"{folder}: something is there; remove it, or choose another --out")


def checksum(path):
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def tensors_of(module):
    """{name: tensor} of its weights and buffers: state_dict() would be of a sharded part's part."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: x.detach() for name, x in named}


def save_tensors(tensors, path, metadata=None):
    replace(path, lambda beside: save_file(tensors, beside, metadata))


def load_tensors(path):
    """What save_tensors wrote: {name: tensor}, metadata. Raises SafetensorError."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def write_json(value, path):
    replace(path, lambda beside: beside.write_text(json.dumps(value, indent=2)))


def parse_json(text):
    """Bytes -> value. Raises ValueError where it is no JSON, nested too deep, or no Unicode."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if b"\\ud" in text.lower():  # half a character can be spelt, but not be printed or saved
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeError as error:
        raise ValueError(f"no Unicode: {error.reason}") from None
    return value


def regular_file(path):
    """The path of a file to be read. Raises ValueError: to open a pipe would hang."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    return path


def read_json(path, kind=dict):
    """Raises ValueError with one line where there is no file, no JSON, or another kind of value."""
    text = regular_file(path).read_bytes()
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}, a {kind.__name__} is wanted")
    return value

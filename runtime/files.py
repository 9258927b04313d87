"""
Files that are whole or not there at all, tensors in them, and JSON that may hold anything.
"""

import json
import os
from itertools import chain
from pathlib import Path

from safetensors.torch import save_file

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by being set


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def replace(path, fill):
    """fill(path) writes a file beside, which then takes path's place: whole, or not at all."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, a file is to be written there: remove it")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    fill(beside)
    beside.chmod(0o666 & ~UMASK)  # safetensors' files are for their owner alone
    flush(beside)
    os.replace(beside, path)


def tensors_of(module):
    """{name: tensor} of its weights and buffers: state_dict() would be of a sharded part's part."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: x.detach() for name, x in named}


def save_tensors(tensors, path, metadata=None):
    replace(path, lambda beside: save_file(tensors, beside, metadata))


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

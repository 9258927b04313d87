"""Files that appear whole under their name, or not at all."""
import os
from pathlib import Path

from safetensors.torch import save_file

UMASK = os.umask(0)
os.umask(UMASK)                           # it can only be read by being set


def replace(path, fill):
    """fill(path) writes a file beside, which then takes path's place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fill(temporary)
    temporary.chmod(0o666 & ~UMASK)       # safetensors' files are for their owner alone
    os.replace(temporary, path)


def save_tensors(tensors, path, metadata=None):
    replace(path, lambda beside: save_file(tensors, beside, metadata))

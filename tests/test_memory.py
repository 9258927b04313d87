"""A data set that is larger than the memory that any program has."""

import ctypes
import importlib
import os
import re
import resource
from functools import partial
from pathlib import Path

import pytest

import encoder
from bench import size
from bench.faults import fork, wait
from runtime import shards
from runtime.dataset import Episodes

pytestmark = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 runs it")

RECORDINGS, STEPS, DIMS = 320, 1000, 512  # 328 MB
ROOM = 160 * 10**6  # bytes that a program has beyond what its imports take: half of that
PROGRAMS = [part for name, part in size.PARTS.items() if name != "the same by memmap"]


def private_memory():
    """Bytes of what this process alone can write to: what RLIMIT_DATA limits."""
    return 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def open_to_read(path, kind, safe_open=shards.safe_open):
    """safe_open, whose file may only be read where it is mapped: so it takes no memory."""
    file = safe_open(path, kind)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)) and " rw-p " in line:
            first, end = (int(x, 16) for x in line.split()[0].split("-"))
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first), end - first, 1) == 0
    return file


def limited(part, place):
    size.lower_bounds()
    encoder.ROWS, encoder.TOGETHER = 100, 2**23
    shards.safe_open = open_to_read
    most = private_memory() + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    part(place)


def hold_all(place):
    assert [
        episode.obs for split in ("train", "val") for episode in Episodes(place / "data", split)
    ]


def test_every_program_takes_data_that_are_larger_than_its_memory(tmp_path, monkeypatch):
    importlib.import_module("torch._inductor")  # train.py needs it: not of what is limited
    monkeypatch.setattr(size, "steps", STEPS)
    monkeypatch.setattr(size, "dims", DIMS)
    size.make(tmp_path, RECORDINGS)
    printed = tmp_path / "printed"
    for part in PROGRAMS:
        assert wait(fork(partial(limited, part, tmp_path), printed)) == 0, printed.read_text()
    assert wait(fork(partial(limited, hold_all, tmp_path), printed)) == 1
    assert "allocate" in printed.read_text()

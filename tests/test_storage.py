"""Disks as they are: full, of a network, or with what a killed process left there."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from runtime import checkpoint, files


def refuses(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


def for_folders(code, call=os.fsync):
    """os.fsync as on a mount that cannot do it for a folder."""

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        call(descriptor)

    return fsync


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.ENOTSUP])
def test_a_folder_that_cannot_be_flushed_is_no_fault(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", for_folders(code))
    files.flush(tmp_path)
    files.write_json({}, tmp_path / "file")


def test_a_file_that_cannot_be_flushed_or_a_full_folder_is_one(tmp_path, monkeypatch):
    files.write_json({}, tmp_path / "file")
    for path, code in (tmp_path / "file", errno.EIO), (tmp_path, errno.ENOSPC):
        monkeypatch.setattr(os, "fsync", refuses(code))
        with pytest.raises(OSError):
            files.flush(path)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_where_there_are_no_modes_files_are_written_all_the_same(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "chmod", refuses(code))
    monkeypatch.setattr(Path, "chmod", refuses(code))
    files.save_tensors({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_where_there_are_no_locks_that_is_a_warning(tmp_path, monkeypatch, capsys, code):
    (tmp_path / ".x.1.new").touch()
    monkeypatch.setattr(fcntl, "flock", refuses(code))
    monkeypatch.setattr(checkpoint, "LOCK", [])
    assert checkpoint.lock_run(tmp_path, False, {}, [], 0) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path} cannot be locked") and said.count("\n") == 1
    assert (tmp_path / ".x.1.new").exists()  # another process may be writing it
    os.close(checkpoint.LOCK.pop())


def test_what_another_has_is_refused_or_waited_for(tmp_path):
    with files.alone(tmp_path):
        with pytest.raises(ValueError, match="another run writes there; choose another"):
            files.lock(tmp_path)
    with files.alone(tmp_path, wait=True):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from unittest import mock
import torch
from runtime import files
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with mock.patch(sys.argv[2], kill):
    files.save_tensors({"x": torch.ones(3)}, Path(sys.argv[1], "test-00000-pictures.safetensors"))
"""


def test_what_a_killed_process_left_is_removed_by_who_has_the_folder(tmp_path):
    (tmp_path / ".tmpA1b2C3").touch()  # as safetensors leaves it
    others = {".DS_Store", ".x.2.old", "x.1.new", "test-00000.jsonl"}
    for name in others:
        (tmp_path / name).touch()
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, "os.replace"], check=False)
    assert len([*tmp_path.iterdir()]) == 2 + len(others)
    with files.alone(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", *others}


def full(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_full(path):
    path.write_text("ha")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fill", [full, half_full])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, fill):
    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match=r"/file cannot be written: .*No space left") as error:
        files.replace(tmp_path / "file", fill)
    assert "\n" not in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_name_as_long_as_may_be_can_be_written(tmp_path):
    path = tmp_path / ("é" * 127)
    files.replace(path, lambda beside: beside.write_text("whole"))
    assert path.read_text() == "whole"
    with pytest.raises(OSError, match="File name too long"):
        files.replace(tmp_path / ("é" * 128), lambda beside: beside.write_text("whole"))

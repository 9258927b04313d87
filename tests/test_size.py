"""What bench/size.py measures, and what it takes for growth."""

import time

import pytest
import torch

from bench import size


def test_memory_that_a_part_holds_is_seen_and_its_failure_told(tmp_path):
    def holds():
        rows = torch.ones(16 * 10**6)  # more than malloc may keep of what was freed
        for _ in range(10):
            rows.sum()
        time.sleep(0.5)  # whoever looks may be kept from it for a while

    def fails():
        raise ValueError("no such part")

    megabytes, seconds = size.measured(holds, tmp_path / "printed")
    assert 60 < megabytes < 100 and seconds > 0.01
    with pytest.raises(ValueError, match="no such part"):
        size.measured(fails, tmp_path / "printed")


def test_a_part_that_holds_all_of_the_test_split_grows(monkeypatch):
    monkeypatch.setattr(size, "PARTS", dict.fromkeys(("flat", "holds a fourth")))
    monkeypatch.setattr(size, "steps", 6000)
    of_recording = 2 * size.dims * size.steps / 1e6
    taken = [{"flat": (50 + n % 3, 1), "holds a fourth": (of_recording * n / 4, 1)} for n in (4, 8)]
    assert list(size.growing([4, 8], taken)) == ["holds a fourth"]


def test_what_is_made_is_packed_shown_and_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(size, "steps", 200)
    monkeypatch.setattr(size, "dims", 8)
    size.make(tmp_path, 4)
    size.pack(tmp_path)
    size.show(tmp_path)
    size.batches(tmp_path, 1)
    size.slices(tmp_path, 1)
    assert "4 episodes, 800 steps of 8 float16, 3 episodes annotated" in capsys.readouterr().out

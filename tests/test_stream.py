"""Captions of a stream of raw embeddings, as it comes on stdin."""

import io
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, program

from data import Episodes, Tokenizer
from encoder import Encoder
from sample import with_confidence
from scripts import stream


@pytest.fixture
def follow(a_run, toy, monkeypatch, capsys):
    """Captions a raw stream on stdin within this process; returns stdout's lines and stderr."""

    def call(raw, dtype="float32", rate=None):
        monkeypatch.setattr(stream, "dtype", dtype)
        monkeypatch.setattr(stream, "json", True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        tokenizer = Tokenizer.from_file(a_run / "tokenizer.json")
        stream.follow_stdin(Encoder.from_pretrained(a_run / "encoder"), tokenizer, rate)
        printed = capsys.readouterr()
        return [json.loads(line) for line in printed.out.splitlines()], printed.err

    return call


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_followed_stream_gives_the_captions_of_the_episode(a_run, toy, tokenizer, follow, dtype):
    raw = Episodes(toy, "test").obs(0).numpy().astype(dtype)
    encoder = Encoder.from_pretrained(a_run / "encoder")
    stream = (x[0] for x in encoder.annotate(torch.from_numpy(raw).float()[None]))
    expected = with_confidence(*stream, tokenizer)
    captions, timing = follow(raw.tobytes(), dtype)
    found = [(c["start"], c["end"], c["text"]) for c in captions]
    assert found == [caption for caption, _ in expected] and found
    assert [c["sure"] for c in captions] == pytest.approx([sure for _, sure in expected], abs=1e-3)
    assert "(p50)" in timing and "latest 40 steps" in timing
    in_seconds, _ = follow(raw.tobytes(), dtype, rate=4)
    assert [c["start"] * 4 for c in in_seconds] == [c["start"] for c in captions]
    assert captions[0]["unit"] == "steps" and in_seconds[0]["unit"] == "seconds"


def test_the_rate_of_a_stream_is_that_of_the_data_set_if_it_is_at_hand(a_run, toy, capsys):
    assert stream.rate_of(toy) == 1
    assert capsys.readouterr().err == ""
    toy.rename(toy.with_name("gone"))
    assert stream.rate_of(toy) is None
    told = f"{toy}: no data set, so times are steps, not seconds\n"
    assert capsys.readouterr().err == told


def test_a_stream_that_breaks_off_or_is_no_numbers_is_one_line(follow):
    wrong = {
        bytes(30): "stdin ended inside step 1: 6 of its 24 bytes",
        bytes(24) + b"\xff" * 24: "stdin, step 1: not a finite",
        b"": "stdin was empty",
    }
    for raw, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            follow(raw)


def test_follow_writes_a_caption_as_soon_as_it_is_complete(a_run, toy):
    """At the prompt, with a pipe that stays open."""
    raw = Episodes(toy, "test").obs(0).numpy()
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.stream", f"--out_dir={a_run.parent}"],
        cwd=ROOT,
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watch = threading.Timer(300, process.kill)
    watch.start()
    process.stdin.write(raw.tobytes())
    process.stdin.flush()
    line = process.stdout.readline()  # printed though stdin has not ended
    start, unit = line.split()[:2] or [40, b""]
    assert float(start) < 40 and unit == b"s", process.stderr.read()
    process.stdin.close()
    assert b"(p99)" in process.stderr.read() and process.wait() == 0
    watch.cancel()


def test_an_empty_stdin_is_one_line_at_the_prompt(a_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    told = "stdin was empty: a step is 6 numbers of float32\n"
    assert program("scripts/stream.py", f"--out_dir={a_run.parent}") == (2, "", told)

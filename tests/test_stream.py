"""Captions of a stream of raw embeddings, as it comes on stdin."""

import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, program

from data import Tokenizer
from encoder import Encoder, Features
from runtime.dataset import Episodes
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
    raw = Episodes(toy, "test")[0].obs.numpy().astype(dtype)
    encoder = Encoder.from_pretrained(a_run / "encoder")
    stream = (x[0] for x in encoder.annotate(torch.from_numpy(raw).float()[None]))
    expected = with_confidence(*stream, tokenizer)
    captions, timing = follow(raw.tobytes(), dtype)
    found = [(c["start"], c["end"], c["text"]) for c in captions]
    assert found == [caption for caption, _ in expected] and found
    assert [c["sure"] for c in captions] == pytest.approx([sure for _, sure in expected], abs=2e-3)
    assert "(p50)" in timing and "latest 40 steps" in timing
    in_seconds, _ = follow(raw.tobytes(), dtype, rate=4)
    assert [c["start"] * 4 for c in in_seconds] == [c["start"] for c in captions]
    assert captions[0]["unit"] == "steps" and in_seconds[0]["unit"] == "seconds"


def arrived(raw, D=6):
    """The observations that are read of raw bytes, (N, D)."""
    return torch.stack([*stream.arriving(io.BytesIO(raw), D, [0.0])])


def saved(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2", "|u1"])
def test_a_npy_on_stdin_is_read_as_one(kind):
    x = np.random.default_rng(0).integers(0, 9, (40, 6)).astype(kind)
    assert np.array_equal(arrived(saved(x)).numpy(), x)
    bfloat16 = torch.tensor(x.astype(np.float32)).bfloat16()
    as_ml_dtypes = bfloat16.view(torch.int16).numpy().view("V2")
    assert torch.equal(arrived(saved(as_ml_dtypes)), bfloat16.float())


def test_a_npy_that_cannot_be_followed_is_one_line():
    x, npz = np.zeros((4, 6), np.float32), io.BytesIO()
    np.savez(npz, x)
    wrong = {
        saved(x)[:-5]: "stdin ended inside step 3: 19 of its 24 bytes",
        saved(x)[:-24]: "stdin ended inside step 3: 0 of its 24 bytes",
        saved(x[:, :5]): r"a .npy of \(4, 5\) float32; real numbers \(steps, 6\)",
        saved(x[0]): r"a .npy of \(6,\)",
        saved(x[:0]): r"a .npy of \(0, 6\)",
        saved(x.astype(complex)): "complex128; real numbers",
        saved(np.asfortranarray(x)): "by columns; save np.ascontiguousarray",
        saved(x) + saved(x): "more than the 4 steps of its .npy",
        saved(x)[:6] + b"\7" + saved(x)[7:]: "a .npy of version 7",
        b"0.25,0.5,1e-3,1,1,1\n" * 6: "a table, a .npz or .safetensors?",
        safetensors.torch.save(dict(x=torch.from_numpy(x))): "a table, a .npz or .safetensors?",
        npz.getvalue(): "a table, a .npz or .safetensors?",
    }
    for raw, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            arrived(raw)


@pytest.mark.parametrize("D", [1, 6])
def test_raw_numbers_of_every_type_are_read(monkeypatch, D):
    for dtype in ("float16", "float32", "float64"):
        monkeypatch.setattr(stream, "dtype", dtype)
        x = np.random.default_rng(0).random((9, D)).astype(dtype)
        assert np.array_equal(arrived(x.tobytes(), D).numpy(), x.astype(np.float32))


def test_numbers_of_another_type_are_warned_of_once(toy, capsys):
    x = Episodes(toy, "test")[0].obs
    features = Features(6).measure(Episodes(toy, "train"))
    exact, true = x.double().numpy(), np.random.default_rng(0).random((40, 6))
    warned = []
    for raw in (x.numpy(), exact, true, 1000 * x.numpy()):
        read = arrived(raw.tobytes())
        assert torch.equal(torch.stack([*stream.warned(read, features)]), read)
        warned.append(capsys.readouterr().err.count("warning: stdin, step "))
    assert warned == [0, 1, 1, 1]


def test_the_rate_of_a_stream_is_that_of_the_data_set_if_it_is_at_hand(a_run, toy, capsys):
    assert stream.rate_of(toy) == 1
    assert capsys.readouterr().err == ""
    toy.rename(toy.with_name("gone"))
    assert stream.rate_of(toy) is None
    told = f"{toy}: no data set, so times are steps, not seconds\n"
    assert capsys.readouterr().err == told


def test_a_stream_that_breaks_off_or_is_no_numbers_is_one_line():
    wrong = {
        bytes(30): "stdin ended inside step 1: 6 of its 24 bytes",
        bytes(24) + b"\xff" * 24: "stdin, step 1: not a finite",
        b"": "stdin was empty",
        b"[0.1, 0.2, 0.3]\n[1,2,3]\n": "stdin: text\\? raw numbers or a .npy",
        b"a,b,c,d,e,f\n1,2,3,4,5,6\n": "stdin: text",
    }
    for raw, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            arrived(raw)


def test_follow_writes_a_caption_as_soon_as_it_is_complete(a_run, toy):
    """At the prompt, with a pipe that stays open."""
    raw = Episodes(toy, "test")[0].obs.numpy()
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

"""bench.gpu in miniature, and the arithmetic of bench.exp1 against what models do."""

import subprocess
import sys

import pytest
import torch
from conftest import program
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bench import exp1, gpu
from data import Batch
from train import Losses


def run_here(command, **how):
    """As subprocess.run, of a Python program, in this process."""
    assert command[0] == sys.executable
    code, out, err = program(*command[1:])
    return subprocess.CompletedProcess(command, code, out, err)


def test_in_miniature_all_is_well_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    monkeypatch.setattr(torch.cuda, "device_count", int)
    monkeypatch.setattr(subprocess, "run", run_here)
    code, out, err = program("bench/gpu.py")
    assert code == 0, out + err
    assert out.count("  ok\n") == 10
    assert "tiny" in out.splitlines()[-1]


def test_a_kernel_that_is_wrong_or_fails_makes_the_exit_code_1(monkeypatch, capsys):
    def fails(*inputs):
        raise RuntimeError("out of resources\nof some kind")

    monkeypatch.setattr(gpu, "ahead_attention", lambda q, k, v, *shape: 0 * q + 0 * k + v)
    monkeypatch.setattr(gpu, "linear_cross_entropy", fails)
    monkeypatch.setattr(gpu, "decoding", list)
    monkeypatch.setattr(gpu, "training", list)
    monkeypatch.setattr(gpu, "SIZES", ())
    with pytest.raises(SystemExit, match="7 of 7 checks are wrong"):
        gpu.main()
    said = capsys.readouterr().out
    assert said.count("WRONG") == 7 and "RuntimeError: out of resources\n" in said


@pytest.fixture
def a_pass(monkeypatch):
    """The shape of a model, the model, and its loss on some windows, on a CPU."""
    for name, value in dict(CUDA=False, DEVICE="cpu", K=4, D=8).items():
        monkeypatch.setattr(gpu, name, value)
    shape = exp1.Shape(6, 64, 4, 503)
    model, batch = gpu.a_model(shape, 3, 16)
    counts = Losses(*torch.ones(3))
    monkeypatch.setattr("train.DENSE", 0)  # the fast path

    def forward(windows):
        some = Batch(*(x[:windows] for x in batch))
        return model(some, counts)[0]

    return shape, model, forward


def test_operations_are_those_that_pytorch_counts(a_pass):
    shape, _, forward = a_pass
    with FlopCounterMode(display=False) as counter:
        forward(3).backward()
    expected = 3 * sum(exp1.operations(shape, 16, 4, 1))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)


def test_memory_is_what_is_saved_for_the_backward(a_pass, monkeypatch):
    shape, model, forward = a_pass
    monkeypatch.setattr("train.DENSE", 99)  # as on CUDA nothing is recomputed
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    totals = []
    for windows in (1, 3):
        saved.clear()
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
            loss = forward(windows)
        totals.append(sum(saved.values()))
        loss.backward()
    more = (exp1.memory(shape, 16, 4, 1, w)[1] * 1e9 for w in (3, 1))
    assert totals[1] - totals[0] == pytest.approx(next(more) - next(more), rel=0.25)


def test_parameters_are_those_of_the_published_models():
    published = {"70m": 70426624, "160m": 162322944, "1b": 1011781632, "12b": 11846072320}
    assert {name: exp1.parameters(exp1.PYTHIA[name]) for name in published} == published


def test_experiment_1_leaves_recordings_without_captions():
    code, out, err = program("bench/exp1.py")
    assert code == 0, err
    assert "100 keep their captions (8.3 hours), 980 do not (81.7 hours)" in out
    assert "\n160m " in out

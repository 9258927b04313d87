"""Training as a user starts it: settings, log, checkpoints, and what may be a pseudo-label."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, toy

import train
from data import END, SILENCE, Batch

SMALL = """--n_embd=32 --n_layer=2 --n_head=2 --T=16 --K=4 --stride=2 --batch_size=4
    --n_annotated=8 --warmup_iters=5 --pseudo_from=10 --learning_rate=3e-3""".split()


def script(*arguments, cwd=ROOT):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training run on the toy data set."""
    folder = tmp_path_factory.mktemp("run")
    data = toy.__wrapped__(folder)
    places = f"--data={data}", f"--out_dir={folder / 'out'}"
    done = script("train.py", *places, "--max_iters=150", "--eval_interval=75", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def test_training_grounds_the_captions_in_the_observations(trained):
    done = script("-m", "bench.report", str(trained / "out"))
    assert done.returncode == 0, done.stderr
    rows = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()}
    assert float(rows["encoder"][0]) > 0.8 > 0.6 > float(rows["observations shuffled"][0])


def test_a_run_keeps_its_settings_its_log_and_its_last_checkpoints(trained):
    names = {path.name for path in (trained / "out").glob("*step-*")}
    assert names == {"step-000075", "step-000150"}
    assert json.loads((trained / "out/step-000150/config.json").read_text())["K"] == 4
    log = [json.loads(line) for line in open(trained / "out/log.jsonl")]
    assert [line["step"] for line in log] == [75, 150]
    assert log[-1]["f1"] > 0.8 and log[-1]["accepted"] > 0


@pytest.mark.parametrize(
    "setting, message",
    [
        ("--T=1", "--T=1: at least 2"),
        ("--ema=1.5", "at most 1"),
        ("--n_annotated=-5", "at least 0"),
        ("--n_embd=34", "34 dimensions are not divisible by 4 heads"),
        ("--eval_interval=0", "at least 1"),
        ("--device=gpu", "one of auto"),
        ("--init_from=nowhere/", "no such directory"),
        ("--data=nowhere", "nowhere/meta.json is missing"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_one_line(trained, tmp_path, setting, message):
    places = f"--data={trained / 'toy'}", f"--out_dir={tmp_path / 'out'}"
    done = script("train.py", *places, setting)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_captions_are_accepted_as_a_whole(monkeypatch):
    monkeypatch.setattr(train, "min_prob", 0.7)
    monkeypatch.setattr(train, "min_prob_silence", 0.7)
    S, E = SILENCE, END
    tok = torch.tensor([[S, 5, 6, E, 7, E, S, 8, S, E, 9, 6]])
    prob = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9]])
    known = torch.zeros_like(tok, dtype=torch.bool)
    # 5 6 END is whole; 7 END, and the silence after it, are unsure; 8 has no END; 9 6 is cut off
    expected = [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert train.accept(tok, prob, known)[0].int().tolist() == expected
    known[0, 3] = True  # a known token cuts the caption short
    assert train.accept(tok, prob, known)[0, :4].int().tolist() == [1, 0, 0, 0]
    monkeypatch.setattr(train, "min_prob_silence", 0.95)
    assert train.accept(tok, prob, known & False)[0].int().tolist() == [0, 1, 1, 1] + [0] * 8


def test_the_target_follows_slowly(encoder):
    target = copy.deepcopy(encoder)
    with torch.no_grad():
        encoder.lm.embed_out.weight += 1
    before = target.lm.embed_out.weight.clone()
    train.update_ema(target, encoder, 0.9)
    torch.testing.assert_close(target.lm.embed_out.weight, before + 0.1)


def test_the_target_writes_only_where_something_is_unknown(encoder, monkeypatch):
    monkeypatch.setattr(train, "pseudo_from", 0)
    known = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    valid = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    tok = torch.full((3, 4), 7)
    obs, noise = torch.randn(3, 4, 5).double(), torch.rand(3, 4)
    batch = Batch(obs, tok, known, valid, torch.zeros(3, dtype=torch.int64), noise)
    annotate, rows = encoder.annotate, []

    def counted(obs, *more):
        rows.append(len(obs))
        return annotate(obs, *more)

    monkeypatch.setattr(encoder, "annotate", counted)
    text, accepted = train.pseudo_labels(encoder, batch, 1)
    assert rows == [2] and text[known].eq(7).all()
    assert not (accepted & (known | ~valid)).any()
    monkeypatch.setattr(train, "predict_weight", 0.0)
    monkeypatch.setattr(train, "self_weight", 0.0)
    train.pseudo_labels(encoder, batch, 1)
    assert rows == [2]  # nobody would learn from it


def test_learning_rates_warm_up_and_fall_to_a_tenth(monkeypatch):
    monkeypatch.setattr(train, "warmup_iters", 10)
    monkeypatch.setattr(train, "max_iters", 110)
    rates = [train.lr_multiplier(step) for step in (4, 9, 110)]
    assert rates == pytest.approx([0.5, 1, 0.1])

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from data import END, SILENCE
from encoder import Encoder
from model import Config, GPTNeoX

SMALL = ["--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=2", "--T=16", "--batch_size=4", "--n_annotated=8",
         "--warmup=5", "--drop=0.0", "--write_from=10", "--lr=3e-3", "--ahead_stride=2", "--K=4"]


def script(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short training run on the toy data set, shared by the tests below."""
    from conftest import toy
    folder = tmp_path_factory.mktemp("run")
    data = toy.__wrapped__(folder)
    done = script("train.py", f"--data={data}", f"--out_dir={folder / 'out'}", "--max_iters=150", "--eval_interval=75", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_grounds_the_captions_in_the_observations(run):
    folder, said = run
    rows = json.loads((folder / "out/results.json").read_text())["captions"]
    assert rows["encoder"]["f1"] > 0.8 > 0.6 > rows["observations shuffled"]["f1"]
    assert "perfect writer" in said and "An episode it never saw" in said


def test_a_run_keeps_its_settings_its_log_and_its_last_checkpoints(run):
    folder, _ = run
    assert {p.name for p in (folder / "out").glob("*step-*")} == {"step-000075", "step-000150"}
    assert json.loads((folder / "out/step-000150/config.json").read_text())["K"] == 4
    log = [json.loads(line) for line in open(folder / "out/log.jsonl")]
    assert [line["step"] for line in log] == [75, 150]
    last = log[-1]                                            # what drift shows first is there
    assert last["target_f1"] > 0.8 and last["target_accepted"] > 0 and 0.8 < last["target_accepted_right"] <= 1


def test_a_run_stops_early_when_asked_and_reports(run, tmp_path):
    data = run[0] / "toy"
    done = script("train.py", f"--data={data}", f"--out_dir={tmp_path}", *SMALL, "--lr=0.0", "--patience=2", "--eval_interval=3")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9]                                 # the first F1, and twice none that is better
    assert (tmp_path / "results.json").exists() and "stopped after step 10: 2 evaluations without a better F1" in done.stdout


@pytest.mark.parametrize("setting, message", [
    ("--T=1", "--T=1: at least 2"), ("--context=0", "one of 'all', 'own'"), ("--ahead=foo", "one of 'steps', 'spoken'"),
    ("--drop=1.5", "at most 1"), ("--n_annotated=-5", "at least 0"), ("--hidden_size=36", "a multiple of 8 for each of 4 heads"),
    ("--eval_interval=0", "at least 1"), ("--device=gpu", "one of 'auto'"),
])
def test_a_setting_that_cannot_be_meant_is_one_line(run, tmp_path, setting, message):
    done = script("train.py", f"--data={run[0] / 'toy'}", f"--out_dir={tmp_path / 'out'}", setting)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_report_is_of_the_best_checkpoint_on_validation(run, tmp_path):
    shutil.copytree(run[0] / "out", tmp_path / "out")
    ruined = ["--resume=True", "--max_iters=165", "--eval_interval=15", "--lr=3.0"]
    done = script("train.py", f"--data={run[0] / 'toy'}", f"--out_dir={tmp_path / 'out'}", *SMALL, *ruined)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    assert log[-1]["step"] == 165 and log[-1]["f1"] < 0.3
    assert json.loads((tmp_path / "out/results.json").read_text())["captions"]["encoder"]["f1"] > 0.8


def test_sample_prints_true_and_written_captions_with_forecasts(run):
    folder, _ = run
    shown = script(str(ROOT / "sample.py"), f"--out_dir={folder / 'out'}", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert any(line.split()[1:3] == ["walk", "walk"] or "open door               open door" in line for line in lines)


@pytest.mark.parametrize("arguments, message", [
    (["--episode=99"], "test has episodes 0 .. 2"), (["--out_dir=nowhere"], "no checkpoint there"), (["--split=best"], "best"),
])
def test_sample_says_what_is_wrong_in_one_line(run, arguments, message):
    folder, _ = run
    shown = script("sample.py", f"--out_dir={folder / 'out'}", *arguments)
    assert shown.returncode == 2 and message in shown.stderr and shown.stderr.count("\n") == 1


def test_a_missing_data_set_is_one_line():
    done = script("train.py", "--data=nowhere")
    assert done.returncode == 2 and "nowhere/meta.json is missing" in done.stderr and "Traceback" not in done.stderr


def test_captions_are_accepted_as_a_whole():
    S, E = SILENCE, END
    tok = torch.tensor([[S, 5, 6, E, 7, E, S, 8, S, E, 9, 6]])
    prob = torch.tensor([[.9, .9, .9, .9, .9, .6, .5, .9, .9, .9, .9, .9]])
    known = torch.zeros_like(tok, dtype=torch.bool)
    accept = train.accepted(tok, prob, known, 0.7, 0.7)[0].int().tolist()
    #      silence  5 6 END: whole   7 END: unsure   silence: unsure   8: no END   silence   END alone   9 6: cut off
    assert accept == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    known[0, 3] = True                                        # a known token cuts the caption short
    assert train.accepted(tok, prob, known, 0.7, 0.7)[0, :4].int().tolist() == [1, 0, 0, 0]
    assert train.accepted(tok, prob, ~known & False, 0.7, 0.95)[0].int().tolist() == [0, 1, 1, 1] + [0] * 8   # surer of silence


def test_the_target_follows_slowly(encoder):
    import copy
    target = copy.deepcopy(encoder)
    with torch.no_grad(): encoder.lm.embed_out.weight += 1
    before = target.lm.embed_out.weight.clone()
    train.follow(target, encoder, 0.9)
    torch.testing.assert_close(target.lm.embed_out.weight, before + 0.1)


def test_frozen_language_models_learn_the_rows_of_silence_alone(monkeypatch):
    monkeypatch.setattr(train, "freeze", "lm")
    lm = lambda: GPTNeoX(Config(31, 16, 1, 2))
    predictor = train.Predictor(lm(), 16, 2)
    torch.nn.init.normal_(predictor.condition.weight)
    model = train.Grounding(Encoder(lm(), 5, 8), predictor)
    train.freeze_all_but_silence(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sum((p.pow(2) * torch.rand_like(p)).sum() for p in model.parameters() if p.requires_grad).backward()
    train.adamw(model).step()
    for name, p in model.named_parameters():
        changed = (p != before[name]).view(len(p), -1).any(1).nonzero().flatten().tolist()
        if "embed" in name: assert changed == [SILENCE], name
        elif ".lm." in name: assert not changed, name
        elif p.dim() > 1: assert changed, name


def test_each_part_has_its_learning_rate(monkeypatch):
    for name, value in dict(lr=1.0, predictor_lr=2.0, projector_lr=None, warmup=10, max_iters=110).items():
        monkeypatch.setattr(train, name, value)
    assert train.learning_rates(9) == [1, 1, 2, 2, 1, 1]
    assert train.learning_rates(4) == [0.5, 0.5, 1, 1, 0.5, 0.5]
    assert train.learning_rates(110) == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.1, 0.1])

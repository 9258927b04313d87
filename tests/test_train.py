import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from data import END, SILENCE

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
    assert [json.loads(line)["step"] for line in open(folder / "out/log.jsonl")] == [75, 150]


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
    accept = train.accepted(tok, prob, known, 0.7)[0].int().tolist()
    #      silence  5 6 END: whole   7 END: unsure   silence: unsure   8: no END   silence   END alone   9 6: cut off
    assert accept == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    known[0, 3] = True                                        # a known token cuts the caption short
    assert train.accepted(tok, prob, known, 0.7)[0, :4].int().tolist() == [1, 0, 0, 0]


def test_the_target_follows_slowly(encoder):
    import copy
    target = copy.deepcopy(encoder)
    with torch.no_grad(): encoder.lm.embed_out.weight += 1
    before = target.lm.embed_out.weight.clone()
    train.follow(target, encoder, 0.9)
    torch.testing.assert_close(target.lm.embed_out.weight, before + 0.1)

"""Training as a user starts it: settings, log, checkpoints, and the reader."""

import json
import re

import pytest
import torch
from conftest import program, toy

import train
from encoder import Encoder, Features
from model import Config, GPTNeoX
from runtime.dataset import Episodes

SMALL = """--n_embd=32 --n_layer=2 --n_head=2 --T=16 --K=4 --stride=2 --batch_size=4
    --n_annotated=8 --warmup_iters=5 --learning_rate=3e-3""".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training run on the toy data set."""
    folder = tmp_path_factory.mktemp("run")
    data = toy.__wrapped__(folder)
    places = f"--data={data}", f"--out_dir={folder / 'out'}"
    code, out, err = program("train.py", *places, "--max_iters=150", "--eval_interval=75", *SMALL)
    assert code == 0, err
    assert re.search(r"step 10: about \d+ minutes left", out)
    return folder


def test_training_grounds_the_captions_in_the_observations(trained):
    code, out, err = program("bench/report.py", trained / "out")
    assert code == 0, err
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert float(rows["encoder"][0]) > 0.8 > 0.6 > float(rows["observations shuffled"][0])


def test_a_run_keeps_its_settings_its_log_and_its_last_checkpoints(trained):
    names = {path.name for path in (trained / "out").glob("*step-*")}
    assert names == {"step-000075", "step-000150"}
    assert json.loads((trained / "out/step-000150/config.json").read_text())["K"] == 4
    log = [json.loads(line) for line in open(trained / "out/log.jsonl")]
    assert [line["step"] for line in log] == [0, 75, 150]
    assert log[-1]["f1"] > 0.8 and log[-1]["loss_pseudo"] < log[1]["loss_pseudo"]
    assert len(log[0]["annotated"]) == 8 and log[0]["annotated"][0].startswith("train-")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("--T=1", "--T=1: at least 2"),
        ("--T=41", "--T=41: no training episode has more than 40 steps"),
        ("--T=8 --K=8", "--K=8: at least 1, at most 7"),
        ("--n_annotated=-5", "at least 0"),
        ("--seed=-1", "--seed=-1: at least 0"),
        ("--n_embd=34", "34 dimensions are not divisible by 4 heads"),
        ("--eval_interval=0", "at least 1"),
        ("--n_embd=16777216", "--n_embd=16777216: at least 1, at most 1048576"),
        ("--batch_size=99999999999", "--batch_size=99999999999: at least 1, at most"),
        ("--out_dir=~nouser/x", "no home folder ~nouser; write the path out"),
        ("--device=mps", "--device=mps: torch sees none"),
        ("--learning_rate=1e999", "at least 0, finite"),
        ("--device=gpu", "one of auto"),
        ("--init_from=nowhere/", "no such directory"),
        ("--data=nowhere", "nowhere: no such data set; python -m scripts.pack makes one"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_one_line(trained, tmp_path, setting, message):
    places = f"--data={trained / 'toy'}", f"--out_dir={tmp_path / 'out'}"
    code, _, err = program("train.py", *places, *setting.split())
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_the_encoder_starts_from_what_the_reader_sees(toy, tmp_path, monkeypatch):
    kept = []
    choose = train.choose_reader
    monkeypatch.setattr(train, "choose_reader", lambda *x: kept.append(choose(*x)) or kept[0])
    monkeypatch.setattr(train, "data", str(toy))
    episodes = Episodes(toy, "train")
    _, model, reader = train.build(episodes, [0, 1, 2, 3])
    assert reader is kept[0]
    weights = model.encoder.projector.dense_1.weight
    evidence = torch.cat((reader.starts, reader.words))
    assert torch.equal(weights[: len(evidence)], evidence) and evidence.abs().sum() > 0


def test_weights_decay_in_matrices_alone_and_new_maps_have_a_rate_of_their_own(monkeypatch):
    for name, value in dict(learning_rate=0.1, projector_lr=0.2, weight_decay=0.3).items():
        monkeypatch.setattr(train, name, value)
    shape = Config(9, 16, 1, 2)
    encoder = Encoder(GPTNeoX(shape), Features(3), 8)
    model = train.Grounding(encoder, train.Predictor(GPTNeoX(shape), 16, 2))
    optimizer, given = train.configure_optimizer(model), {}
    for group in optimizer.param_groups:
        given |= {p: (group["peak"], group["weight_decay"]) for p in group["params"]}
    assert given.keys() == {*model.parameters()}
    for name, p in model.named_parameters():
        new = "projector" in name or "condition" in name
        assert given[p] == (0.2 if new else 0.1, 0.3 if p.dim() > 1 else 0.0), name


def test_learning_rates_warm_up_and_fall_to_a_tenth(monkeypatch):
    monkeypatch.setattr(train, "warmup_iters", 10)
    monkeypatch.setattr(train, "max_iters", 110)
    rates = [train.lr_multiplier(step) for step in (4, 9, 110)]
    assert rates == pytest.approx([0.5, 1, 0.1])

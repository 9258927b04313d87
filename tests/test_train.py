"""Training as a user starts it: settings, log, checkpoints, and the reader."""

import functools
import json
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TEXTS, program, toy

import train
from data import Caption, Episodes, score
from encoder import Encoder, Projector, Reader, choose_reader, shortest_repeat

SMALL = """--n_embd=32 --n_layer=2 --n_head=2 --T=16 --K=4 --stride=2 --batch_size=4
    --n_annotated=8 --warmup_iters=5 --learning_rate=3e-3""".split()


@pytest.fixture(scope="module", autouse=True)
def short_reader():
    """A reader that learns no longer than this data needs."""
    short = functools.partialmethod(Reader.fit, updates=500)
    with mock.patch.object(Reader, "fit", short):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short training run on the toy data set."""
    folder = tmp_path_factory.mktemp("run")
    data = toy.__wrapped__(folder)
    places = f"--data={data}", f"--out_dir={folder / 'out'}"
    code, out, err = program("train.py", *places, "--max_iters=150", "--eval_interval=75", *SMALL)
    assert code == 0, err
    assert "step 10: about 0 minutes left" in out
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
    assert [line["step"] for line in log] == [75, 150]
    assert log[-1]["f1"] > 0.8 and log[-1]["loss_pseudo"] < log[0]["loss_pseudo"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("--T=1", "--T=1: at least 2"),
        ("--T=41", "--T=41: no training episode has more than 40 steps"),
        ("--T=8 --K=8", "--K=8: at least 1, at most 7"),
        ("--n_annotated=-5", "at least 0"),
        ("--seed=-1", "--seed=-1: at least 0"),
        ("--feature_power=-0.5", "--feature_power=-0.5: at least 0"),
        ("--n_embd=34", "34 dimensions are not divisible by 4 heads"),
        ("--eval_interval=0", "at least 1"),
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


def test_the_reader_says_which_caption_starts(toy):
    episodes = Episodes(toy, "train")
    projector = Projector(6, 8, past=4)
    projector.standardise(episodes, 0.0)
    reader = Reader(projector, TEXTS).fit(episodes, [0, 1, 2, 3])
    others = range(4, 12)
    read = [reader.captions(episodes.obs(i)) for i in others]
    assert score([episodes.captions(i) for i in others], read)["f1"] > 0.9


def test_the_reader_learns_nothing_from_what_nobody_annotated(toy):
    episodes = Episodes(toy, "train")
    assert len(episodes.captions(0)) == 4
    episodes.records[0]["annotated"] = [[0, 10]]  # one caption is known, and silence around it
    assert episodes.starts(0, TEXTS).tolist()[10:] == [-1] * 30
    reader = Reader(Projector(6, 8, past=4), TEXTS).fit(episodes, [0])
    assert {c.text for c in reader.captions(episodes.obs(0))} <= {episodes.captions(0)[0].text}


def test_the_same_text_within_a_pause_is_one_caption():
    reader = Reader(Projector(6, 8, past=4), ["a", "b"])
    reader.pause = 2
    likeliest = torch.tensor([0, 0, 2, 0, 1, 2, 2, 0, 0])  # 2: nothing
    read = reader.starts(torch.eye(3)[likeliest], margin=0.0)
    assert [(c.start, c.text) for c in read] == [(0, "a"), (4, "b"), (7, "a")]


def test_silence_has_to_be_likelier_by_the_margin():
    reader = Reader(Projector(6, 8, past=4), ["a", "b"])
    logits = torch.tensor([[1.0, 0.0, 2.5], [0.0, 1.0, 3.5]])
    assert reader.starts(logits, margin=1.0) == []
    assert [c.text for c in reader.starts(logits, margin=2.0)] == ["a"]


def test_a_reader_pauses_as_long_as_the_annotators_do():
    starts = [[(3, "a"), (5, "b"), (9, "a")], [(2, "b"), (7, "b"), (8, "c")], []]
    episodes = [[Caption(start, start + 1, text) for start, text in each] for each in starts]
    assert shortest_repeat(episodes) == 5
    assert shortest_repeat(episodes[:1]) == 6
    assert shortest_repeat(episodes[2:]) == float("inf")


@pytest.mark.parametrize("telling, power", [("brief", 4.0), ("slow", 0.0)])
def test_features_weigh_as_the_annotated_episodes_ask_for(toy, monkeypatch, telling, power):
    episodes, rng = Episodes(toy, "train"), np.random.default_rng(0)
    given = []
    for i in range(len(episodes)):
        events = episodes.obs(i)
        slow, brisk = rng.normal(size=(5, 30)).repeat(8, 0), rng.random((40, 6))
        counts = (events > 0.5).float().cumsum(0)  # what events leave behind
        parts = (events, slow) if telling == "brief" else (counts, brisk)
        given.append(torch.from_numpy(np.concatenate(parts, 1)).float())
    monkeypatch.setattr(Episodes, "obs", lambda self, i: given[i])
    projector = Projector(given[0].shape[1], 8, past=4)
    reader = choose_reader(projector, episodes, list(range(12)))
    assert reader.f1 > 0.4
    projector.standardise(episodes, power)
    assert torch.equal(reader.projector.feature_weight, projector.feature_weight)


def test_the_encoder_goes_on_from_what_the_reader_learned_to_see(toy, tmp_path, monkeypatch):
    def fit(self, *_):
        self.projector.dense_1.weight.data.fill_(0.5)
        return self

    monkeypatch.setattr(Reader, "fit", fit)
    places = f"--data={toy}", f"--out_dir={tmp_path / 'out'}"
    still = "--learning_rate=0.0", "--projector_lr=0.0", "--max_iters=1"
    code, _, err = program("train.py", *places, *SMALL, *still)
    assert code == 0, err
    encoder = Encoder.from_pretrained(tmp_path / "out/step-000001/encoder")
    assert (encoder.projector.dense_1.weight == 0.5).all()


def test_learning_rates_warm_up_and_fall_to_a_tenth(monkeypatch):
    monkeypatch.setattr(train, "warmup_iters", 10)
    monkeypatch.setattr(train, "max_iters", 110)
    rates = [train.lr_multiplier(step) for step in (4, 9, 110)]
    assert rates == pytest.approx([0.5, 1, 0.1])

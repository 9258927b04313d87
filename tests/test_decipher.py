"""Text and observations that never met, of a process whose rates and order tell which is which."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import program

from data import score
from runtime.dataset import Caption, Episode, Episodes, write_shard
from runtime.shards import write_meta
from scripts import decipher

EVENTS = ["knock", "door opens", "somebody enters", "dog barks", "phone rings"]
FEATURE = [0, 2, 1, 3, 4]  # so that what cannot be told apart is matched wrongly
STEPS, DISTRACTORS = 150, 8


def happenings(rng):
    """(step, which of EVENTS): a knock, then mostly the door, 4 steps later somebody; as often
    a dog barks, but later, and at times a phone rings."""
    found = []
    for knock in rng.integers(5, 40) + np.cumsum(rng.integers(25, 60, 3)):
        if knock > STEPS - 30:
            break
        found.append((knock, 0))
        if rng.random() < 0.8:
            found += [(knock + 5, 1), (knock + 9, 2)]
        if rng.random() < 0.8:
            found.append((knock + 16, 3))
        if rng.random() < 0.5:
            found.append((knock + 25, 4))
    return sorted((int(step), event) for step, event in found)


def captions_of(found):
    return [Caption(step, step + 1, EVENTS[event]) for step, event in found]


def observed(name, rng):
    """An event's feature rises for a step when it happens, that of the phone when the dog barks as
    well; the others when they like; and all are noisy."""
    found = happenings(rng)
    obs = np.zeros((STEPS, len(EVENTS) + DISTRACTORS), np.float32)
    for step, event in found:
        obs[step, FEATURE[event]] = 1
        obs[step, 4] = event in (3, 4)
    rates = np.linspace(0.02, 0.06, DISTRACTORS)
    obs[:, len(EVENTS) :] = rng.random((STEPS, DISTRACTORS)) < rates
    obs += rng.normal(0, 0.07, obs.shape)
    return Episode(name, obs, captions_of(found), [])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set in which nobody annotated anything, and a file of other episodes' captions."""
    folder, rng = tmp_path_factory.mktemp("decipher"), np.random.default_rng(0)
    for split, count in dict(train=150, val=2).items():
        write_shard(folder / "data", split, 0, [observed(f"{split}{n}", rng) for n in range(count)])
    about = dict(steps_per_second=None, source="", licence="", splits=["train", "val"])
    write_meta(folder / "data", obs_dim=len(EVENTS) + DISTRACTORS, dtype="float32", **about)
    rows = [(n, caption) for n in range(120) for caption in captions_of(happenings(rng))]
    lines = [json.dumps(dict(episode=f"told{n}") | caption._asdict()) for n, caption in rows]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def call(places, **other):
    given = dict(data=places / "data", text=places / "text.jsonl", out=places / "out") | other
    return program("scripts/decipher.py", *(f"--{name}={value}" for name, value in given.items()))


def f1_of(places, out):
    true, found = Episodes(places / "data", "train"), Episodes(places / out, "train")
    assert all(episode.known.all() for episode in found)
    of = [[episode.captions for episode in x] for x in (true, found)]
    return score(*of)["f1"]


def test_text_and_observations_that_never_met_are_matched(places):
    code, said, err = call(places)
    assert code == 0, err
    assert sorted(line[:24].strip() for line in said.splitlines()[:-1]) == sorted(EVENTS)
    assert f1_of(places, "out") > 0.95
    val = [Episodes(places / folder, "val") for folder in ("data", "out")]
    same = [[(e.id, e.annotated, e.captions) for e in episodes] for episodes in val]
    assert same[0] == same[1]


def f1_by_counts_alone(places, monkeypatch, annotated):
    """Of what is deciphered where nothing is compared but how often something happens."""
    lags = decipher.Marks.lags
    monkeypatch.setattr(decipher.Marks, "lags", lambda self, times: 0 * lags(self, times))
    monkeypatch.setattr(decipher, "MARGIN", -1.0)
    monkeypatch.setattr(decipher, "BINS", 1)
    episodes, text = Episodes(places / "data", "train"), places / "text.jsonl"
    for i in annotated:
        episodes[i].annotated = "all"
    captions = decipher.decipher(episodes, decipher.read_text_file(str(text), 0), annotated)
    return score([episode.captions for episode in episodes], captions)["f1"]


def test_what_comes_as_often_is_told_apart_by_what_comes_before(places, monkeypatch):
    assert f1_by_counts_alone(places, monkeypatch, annotated=[]) < 0.9


def test_or_by_a_few_annotated_episodes(places, monkeypatch):
    assert f1_by_counts_alone(places, monkeypatch, annotated=[3, 8]) > 0.95


def test_annotated_episodes_keep_their_captions(places):
    train = Episodes(places / "data", "train")
    own = {3: ([Caption(7, 8, "dog barks")], "all"), 8: ([Caption(9, 10, "hum")], [[0, 20]])}
    new = [([], []) if i not in own else own[i] for i in range(len(train))]
    some = [Episode(f"e{i}", train[i].obs, *new[i]) for i in range(len(train))]
    write_shard(places / "some", "train", 0, some)
    write_meta(places / "some", **train.meta | dict(splits=["train"]))
    code, said, err = call(places, data=places / "some", out=places / "kept", n_annotated=2)
    assert code == 0 and "2 keep theirs" in said, err
    assert "fewer than 10 captions hum: are they the same words?" in err
    assert re.search(r"dog barks .*, at [01] of 1 annotated", said)
    kept = Episodes(places / "kept", "train")
    for i, (captions, annotated) in own.items():
        assert kept[i].captions == captions and kept[i].annotated == annotated
    assert all(episode.known.all() for episode in kept if i not in own)
    code, said, err = call(places, data=places / "some", out=places / "replaced", n_annotated=0)
    assert code == 0 and "0 keep theirs" in said, err
    assert Episodes(places / "replaced", "train")[8].captions != own[8][0]


def test_where_all_episodes_are_annotated_there_is_nothing_to_decipher(places):
    all_known = Episode("e", np.zeros((9, 2), np.float32), [Caption(3, 4, "knock")], "all")
    write_shard(places / "whole", "train", 0, [all_known])
    about = dict(steps_per_second=None, source="", licence="", splits=["train"])
    write_meta(places / "whole", obs_dim=2, dtype="float32", **about)
    code, _, err = call(places, data=places / "whole", out=places / "other")
    assert code == 2 and "all training episodes are annotated; --n_annotated" in err


def test_disagreements_are_counted_as_by_hand():
    """Two episodes of 50 steps, the first of them annotated."""

    def marks(n, *episodes):
        pairs = [np.array(episode, int).reshape(-1, 2).T for episode in episodes]
        return decipher.Marks.of_episodes(pairs, n, 50)

    true = marks(2, [(0, 5), (0, 20), (0, 30)], [])
    seen = marks(2, [(0, 6), (0, 33), (1, 4), (1, 10), (1, 19)], [(0, 6), (1, 40)])
    known = marks(1, [(0, step) for step in range(50)], [])
    # an event of kind 0 lacks at 20, one of kind 1 at 30, and at 10 one is too many
    assert decipher.disagreements(true, seen, known).tolist() == [[1, 2], [2, 3]]
    known = marks(1, [(0, 5), (0, 20), (0, 30)], [])  # an event a step beside an annotated one
    assert decipher.disagreements(true, seen, known).tolist() == [[1, 1], [0, 0]]


def test_marks_are_counted_as_by_hand():
    rng, length = np.random.default_rng(0), 40
    episodes = [np.sort(rng.choice(3 * length, 20, replace=False)) for _ in range(4)]
    episodes = [(x % 3, x // 3) for x in episodes]
    marks = decipher.Marks.of_episodes(episodes, 3, length)
    times = marks.times(1)
    by_hand = np.zeros((3, len(decipher.LAGS)), int)
    for kinds, steps in episodes:
        for kind, step in zip(kinds, steps, strict=True):
            for other in steps[kinds == 1]:
                for n, (least, most) in enumerate(decipher.LAGS):
                    by_hand[kind, n] += least <= other - step <= most
    assert (marks.lags(times) == by_hand).all()
    in_time, in_episode = np.split(marks.rates(), [decipher.BINS], 1)
    for kind in range(3):
        steps = [step for kinds, steps in episodes for step in steps[kinds == kind]]
        assert (in_time[kind] == np.histogram(steps, decipher.BINS, (0, length))[0]).all()
        often = [min((kinds == kind).sum(), decipher.MOST) for kinds, _ in episodes]
        assert (in_episode[kind] == np.bincount(often, minlength=decipher.MOST + 1)).all()


def test_marks_within_a_pause_are_one():
    marks = decipher.Marks.of_episodes(
        [(np.array([0, 0, 1, 0, 0]), np.array([3, 5, 6, 7, 11]))], 2, 20
    )
    first = marks.first_of_runs(4)
    assert first.episode_and_step(first.times(0))[1].tolist() == [3, 11]
    assert first.episode_and_step(first.times(1))[1].tolist() == [6]


def test_deviance_is_twice_the_log_of_a_likelihood_ratio():
    a, b, n_a, n_b = np.array([[3.0, 40.0]]), np.array([[9.0, 7.0]]), 10, 30
    a_rate, b_rate = (a + 0.5) / n_a, (b + 0.5 * n_b / n_a) / n_b  # half a count in n_a episodes
    rate = (a_rate * n_a + b_rate * n_b) / (n_a + n_b)

    def log_likelihood(of_a, of_b):
        """Of counts that the rates of a and b would give, but for what no rate changes."""
        first = torch.distributions.Poisson(torch.from_numpy(of_a * n_a), validate_args=False)
        second = torch.distributions.Poisson(torch.from_numpy(of_b * n_b), validate_args=False)
        counts = torch.from_numpy(a_rate * n_a), torch.from_numpy(b_rate * n_b)
        return (first.log_prob(counts[0]) + second.log_prob(counts[1])).sum().item()

    gained = log_likelihood(a_rate, b_rate) - log_likelihood(rate, rate)
    assert decipher.deviance(a, n_a, b, n_b)[0, 0] == pytest.approx(2 * gained)


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(text=""), "--text is needed"),
        (dict(text="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(data="nowhere"), "nowhere: no such data set"),
        (dict(out="{folder}/data"), "something is there"),
        (dict(text="{folder}/rare.jsonl"), "no caption could be matched"),
        (
            dict(text="{folder}/late.jsonl"),
            "1 of 1 captions of the text start at step 150 or later",
        ),
    ],
)
def test_a_users_mistake_is_one_line(places, other, message):
    rare = dict(episode="a", start=3, text="knock")
    (places / "rare.jsonl").write_text(json.dumps(rare))
    (places / "late.jsonl").write_text(json.dumps(rare | dict(start=300)))
    other = {name: value.format(folder=places) for name, value in other.items()}
    code, _, err = call(places, **dict(out=places / "other") | other)
    assert code == 2 and message in err and err.count("\n") == 1, err

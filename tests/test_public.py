"""The public recordings, made up in miniature, and the probe."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import probe, public
from data import score
from runtime.dataset import Caption, Episode, Episodes, write_shard
from runtime.shards import write_meta


def test_a_caption_starts_where_the_activity_first_fills_a_second():
    lengths, texts = [100, 127, 90, 108], ["rest", "walk", "walk", "run"]
    pieces = [
        (text, np.full((n, 2), k)) for k, (n, text) in enumerate(zip(lengths, texts, strict=True))
    ]
    e = public.episode("made", pieces, 10)
    assert [caption.text for caption in e.captions] == ["starts walk", "starts run"]
    for caption, value in zip(e.captions, (1, 3), strict=True):
        assert e.obs[caption.start].tolist() == [value, value, 0, 0]
        assert (e.obs[caption.start - 1, 2:] > 0).all()  # half of it is the activity before


def test_a_cut_keeps_every_sample_once_in_pieces_of_3_to_7_seconds():
    x = np.arange(2 * 1234).reshape(-1, 2)
    pieces = list(public.cut([("walk", x), ("run", x[:80])], 10, np.random.default_rng(0)))
    assert np.array_equal(np.concatenate([x for text, x in pieces if text == "walk"]), x)
    assert np.array_equal(np.concatenate([x for text, x in pieces if text == "run"]), x[:80])
    assert all(30 <= len(x) < 100 for _, x in pieces)


def test_a_ts_file_has_a_recording_a_line(tmp_path):
    path = tmp_path / "made.ts"
    path.write_text("#walk\n@classLabel true Walk\n@data\n1,2,3:4,5,6:Walk\n7,8,9:0,0,1:Run\n")
    (walk, x), (run, y) = public.read_ts(path)
    assert (walk, run) == ("walk", "run")
    assert x.tolist() == [[1, 4], [2, 5], [3, 6]] and y.tolist() == [[7, 0], [8, 0], [9, 1]]


def test_a_storm_tells_where_its_kind_changes():
    kinds = ["tropical depression", "tropical storm", "tropical storm", "hurricane", "other low"]
    columns = {name: np.arange(5.0) for name in "lat long wind pressure month day".split()}
    e = public.storm("made", SimpleNamespace(status=kinds, **columns))
    assert [(c.start, c.text) for c in e.captions] == [(1, "storm"), (3, "hurricane"), (4, "low")]
    assert e.obs.shape == (5, 6)


def echoes(tmp_path, lag, steps=60):
    """A data set of noise where feature k is 5 `lag` steps before caption k starts."""
    rng, texts = np.random.default_rng(0), ["walk", "run"]
    for part in ("train", "val"):
        episodes = []
        for n in range(6):
            obs = rng.normal(size=(steps, 3)).astype(np.float32)
            starts = list(range(9, steps, 12))
            which = rng.integers(2, size=len(starts))
            obs[np.array(starts) - lag, which] = 5
            captions = [Caption(t, t + 1, texts[k]) for t, k in zip(starts, which, strict=True)]
            episodes.append(Episode(f"{part}-{n}", obs, captions))
        write_shard(tmp_path, part, 0, episodes)
    write_meta(tmp_path, obs_dim=3, dtype="float32", steps_per_second=1, splits=["train", "val"])
    return Episodes(tmp_path, "train"), Episodes(tmp_path, "val")


def test_the_probe_finds_what_lies_in_its_window_and_nothing_before(tmp_path):
    train, val = echoes(tmp_path, lag=5)  # further back than a caption may be off
    true = probe.true_captions(val)
    annotated = range(len(train))
    assert score(true, probe.probe(6, train, annotated, val, val))["f1"] > 0.9
    assert score(true, probe.probe(1, train, annotated, val, val))["f1"] < 0.6


def test_the_fit_is_the_least_of_the_penalised_likelihood(tmp_path, monkeypatch):
    """Its gradient, by hand, is zero: of the annotated steps' windows, and no others."""
    monkeypatch.setattr(probe, "ROWS", 25)  # an episode in three parts
    train, _ = echoes(tmp_path, lag=0)
    train[4].annotated = [[0, 30]]
    annotated = [1, 4, 2]
    model = probe.Probe(train, annotated, 2)
    model.fit(1e-2)
    seen = [model.look(train[i]).unfold(0, 2, 1).flatten(1) for i in annotated]
    label = torch.cat([probe.start_labels(train[i], model.texts) for i in annotated])
    x = torch.nn.functional.pad(torch.cat(seen), (0, 1), value=1.0)[label >= 0]
    y = torch.eye(3)[label[label >= 0]]
    assert len(x) == 60 + 30 + 60
    x, y, w = (v.double().numpy() for v in (x, y, model.weight))
    p = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
    penalty = 1e-2 * w
    penalty[-1] = 0  # not of the bias
    assert np.abs(x.T @ (p - y) / len(x) + penalty).max() < 1e-3


class InMemory:
    """An episode, annotated, in which nothing is said."""

    def __init__(self, obs):
        self.obs, self.known, self.known_captions = obs, np.ones(len(obs), bool), []

    def window(self, start, stop):
        return self.obs[start:stop]


def test_a_feature_that_never_moved_says_nothing_when_it_does():
    obs = torch.full((9, 3), 0.1)
    still, moved = (InMemory(obs * torch.tensor([1.0, 1.0, i])) for i in range(2))
    model = probe.Probe([still, moved], [0, 1], 2)
    assert torch.equal(model.look(InMemory(obs * 5))[:, :2], torch.zeros(10, 2))


def test_the_probe_pauses_after_a_caption():
    texts = ["walk", "run"]
    logits = torch.tensor([[0.0, 0, 1], [2, 0, 1], [0, 3, 1], [0, 0, 1], [0, 2, 1]])
    every = [(1, "walk"), (2, "run"), (4, "run")]
    for margin, pause, said in ((0, 1, every), (0, 3, every[::2]), (2.5, 1, [])):
        assert [c[::2] for c in probe.captions_from(logits, texts, margin, pause)] == said


def test_a_line_for_each_of_the_three(tmp_path, monkeypatch, capsys):
    echoes(tmp_path / "made", lag=0)
    monkeypatch.setattr(public, "data", str(tmp_path))
    monkeypatch.setattr(public, "split", "val")
    monkeypatch.setattr(public, "regression", lambda train, every, val, some: [[] for _ in some])
    monkeypatch.setattr(public, "ours", lambda *given: {"ours": probe.true_captions(given[-1])})
    public.rows("made")
    *baselines, ours = capsys.readouterr().out.splitlines()
    assert len(baselines) == 3 and ours.split()[1:] == ["30", "ours", "1.000", "1.00", "..", "1.00"]


def test_what_is_not_installed_says_how_to_install_it():
    with pytest.raises(ValueError, match="no_such: pip install -r requirements-extra.txt"):
        public.folder_of("no_such")


def test_the_gradient_of_the_probe_is_autograd_s():
    linear = SimpleNamespace(T=3)
    x, label = torch.randn(9, 4).double(), torch.tensor([0, 1, 2, 0, 1, 1, 2])
    weight = torch.randn(3 * 4 + 1, 3).double().requires_grad_()
    logits = probe.Probe.logits(linear, x, weight)
    windows = x.unfold(0, 3, 1).flatten(1)  # (7, 4 * 3)
    torch.testing.assert_close(logits, windows @ weight[:-1] + weight[-1])
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), weight)
    error = logits.softmax(-1) - F.one_hot(label)
    torch.testing.assert_close(probe.Probe.gradient(linear, x, error.detach()), expected)

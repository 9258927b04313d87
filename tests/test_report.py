"""Caption F1, and the baselines and controls of bench/report.py."""

from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import report
from data import SILENCE, Caption, Episodes, choose_annotated, match, score
from encoder import Encoder, Projector
from model import Config, GPTNeoX
from train import Predictor


def a_caption(start, text):
    return Caption(start, start + 1, text)


captions = st.lists(st.builds(a_caption, st.integers(0, 12), st.sampled_from("ab")), max_size=4)


def largest(true, written):
    """The largest one-to-one matching, by trying all."""

    def close(t, w):
        return w is not None and t.text == w.text and abs(t.start - w.start) <= 3

    orders = permutations(written + [None] * len(true), len(true))
    return max(sum(map(close, true, order)) for order in orders)


@settings(max_examples=60, deadline=None)
@given(captions, captions)
def test_the_matching_is_the_largest(true, written):
    assert len(match(true, written)) == largest(true, written)


def test_scores_of_a_known_case():
    true = [[Caption(0, 1, "a"), Caption(10, 11, "b")], [Caption(5, 6, "a")]]
    written = [[Caption(2, 5, "a"), Caption(14, 15, "b")], []]
    scores = score(true, written)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (1 / 2, 1 / 3, 2 / 5)
    assert scores["texts"]["a"] == (2 / 3, 2)


class Parrot:
    """Says a caption wherever feature k is 1: what the controls must take from an encoder."""

    def __init__(self, tokenizer, texts):
        self.ids = [tokenizer.encode(text) + [0] for text in texts]

    def annotate(self, obs):
        tok = torch.full(obs.shape[:2], SILENCE)
        for b, t, k in (obs == 1).nonzero().tolist():
            ids = torch.tensor(self.ids[k])[: tok.shape[1] - t]
            tok[b, t : t + len(ids)] = ids
        return tok, torch.ones(tok.shape)


def test_controls_and_baselines_on_the_toy_data(toy, tokenizer):
    train, test = Episodes(toy, "train"), Episodes(toy, "test")
    true = [test.captions(i) for i in range(len(test))]
    parrot = Parrot(tokenizer, ["open door", "walk", "close the door"])

    def f1(written):
        return score(true, written)["f1"]

    assert f1(report.written_captions(parrot, test, tokenizer)) == 1
    assert f1(report.written_captions(parrot, test, tokenizer, "shuffled")) < 0.6
    assert f1(report.written_captions(parrot, test, tokenizer, "zeroed")) == 0
    annotated = choose_annotated(train, 8, 0)
    projector = Projector(6, 8)
    projector.standardise(train, 0.0)
    assert f1(report.reader_alone(test, train, annotated, projector, 4, tokenizer)) > 0.9
    assert f1(report.most_frequent(test, train, annotated)) < 0.5
    assert f1(report.perfect_writer(test, tokenizer)) == 1


def test_losses_of_the_predictor_are_those_of_the_parallel_pass(toy, tokenizer):
    """The mean over all offsets, against the sum that training makes."""
    shape = Config(tokenizer.vocab_size, 16, 2, 2)
    encoder, predictor = Encoder(GPTNeoX(shape), 6, 8), Predictor(GPTNeoX(shape), 16, 3)
    test = Episodes(toy, "test")
    losses = report.predictor_losses(encoder, predictor, test, tokenizer)
    assert losses.shape == (4, 3)
    expected = torch.log(torch.tensor(float(tokenizer.vocab_size)))
    assert (losses - expected).abs().max() < 2  # random weights know nothing


def test_the_interval_of_a_mean_is_students():
    # scipy.stats.t.interval(0.95, 2, 2, scipy.stats.sem([1, 2, 3])) is 2 +- 2.484
    assert abs(report.interval([1.0, 2.0, 3.0]) - 2.484) < 0.01

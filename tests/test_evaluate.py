from itertools import permutations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from data import SILENCE, Caption, Episodes, choose_annotated

captions = st.lists(st.builds(lambda start, text: Caption(start, start + 1, text), st.integers(0, 12), st.sampled_from("ab")), max_size=5)


def largest(true, written):
    """The largest one-to-one matching, by trying all."""
    written = written + [None] * len(true)
    close = lambda t, w: w is not None and t.text == w.text and abs(t.start - w.start) <= evaluate.TOLERANCE
    return max(sum(close(t, w) for t, w in zip(true, order, strict=False)) for order in permutations(written, len(true)))


@settings(max_examples=60, deadline=None)
@given(captions.map(lambda c: c[:4]), captions.map(lambda c: c[:4]))
def test_the_matching_is_the_largest(true, written):
    assert len(evaluate.match(true, written)) == largest(true, written)


def test_scores_of_a_known_case():
    true = [[Caption(0, 1, "a"), Caption(10, 11, "b")], [Caption(5, 6, "a")]]
    written = [[Caption(2, 5, "a"), Caption(14, 15, "b")], []]
    found = evaluate.score(true, written)
    assert (found["precision"], found["recall"], found["f1"], found["delay"]) == (1 / 2, 1 / 3, 2 / 5, 2)
    assert found["kinds"]["a"] == (2 / 3, 2)


def test_baselines_and_the_perfect_writer(toy, tokenizer):
    train, test = Episodes(toy, "train"), Episodes(toy, "test")
    annotated = choose_annotated(12, 12, 0)
    assert evaluate.perfect_writer(test, range(3), tokenizer)["f1"] == 1
    assert evaluate.linear_probe(test, range(3), train, annotated, lambda obs: obs * 5)["f1"] > 0.9
    assert 0 < evaluate.most_frequent(test, range(3), train, annotated)["f1"] < 0.9


class Parrot:
    """An encoder that says a caption wherever feature k is 1: what evaluate.captions must see through its observations alone."""

    def __init__(self, tokenizer, texts): self.words = [tokenizer.encode(t) + [0] for t in texts]

    def annotate(self, obs):
        tok = torch.full(obs.shape[:2], SILENCE)
        for b, t, k in (obs[..., :3] > 0.5).nonzero().tolist(): tok[b, t:t + len(self.words[k])] = torch.tensor(self.words[k])
        return tok, torch.ones(tok.shape)


def test_the_controls_take_the_observations_away(toy, tokenizer):
    from conftest import TEXTS
    episodes, parrot = Episodes(toy, "train"), Parrot(tokenizer, TEXTS)
    f1 = {how: evaluate.captions(parrot, episodes, range(12), tokenizer, "cpu", how)["f1"] for how in ("true", "shuffled", "zeroed")}
    assert f1["true"] == 1 and f1["shuffled"] < 0.7 and f1["zeroed"] == 0


def test_collapse_is_visible():
    assert evaluate.collapse([np.full(50, SILENCE)]) == dict(entropy=0.0, silence=1.0)
    spoken = evaluate.collapse([np.array([0, 1, 2, 3])])
    assert np.isclose(spoken["entropy"], np.log(4)) and spoken["silence"] == 0.25

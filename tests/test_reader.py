"""The reader: prior of the text x evidence of the step."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import encoder
from data import END, SILENCE, Tokenizer, score
from encoder import (
    Features,
    Prior,
    Reader,
    answers,
    choose_reader,
    dense_weights,
    kinds_of,
    moments,
    shared_by_few,
    shortest_pauses,
    sparse_weights,
)
from runtime.dataset import Caption, Episodes, read_text, write_text

TEXTS = [f"{verb} {thing}" for verb in ("take", "drop", "see") for thing in ("red", "blue")]


class Told(list):
    """Episodes in memory, all annotated."""

    meta = dict(obs_dim=9)


class InMemory(SimpleNamespace):
    """obs and captions given."""

    @property
    def known(self):
        return np.ones(len(self.obs), bool)

    @property
    def known_captions(self):
        return [caption for caption in self.captions if self.known[caption.start]]


def episode(rng, texts, steps=60):
    """Features 0, 1, 2 tell the verb, 3 and 4 what it is done to."""
    obs, captions = torch.zeros(steps, 9), []
    obs[:, 5:] = torch.from_numpy(rng.integers(0, 2, (steps, 4)))
    for t in range(4, steps - 3, 9):
        text = texts[rng.integers(len(texts))]
        verb, thing = text.split()
        obs[t, ["take", "drop", "see"].index(verb)] = 1
        obs[t, 3 + ["red", "blue"].index(thing)] = 1
        captions.append(Caption(t, t + 1, text))
    return InMemory(obs=obs, captions=captions)


@pytest.fixture
def told():
    """12 annotated episodes that never say "see blue", and 12 that do."""
    rng = np.random.default_rng(0)
    return Told([episode(rng, TEXTS[:-1] if n < 12 else TEXTS) for n in range(24)])


def test_a_reader_says_what_was_annotated_and_what_never_was(told):
    """ "blue" was learned of "take" and "drop"; the text of others has it after "see" too."""
    tokenizer = Tokenizer.from_captions(TEXTS)
    text = [(*tokenizer.encode(each), END, SILENCE) for each in TEXTS for _ in range(9)]
    features = Features(9).measure(told)
    true = [told[i].known_captions for i in range(12, 24)]
    for shared, f1, of_new in ((10**9, 0.99, 1.0), (1, 0.8, 0.0)):  # words, and a closed list
        reader = Reader(features, tokenizer, False, shared).fit(told, list(range(12)), text)
        result = score(true, [reader.captions(told[i].obs) for i in range(12, 24)])
        assert result["f1"] > f1 and result["texts"]["see blue"][0] == of_new


def test_a_reader_is_chosen_by_what_it_reads_in_other_episodes(told):
    tokenizer, annotated = Tokenizer.from_captions(TEXTS), list(range(12))
    reader = choose_reader(told, annotated, tokenizer, [])
    again = Reader(reader.features, tokenizer, reader.dense, reader.shared)
    true, written = [], []
    for fold in (annotated[k::4] for k in range(4)):
        again.fit(told, [i for i in annotated if i not in fold], [])
        true += [told[i].known_captions for i in fold]
        written += [again.write(*again.logits(told[i].obs), reader.moment) for i in fold]
    assert reader.f1 == score(true, written)["f1"] >= max(reader.tried.values()) - 0.02


@pytest.mark.parametrize("dense", [False, True])
def test_a_stored_reader_reads_the_same(told, tmp_path, dense):
    tokenizer = Tokenizer.from_captions(TEXTS)
    features = Features(9, dense, past=4).measure(told)
    reader = Reader(features, tokenizer, dense, 3).fit(told, list(range(12)), [])
    reader.moment = 3, 0.3
    reader.save_pretrained(tmp_path / "reader")
    again = Reader.from_pretrained(tmp_path / "reader", tokenizer)
    for i in range(12, 24):
        captions = reader.captions(told[i].obs)
        assert captions and again.captions(told[i].obs) == captions
    assert str(again) == str(reader)


def test_a_reader_learns_from_annotated_steps_alone(told, monkeypatch):
    tokenizer = Tokenizer.from_captions(TEXTS)

    def fitted():
        return Reader(Features(9), tokenizer, False, 1).fit(told, [0, 1], [])

    before = fitted()
    known = np.arange(60) < 30
    late = {caption.text for caption in told[0].known_captions if caption.start >= 30}
    monkeypatch.setattr(InMemory, "known", known)
    told[0].obs[30:] = 7  # what nobody annotated may be anything
    reader = fitted()
    assert late and not torch.equal(reader.offset, before.offset)
    again = fitted()
    told[0].obs[30:] = -3
    assert torch.equal(again.starts, reader.starts)
    assert torch.equal(fitted().starts, reader.starts)


def test_episodes_in_which_nothing_is_said_teach_silence_alone():
    rng, tokenizer = np.random.default_rng(0), Tokenizer.from_captions(TEXTS)
    noise = [F.pad(torch.randint(0, 2, (60, 4)), (5, 0)).float() for _ in range(4)]
    told = Told([episode(rng, TEXTS), *(InMemory(obs=obs, captions=[]) for obs in noise)])
    assert choose_reader(told, [0, 1], tokenizer, []).f1 == 0  # a fold has no caption
    reader = choose_reader(told, [0, 1, 2, 3, 4], tokenizer, [])
    assert reader.captions(told[1].obs) == []
    assert reader.captions(told[0].obs)


def test_steps_left_out_do_not_make_silence_rarer(told, monkeypatch):
    tokenizer = Tokenizer.from_captions(TEXTS)
    every = Reader(Features(9), tokenizer, False, 1).fit(told, list(range(12)), [])
    monkeypatch.setattr(encoder, "ROWS", 300)
    some = Reader(Features(9), tokenizer, False, 1).fit(told, list(range(12)), [])

    def odds(reader):
        return (reader.offset[-1] - reader.offset[:-1].logsumexp(0)).item()

    assert odds(some) == pytest.approx(odds(every), abs=0.02)


def test_several_captions_of_a_step_are_read_in_their_order():
    tokenizer = Tokenizer.from_captions(TEXTS)
    captions = [Caption(3, 4, "see red"), Caption(3, 4, "drop blue"), Caption(8, 9, "see red")]
    obs = torch.zeros(40, 4)
    obs[3, 0], obs[8, 1] = 1, 1
    told = Told([InMemory(obs=obs.clone(), captions=captions) for _ in range(4)])
    told.meta = dict(obs_dim=4)
    reader = choose_reader(told, [0, 1, 2, 3], tokenizer, [])
    assert reader.captions(obs) == captions


def test_what_begins_alike_within_a_pause_is_said_once(told):
    tokenizer = Tokenizer.from_captions(TEXTS)
    reader = Reader(Features(9), tokenizer, False, 1).fit(told, [0], [])
    reader.kinds = [(*tokenizer.encode(text), END, SILENCE) for text in ("take red", "see red")]
    reader.pauses = {tuple(tokenizer.encode("take red")): 2, tuple(tokenizer.encode("see red")): 0}
    likeliest = torch.tensor([0, 0, 2, 0, 1, 1, 2, 0, 0])  # 2: nothing
    read = reader.write(10 * torch.eye(3)[likeliest], torch.zeros(9, len(reader.told)), (0, 0.5))
    assert [(c.start, c.text[:3]) for c in read] == [(0, "tak"), (4, "see"), (5, "see"), (7, "tak")]


def test_a_moment_is_where_a_kind_is_likely_enough_near_by():
    p = torch.tensor([[0.2, 0.0], [0.3, 0.1], [0.1, 0.0], [0.0, 0.0], [0.0, 0.25], [0.6, 0.25]])
    logits = torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1).log()
    # the likeliest step of the three, and what the others had is spent; the last step is explained
    assert moments(logits, 1, 0.2) == [(5, 0), (1, 0), (4, 1)]
    assert moments(logits, 1, 0.3) == [(5, 0), (1, 0)]
    assert moments(logits, 0, 0.2) == [(5, 0), (1, 0), (4, 1), (0, 0)]


def test_what_goes_on_is_neither_taught_nor_denied(told):
    """Within the span of a caption what tells of it is seen again."""
    for one in told:
        one.captions = [Caption(start, start + 3, text) for start, _, text in one.captions]
        for caption in one.captions:
            one.obs[caption.start + 2] = one.obs[caption.start]
    tokenizer, annotated = Tokenizer.from_captions(TEXTS), list(range(12))
    reader = Reader(Features(9), tokenizer, False, 1).fit(told, annotated, [])
    silence = reader.logits(told[0].obs)[0].softmax(-1)[:, -1]
    starts = torch.tensor([caption.start for caption in told[0].known_captions])
    assert silence[starts].mean() < 0.4 and silence[starts + 2].mean() < 0.4
    assert silence[starts + 4].min() > 0.7
    # of few episodes such steps are left out
    for n, steps in ((3, 3 * (60 - 2 * 6)), (4, 4 * 60)):
        assert len(reader.rows(told, annotated[:n])[1]) == steps


def test_pauses_are_the_shortest_between_what_begins_alike():
    tokenizer = Tokenizer.from_captions(TEXTS)
    starts = [[(3, "take red"), (5, "see red"), (9, "take red")], [(2, "see red"), (30, "see red")]]
    captions = [[Caption(t, t + 1, text) for t, text in one] for one in starts]
    told = Told([InMemory(obs=torch.zeros(40, 1), captions=said) for said in captions])
    pauses = shortest_pauses(told, [0, 1], tokenizer)
    take, see = (tuple(tokenizer.encode(text)) for text in ("take red", "see red"))
    assert pauses == {take: 5, see: encoder.PAUSE}


def test_kinds_are_beginnings_that_so_many_share(monkeypatch):
    texts = [(7, 8, 0, 1)] * 3 + [(7, 9, 0, 1)] * 2 + [(5, 0, 1)]
    whole = kinds_of(texts, 1)
    assert all(kind == ids for ids, kind in whole.items())
    assert kinds_of(texts, 3) == {texts[0]: texts[0], texts[3]: (7,), texts[5]: (5,)}
    assert set(kinds_of(texts, 99).values()) == {(7,), (5,)}
    monkeypatch.setattr(encoder, "KINDS", 2)
    assert len(set(kinds_of(texts, 1).values())) == 2


def test_few_episodes_are_taken_by_first_words_where_their_words_make_more_of_the_text():
    own = {(7, 8, 0), (7, 9, 1)}
    as_said, by_their_words, by_others = (7, 8, 0), (7, 8, 1), (7, 5, 0)
    assert shared_by_few(own, [as_said] * 9 + [by_others] * 9) == 1
    assert shared_by_few(own, [as_said] * 6 + [by_their_words]) > 1
    assert shared_by_few(own, [as_said] * 7 + [by_their_words]) == 1
    assert shared_by_few(own, []) == 1


def test_an_answer_is_all_that_is_said_at_a_step():
    tokenizer = Tokenizer.from_captions(TEXTS)
    red, blue = ((*tokenizer.encode(f"see {x}"), END) for x in ("red", "blue"))
    captions = [Caption(4, 5, "see red"), Caption(2, 3, "see blue"), Caption(4, 9, "see blue")]
    assert answers(captions, tokenizer) == {4: (*red, *blue, SILENCE), 2: (*blue, SILENCE)}


def test_the_prior_is_the_smoothed_n_gram(monkeypatch):
    monkeypatch.setattr(encoder, "ORDER", 2)
    texts = [(5, 6, 7), (5, 6, 8), (9, 6, 8), (5, 6, 8)]
    prior = Prior(texts)
    assert prior.words == [5, 6, 7, 8, 9]

    def by_hand(texts, prefix):
        p = {w: 1e-4 / 5 for w in prior.words}
        for order in range(min(2, len(prefix)) + 1):
            context = prefix[len(prefix) - order :]
            n = Counter(
                ids[k]
                for ids in texts
                for k in range(len(context), len(ids))
                if ids[k - len(context) : k] == context
            )
            if n:
                weight = n.total() / (n.total() + 0.5 * len(n))
                p = {w: (1 - weight) * p[w] + weight * n[w] / n.total() for w in p}
        return [math.log(p[w]) for w in prior.words]

    for prefix in [(), (5,), (5, 6), (9, 6), (7,), (6, 5)]:
        assert prior(prefix).tolist() == pytest.approx(by_hand(texts, prefix), rel=1e-5)
    # (5, 6, 7) stands there once: without itself, nothing speaks for 7 after 6
    assert prior((5, 6), 7)[2] == pytest.approx(by_hand(texts[1:], (5, 6))[2], rel=0.5)
    assert prior((5, 6), 7)[2] < prior((5, 6))[2] - 2


@pytest.fixture
def problem():
    """X (300, 12), a target of 3 classes that features 0 and 1 tell, and an offset."""
    X = torch.randn(300, 12)
    logits = torch.stack((2 * X[:, 0], -2 * X[:, 0] + X[:, 1], X[:, 1]), 1)
    target = torch.distributions.Categorical(logits=logits).sample()
    return X, target, torch.randn(300, 3)


def test_dense_weights_are_where_the_gradient_vanishes(problem):
    X, target, offset = (problem[0].double(), problem[1], problem[2].double())
    W = dense_weights(*problem, 3).double().requires_grad_()
    loss = F.cross_entropy(offset + X @ W.T, target) + 0.0015 * W.square().sum()
    [gradient] = torch.autograd.grad(loss, W)
    assert gradient.abs().max() < 1e-3


def test_sparse_weights_meet_the_conditions_of_an_l1_penalty(problem):
    """The gradient is the penalty where a weight is not 0, against its sign, and less elsewhere."""
    X, target, offset = problem
    W = sparse_weights(X, target, offset, 3, penalty=0.2, rounds=9, most=2).requires_grad_()
    loss = F.cross_entropy(offset + X @ W.T, target)
    [gradient] = torch.autograd.grad(loss, W)
    zero = torch.zeros_like(W, requires_grad=True)
    [first] = torch.autograd.grad(F.cross_entropy(offset + X @ zero.T, target), zero)
    penalty, used = 0.2 * first.abs().max(), W != 0
    assert 0 < used.sum() < 20
    torch.testing.assert_close(gradient[used], -penalty * W[used].sign(), rtol=2e-3, atol=0)
    assert gradient.abs().max() < 1.03 * penalty


def test_text_without_observations_comes_back_from_disk(toy):
    text = [[Caption(3, 4, "take a red café"), Caption(9, 10, "x")], []]
    before = Episodes(toy, "train").identity()
    assert read_text(toy) == []
    write_text(toy, text)
    assert read_text(toy) == text
    assert Episodes(toy, "train").identity() != before
    path = toy / "text-00000.jsonl"
    path.write_text(path.read_text().replace("red", "rot"))
    with pytest.raises(ValueError, match="text-00000.jsonl, line 1: does not match its crc"):
        read_text(toy)

"""
The baseline that a reviewer would run: scikit-learn's logistic regression with an L1 penalty, one
of a class against all else, of each step's state and change. Penalty, margin and pause are chosen
on validation.

A class is a text; or, by word, the word in a slot ("collect wood north" has three): the first word
or silence at every step, each next one where a caption is.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from bench.probe import PAUSES, captions_from, mean_and_deviation, true_captions
from data import score
from runtime.dataset import Caption

STRENGTHS = 0.3, 0.1, 0.03  # C of liblinear
MARGINS = range(-4, 5)
LAST = ""  # in the slot after a caption's last word


def slots_of(text, by_word):
    return [*text.split(), LAST] if by_word else [text]


def one_against_all(x, label, strength):
    """Classifier of x (n, F) and labels, which may all be the same."""
    try:
        from sklearn.dummy import DummyClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
    except ImportError:
        remedy = "pip install -r requirements-extra.txt"
        raise ValueError(f"the package scikit-learn is missing: run `{remedy}`") from None
    one = LogisticRegression(penalty="l1", solver="liblinear", C=strength, random_state=0)
    several = len(set(label)) > 1
    return (OneVsRestClassifier(one) if several else DummyClassifier()).fit(x, label)


class Regression:
    """A classifier of each slot."""

    def __init__(self, train, annotated, by_word):
        self.by_word = by_word
        self.mean, std = mean_and_deviation(train, annotated)
        self.scale = (std > 1e-6) / std.clamp(min=1e-6)
        self.x, self.slots = [], []  # of all annotated steps: (F,), and [class of each slot, ..]
        for episode in (train[i] for i in annotated):
            said = {c.start: slots_of(c.text, by_word) for c in episode.known_captions}
            known = np.flatnonzero(episode.known)
            self.x.append(self.look(episode.obs)[known])
            self.slots += [said.get(t, []) for t in known.tolist()]
        self.x = np.concatenate(self.x)
        self.firsts = sorted({slots[0] for slots in self.slots if slots})

    def look(self, obs):  # (N, D) -> (N, 2 D)
        x = (obs.float() - self.mean) * self.scale
        return torch.cat((x, F.pad(x.diff(dim=0), (0, 0, 1, 0))), 1).clamp(-3, 3).numpy()

    def fit(self, strength):
        silence = len(self.firsts)
        first = [self.firsts.index(slots[0]) if slots else silence for slots in self.slots]
        self.models = [one_against_all(self.x, first, strength)]
        for k in range(1, max(map(len, self.slots))):
            rows = [n for n, slots in enumerate(self.slots) if len(slots) > k]
            words = [self.slots[n][k] for n in rows]
            self.models.append(one_against_all(self.x[rows], words, strength))
        return self

    def logits(self, episode):
        """Of each first slot, and of silence, (N, C+1)."""
        model = self.models[0]
        found = np.full((episode.steps, len(self.firsts) + 1), -99.0)
        found[:, model.classes_] = model.decision_function(self.look(episode.obs))
        return torch.from_numpy(found)

    def captions(self, episode, logits, margin, pause):
        """First slots by their logits, the others one by one."""
        firsts = captions_from(logits, self.firsts, margin, pause)
        if not firsts or not self.by_word:
            return firsts
        x = self.look(episode.obs)[[caption.start for caption in firsts]]
        slots = np.stack([model.predict(x) for model in self.models[1:]], 1)  # (captions, k)
        rest = [" ".join(itertools.takewhile(bool, words)) for words in slots]
        texts = [f"{c.text} {more}".strip() for c, more in zip(firsts, rest, strict=True)]
        return [Caption(c.start, c.end, text) for c, text in zip(firsts, texts, strict=True)]


def regression(train, annotated, val, episodes, by_word=False):
    """What it says in episodes, at its best on val."""
    model, true, best = Regression(train, annotated, by_word), true_captions(val), (-1, None)
    for strength in STRENGTHS:
        model.fit(strength)
        logits = [model.logits(episode) for episode in val]
        for choice in itertools.product(MARGINS, PAUSES):
            pairs = zip(val, logits, strict=True)
            f1 = score(true, [model.captions(*pair, *choice) for pair in pairs])["f1"]
            best = max(best, (f1, strength, choice), key=lambda row: row[0])
    _, strength, choice = best
    model.fit(strength)
    return [model.captions(e, model.logits(e), *choice) for e in episodes]

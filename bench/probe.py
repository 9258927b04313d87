"""
A baseline: logistic regression says which caption starts at a step, from the T steps up to it.

What is chosen, is chosen on validation: the penalty, by how much silence is preferred, and how long
it pauses after a caption. A caption starts where one first beats silence: no future is used.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from data import score
from runtime.dataset import Caption

PENALTIES = 1e-2, 1e-3, 1e-4
MARGINS = np.arange(-6, 3.1, 0.5)  # added to the logit of silence
PAUSES = 1, 4, 8, 16  # steps
ROWS = 4096  # that are looked at together: what they need stays in the cache
LARGE = 2e10  # multiplications in a pass over the data; all passes take half an hour on one core


def true_captions(episodes):
    return [episode.captions for episode in episodes]


def start_labels(episode, texts):
    """The index in texts of the caption that starts at each step of an episode, len(texts) where
    none does, -1 where nobody annotated: (N,) int64."""
    starts = np.where(episode.known, len(texts), -1)
    for caption in episode.known_captions:
        starts[caption.start] = texts.index(caption.text)
    return torch.from_numpy(starts)


def mean_and_deviation(episodes, some):
    """Mean and deviation (D,) of some of the episodes, which are read one at a time."""
    n, total, square = 0, 0, 0
    shift = episodes[some[0]].obs.double().mean(0)  # or a large mean swallows the deviation
    for i in some:
        x = episodes[i].obs.double() - shift
        n, total, square = n + len(x), total + x.sum(0), square + x.square().sum(0)
    std = ((square - total * total / n) / max(n - 1, 1)).clamp(min=0).sqrt()
    return (shift + total / n).float(), std.float()


class Probe:
    """Logistic regression: which caption starts at a step, from the T steps up to it."""

    def __init__(self, train, annotated, T):
        """annotated: the episodes of train that it learns from."""
        self.train, self.T = train, T
        self.texts = sorted({c.text for i in annotated for c in train[i].known_captions})
        self.mean, std = mean_and_deviation(train, annotated)
        self.std = std.where(std > 1e-6, torch.inf)  # what never moved there says nothing later
        self.labels = {i: start_labels(train[i], self.texts) for i in annotated}
        self.weight = torch.zeros(T * len(std) + 1, len(self.texts) + 1)

    def look(self, episode, start=0, stop=None):
        """Steps start .. stop of an episode, standardised, after the T-1 before them; before its
        first step, ones like that: (T-1+n, D)."""
        before = max(start - self.T + 1, 0)
        x = (episode.window(before, stop) - self.mean).div_(self.std)
        missing = self.T - 1 - (start - before)
        return torch.cat((x[:1].expand(missing, -1), x)) if missing else x

    def parts(self):
        """(T-1+n, D) and what starts at the last n, (n,), -1 where nobody knows: of all that it
        learns from, at most ROWS steps at a time."""
        for i, label in self.labels.items():
            for a in range(0, len(label), ROWS):
                yield self.look(self.train[i], a, a + ROWS), label[a : a + ROWS]

    def logits(self, x, weight):
        """x (T-1+N, D) -> (N, C), of each step's window of T rows.

        The windows themselves would be T times the data: each row is read once for every place
        that it has in one, and what it says there goes to the window's last step.
        """
        T, C = self.T, weight.shape[1]
        N = len(x) - T + 1
        said = (x @ weight[:-1].view(-1, T * C)).unflatten(1, (T, C))  # the last row is the bias
        return weight[-1] + sum(said[k : k + N, k] for k in range(T))

    def gradient(self, x, error):
        """Of the weight, where the loss has the gradient `error` (N, C) in the logits.

        By hand: autograd makes zeros of the size of all `said` for each of its T slices.
        """
        T, (N, C) = self.T, error.shape
        of_said = error.new_zeros(T - 1 + N, T, C)
        for k in range(T):
            of_said[k : k + N, k] = error
        matrix = (x.T @ of_said.flatten(1)).view(-1, C)
        return torch.cat((matrix, error.sum(0, keepdim=True)))

    def fit(self, penalty):
        """Minimises cross-entropy + penalty / 2 |weight|^2 by L-BFGS, from where it is."""
        weight = self.weight.clone()
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
        count = sum((label >= 0).sum() for label in self.labels.values())

        @torch.no_grad()
        def loss():
            total = penalty / 2 * weight[:-1].square().sum()
            weight.grad = F.pad(penalty * weight[:-1], (0, 0, 0, 1))
            for x, label in self.parts():
                log_p = self.logits(x, weight).log_softmax(-1)
                total += F.nll_loss(log_p, label, reduction="sum", ignore_index=-1) / count
                true = F.one_hot(label.clamp(min=0), weight.shape[1])
                error = (log_p.exp() - true) * (label >= 0)[:, None] / count
                weight.grad += self.gradient(x, error)
            return total

        optimizer.step(loss)
        self.weight = weight

    def all_logits(self, episodes):
        """The logits of each episode."""
        return [self.logits(self.look(episode), self.weight) for episode in episodes]


def captions_from(logits, texts, margin, pause):
    """What starts in an episode, logits (N, texts + 1), and then nothing for `pause` steps."""
    captions, free = [], 0
    best, which = logits[:, :-1].max(1)
    for t in (best > logits[:, -1] + margin).nonzero()[:, 0].tolist():
        if t >= free:
            captions.append(Caption(t, t + 1, texts[which[t]]))
            free = t + pause
    return captions


def multiplications(T, train, annotated):
    """In a pass over the data."""
    steps = sum(train[i].steps for i in annotated)
    texts = {c.text for i in annotated for c in train[i].known_captions}
    return steps * train.meta["obs_dim"] * T * (len(texts) + 1)


def probe(T, train, annotated, val, episodes):
    """What the probe says in episodes, at its best on val."""
    model, best, true = Probe(train, annotated, T), -1, true_captions(val)
    for penalty in PENALTIES:
        model.fit(penalty)
        logits = model.all_logits(val)
        for margin, pause in itertools.product(MARGINS, PAUSES):
            f1 = score(true, [captions_from(x, model.texts, margin, pause) for x in logits])["f1"]
            if f1 > best:
                best, chosen, weight = f1, (margin, pause), model.weight
    model.weight = weight
    return [captions_from(x, model.texts, *chosen) for x in model.all_logits(episodes)]

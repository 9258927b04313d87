"""
A baseline: logistic regression says which caption starts at a step, from the T steps up to it.

What is chosen, is chosen on validation: the penalty, by how much silence is preferred, and how long
it pauses after a caption. A caption starts where one first beats silence: no future is used.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from data import Caption, score

PENALTIES = 1e-2, 1e-3, 1e-4
MARGINS = np.arange(-3, 3.1, 0.5)  # added to the logit of silence
PAUSES = 1, 4, 8, 16  # steps


def true_captions(episodes):
    return [episodes.captions(i) for i in range(len(episodes))]


class Probe:
    """Logistic regression: which caption starts at a step, from the T steps up to it."""

    def __init__(self, train, T):
        self.T = T
        self.texts = sorted({c.text for captions in true_captions(train) for c in captions})
        obs = torch.cat([train.obs(i) for i in range(len(train))])
        self.mean, self.std = obs.mean(0), obs.std(0).clamp(min=1e-6)
        self.x = torch.cat([self.look(train.obs(i)) for i in range(len(train))])
        self.label = torch.cat([train.starts(i, self.texts) for i in range(len(train))])
        self.weight = torch.zeros(self.x.shape[1], len(self.texts) + 1)

    def look(self, obs):
        """obs (N, D) -> the last T steps of each, and a one, (N, T D + 1)."""
        x = (obs - self.mean) / self.std
        x = torch.cat((x[:1].expand(self.T - 1, -1), x)).unfold(0, self.T, 1)  # (N, D, T)
        return F.pad(x.flatten(1), (0, 1), value=1.0)

    def fit(self, penalty):
        """Minimises cross-entropy + penalty / 2 |weight|^2 by L-BFGS, from where it is."""
        weight = self.weight.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(self.x @ weight, self.label)
            value = value + penalty / 2 * weight[:-1].square().sum()  # the last row is the bias
            value.backward()
            return value

        optimizer.step(loss)
        self.weight = weight.detach()

    def logits(self, episodes):
        return [self.look(episodes.obs(i)) @ self.weight for i in range(len(episodes))]

    def captions(self, logits, margin, pause):
        """What starts in an episode, logits (N, texts + 1), and then nothing for `pause` steps."""
        captions, free = [], 0
        best, which = logits[:, :-1].max(1)
        for t in (best > logits[:, -1] + margin).nonzero()[:, 0].tolist():
            if t >= free:
                captions.append(Caption(t, t + 1, self.texts[which[t]]))
                free = t + pause
        return captions


def probe(T, train, val, episodes):
    """What the probe says in episodes, at its best on val."""
    model, best, true = Probe(train, T), -1, true_captions(val)
    for penalty in PENALTIES:
        model.fit(penalty)
        logits = model.logits(val)
        for margin, pause in itertools.product(MARGINS, PAUSES):
            f1 = score(true, [model.captions(x, margin, pause) for x in logits])["f1"]
            if f1 > best:
                best, written = f1, model.logits(episodes)
                written = [model.captions(x, margin, pause) for x in written]
    return written

"""
Baselines of labels.py that train nothing: the annotated steps nearest to a step decide what is said there.

kNN lets the k nearest vote. A prompted language model reads the 16 nearest as text, the least near first, each as the numbers of its
strongest features and its caption, and says which of their captions has the greatest likelihood at the step in question.
"""
import torch

import evaluate
import pythia
import train as settings
from data import Caption, Tokenizer, choose_annotated
from encoder import Projector
from model import GPTNeoX

SHOTS, FEATURES = 16, 6                   # examples in a prompt, features spelled out of each
NOTHING = "nothing"


class Annotated:
    """The steps of the annotated episodes: what the projector sees at each, and the caption that starts there, or None."""

    def __init__(self, episodes, annotated, seen):
        self.seen, self.x = seen, torch.cat([seen(episodes.obs(i)) for i in annotated])
        self.texts, first = [None] * len(self.x), 0
        for i in annotated:
            for c in episodes.captions(i): self.texts[first + c.start] = c.text
            first += episodes.steps(i)

    def nearest(self, episodes, k):
        """For each episode the observations as they are seen, and the k nearest annotated steps of each step, nearest first."""
        for i in range(len(episodes)):
            x = self.seen(episodes.obs(i))
            yield x, torch.cdist(x, self.x).topk(min(k, len(self.x)), largest=False).indices.tolist()


def f1(test, said):
    """Caption F1 of one text, or None, per step of every episode."""
    written = [[Caption(t, t + 1, text) for t, text in enumerate(row) if text] for row in said]
    return evaluate.score([test.captions(i) for i in range(len(test))], written)["f1"]


def vote(texts):
    """The most frequent of the texts; of equally frequent ones that of the nearest."""
    return max(texts, key=texts.count)


def knn(test, known, ks):
    """F1 for each k of `ks`."""
    found = [near for _, near in known.nearest(test, max(ks))]
    return {k: f1(test, [[vote([known.texts[n] for n in near[:k]]) for near in rows] for rows in found]) for k in ks}


def spelled(x):
    """A step as text: its strongest features, '913:+4 1204:-3'."""
    strongest = x.abs().topk(min(FEATURES, len(x))).indices.sort().values
    return " ".join(f"{i}:{round(x[i].item())}" for i in strongest.tolist())


@torch.no_grad()
def likelihood(lm, prompt, answers):
    """Log-probability (A,) of each answer (list of ids) after the prompt (list of ids)."""
    width = max(map(len, answers))
    tok = torch.tensor([prompt + a + [0] * (width - len(a)) for a in answers])          # padded behind: what is causal does not see it
    logp = lm(tok)[:, len(prompt) - 1:-1].log_softmax(-1)                               # (A, width, V)
    each = logp.gather(2, tok[:, len(prompt):, None])[..., 0]
    return each.where(torch.arange(width) < torch.tensor(list(map(len, answers)))[:, None], 0).sum(1)


def prompted(test, known, folder):
    """F1 of a pretrained language model in `folder` (or a name, pythia.find) that is shown annotated examples as text."""
    lm, tokenizer = GPTNeoX.from_pretrained(folder).eval(), Tokenizer.from_file(pythia.find(folder) / "tokenizer.json")
    line = lambda x, text="": f"{spelled(x)} ={' ' + text if text else ''}"
    def answer(x, near):
        choices = list(dict.fromkeys(known.texts[n] for n in near))
        if len(choices) == 1: return choices[0]
        prompt = "\n".join([line(known.x[n], known.texts[n] or NOTHING) for n in reversed(near)] + [line(x)])
        return choices[likelihood(lm, tokenizer.encode(prompt), [tokenizer.encode(f" {c or NOTHING}\n") for c in choices]).argmax()]
    return f1(test, [[answer(x, near) for x, near in zip(seen, rows, strict=True)] for seen, rows in known.nearest(test, SHOTS)])


def rows(test, train, sizes, seeds, icl=None):
    """{name: {N: {seed: F1}}} of kNN, the prompted language model if there is one, the most frequent caption, and silence."""
    projector = Projector(train.meta["obs_dim"], 1)
    projector.standardise(train, settings.brevity)
    table = {"kNN, k = 1": {}, "kNN, k = 3": {}} | ({"prompted": {}} if icl else {}) | {"most frequent": {}, "silence": {}}
    for by_size in table.values(): by_size.update((n, {}) for n in sizes)
    for n in sizes:
        for s in seeds:
            annotated = choose_annotated(len(train), n, s)
            known = Annotated(train, annotated, projector.weighed)
            for k, found in knn(test, known, (1, 3)).items(): table[f"kNN, k = {k}"][n][s] = found
            if icl: table["prompted"][n][s] = prompted(test, known, icl)
            table["most frequent"][n][s] = evaluate.most_frequent(test, range(len(test)), train, annotated)["f1"]
            table["silence"][n][s] = f1(test, [[]] * len(test))
    return table

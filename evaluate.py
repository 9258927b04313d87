"""
How good captions and forecasts are, and the controls that show they are grounded. train.py calls `captions` and `forecasts`.

Captions are scored on the encoder writing freely: a written caption is right if its text is that of a true one that starts
within +-3 steps, one to one. The controls give the encoder other episodes' observations (shuffled), or none (zeroed).
"""
import copy
from collections import Counter, defaultdict

import numpy as np
import torch

from data import END, SILENCE, Caption, read_stream, write_stream

TOLERANCE = 3                                                # steps between a true and a written start


def match(true, written):
    """Largest one-to-one matching of captions with the same text and close starts: [(true, written), ..]."""
    pairs, waiting = [], defaultdict(list)
    for caption in sorted(written): waiting[caption.text].append(caption)
    for caption in sorted(true):
        queue = waiting[caption.text]
        while queue and queue[0].start < caption.start - TOLERANCE: queue.pop(0)
        if queue and queue[0].start <= caption.start + TOLERANCE: pairs.append((caption, queue.pop(0)))
    return pairs


def score(true, written):
    """Lists of captions per episode -> precision, recall, f1, mean time difference of the matches in steps, and f1 per text."""
    hits, said, real, delays = Counter(), Counter(), Counter(), []
    for ours, theirs in zip(written, true, strict=True):
        pairs = match(theirs, ours)
        hits.update(t.text for t, _ in pairs)
        said.update(c.text for c in ours)
        real.update(c.text for c in theirs)
        delays += [w.start - t.start for t, w in pairs]
    f1 = lambda hit, n_said, n_real: 2 * hit / max(n_said + n_real, 1)
    return dict(f1=f1(hits.total(), said.total(), real.total()), precision=hits.total() / max(said.total(), 1),
                recall=hits.total() / max(real.total(), 1), delay=float(np.mean(delays)) if delays else 0.0,
                kinds={text: (f1(hits[text], said[text], real[text]), real[text]) for text, _ in real.most_common()})


def padded(episodes, indexes, device):
    """Observations of several episodes, (E, N, D) with zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([episodes.obs(i) for i in indexes], batch_first=True).to(device)


def collapse(streams):
    """What a collapsing encoder shows first: entropy of its tokens (nats), share of silence, over streams [(N,), ..]."""
    counts = np.bincount(np.concatenate(streams))
    p = counts[counts > 0] / counts.sum()
    return dict(entropy=float(-(p * np.log(p)).sum()), silence=float(counts[SILENCE] / counts.sum()) if len(counts) > 1 else 0.0)


def captions(encoder, episodes, indexes, tokenizer, device, observations="true", keep=None):
    """Lets the encoder write on episodes; observations 'true', 'shuffled' (the next episode's) or 'zeroed'. Returns the scores.

    keep(tok, prob) -> (E, N) bool: captions with a step where it is False are silenced before anything is scored.
    """
    obs = padded(episodes, indexes, device)
    if observations == "shuffled": obs = obs.roll(1, 0)
    if observations == "zeroed": obs = torch.zeros_like(obs)
    tok, prob = encoder.annotate(obs)
    if keep is not None: tok = tok.where(keep(tok, prob), SILENCE)
    streams = [row[:episodes.steps(i)] for row, i in zip(tok.cpu().numpy(), indexes, strict=True)]
    written = [read_stream(s, tokenizer) for s in streams]
    truth = [write_stream(episodes.captions(i), episodes.steps(i), tokenizer) for i in indexes]
    spoken = np.concatenate([(t != SILENCE) for t in truth])
    same = np.concatenate([s == t for s, t in zip(streams, truth, strict=True)])
    return score([episodes.captions(i) for i in indexes], written) | collapse(streams) | dict(
        token_accuracy=float(same[spoken].mean()), written=sum(map(len, written)), distinct=len({c.text for w in written for c in w}))


@torch.no_grad()
def forecasts(model, episodes, indexes, tokenizer, T, device, shuffled=False):
    """Mean loss in nats of the predictor per offset j = 1 .. K, (4, K): on silence, first tokens of captions, the rest, all but silence.

    Runs on the true streams, cut into windows of T; shuffled gives it the hidden states of other windows.
    """
    windows = []
    for i in indexes:
        tok = torch.from_numpy(write_stream(episodes.captions(i), episodes.steps(i), tokenizer))
        for a in range(0, len(tok) - T + 1, T):
            windows.append((episodes.obs(i, a, a + T), tok[a:a + T], tok[a - 1] if a else torch.tensor(END)))
    total, count = torch.zeros(4, model.predictor.K), torch.zeros(4, model.predictor.K)
    for a in range(0, len(windows), 32):
        obs, tok, prev = (torch.stack(x).to(device) for x in zip(*windows[a:a + 32], strict=True))
        hidden = model.encoder(obs, tok, prev)
        if shuffled: hidden = hidden.roll(len(hidden) // 2, 0)
        _, loss, target, before, exists = model.predict(hidden, tok, prev, torch.ones_like(tok, dtype=torch.bool))     # (B, S, K)
        spoken = target != SILENCE
        first = spoken & (before <= SILENCE)
        for k, kind in enumerate((~spoken, first, spoken & ~first, spoken)):
            total[k] += (loss * (kind & exists)).sum((0, 1)).cpu()
            count[k] += (kind & exists).sum((0, 1)).cpu()
    return total / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# what needs no language model


def perfect_writer(episodes, indexes, tokenizer):
    """The true captions through a stream and back: what queueing costs."""
    true = [episodes.captions(i) for i in indexes]
    return score(true, [read_stream(write_stream(c, episodes.steps(i), tokenizer), tokenizer) for c, i in zip(true, indexes, strict=True)])


def most_frequent(episodes, indexes, train, annotated):
    """Says the annotated episodes' most frequent caption at the rate at which it occurs there."""
    text, count = Counter(c.text for i in annotated for c in train.captions(i)).most_common(1)[0]
    every = max(sum(train.steps(i) for i in annotated) // count, 1)
    return score([episodes.captions(i) for i in indexes],
                 [[Caption(t, t + 1, text) for t in range(every // 2, episodes.steps(i), every)] for i in indexes])


def linear_probe(episodes, indexes, train, annotated, seen, weight_decay=1e-3, steps=300):
    """Logistic regression from the observation, seen(obs) as the encoder's projector sees it, to the caption that starts there, or none."""
    texts = [None] + sorted({c.text for i in annotated for c in train.captions(i)})
    x = torch.cat([seen(train.obs(i)) for i in annotated])
    y = torch.zeros(len(x), dtype=torch.int64)
    for first, i in zip(np.cumsum([0] + [train.steps(i) for i in annotated]), annotated, strict=False):
        for c in train.captions(i): y[first + c.start] = texts.index(c.text)
    torch.manual_seed(0)
    probe = torch.nn.Linear(x.shape[1], len(texts))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        rows = torch.randint(len(x), (2048,))
        loss = torch.nn.functional.cross_entropy(probe(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        best = [probe(seen(episodes.obs(i))).argmax(-1).tolist() for i in indexes]
    return score([episodes.captions(i) for i in indexes],
                 [[Caption(t, t + 1, texts[b]) for t, b in enumerate(row) if b] for row in best])


# ---------------------------------------------------------------------------------------------------------------------
# the report at the end of a run


def report(model, tokenizer, train, annotated, test, T, device):
    """Captions, controls and baselines, and the predictor's losses, on all episodes of `test`."""
    everything = range(len(test))
    write = lambda observations: captions(model.encoder, test, everything, tokenizer, device, observations)
    rows = {"encoder": write("true"), "observations shuffled": write("shuffled"), "observations zeroed": write("zeroed")}
    if annotated:
        seen = copy.deepcopy(model.encoder.projector).cpu().float().weighed
        rows |= {"linear probe": linear_probe(test, everything, train, annotated, seen),
                 "most frequent caption": most_frequent(test, everything, train, annotated)}
    rows["perfect writer"] = perfect_writer(test, everything, tokenizer)
    if not model.predicts: return dict(captions=rows, forecasts={})
    ahead = {name: forecasts(model, test, everything, tokenizer, T, device, name == "shuffled").tolist()
             for name in ("true", "shuffled")}
    return dict(captions=rows, forecasts=ahead)


def show(results):
    rows = results["captions"]
    print(f"\n{'held-out test episodes':24}    F1  precision  recall  delay  tokens right  silence  entropy  distinct")
    for name, row in rows.items():
        line = f"{name:24} {row['f1']:5.3f}  {row['precision']:9.3f}  {row['recall']:6.3f}  {row['delay']:5.2f}"
        if "entropy" in row: line += f"  {row['token_accuracy']:12.3f}  {row['silence']:7.3f}  {row['entropy']:7.2f}  {row['distinct']:8}"
        print(line)
    print(f"\n{'F1 by caption':24} {'count':>5}   " + "  ".join(f"{name:>12}" for name in ("encoder", "linear probe", "perfect")))
    columns = [rows.get(name, {"kinds": {}})["kinds"] for name in ("encoder", "linear probe", "perfect writer")]
    for text, (_, count) in rows["encoder"]["kinds"].items():
        print(f"{text:24} {count:5}   " + "  ".join(f"{column[text][0]:12.2f}" if text in column else " " * 12 for column in columns))
    if not results["forecasts"]: return
    kinds = "silence", "first of a caption", "the rest", "all but silence"
    print(f"\n{'predictor, loss in nats':24} hidden    " + "".join(f"  j={j + 1:<3}" for j in range(len(results["forecasts"]["true"][0]))))
    for k, kind in enumerate(kinds):
        for name, losses in results["forecasts"].items():
            print(f"{kind:24} {name:9} " + "".join(f" {x:6.3f}" for x in losses[k]))


def beside(true, written, prob):
    """True and written captions in order of time: (step, true text, written text, probability of the least sure token or None)."""
    hits = {w: t for t, w in match(true, written)}
    rows = [(t.start, t.text, "", None) for t in true if t not in hits.values()]
    rows += [(w.start, hits[w].text if w in hits else "", w.text, prob[w.start:w.end].min().item()) for w in written]
    return sorted(rows, key=lambda row: row[0])

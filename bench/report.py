"""
How good the captions of runs are on their test episodes, with controls and baselines.

    python -m bench.report out/crafter       one run: captions, F1 by text, predictor's losses
    python -m bench.report out/seed-*        several: F1 of each, mean and 95 % interval

A written caption is right if a true one of the same text starts within 3 steps, one to one; exact:
at the same step; words: the share of words that pairs in order have in common (data.score). The
controls give the encoder another episode's observations (shuffled), or none (zeroed). The probes
are logistic regressions of the annotated episodes, tuned on val (bench/probe.py).
"""

from configurator import run
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from bench.probe import LARGE, multiplications, probe
from data import (
    END,
    SILENCE,
    Caption,
    Episodes,
    choose_annotated,
    match,
    read_stream,
    score,
    write_stream,
)
from encoder import Reader, load, written_captions
from runtime.distributed import pick_device
from sample import predictor_of

TOGETHER = 2**26  # numbers of the episodes that are written at once
T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t, 1 .. 9 degrees


def captions_of(encoder, episodes, tokenizer, observations="true"):
    """What the encoder writes on each episode, given true, shuffled or zeroed observations."""
    longest = max(episodes.steps(i) for i in range(len(episodes)))
    rows = min(max(TOGETHER // (longest * episodes.meta["obs_dim"]), 1), 64)
    other = observations == "shuffled"  # each as long as it was, or as the other is
    written = []
    for first in range(0, len(episodes), rows):
        some = range(first, min(first + rows, len(episodes)))
        obs = [episodes.obs(i - other, 0, episodes.steps(i)) for i in some]
        if observations == "zeroed":
            obs = [torch.zeros_like(own) for own in obs]
        written += written_captions(encoder, obs, tokenizer)
    return written


def perfect_writer(episodes, tokenizer):
    """The true captions through a stream and back."""
    every = range(len(episodes))
    streams = [write_stream(episodes.captions(i), episodes.steps(i), tokenizer) for i in every]
    return [read_stream(*stream, tokenizer) for stream in streams]


def most_frequent(episodes, train, annotated):
    """The annotated episodes' most frequent caption, as often as it occurs there."""
    texts = Counter(c.text for i in annotated for c in train.captions(i))
    text, count = texts.most_common(1)[0]
    every = max(sum(train.steps(i) for i in annotated) // count, 1)
    lengths = [episodes.steps(i) for i in range(len(episodes))]
    return [[Caption(t, t + 1, text) for t in range(every // 2, n, every)] for n in lengths]


def reader_alone(episodes, folder, tokenizer):
    """What the run's reader, of which the encoder learned, reads."""
    reader = Reader.from_pretrained(folder, tokenizer)
    return [reader.captions(episodes.obs(i)) for i in range(len(episodes))]


def probes(episodes, train, annotated, T):
    """What linear probes say that see the present step, or T; not where that takes too long."""
    val, written = Episodes(train.folder, "val"), {}
    for name, steps in {"probe, present step": 1, f"probe, {T} steps": T}.items():
        if multiplications(steps, train, annotated) > LARGE:
            print(f"{name}: left out, so much data takes it hours", file=sys.stderr)
            continue
        written[name] = probe(steps, train, annotated, val, episodes)
    return written


def windows_of(episodes, tokenizer, T):
    """The true streams in windows: obs (T, D), and tok, step (L,) of its slots."""
    for i in range(len(episodes)):
        tok, step = write_stream(episodes.captions(i), episodes.steps(i), tokenizer)
        for start in range(0, episodes.steps(i) - T + 1, T):
            inside = (step >= start) & (step < start + T)
            obs = episodes.obs(i, start, start + T).float()
            yield obs, torch.from_numpy(tok[inside]), torch.from_numpy(step[inside] - start)


@torch.no_grad()
def predictor_losses(encoder, predictor, episodes, tokenizer, shuffled=False):
    """Mean loss in nats per offset (4, K): on silence, first tokens of captions, the rest, all but
    silence. On the true streams, in windows of T steps; shuffled: with other windows' hidden."""
    T, device = encoder.T, encoder.device
    windows = windows_of(episodes, tokenizer, T)
    total, count = torch.zeros(2, 4, predictor.K)
    while some := list(islice(windows, 32)):
        obs, tok, step = zip(*some, strict=True)
        obs = torch.stack(obs).to(device)
        tok = pad_sequence(tok, batch_first=True, padding_value=-1).to(device)
        step = pad_sequence(step, batch_first=True, padding_value=T - 1).to(device)
        said = tok.where(tok >= 0, SILENCE)
        before = F.pad(said[:, :-1], (1, 0), value=SILENCE)
        hidden = encoder(obs, before, step)
        if shuffled:
            hidden = hidden.roll(len(hidden) // 2, 0)
        blocks = predictor.blocks(tok, -1)  # (B, S, K+1), -1 beyond the window
        inputs, target = blocks[..., :-1].clamp(min=0), blocks[..., 1:]
        logits = predictor.lm.embed_out(predictor(before, hidden, inputs))
        loss = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none", ignore_index=-1)
        spoken = target > SILENCE
        spoken |= target == END
        begins = spoken & (inputs <= SILENCE)
        kinds = target == SILENCE, begins, spoken & ~begins, spoken
        for k, kind in enumerate(kinds):
            total[k] += (loss * kind).sum((0, 1)).cpu()
            count[k] += kind.sum((0, 1)).cpu()
    return total / count.clamp(min=1)


def report(out_dir, split="test", device="auto"):
    """{arm: scores} of a run on a split, and {hidden states: losses of its predictor (4, K)}."""
    encoder, tokenizer, folder, config = load(out_dir, pick_device(device))
    predictor = predictor_of(folder, config, encoder.device)
    episodes, train = Episodes(config["data"], split), Episodes(config["data"], "train")
    annotated = choose_annotated(train, config["n_annotated"], config["seed"])
    arms = {
        "encoder": captions_of(encoder, episodes, tokenizer),
        "observations shuffled": captions_of(encoder, episodes, tokenizer, "shuffled"),
        "observations zeroed": captions_of(encoder, episodes, tokenizer, "zeroed"),
    }
    if annotated:
        if (folder / "reader").exists():
            arms["reader alone"] = reader_alone(episodes, folder / "reader", tokenizer)
        arms |= probes(episodes, train, annotated, encoder.T)
        arms["most frequent caption"] = most_frequent(episodes, train, annotated)
    arms["perfect writer"] = perfect_writer(episodes, tokenizer)
    true = [episodes.captions(i) for i in range(len(episodes))]
    scores = {
        arm: score(true, captions) | dict(bootstrap=bootstrap(true, captions))
        for arm, captions in arms.items()
    }
    losses = {}
    if predictor:
        predictor.stride = config["stride"]
        for name in ("true", "shuffled"):
            args = encoder, predictor, episodes, tokenizer, name == "shuffled"
            losses[name] = predictor_losses(*args).tolist()
    return scores, losses


def bootstrap(true, written, rounds=1000):
    """95 % interval of F1: percentiles over draws of as many episodes (Efron 1979)."""
    pairs = zip(true, written, strict=True)
    counts = np.array([(len(match(t, w)), len(w) + len(t)) for t, w in pairs])  # (E, 2)
    drawn = np.random.default_rng(0).integers(len(counts), size=(rounds, len(counts)))
    hits, said = counts[drawn].sum(1).T
    return np.quantile(2 * hits / np.maximum(said, 1), (0.025, 0.975)).tolist()


def show(scores, losses):
    total = sum(count for _, count in scores["encoder"]["texts"].values())
    print(f"{f'{total} captions of test':24}    F1  exact  words  precision  recall  95 % of F1")
    for arm, row in scores.items():
        cells = f"{row['f1']:5.3f}  {row['f1_exact']:5.3f}  {row['word_f1']:5.3f}"
        cells += f"  {row['precision']:9.3f}  {row['recall']:6.3f}"
        print(f"{arm:24} {cells}  " + "{:.2f} .. {:.2f}".format(*row["bootstrap"]))
    columns = [arm for arm in ("encoder", "reader alone", "perfect writer") if arm in scores]
    print(f"\n{'F1 by caption':24} count" + "".join(f"  {arm:>14}" for arm in columns))
    for text, (_, count) in scores["encoder"]["texts"].items():
        cells = [f"  {scores[arm]['texts'][text][0]:14.2f}" for arm in columns]
        print(f"{text:24} {count:5}" + "".join(cells))
    if losses:
        offsets = "".join(f"  j={j + 1:<3}" for j in range(len(losses["true"][0])))
        print(f"\n{'predictor, loss in nats':24} hidden    {offsets}")
    for k, kind in enumerate(("silence", "first of a caption", "the rest", "all but silence")):
        for name, rows in losses.items():
            print(f"{kind:24} {name:9} " + "".join(f" {x:6.3f}" for x in rows[k]))


def interval(values):
    """Half of the 95 % interval of a mean, Student's t."""
    n = len(values)
    return T_95[n - 2] * np.std(values, ddof=1) / n**0.5 if 1 < n < 11 else float("nan")


def show_many(reports):
    runs = "".join(f"  run {n:<3}" for n in range(len(reports)))
    print(f"{'F1 on test':24}{runs}  mean +- 95 %")
    for arm in reports[0]:
        if not all(arm in scores for scores in reports):
            continue  # of runs with another T, or without annotated episodes
        values = [scores[arm]["f1"] for scores in reports]
        cells = "".join(f"  {value:.3f}  " for value in values)
        print(f"{arm:24}{cells}  {np.mean(values):.3f} +- {interval(values):.3f}")


def main():
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        raise ValueError("python -m bench.report out/crafter [out/another ..]")
    reports = []
    for out_dir in sys.argv[1:]:
        scores, losses = report(out_dir)
        reports.append(scores)
        results = json.dumps(dict(captions=scores, losses=losses), indent=2)
        Path(out_dir, "results.json").write_text(results)
    if len(reports) > 1:
        show_many(reports)
    else:
        show(scores, losses)


if __name__ == "__main__":
    run(main)

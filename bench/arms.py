"""
What is scored beside one another on the episodes of a split: the encoder and its controls, its
reader, baselines; and how well its predictor foretells the true text.
"""

import sys
from collections import Counter
from itertools import islice

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from bench.probe import LARGE, multiplications, probe
from data import END, SILENCE, read_stream, write_stream
from encoder import Reader, written_captions
from runtime.dataset import Caption, Episodes


def captions_of(encoder, episodes, tokenizer, observations="true"):
    """What the encoder writes on each episode, given true, shuffled or zeroed observations."""
    lengths = [episode.steps for episode in episodes]
    other = observations == "shuffled"  # each as long as it was, or as the other is
    obs = (episodes[i - other].window(0, n) for i, n in enumerate(lengths))
    if observations == "zeroed":
        obs = map(torch.zeros_like, obs)
    return written_captions(encoder, obs, tokenizer, max(lengths))


def perfect_writer(episodes, tokenizer):
    """The true captions through a stream and back."""
    streams = [write_stream(e.captions, e.steps, tokenizer) for e in episodes]
    return [read_stream(*stream, tokenizer) for stream in streams]


def most_frequent(episodes, train, annotated):
    """The annotated episodes' most frequent caption, as often as it occurs there."""
    texts = Counter(c.text for i in annotated for c in train[i].captions)
    text, count = texts.most_common(1)[0]
    every = max(sum(train[i].steps for i in annotated) // count, 1)
    lengths = [episode.steps for episode in episodes]
    return [[Caption(t, t + 1, text) for t in range(every // 2, n, every)] for n in lengths]


def reader_alone(episodes, folder, tokenizer):
    """What the run's reader, of which the encoder learned, reads."""
    reader = Reader.from_pretrained(folder, tokenizer)
    return [reader.captions(episode.obs) for episode in episodes]


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
    for episode in episodes:
        tok, step = write_stream(episode.captions, episode.steps, tokenizer)
        for start in range(0, episode.steps - T + 1, T):
            inside = (step >= start) & (step < start + T)
            obs = episode.window(start, start + T).float()
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

"""
Tells what is in a data set, and warns of what will hurt training.

    python -m scripts.show data/crafter
"""

from configurator import docstring, run
import difflib
import glob
import os
import re
import sys
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from data import Tokenizer
from encoder import MOST
from runtime.dataset import Episodes
from runtime.shards import ABSURD, absurd, absurd_warning
from scripts.oddities import MANY, alike, at_most, views

SPLITS = "train", "val", "test"
READ = 2**30  # bytes of observations read for the statistics; of more, every n-th episode


def observation_statistics(splits):
    """Mean, deviation, least and largest value of each dim (D,), of how many episodes, and
    warnings of absurd numbers, which are left out of the four."""
    every = [episode for episodes in splits.values() for episode in episodes]
    obs_dim = next(iter(splits.values())).meta["obs_dim"]
    size = sum(4 * obs_dim * episode.steps for episode in every)
    some = every[:: size // READ + 1]
    count, total, square = 0, 0, 0
    least, most = torch.tensor(np.inf), torch.tensor(-np.inf)
    # or a large mean swallows the deviation
    shift = some[0].obs.double().median(0).values
    warnings = []
    for episode in tqdm(some, desc="reading", leave=False, disable=None):
        x = episode.obs
        low, high = x.amin(0), x.amax(0)
        if max(-low.double().min(), high.max()) > ABSURD:
            x = x.double()
            warnings += absurd_warning(x, episode.id)
            x = x.where(~absurd(x), x.median(0).values)
            low, high = x.amin(0), x.amax(0)
        least, most = torch.minimum(least, low), torch.maximum(most, high)
        x = x.double().sub_(shift)  # in place: so much memory is slow to get anew
        count += len(x)
        total += x.sum(0)
        square += x.square_().sum(0)
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt()
    if len(warnings) > MANY:
        warnings[MANY:] = [f"{len(warnings) - MANY} more episodes hold such numbers"]
    return shift + mean, std, least, most, len(some), warnings


def text_statistics(episodes, tokenizer):
    """What a split's captions become on the stream, as a dict of counts and lists."""
    counts = dict(texts=Counter(), tokens=[], known=0, spoken=0, cut=0)
    for episode in episodes:
        said = Counter()  # tokens and ENDs of each step
        for caption in episode.captions:
            counts["tokens"].append(len(tokenizer.encode(caption.text)))
            counts["texts"][caption.text] += 1
            said[caption.start] += counts["tokens"][-1] + 1
        known = episode.known
        counts["known"] += int(known.sum())
        counts["spoken"] += sum(bool(known[step]) for step in said)
        counts["cut"] += sum(n > MOST for n in said.values())
    return counts


def as_seconds(rate, *steps):
    """Numbers of steps as ' (1.2 to 3 s)'; '' where no rate is known."""
    return " (" + " to ".join(f"{n / rate:g}" for n in steps) + " s)" if rate else ""


def percent(n, total):
    return f"{n} ({100 * n / max(total, 1):.0f} %)"


def show_split(split, episodes, counts):
    """A split in a few lines."""
    steps = [episode.steps for episode in episodes]
    total, rate = sum(steps), episodes.meta["steps_per_second"]
    hours = f", {total / rate / 3600:.2f} hours at {rate:g} steps per second" if rate else ""
    texts, tokens = counts["texts"], counts["tokens"]
    n = texts.total()
    known = percent(counts["known"], total)
    print(f"{split}: {len(steps)} episodes of {min(steps)} to {max(steps)} steps", end="")
    print(f"{as_seconds(rate, min(steps), max(steps))}, {total:,} steps{hours}")
    print(f"  annotated: {known} of the steps; {n} captions, {len(texts)} different")
    if not n:
        return
    silent = percent(counts["known"] - counts["spoken"], counts["known"])
    print(f"  a caption has {np.mean(tokens):.1f} tokens (most: {max(tokens)})", end="; ")
    print(f"silence: {silent} of the annotated steps")
    print("  most frequent:", ", ".join(f"{text} {count}" for text, count in texts.most_common(8)))


def drop_of(mask):
    """The setting of scripts.pack that leaves features out, mask (D,) bool."""
    return "scripts.pack --drop=" + ",".join(map(str, mask.nonzero()[:, 0].tolist()))


def observation_warnings(mean, std, least, most):
    constant, faint = most == least, (most > least) & (std < 1e-2)
    wild = (torch.maximum(most - mean, mean - least) > 100 * std) & (std >= 1e-2)
    for mask, problem in (
        (constant, f"never change, so they say nothing: {drop_of(constant)} leaves them out"),
        (
            faint,
            "have a standard deviation below 0.01, which training does not scale up to 1, so "
            "they count too little: multiply them by a number that does, and pack again",
        ),
        (
            wild,
            "have values more than 100 standard deviations from the mean, beside which the rest "
            "looks constant: mend them if they are mistakes, or pack their logarithm",
        ),
    ):
        dims = mask.nonzero()[:, 0].tolist()
        if dims:
            names = ", ".join(map(str, dims[:8])) + (", .." if len(dims) > 8 else "")
            yield f"{len(dims)} of {len(std)} features (from 0 on: {names}) {problem}"


def text_warnings(counts):
    """counts: {split: what text_statistics says}."""
    for split in SPLITS:
        if split not in counts:
            yield f"no split {split}: train.py needs train, val and test"
        elif not counts[split]["known"]:
            yield f"nothing is annotated in {split}: no words to learn, or no score"
    for split, of_split in counts.items():
        texts = of_split["texts"]
        if of_split["cut"]:
            yield f"{split}: {of_split['cut']} steps have more than the {MOST} tokens written"
        new = texts.keys() - counts.get("train", of_split)["texts"].keys()
        if new:
            yield f"{split}: {len(new)} texts that no training episode has, e.g. {min(new)!r}"


def spelling_warnings(counts):
    """A warning where texts differ by the case of letters, or by a mark at their end, alone."""
    spelt = {}
    for text in sorted({text for of_split in counts.values() for text in of_split["texts"]}):
        spelt.setdefault(text.casefold().rstrip(" .,;:!?"), []).append(text)
    several = [texts for texts in spelt.values() if len(texts) > 1]
    for a, b, *_ in several[:1]:
        yield f"{len(several)} texts are spelt in several ways, as {a!r}, {b!r}: two texts to F1"


def identity_warnings(splits):
    """Episodes that start and end with the same observations, or with those a step later."""
    seen = {
        (split, episode.id): views(episode.window, episode.steps)
        for split, episodes in splits.items()
        for episode in episodes
    }
    kinds = "identical episodes", "equal but for a step"
    for groups, kind in zip(alike(seen), kinds, strict=True):
        warnings = []
        for group in groups:
            leakage = "leakage: " if len({split for split, _ in group}) > 1 else ""
            names = ", ".join(f"{split} {name}" for split, name in group[:4])
            warnings.append(f"{leakage}{kind}: {names}")
        yield from at_most(warnings)


def group_warnings(splits):
    """A warning where episodes named alike up to the last part stand in two splits."""
    groups = {}
    for split, episodes in splits.items():
        for episode in episodes:
            found = re.match(r"(.+)[\W_]", episode.id)
            groups.setdefault(found[1] if found else episode.id, set()).add(split)
    shared = [name for name, of_splits in groups.items() if len(of_splits) > 1]
    if shared and len(groups) > 1:
        which = f"{min(shared)!r} and {len(shared) - 1} more" if shared[1:] else repr(shared[0])
        yield f"episodes of {which} in two splits: one person or day? see scripts.pack --group"


def open_splits(folder):
    """{split: Episodes} of those that are there. Raises ValueError if there is none."""
    if not os.path.isdir(folder):
        near = difflib.get_close_matches(folder, glob.glob("data/*"), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{folder}: no such folder{hint}")
    pattern = glob.escape(folder) + "/{}-?????.safetensors"
    present = [split for split in SPLITS if glob.glob(pattern.format(split))]
    return {split: Episodes(folder, split) for split in present or ["train"]}


def show(folder):
    splits = open_splits(folder)
    first = next(iter(splits.values()))
    meta = first.meta
    origin = "; ".join(f"{key}: {meta.get(key) or 'not told'}" for key in ("source", "licence"))
    print(f"{folder}: {meta['obs_dim']} {meta['dtype']} a step; {origin}")
    every = [episode for episodes in splits.values() for episode in episodes]
    tokenizer = Tokenizer.from_captions(c.text for episode in every for c in episode.captions)
    counts = {split: text_statistics(episodes, tokenizer) for split, episodes in splits.items()}
    for split, episodes in splits.items():
        show_split(split, episodes, counts[split])
    mean, std, least, most, read, warnings = observation_statistics(splits)
    print(
        f"observations ({read} of {len(every)} episodes): values {least.min():.4g} to "
        f"{most.max():.4g}; standard deviation of a feature {std.min():.3g} to {std.max():.3g}, "
        f"median {std.median():.3g}"
    )
    warnings += [
        *observation_warnings(mean, std, least, most),
        *text_warnings(counts),
        *spelling_warnings(counts),
        *identity_warnings(splits),
        *group_warnings(splits),
    ]
    for warning in warnings or ["none"]:
        print(f"warning: {warning}")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError(docstring(__file__))
    show(sys.argv[1])


if __name__ == "__main__":
    run(main)

"""
Tells what is in a data set, and warns of what will hurt training.

    python data.py show data/crafter
"""
import difflib
import glob
import hashlib
import os
import sys
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from configurator import Fault, stop
from data import SILENCE, Episodes, Tokenizer
from encoder import Projector
from train import brevity

READ = 2 ** 30                            # bytes of observations read for the statistics; of more, every n-th episode
FEW = 4                                   # of 16 dims or more, if brevity leaves no more than this it weighs too little
TOLERANCE = 3                             # steps a caption may wait for another before it counts as late, as in evaluate.py


def hours(steps, rate):
    return f", {steps / rate / 3600:.2f} hours at {rate:g} steps per second" if rate else ""


def observations(splits):
    """Mean, deviation, least and largest value of every dim (D,), of up to READ bytes; and how many episodes that was."""
    every = [(episodes, i) for episodes in splits.values() for i in range(len(episodes))]
    size = sum(4 * episodes.meta["obs_dim"] * episodes.steps(i) for episodes, i in every)
    count, total, square, least, most = 0, 0, 0, torch.tensor(np.inf), torch.tensor(-np.inf)
    for episodes, i in (chosen := tqdm(every[::size // READ + 1], desc="reading", leave=False, disable=None)):
        x = episodes.obs(i).double()
        if not count: shift = x[0]                                                      # or a large mean swallows the deviation
        count, total, square = count + len(x), total + (x - shift).sum(0), square + ((x - shift) ** 2).sum(0)
        least, most = torch.minimum(least, x.amin(0)), torch.maximum(most, x.amax(0))
    mean = total / count
    return shift + mean, (square / count - mean ** 2).clamp(min=0).sqrt(), least, most, len(chosen)


def identical(splits):
    """Episodes whose first and last 32 observations are the same: [[(split, id), ..], ..]."""
    same = {}
    for split, episodes in splits.items():
        for i in range(len(episodes)):
            n = episodes.steps(i)
            key = hashlib.sha256(episodes.obs(i, 0, 32).numpy().tobytes() + episodes.obs(i, max(n - 32, 0), n).numpy().tobytes()).digest()
            same.setdefault((n, key), []).append((split, episodes.records[i]["id"]))
    return [group for group in same.values() if len(group) > 1]


def text(episodes, tokenizer):
    """What a split's captions become on the stream, as a dict of counts and lists."""
    found = dict(texts=Counter(), tokens=[], waits=[], overlap=0, cut=0, silence=0, known=0)
    for i in range(len(episodes)):
        captions, steps = sorted(episodes.captions(i)), episodes.steps(i)
        tok, known = episodes.stream(i, tokenizer)
        found["known"] += int(known.sum())
        found["silence"] += int((known & (tok == SILENCE)).sum())
        found["texts"].update(c.text for c in captions)
        found["overlap"] += sum(b.start < a.end for a, b in zip(captions, captions[1:], strict=False))
        free = 0
        for caption in captions:
            length, start = len(tokenizer.encode(caption.text)) + 1, max(caption.start, free)
            free = start + length
            found["tokens"].append(length - 1)
            found["waits"].append(start - caption.start)
            found["cut"] += free > steps
    return found


def described(split, episodes, found):
    """A split in a few lines."""
    steps = [episodes.steps(i) for i in range(len(episodes))]
    captions, waits = sum(found["texts"].values()), np.array(found["waits"] or [0])
    share = lambda n, of: f"{n} ({100 * n / max(of, 1):.0f} %)"
    duration = hours(sum(steps), episodes.meta["steps_per_second"])
    yield f"{split}: {len(steps)} episodes of {min(steps)} to {max(steps)} steps, {sum(steps):,} steps{duration}"
    yield f"  annotated: {share(found['known'], sum(steps))} of the steps; {captions} captions, {len(found['texts'])} different"
    if not captions: return
    yield (f"  a caption has {np.mean(found['tokens']):.1f} tokens (most: {max(found['tokens'])}); silence: "
           f"{share(found['silence'], found['known'])} of the annotated steps")
    yield f"  {share(found['overlap'], captions)} start before the last has ended; {share(found['cut'], captions)} are cut off by the end"
    yield f"  {share(int((waits > 0).sum()), captions)} wait for another to be written, at most {waits.max()} steps"
    yield "  most frequent: " + ", ".join(f"{text} {n}" for text, n in found["texts"].most_common(8))


def some(dims):
    dims = dims.nonzero()[:, 0].tolist()
    return f"{len(dims)} of the dims (" + ", ".join(map(str, dims[:8])) + (", .." if len(dims) > 8 else "") + ")"


def warnings(splits, found, mean, std, least, most, twins):
    """What will hurt training, a line each."""
    constant, faint = most == least, (most > least) & (std < 1e-2)
    wild = (torch.maximum(most - mean, mean - least) > 100 * std) & (std >= 1e-2)
    if constant.any(): yield f"{some(constant)} never change: leave them out"
    if faint.any(): yield f"{some(faint)} deviate by less than 0.01, where standardising stops: scale them up"
    if wild.any(): yield f"{some(wild)} have values beyond 100 standard deviations, which are clipped: try the logarithm"
    for split in ("train", "val", "test"):
        if split not in splits: yield f"no split {split}: train.py needs train, val and test"
        elif not found[split]["known"]: yield f"nothing is annotated in {split}: no words to learn, or no score"
    for split, told in found.items():
        late, captions = int((np.array(told["waits"]) > TOLERANCE).sum()), sum(told["texts"].values())
        if late > captions / 10:
            yield f"{split}: {late} of {captions} captions wait more than {TOLERANCE} steps: merge or shorten some, or use more steps"
        if told["silence"] < told["known"] / 5: yield f"{split}: less than a fifth of the annotated steps is silence: captions too dense"
        new = set(told["texts"]) - set(found.get("train", told)["texts"])
        if new: yield f"{split}: {len(new)} texts that no training episode has, e.g. {min(new)!r}"
    for group in twins:
        across = len({split for split, _ in group}) > 1
        yield ("leakage: " if across else "") + "identical episodes: " + ", ".join(f"{split} {name}" for split, name in group[:4])


def weighing(episodes):
    """A warning where train.py's default brevity would hide nearly all of the dims."""
    projector = Projector(episodes.meta["obs_dim"], 1)
    projector.standardise(episodes, brevity)
    weigh, dims = projector.effective(), episodes.meta["obs_dim"]
    if dims >= 16 and weigh < FEW: yield f"{dims} dims weigh as {weigh:.1f} at --brevity={brevity:g}, the default of train.py: try 0"


def main(arguments):
    try: return tell(arguments)
    except Fault as fault: stop(str(fault))


def tell(arguments):
    if {"-h", "--help"} & set(arguments) or len(arguments) != 1:
        print(__doc__.strip())
        return not {"-h", "--help"} & set(arguments)
    folder = arguments[0]
    if not os.path.isdir(folder):
        near = difflib.get_close_matches(folder, glob.glob("data/*"), 1)
        stop(f"{folder}: no such folder" + (f"; did you mean {near[0]}?" if near else ""))
    here = [split for split in ("train", "val", "test") if glob.glob(f"{glob.escape(folder)}/{split}-?????.safetensors")]
    splits = {split: Episodes(folder, split) for split in here or ["train"]}
    meta = next(iter(splits.values())).meta
    told = lambda key: f"{key}: {meta.get(key) or 'not told'}"
    print(f"{folder}: {meta['obs_dim']} {meta['dtype']} a step; {told('source')}; {told('licence')}")
    records = [record for episodes in splits.values() for record in episodes.records]
    tokenizer = Tokenizer.from_captions([c["text"] for record in records for c in record["captions"]])
    found = {split: text(episodes, tokenizer) for split, episodes in splits.items()}
    for split, episodes in splits.items(): print(*described(split, episodes, found[split]), sep="\n")
    mean, std, least, most, read = observations(splits)
    middle, of = std.median().item(), sum(map(len, splits.values()))
    print(f"observations ({read} of {of} episodes): values {least.min():.4g} to {most.max():.4g}; "
          f"standard deviation of a dim {std.min():.3g} to {std.max():.3g}, median {middle:.3g}")
    hurts = list(warnings(splits, found, mean, std, least, most, identical(splits)))
    hurts += weighing(splits.get("train") or next(iter(splits.values())))
    print(*(f"warning: {line}" for line in hurts or ["none"]), sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
What is odd about observations, for scripts.pack and scripts.show: episodes that are another one but
for a step, changes that are lost in float32, an array whose second axis may be time.
"""

import hashlib

import numpy as np
import torch

ENDS = 32  # observations at an episode's start and end by which it is known
SHORTEST = 8  # steps of an episode of which a shift tells anything
JITTER = 1e-13  # of a number: smaller changes are rounding
CHUNK = 16384  # steps looked at at a time
MANY = 8  # warnings of one kind


def views(read, steps):
    """Keys of an episode whole, without its first step, and without its last: of two episodes that
    start and end alike they are the same. read(start, stop): observations (n, D)."""
    keys, shifted = [], [(1, steps), (0, steps - 1)]
    late = max(steps - ENDS - 1, 0)
    first, last = read(0, min(ENDS + 1, steps)), read(late, steps)
    for start, stop in [(0, steps)] + shifted * (steps > SHORTEST):
        begin = first[start : min(start + ENDS, stop)]
        end = last[max(start, stop - ENDS) - late : stop - late]
        ends = torch.cat([begin, end]).float().numpy()
        keys.append((stop - start, hashlib.sha256(ends.tobytes()).digest()))
    return keys if keys[1:2] != keys[2:] else keys[:1]  # what stands still is no shift


def alike(episodes):
    """Which of {name: its views} are the same, and which are but for a step: two lists of lists of
    names."""
    groups = {}
    for name, keys in episodes.items():
        for key in keys:
            groups.setdefault(key, []).append(name)
    same, shifted = [], {}
    for key, names in groups.items():
        whole = {episodes[name][0] for name in names}
        if len(names) > 1 and whole == {key}:
            same.append(names)
        elif len(whole) > 1:
            shifted[frozenset(names)] = names
    return same, [*shifted.values()]


def at_most(warnings):
    """The first of many warnings of a kind, and how many more there are."""
    warnings = list(warnings)
    more = [f"{len(warnings) - MANY} more of this kind"] * (len(warnings) > MANY)
    return warnings[:MANY] + more


def sameness(episodes):
    """A line for each of {name: its views} that is another one, whole or but for a step."""
    same, shifted = alike(episodes)
    lines = [f"{a} and {b} are equal: leave one out" for a, b, *_ in same]
    lines += [f"{a} and {b} are equal but for a step: leave one out" for a, b, *_ in shifted]
    return at_most(lines)


def lost_changes(x, kept, stored):
    """The feature of which the largest share of changes is lost in what is stored (N, K) of the
    kept features of x (N, D), and that share. x: numpy or torch; stored: torch."""
    changed, lost = np.zeros((2, len(kept)), int)
    jitter = 0 if np.asarray(x[:1]).dtype.kind in "iu" else JITTER
    for start in range(0, len(x) - 1, CHUNK):
        rows = slice(start, start + CHUNK + 1)
        exact = np.asarray(x[rows], np.float64)[:, kept]
        change = np.abs(np.diff(exact, axis=0)) > jitter * np.abs(exact[1:])
        changed += change.sum(0)
        lost += (change & (stored[rows].diff(dim=0) == 0).numpy()).sum(0)
    share = lost / np.maximum(changed, 1)
    return kept[int(share.argmax())], float(share.max())


def time_is_second(x):
    """Whether the numbers of x (N, D) go on more smoothly along the second axis."""
    x = np.asarray(x, np.float64)
    return np.abs(np.diff(x, axis=1)).mean() < 0.5 * np.abs(np.diff(x, axis=0)).mean()

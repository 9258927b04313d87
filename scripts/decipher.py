"""
Captions for observations that nobody annotated, from text that was never seen beside any.

    python -m scripts.decipher --data=data/mine --text=captions.csv --out=data/deciphered
    python train.py --data=data/deciphered --out_dir=out/deciphered --n_annotated=1000000

The text is a file of captions as scripts.pack takes it, of other episodes of the same kind: what
happened in them, and when, but no observations.

An event is a feature that rises, or falls, by more than it usually changes. A caption is matched
with the event that comes as often, at the same times of an episode, and as long before and after
the captions matched already: the one whose counts differ least from the caption's, by the deviance
of two Poisson rates (Wilks 1938). The clearest caption is matched first. Others may match what it
leaves of an event. A caption that two events fit about as well is left out, and of two captions of
a step the one of the rarer event is kept.

The training episodes get these captions; val and test keep what they have.
"""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import check_range, configure, run
from data import Caption, Episode, Episodes, write_shard
from encoder import shortest_repeat
from runtime.shards import read_meta, write_meta
from scripts.captions import csv_rows, json_rows, read_captions

data = ""  # the data set whose observations are to get captions
text = ""  # .csv or .jsonl of captions of other episodes
out = ""  # folder of the data set that has both
fps = 0.0  # steps per second; with it the captions' times are seconds, else steps

BINS = 20  # of the time since an episode began
MOST = 7  # times in an episode; more count as so many
LAGS = ((0, 0), (1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64))  # steps between two events
APART = 100  # steps between episodes in a row: more than the longest lag
FEWEST = 10  # what is rarer cannot be matched
MARGIN = 10.0  # of deviance, to the next best event: it is e^5 times less likely
NEAR = 3  # steps within which two events are of one thing
LONGEST = 10**6  # steps of an episode of which there is only text


class Marks:
    """What happens in a row of episodes: each mark has a kind, 0 .. n - 1, and a time."""

    def __init__(self, kind, time, n, episodes, length):
        """kind, time (M,): of each mark; episodes: how many, each of `length` steps and a gap."""
        self.kind, self.time, self.n, self.episodes, self.length = kind, time, n, episodes, length

    @classmethod
    def of_episodes(cls, marks, n, length):
        """marks: a pair of arrays for each episode, kinds and steps."""
        kind = np.concatenate([kinds for kinds, _ in marks])
        time = [APART + i * (length + APART) + steps for i, (_, steps) in enumerate(marks)]
        return cls(kind, np.concatenate(time), n, len(marks), length)

    def first_of_runs(self, pause):
        """Of marks of one kind with less than `pause` steps between each, the first."""
        order = np.lexsort((self.time, self.kind))
        kind, time = self.kind[order], self.time[order]
        first = (np.diff(kind, prepend=-1) != 0) | (np.diff(time, prepend=-pause) >= pause)
        return Marks(kind[first], time[first], self.n, self.episodes, self.length)

    def times(self, kind):
        return self.time[self.kind == kind]

    def episode_and_step(self, time):
        return np.divmod(time - APART, self.length + APART)

    def count(self, weights=None):
        """How many marks of each kind, (n,); or the sum of their weights."""
        return np.bincount(self.kind, weights, self.n)

    def near(self, times):
        """Which marks lie within NEAR steps of some times, (M,) bool."""
        return np.isin(self.time, times[:, None] + np.arange(-NEAR, NEAR + 1))

    def rates(self):
        """How many marks at which time of an episode, and in how many episodes there are how many
        of them: (n, BINS + MOST + 1)."""
        episode, step = self.episode_and_step(self.time)
        time_bin = step * BINS // self.length
        counts = np.bincount(self.kind * BINS + time_bin, minlength=self.n * BINS)
        in_episode = np.bincount(
            self.kind * self.episodes + episode, minlength=self.n * self.episodes
        )
        in_episode = in_episode.clip(max=MOST).reshape(self.n, self.episodes)
        histogram = [(in_episode == times).sum(1) for times in range(MOST + 1)]
        return np.stack([*counts.reshape(self.n, BINS).T, *histogram], 1)

    def lags(self, times):
        """How many of these times lie how long before and after marks of each kind, (n, lags)."""
        total = np.zeros(self.episodes * (self.length + APART) + 2 * APART)
        np.add.at(total, times + 1, 1)
        total = total.cumsum()  # how many there are before each step
        counts = []
        for least, most in LAGS:
            counts.append(self.count(total[self.time + most + 1] - total[self.time + least]))
            counts.append(self.count(total[self.time - least + 1] - total[self.time - most]))
        return np.stack(counts, 1)


def deviance(a, n_a, b, n_b):
    """Counts a (A, C) in n_a episodes, b (B, C) in n_b -> (A, B): twice the log of how much
    likelier a rate for each is than one for both, summed over the C counts."""
    a = a[:, None] + 0.5
    b = b[None] + 0.5 * n_b / n_a
    rate = (a + b) / (n_a + n_b)
    return 2 * (a * np.log(a / rate / n_a) + b * np.log(b / rate / n_b)).sum(-1)


def match(said, seen, pause):
    """{kind of caption: (kind of event, its times, margin)}, of Marks of captions and of events.

    Events of a kind with less than `pause` steps between each are one caption.
    """
    matched, explained = {}, np.zeros(0, int)
    while len(matched) < said.n:
        every = with_the_unexplained(seen, explained)
        first = every.first_of_runs(pause)
        texts = [kind for kind in range(said.n) if kind not in matched]
        cost = deviance(said.rates()[texts], said.episodes, first.rates(), first.episodes)
        for kind, (event, times, _) in matched.items():
            counts = said.lags(said.times(kind))[texts]
            cost += deviance(counts, said.episodes, first.lags(times), first.episodes)
            cost[:, event] = np.inf
        cost[:, first.count() < FEWEST] = np.inf
        best = [(*best_event(row, first), kind) for row, kind in zip(cost, texts, strict=True)]
        margin, event, kind = max(best)
        if not margin > MARGIN:
            break
        matched[kind] = event % seen.n, first.times(event), margin
        explained = np.union1d(explained, every.times(event))
    return matched


def with_the_unexplained(seen, explained):
    """Marks of twice as many kinds: the events, and what of each is at no explained time."""
    left = ~np.isin(seen.time, explained)
    kind = np.concatenate((seen.kind, seen.kind[left] + seen.n))
    time = np.concatenate((seen.time, seen.time[left]))
    return Marks(kind, time, 2 * seen.n, seen.episodes, seen.length)


def best_event(cost, seen):
    """How much more the next best event costs that is of another thing, and the best event."""
    best = int(cost.argmin())
    share = seen.count(seen.near(seen.times(best))) / seen.count().clip(min=1)
    return np.where(share < 0.5, cost, np.inf).min() - cost[best], best


# -----------------------------------------------------------------------------
# captions and observations as marks


def read_text(path):
    """A list of captions for each episode of the text."""
    rows = (csv_rows if path.endswith(".csv") else json_rows)(Path(path).read_text("utf-8-sig"))
    steps = {str(row.get("episode")): LONGEST for _, row in rows}
    captions, _ = read_captions(path, steps, fps, "all")
    return list(captions.values())


def find_events(episodes):
    """Kinds and steps of the events of each episode; kind 2 f + 1: feature f rises, 2 f: falls."""
    change = torch.cat([episodes.obs(i).float().diff(dim=0) for i in range(len(episodes))])
    usual = change.std(0).numpy()
    events = []
    for i in tqdm(range(len(episodes)), "looking for events", disable=None):
        change = np.diff(episodes.obs(i).float().numpy(), axis=0)
        step, feature = np.nonzero(np.abs(change) > usual)
        events.append((2 * feature + (change[step, feature] > 0), step + 1))
    return events


def decipher(episodes, said):
    """Captions for each of the episodes, from lists of captions of others. Says what it matched."""
    counts = Counter(caption.text for captions in said for caption in captions)
    texts = [name for name, count in counts.most_common() if count >= FEWEST]
    length = max(episodes.steps(i) for i in range(len(episodes)))
    said = [[c for c in captions if c.text in texts and c.start < length] for captions in said]
    pause = int(min(shortest_repeat(said), LAGS[-1][1]))
    marks = [
        (
            np.array([texts.index(c.text) for c in captions], int),
            np.array([c.start for c in captions], int),
        )
        for captions in said
    ]
    spoken = Marks.of_episodes(marks, len(texts), length)
    kinds = 2 * episodes.meta["obs_dim"]
    seen = Marks.of_episodes(find_events(episodes), kinds, length)
    matched = sorted(match(spoken, seen, pause).items(), key=lambda item: -len(item[1][1]))
    text_at = {}
    for kind, (event, times, margin) in matched:  # the rarest last
        text_at |= dict.fromkeys(times.tolist(), texts[kind])
        moves = f"feature {event // 2} {'rises' if event % 2 else 'falls'}"
        often = counts[texts[kind]] / len(said), len(times) / len(episodes)
        rates = "{:.2f} times an episode in the text, {:.2f} seen".format(*often)
        print(f"{texts[kind]:24} {moves:20} {rates}, margin {margin:.0f}", flush=True)
    captions = [[] for _ in range(len(episodes))]
    for time, name in sorted(text_at.items()):
        episode, step = seen.episode_and_step(time)
        captions[episode].append(Caption(int(step), int(step) + 1, name))
    return captions


# -----------------------------------------------------------------------------
# the data set


def rewrite(episodes, captions, split):
    """Writes the split with these captions (or with its own), in shards as it was."""

    def episode(i):
        record = episodes.records[i]
        known = "all" if captions else record["annotated"]
        own = captions[i] if captions else episodes.captions(i)
        return Episode(record["id"], episodes.obs(i), own, known, episodes.pictures(i))

    shards = itertools.groupby(range(len(episodes)), lambda i: episodes.index[i][0])
    for index, (_, numbers) in enumerate(shards):
        write_shard(out, split, index, [episode(i) for i in numbers])


def main():
    configure(globals())
    for name in ("data", "text", "out"):
        if not globals()[name]:
            raise ValueError(f"--{name} is needed; python -m scripts.decipher --help")
    check_range(globals(), 0, "fps", most=1e6)
    if Path(out, "meta.json").exists():
        raise ValueError(f"{out}: a data set is there; remove it, or choose another --out")
    meta, train = read_meta(data), Episodes(data, "train")
    captions = decipher(train, read_text(text))
    count = sum(map(len, captions))
    if not count:
        raise ValueError(f"{text}: no caption could be matched with an event of {data}")
    Path(out).mkdir(parents=True, exist_ok=True)
    for split in meta["splits"]:
        rewrite(Episodes(data, split), captions if split == "train" else None, split)
    write_meta(out, **{name: value for name, value in meta.items() if name != "format"})
    print(f"{out}: {count} captions in {len(captions)} training episodes")


if __name__ == "__main__":
    run(main)

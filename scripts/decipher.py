"""
Captions for observations that nobody annotated, from text that was never seen beside any.

    python -m scripts.decipher --data=data/mine --text=captions.csv --out=data/deciphered
    python train.py --data=data/deciphered --out_dir=out/deciphered --n_annotated=1000000

The text is a file of captions as scripts.pack takes it, of other episodes of the same kind and
length: what happened in them, and when, but no observations. Its times are seconds where the data
set has a rate, else steps.

An event is a feature that jumps up, or down, in one step. A caption is matched with the event that
comes as often, at the same times of an episode, and as long before and after the captions matched
already: the one whose counts differ least from the caption's, by the deviance of two Poisson rates
(Wilks 1938). The clearest caption is matched first, and stays. Others may match what it leaves of
an event. A caption that two events fit about as well is left out, and of two captions of a step the
one of the rarer event is kept. In episodes that are annotated an event should also be where its
caption is, and nowhere else.

What fits best may still be wrong: see how often a caption is in the text, how often seen, and at
how many of the annotated ones (within 3 steps). The margin is deviance to the next best event.

Training episodes that nobody annotated get these captions, each a step long. All others keep what
they have.
"""

from configurator import check_range, configure, run
import itertools
import sys
from collections import Counter

import numpy as np

from data import shortest_repeat
from runtime.dataset import Caption, Episode, Episodes, choose_annotated, write_shard
from runtime.files import alone, check_empty
from runtime.shards import read_meta, write_meta
from scripts.captions import read_text_file

data = ""  # the data set whose observations are to get captions
text = ""  # .csv or .jsonl of captions of other episodes
out = ""  # folder of the data set that has both
n_annotated = 1000000  # training episodes that keep their captions; more than there are: all
seed = 0  # of their choice, as in train.py

BINS = 20  # of the time since an episode began
MOST = 7  # times in an episode; more count as so many
AFTER = [(0, 0), (1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]  # steps between two events
LAGS = AFTER + [(-most, -least) for least, most in AFTER]  # to the same step twice
JUMP = 6 * 1.4826  # times the median change of a feature: 6 deviations of normal noise
SAMPLE = 16384  # steps whose changes tell the median one
APART = 100  # steps between episodes in a row: more than the longest lag
FEWEST = 10  # what is rarer cannot be matched
DISAGREE = 60.0  # deviance of a caption without its event, or the other way round
MARGIN = 10.0  # of deviance, to the next best event
NEAR = 3  # steps within which two events are of one thing


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
        """How many of these times lie how long after marks of each kind, (n, lags)."""
        total = np.zeros(self.episodes * (self.length + APART) + 2 * APART)
        np.add.at(total, times + 1, 1)
        total = total.cumsum()  # how many there are before each step
        found = [total[self.time + most + 1] - total[self.time + least] for least, most in LAGS]
        return np.stack([self.count(weights) for weights in found], 1)


def deviance(a, n_a, b, n_b):
    """Counts a (A, C) in n_a episodes, b (B, C) in n_b -> (A, B): twice the log of how much
    likelier a rate for each is than one for both, summed over the C counts."""
    a = a[:, None] + 0.5
    b = b[None] + 0.5 * n_b / n_a
    rate = (a + b) / (n_a + n_b)
    return 2 * (a * np.log(a / rate / n_a) + b * np.log(b / rate / n_b)).sum(-1)


def match_events(said, seen, pause, true, known):
    """{kind of caption: (kind of event, its times, margin)}, of Marks of captions and of events.

    Events of a kind with less than `pause` steps between each are one caption. true: Marks of the
    captions that stand beside the events seen; known: Marks of the steps that are annotated.
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
        cost += DISAGREE * disagreements(true, first, known)[texts]
        cost[:, first.count() < FEWEST] = np.inf
        best = [(*best_event(row, first), kind) for row, kind in zip(cost, texts, strict=True)]
        margin, event, kind = max(best)
        if not margin > MARGIN:
            break
        matched[kind] = event % seen.n, first.times(event), margin
        explained = np.union1d(explained, every.times(event))
    return matched


def disagreements(true, seen, known):
    """How many captions of a kind there are more than events of a kind near them, and how many such
    events are at annotated steps, but near no caption: (kinds of captions, kinds of events)."""
    close = seen.near(known.time)
    seen = Marks(seen.kind[close], seen.time[close], seen.n, seen.episodes, seen.length)
    inside = np.isin(seen.time, known.time)
    near = [seen.near(true.times(kind)) for kind in range(true.n)]
    both = np.stack([seen.count(these) for these in near])
    alone = np.stack([seen.count(inside & ~these) for these in near])
    return (true.count()[:, None] - both).clip(min=0) + alone


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
    next_best = cost[(share < 0.5) & np.isfinite(cost)].min(initial=np.inf)
    return (next_best - cost[best] if np.isfinite(next_best) else 0.0), best


# -----------------------------------------------------------------------------
# captions and observations as marks


def changes(episode):
    """Of each feature of an episode since the step before, (N - 1, D) float32."""
    return episode.obs.float().diff(dim=0).numpy()


def smallest_jumps(episodes):
    """The change of each feature beyond which it jumps, (D,): its deviation, and JUMP times its
    median change, which SAMPLE steps tell to a hundredth."""
    steps = sum(episode.steps for episode in episodes)
    n, total, square, some = 0, 0, 0, []
    for episode in episodes:
        change = changes(episode)
        n, total = n + len(change), total + change.sum(0, dtype=float)
        square = square + np.square(change, dtype=float).sum(0)
        some.append(np.abs(change[:: -(-steps // SAMPLE)]))
    std = np.sqrt((square / n - (total / n) ** 2).clip(min=0))
    return np.maximum(std, JUMP * np.median(np.concatenate(some), 0)).astype(np.float32)


def find_events(episodes):
    """Kinds and steps of the events of each episode; 2 f: feature f jumps down, 2 f + 1: up."""
    least, events = smallest_jumps(episodes), []
    for episode in episodes:
        change = changes(episode)
        step, feature = np.nonzero(np.abs(change) > least)
        kind = 2 * feature + (change[step, feature] > 0)
        events.append((kind.astype(np.int32), (step + 1).astype(np.int32)))
    return events


def usable(said, length):
    """The text's captions that start within `length` steps, and are not too rare to be matched."""
    late = [caption.start >= length for captions in said for caption in captions]
    if any(late):
        where = f"start at step {length} or later, where no episode goes on: is it the same unit?"
        where = f"{sum(late)} of {len(late)} captions of the text {where}"
        if 2 * sum(late) > len(late):
            raise ValueError(where)
        print(f"warning: {where}", file=sys.stderr)
    said = [[c for c in captions if c.start < length] for captions in said]
    counts = Counter(caption.text for captions in said for caption in captions)
    return [[c for c in captions if counts[c.text] >= FEWEST] for captions in said]


def marks_of(captions, texts, length):
    """Marks of a list of captions for each episode. What is not among the texts is left out."""
    marks = []
    for in_episode in captions:
        found = [(texts.index(c.text), c.start) for c in in_episode if c.text in texts]
        marks.append(np.array(found, int).reshape(-1, 2).T)
    return Marks.of_episodes(marks, len(texts), length)


def marks_of_known(episodes, annotated, length):
    """Marks, of one kind, of each step that is annotated."""
    steps = [(e.known & (i in annotated)).nonzero()[0] for i, e in enumerate(episodes)]
    return Marks.of_episodes([(0 * known, known) for known in steps], 1, length)


def read_annotated(episodes, annotated, texts):
    """The captions of each episode; none of those that are not annotated."""
    read = [e.known_captions if i in annotated else [] for i, e in enumerate(episodes)]
    other = {caption.text for captions in read for caption in captions} - set(texts)
    if other:
        lacks = f"the text has fewer than {FEWEST} captions {', '.join(sorted(other))}"
        print(f"warning: annotated, but {lacks}: are they the same words?", file=sys.stderr)
    return read


def decipher(episodes, said, annotated):
    """Captions for each of the episodes, from lists of captions of others. Says what it matched.

    annotated: the episodes whose captions may be read, to tell which event is which.
    """
    length = max(episode.steps for episode in episodes)
    said = usable(said, length)
    texts = sorted({caption.text for captions in said for caption in captions})
    spoken = marks_of(said, texts, length)
    kinds = 2 * episodes.meta["obs_dim"]
    seen = Marks.of_episodes(find_events(episodes), kinds, length)
    pause = int(min(shortest_repeat(said), APART))
    true = marks_of(read_annotated(episodes, annotated, texts), texts, length)
    known = marks_of_known(episodes, annotated, length)
    matched = match_events(spoken, seen, pause, true, known)
    text_at = {}
    for kind in sorted(matched, key=lambda kind: -len(matched[kind][1])):  # the rarest last
        event, times, margin = matched[kind]
        text_at |= dict.fromkeys(times.tolist(), texts[kind])
        jumps = f"feature {event // 2} jumps {'up' if event % 2 else 'down'}"
        often = spoken.count()[kind] / len(said), len(times) / len(episodes)
        rates = "{:.2f} times an episode in the text, {:.2f} seen".format(*often)
        found = (true.near(times) & (true.kind == kind)).sum()
        found = f"at {found} of {true.count()[kind]} annotated, " if annotated else ""
        print(f"{texts[kind]:24} {jumps:24} {rates}, {found}margin {margin:.0f}", flush=True)
    captions = [[] for _ in episodes]
    for time, name in sorted(text_at.items()):
        episode, step = seen.episode_and_step(time)
        captions[episode].append(Caption(int(step), int(step) + 1, name))
    return captions


# -----------------------------------------------------------------------------
# the data set


def rewrite(episodes, captions, split):
    """Writes the split in shards as it was. captions: {i: new ones}; other episodes keep theirs."""

    def rewritten(i, e):
        known = "all" if i in captions else e.annotated
        return Episode(e.id, e.obs, captions.get(i, e.captions), known, e.pictures)

    shards = itertools.groupby(enumerate(episodes), lambda pair: pair[1].shard)
    for index, (_, pairs) in enumerate(shards):
        write_shard(out, split, index, [rewritten(*pair) for pair in pairs])


def main():
    configure(globals())
    for name in ("data", "text", "out"):
        if not globals()[name]:
            raise ValueError(f"--{name} is needed; python -m scripts.decipher --help")
    check_range(globals(), 0, "n_annotated")
    check_range(globals(), 0, "seed", most=2**63 - 1)
    check_empty(out)
    meta, train = read_meta(data), Episodes(data, "train")
    said = read_text_file(text, meta["steps_per_second"] or 0)
    annotated = choose_annotated(train, n_annotated, seed)
    if len(annotated) == len(train):
        raise ValueError(f"{data}: all training episodes are annotated; --n_annotated keeps fewer")
    captions = decipher(train, said, annotated)
    new = {i: found for i, found in enumerate(captions) if i not in annotated}
    count = sum(map(len, new.values()))
    if not count:
        raise ValueError(f"{text}: no caption could be matched with an event of {data}")
    with alone(out):
        for split in meta["splits"]:
            rewrite(Episodes(data, split), new if split == "train" else {}, split)
        write_meta(out, **meta)
    print(f"{out}: {count} captions in {len(new)} training episodes; {len(annotated)} keep theirs")


if __name__ == "__main__":
    run(main)

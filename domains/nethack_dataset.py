"""
Recordings of NetHack as a data set: NLD-AA of the NetHack Learning Dataset (Hambro et al. 2022,
arXiv 2211.00539), or your own by nle.

    python -m domains.nethack_dataset --recordings=nle_data --out=data/nethack-recorded

Captions are the top line's messages, when it changes. Observed are the 9x9 cells around the cursor,
the numbers of the last line, and their change, but nothing of the top line.
"""

from configurator import check_range, configure, run
import re
from collections import Counter
from tempfile import TemporaryDirectory

import numpy as np

from domains.nethack_play import tell
from runtime.dataset import Episode, write_shard
from runtime.files import alone, check_empty
from runtime.shards import write_meta

recordings = "nle_data"  # folder of folders with ttyrec files and an xlogfile
out = "data/nethack-recorded"  # folder to write
games = 100  # at most; of them a tenth for val, and a tenth for test
steps = 1000  # of a game, its first screens

NEAR, NUMBERS = 4, 10  # cells on each side; numbers of the last line
VECTOR = np.random.default_rng(12345).normal(size=(256, 16, 16))  # of a character in a colour
LIST = r"(--More--|\((end|\d+ of \d+)\))\s*$"  # before the cursor below a list on the map


def read(name, screens, colors, cursors):
    """Screens (N, 24, 80), their colours, and the cursor's (row, column) (N, 2) -> Episode."""
    obs, captions, told, before = [], [], "", None
    for step, (screen, color) in enumerate(zip(screens, colors, strict=True)):
        row, column = cursors[step]
        lines = [bytes(line).decode("latin-1") for line in screen]
        top = lines[0].replace("--More--", "").strip()
        list_is_shown = row > 0 and re.search(LIST, lines[row][:column])
        if top != told and not list_is_shown:
            captions += tell(step, [top])
        told = top
        cells = np.pad(VECTOR[screen, color & 15][1:], ((NEAR + 1, NEAR), (NEAR, NEAR), (0, 0)))
        cells = cells[row:, column:][: 2 * NEAR + 1, : 2 * NEAR + 1]
        found = [int(number) for number in re.findall(r"-?\d+", lines[-1])]
        numbers = np.array([*found, *[0] * NUMBERS][:NUMBERS])
        change = numbers - (numbers if before is None else before)
        obs.append(np.concatenate([cells.ravel(), numbers, change]).clip(-1e4, 1e4))
        before = numbers
    return Episode(name, np.stack(obs).astype(np.float16), captions)


def recorded():
    """An Episode of each game recorded."""
    from nle import dataset

    with TemporaryDirectory() as folder:
        index = f"{folder}/index.db"
        dataset.db.create(index)
        dataset.add_nledata_directory(recordings, "recorded", index)
        with dataset.db.db(filename=index) as db:
            ids = sorted(row[1] for row in dataset.db.get_games("recorded", db))
        for game in ids[:games]:
            about = dict(dbfilename=index, gameids=[game], shuffle=False)
            batch = next(iter(dataset.TtyrecDataset("recorded", 1, steps, **about)))
            n = (batch["gameids"][0] == game).sum()  # beyond the game's end it is padded
            shown = (batch[f"tty_{part}"][0, :n] for part in ("chars", "colors", "cursor"))
            yield read(f"game-{game}", *shown)


def main():
    configure(globals())
    check_range(globals(), 1, "games steps")
    check_empty(out)
    with alone(out):
        make()


def make():
    """The data set of all games. Raises ValueError where they are too few."""
    made = Counter()
    for n, episode in enumerate(recorded()):
        split = {0: "test", 1: "val"}.get(n % 10, "train")
        write_shard(out, split, made[split], [episode])
        made[split] += 1
    if len(made) < 3:
        raise ValueError(f"{recordings}: {made.total()} finished games; at least 3 are needed")
    about = dict(source="NetHack recordings (nle)", licence="", splits=["train", "val", "test"])
    write_meta(out, obs_dim=episode.obs.shape[1], dtype="float16", steps_per_second=None, **about)


if __name__ == "__main__":
    run(main)

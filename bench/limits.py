"""
What limits a few labels: fine-tuning on N = 8 annotated episodes, when part of the work is done for the encoder.

    python bench/limits.py --jobs=2           makes the episodes anew, trains, prints the table; goes on where it was interrupted

The same annotated episodes and settings as `finetune` in labels.py, but an observation is only
- change: for each thing in the inventory, whether it has become more, and whether it has become less: perception done by hand;
- events: which of the game's counters went up, before the same event again within 8 steps is merged into one caption;
- captions: which caption starts there: all that is left is to write it, token by token, behind the one before.
"""
import argparse
import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from labels import ARMS, add_row, rows_of, run_train, said  # noqa: E402

from data import Episodes, choose_annotated, write_meta, write_shard  # noqa: E402
from domains import crafter_play  # noqa: E402

DATA, N, KINDS = "data/crafter", 8, ("change", "events", "captions")
PLAN = dict(steps=200, area=36)           # of data/crafter


def marked(starts, steps, names):
    obs = np.zeros((steps, len(names)), np.uint8)
    for start, name in starts: obs[start, names.index(name)] = 1
    return obs


def seen(kind, episode, events, names):
    """The observations (steps, D) of one kind for an episode of data.Episode; events: all (step, name) of it."""
    if kind == "events": return marked(events, len(episode.obs), names)
    if kind == "captions": return marked([(c.start, c.text) for c in episode.captions], len(episode.obs), names)
    change = episode.obs[:, -len(crafter_play.ITEMS):].astype(int) - 9
    return np.concatenate((change > 0, change < 0), 1).astype(np.uint8)


@functools.cache
def replay(world):
    """The episode of a world of data/crafter, and all its events."""
    merged, crafter_play.MERGE = crafter_play.MERGE, 0
    every = crafter_play.play(world, **PLAN)
    crafter_play.MERGE = merged
    captions = crafter_play.events_to_captions([(c.start, c.text) for c in every.captions])
    return every._replace(captions=captions), [(c.start, c.text) for c in every.captions]


def make(folder, seed):
    """A data set per kind whose training episodes are the N that the seed annotates."""
    if (folder / KINDS[-1] / "meta.json").exists(): return
    chosen = {"train": choose_annotated(len(Episodes(DATA, "train")), N, seed), "val": range(5), "test": range(50)}
    found = {}
    for split, some in chosen.items():
        theirs = Episodes(DATA, split)
        for i in some:
            found.setdefault(split, []).append(replay(int(theirs.records[i]["id"].removeprefix("world-"))))
            if found[split][-1][0].captions != theirs.captions(i): sys.exit(f"{DATA} was made by another crafter or with other settings")
    names = sorted({name for episodes in found.values() for _, events in episodes for _, name in events})
    for kind in KINDS:
        for split, episodes in found.items():
            write_shard(folder / kind, split, 0, [e._replace(obs=seen(kind, e, events, names)) for e, events in episodes])
        dims = {"change": 2 * len(crafter_play.ITEMS)}.get(kind, len(names))
        write_meta(folder / kind, obs_dim=dims, dtype="uint8", steps_per_second=None, source="crafter", licence="MIT", splits=list(chosen))


def one_run(kind, seed, args):
    make(args.out / "data" / str(seed), seed)
    row = run_train(ARMS["finetune"], args.updates, n_annotated=N, seed=seed, data=args.out / "data" / str(seed) / kind,
                    out_dir=args.out / f"{kind}-{seed}")
    return dict(observation=kind, seed=seed) | row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/limits"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "limits.csv"
    done = {(row["observation"], row["seed"]) for row in rows_of(path)}
    for seed in options.seeds: make(options.out / "data" / str(seed), seed)
    with ThreadPoolExecutor(options.jobs) as pool:
        todo = [(kind, seed) for seed in options.seeds for kind in KINDS if (kind, seed) not in done]
        for row in pool.map(lambda job: one_run(*job, options), todo): add_row(path, row)
    test = Episodes(options.out / "data" / str(options.seeds[0]) / "events", "test")
    count = sum(int(test.obs(i).sum()) for i in range(len(test))), sum(len(test.captions(i)) for i in range(len(test)))
    print("{:,} events of the test episodes make {} captions".format(*count))
    f1 = {(row["observation"], row["seed"]): row["f1"] for row in rows_of(path)}
    print("fine-tuning on 8 annotated episodes, caption F1 on 50 test episodes\n\n| observation | F1 |\n|---|---|")
    for kind in KINDS: print(f"| {kind} | {said([f1[kind, s] for s in options.seeds if (kind, s) in f1])} |")

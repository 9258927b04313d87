"""
A new domain without a single annotation: captions in world b from annotations in world a alone.

    python bench/transfer.py --jobs=2                     makes the episodes, trains, prints the table; goes on where it was interrupted

World b has another player (its likes are more extreme: it does a few things over and over), a smaller map (24 cells a side instead of
36), and begins 120 steps later, so that night falls. `rotated`: besides, an unknown rotation mixes 30 % of b's observation features.
Runs with the settings of `ours` in labels.py: `a alone` knows 64 annotated and 436 other episodes of a; `ours` also b's 200 episodes,
observations only; `ceiling` has 64 of b annotated too. `statistics` is a control: fine-tuning on a's annotations, where b's observations
have a part in the projector's mean, scale and brevity alone. All are scored on b's 50 test episodes.
"""
import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import labels  # noqa: E402
from labels import add_row, rows_of, run_train, said  # noqa: E402

from data import Episode, Episodes, write_meta, write_shard  # noqa: E402
from domains import crafter_play  # noqa: E402

WORLDS, ARMS, ANNOTATED, SHARE = ("plain", "rotated"), ("a alone", "statistics", "ours", "ceiling"), 64, 0.3


def rotation(D, seed=0):
    """An orthogonal matrix (D, D) that mixes SHARE of the features and leaves the others."""
    rng, Q = np.random.default_rng(seed), np.eye(D, dtype=np.float32)
    mixed = rng.permutation(D)[:int(SHARE * D)]
    Q[np.ix_(mixed, mixed)] = np.linalg.qr(rng.normal(size=(len(mixed), len(mixed))))[0]
    return torch.from_numpy(Q)


def combine(folder, a, b, arm, seed, Q):
    """Training episodes of a, with those of b unless arm is 'a alone'; validation and test of b. Captions stay where the arm has them."""
    if (folder / "meta.json").exists(): return
    def part(name, split, n_annotated, turn):
        episodes = Episodes(name, split)
        chosen = set(np.random.default_rng(seed).permutation(len(episodes))[:n_annotated].tolist())
        for i in range(len(episodes)):
            kept = episodes.captions(i) if i in chosen else []
            obs = (episodes.obs(i) @ turn if turn is not None else episodes.obs(i)).half()
            yield Episode(f"{Path(name).name}-{episodes.records[i]['id']}", obs, kept, "all" if i in chosen else [])

    write_shard(folder, "train", 0, list(part(a, "train", ANNOTATED, None)))
    if arm != "a alone": write_shard(folder, "train", 1, list(part(b, "train", ANNOTATED * (arm == "ceiling"), Q)))
    for split in ("val", "test"): write_shard(folder, split, 0, list(part(b, split, 10 ** 6, Q)))
    write_meta(folder, obs_dim=Episodes(a, "train").meta["obs_dim"], dtype="float16", steps_per_second=None, source="crafter, two players",
               licence="Crafter is MIT licensed (c) Danijar Hafner", splits=["train", "val", "test"])


def one_run(world, arm, seed, args):
    name = f"{world}-{arm.replace(' ', '-')}-{seed}"
    Q = rotation(Episodes(args.b, "test").meta["obs_dim"]) if world == "rotated" else None
    combine(args.out / "data" / name, args.a, args.b, arm, seed, Q)
    settings = labels.ARMS["finetune" if arm == "statistics" else "ours"]
    row = run_train(settings, args.updates, n_annotated=10 ** 6, seed=seed, data=args.out / "data" / name, out_dir=args.out / name)
    return dict(world=world, arm=arm, seed=seed, **row)


def report(path, seeds):
    f1 = {(row["world"], row["arm"], row["seed"]): row["f1"] for row in rows_of(path)}
    print("caption F1 in world b\n\n| | " + " | ".join(ARMS) + " | share of the gap that ours closes |\n|---|" + "---|" * (len(ARMS) + 1))
    for world in WORLDS:
        columns = [[f1[world, arm, seed] for seed in seeds if (world, arm, seed) in f1] for arm in ARMS]
        if not all(columns): continue
        alone, _, ours, ceiling = map(np.mean, columns)
        print(f"| {world} | " + " | ".join(map(said, columns)) + f" | {(ours - alone) / (ceiling - alone):.2f} |")
        for column, arm in zip(columns[:2], ARMS, strict=False):
            print(f"{world}: ours minus {arm}, paired: {said(np.subtract(columns[2], column), '+')}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/transfer"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.a, options.b, path = "data/crafter", options.out / "b", options.out / "transfer.csv"
    crafter_play.make(options.b, train=200, val=20, test=50, area=24, first_seed=2_000_000, begin=120, taste=0.5)
    done = {(row["world"], row["arm"], row["seed"]) for row in rows_of(path)}
    todo = [(w, arm, s) for w in WORLDS for s in options.seeds for arm in ARMS if (w, arm, s) not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda job: one_run(*job, options), todo): add_row(path, row)
    report(path, options.seeds)

"""
What annotated episodes buy: each arm with 0 .. 128 of them, on worlds that nothing has seen.

    python -m bench.labels --arm=ours --annotated=8 --seed=0     trains and scores one cell
    python -m bench.labels --arm="ours with text" --annotated=0  none: what scripts.decipher finds
    python -m bench.labels                                       the table of all that were scored

Every cell is a run of train.py on Crafter with the flags below, in out/labels. It is scored on 50
episodes of fresh worlds. A seed is another choice of annotated episodes, other weights, and where
there is text, that of 250 other worlds.
For what a policy network sees (domains/crafter_latents.py) add --data=data/crafter-latents
--fresh=data/crafter-latents-fresh --out=out/labels-latents.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench.report import captions_of, interval, reader_alone
from configurator import check_range, configure, run
from data import Episodes, choose_annotated, score
from sample import load

arm = ""  # which arm to run; '': none, only the table
annotated = 8  # episodes that keep their captions
seed = 0  # of the run
out = "out/labels"  # folder of runs and of scores.jsonl
data = "data/crafter"  # what is trained on
fresh = "data/crafter-fresh"  # what is scored
flags = ""  # more flags of train.py, which count more than the arm's

FRESH = "data/crafter-fresh"
ALL = 10**6
FINE_TUNING = "--pseudo_labels=False --predict_weight=0 --feature_power="
ARMS = {
    "ours": "",
    "ours with text": "--eval_interval=400",  # once, so val chooses nothing
    "without the predictor": "--predict_weight=0",
    "without gradient from it": "--detach=True",
    "without pseudo-labels": "--pseudo_labels=False",
    "without feature weights": "--feature_power=0",
    "fine-tuning": FINE_TUNING + "10",  # better than 4
    "plain fine-tuning": FINE_TUNING + "0",
}


def fresh_episodes():
    """50 episodes from worlds whose seeds no other data set has."""
    if not Path(FRESH, "meta.json").exists():
        from domains import crafter_play

        crafter_play.make(FRESH, train=0, val=0, test=50, first_seed=1_000_000)
    return Episodes(fresh, "test")


def text_alone(worlds=250):
    """A file of the captions of worlds that nothing else has, a line each."""
    folder, path = Path(f"data/crafter-text-{seed}"), Path(out, f"text-{seed}.jsonl")
    if not Path(folder, "meta.json").exists():
        from domains import crafter_play

        first = 2_000_000 + worlds * seed
        crafter_play.make(folder, train=worlds, val=0, test=0, first_seed=first)
    episodes = Episodes(folder, "train")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for i in range(len(episodes)):
            for caption in episodes.captions(i):
                about = dict(episode=episodes.records[i]["id"], **caption._asdict())
                file.write(json.dumps(about) + "\n")
    return path


def deciphered():
    """The data set with captions that were deciphered, but for those of the annotated episodes."""
    folder = Path(out, f"deciphered-{annotated}-{seed}")
    if not Path(folder, "meta.json").exists():
        command = f"-m scripts.decipher --data={data} --text={text_alone()} --out={folder}"
        command += f" --n_annotated={annotated} --seed={seed}"
        if subprocess.run([sys.executable, *command.split()]).returncode:
            sys.exit(2)  # it has said why
    return folder


def cell():
    """Trains one arm, scores it, without the predictor its reader alone as well, and keeps that."""
    folder, n = (deciphered(), ALL) if arm == "ours with text" else (data, annotated)
    train, episodes = Episodes(folder, "train"), fresh_episodes()
    out_dir = Path(out, f"{arm.replace(' ', '-')}-{annotated}-{seed}")
    of_cell = f"--data={folder} --out_dir={out_dir} --n_annotated={n} --seed={seed}"
    command = [sys.executable, "train.py", *f"{of_cell} {ARMS[arm]} {flags}".split()]
    if subprocess.run([*command, "--resume"]).returncode:
        sys.exit(2)  # train.py has said why
    encoder, _, tokenizer, config = load(out_dir)
    true = [episodes.captions(i) for i in range(len(episodes))]
    arms = {arm: captions_of(encoder, episodes, tokenizer)}
    if not annotated:
        shuffled = captions_of(encoder, episodes, tokenizer, "shuffled")
        arms[f"{arm}, observations shuffled"] = shuffled
    if arm == "without the predictor":
        some = choose_annotated(train, n, seed)
        arms["reader alone"] = reader_alone(episodes, train, some, tokenizer)
    with open(Path(out, "scores.jsonl"), "a") as file:
        for name, captions in arms.items():
            f1 = score(true, captions)["f1"]
            file.write(json.dumps(dict(arm=name, N=annotated, seed=seed, f1=f1)) + "\n")


def table():
    """Mean F1 of each arm over seeds +- half of its 95 % interval, a column for each N; and by how
    much ours is better, paired by seed."""
    if not Path(out, "scores.jsonl").exists():
        raise ValueError(f"{out}: nothing was scored yet; --arm=ours --annotated=8 is a cell")
    rows = [json.loads(line) for line in open(Path(out, "scores.jsonl"))]
    scores = {}
    for row in rows:
        scores.setdefault(row["arm"], {}).setdefault(row["N"], {})[row["seed"]] = row["f1"]
    counts = sorted({row["N"] for row in rows})
    print(f"{'F1 on fresh worlds':38}" + "".join(f"  {f'N={N}':>15}" for N in counts))
    for name, of_arm in scores.items():
        show(name, [list(of_arm.get(N, {}).values()) for N in counts])
    ours = scores.pop("ours", {})
    print("\nours minus that, by seed")
    for name, of_arm in scores.items():
        pairs = [(ours.get(N, {}), of_arm.get(N, {})) for N in counts]
        show(name, [[a[s] - b[s] for s in a.keys() & b.keys()] for a, b in pairs])


def show(name, cells):
    """A line of the table: the mean of each cell's numbers, and its interval."""
    texts = [f"{np.mean(c):.3f} +- {interval(c):.3f}" if c else "" for c in cells]
    print(f"{name:38}" + "".join(f"  {text:>15}" for text in texts))


def main():
    configure(globals())
    check_range(globals(), 0, "annotated seed")
    if arm and arm not in ARMS:
        raise ValueError(f"--arm={arm}: one of {', '.join(ARMS)}")
    if arm and not annotated and arm != "ours with text":
        raise ValueError("--annotated=0: only --arm='ours with text' has captions then")
    if arm:
        cell()
    table()


if __name__ == "__main__":
    run(main)

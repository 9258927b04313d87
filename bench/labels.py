"""
What annotated episodes buy: each arm with 0 .. 128 of them, on worlds that nothing has seen.

    python -m bench.labels --arm=ours --annotated=8 --seed=0     trains and scores one cell
    python -m bench.labels --arm=reader --annotated=8            its reader alone, in seconds
    python -m bench.labels                                       the table of all that were scored
    python -m bench.labels --plot=docs/labels.svg                and a picture (matplotlib)

Every cell of a run is one of train.py on Crafter with the flags below, in out/labels. It is scored
on 50 episodes of fresh worlds. A seed is another choice of annotated episodes, and other weights.
"with text" knows the captions of 250 other worlds, which were never seen beside an observation.
For captions that tell where and how many, and for what a policy network sees, add
--data=data/crafter-details --out=out/labels-details, or --data=data/crafter-latents (README).
"""

from configurator import check_range, configure, run
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench.arms import captions_of
from bench.intervals import interval
from bench.regression import regression
from data import Tokenizer, match, score
from encoder import choose_reader, load
from runtime.dataset import Episodes, choose_annotated, read_text
from runtime.files import regular_file, replace
from runtime.shards import read_line

arm = ""  # which arm to run; '': none, only the table
annotated = 8  # episodes that keep their captions
seed = 0  # of the run
out = "out/labels"  # folder of runs and of scores.jsonl
data = "data/crafter"  # what is trained on
fresh = "data/crafter-fresh"  # what is scored
plot = ""  # file of a picture to draw: .svg, .png, .pdf; '': none
flags = ""  # more flags of train.py, which count more than the arm's

ALL = 10**6
FINE_TUNING = "--pseudo_labels=False --predict_weight=0"
ARMS = {
    "ours": "",
    "ours, deciphered": "--eval_interval=400",  # once, so val chooses nothing
    "without the predictor": "--predict_weight=0",
    "without gradient from it": "--detach=True",
    "without pseudo-labels": "--pseudo_labels=False",
    "plain fine-tuning": FINE_TUNING,
    "reader": None,  # no run: fitted in seconds
    "reader with text": None,
    "logistic regression": None,
    "logistic regression by word": None,
}
DRAWN = {  # arm: label, colour (Okabe and Ito 2008), marker
    "ours": ("encoder", "#0072b2", "o"),
    "reader": ("its reader", "#56b4e9", "s"),
    "reader with text": ("reader, with text of other episodes", "#009e73", "D"),
    "plain fine-tuning": ("plain fine-tuning", "#d55e00", "^"),
    "logistic regression": ("L1 logistic regression", "#7f7f7f", "v"),
}


def fresh_episodes():
    """50 episodes from worlds whose seeds no other data set has."""
    if not Path(fresh, "meta.json").exists():
        plan = Path(data, "plan.json")
        if not plan.exists():
            raise ValueError(f"{fresh}: no such data set, and {data} is not by crafter_play")
        from domains import crafter_play

        about = dict(details=json.loads(plan.read_text()).get("details", ""), first_seed=1_000_000)
        crafter_play.make(fresh, train=0, val=0, test=50, **about)
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
    said = [(episode.id, caption) for episode in episodes for caption in episode.captions]
    lines = [json.dumps(dict(episode=name) | caption._asdict()) + "\n" for name, caption in said]
    replace(path, lambda beside: beside.write_text("".join(lines)))
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


def trained(train):
    """What a run of train.py writes on the fresh worlds, {name: captions of each}."""
    n = ALL if arm == "ours, deciphered" else annotated
    out_dir = Path(out, f"{arm.replace(', ', '-').replace(' ', '-')}-{annotated}-{seed}")
    of_cell = f"--data={train.folder} --out_dir={out_dir} --n_annotated={n} --seed={seed}"
    command = [sys.executable, "train.py", *f"{of_cell} {ARMS[arm]} {flags}".split()]
    if subprocess.run([*command, "--resume"]).returncode:
        sys.exit(2)  # train.py has said why
    encoder, tokenizer, *_ = load(out_dir)
    arms = {arm: captions_of(encoder, fresh_episodes(), tokenizer)}
    if not annotated:
        shuffled = captions_of(encoder, fresh_episodes(), tokenizer, "shuffled")
        arms[f"{arm}, observations shuffled"] = shuffled
    return arms


def fitted(train, some):
    """What a reader, or a logistic regression, of the annotated episodes reads there."""
    episodes = fresh_episodes()
    if arm.startswith("logistic regression"):
        return regression(train, some, Episodes(data, "val"), episodes, arm.endswith("by word"))
    text = read_text(data) if arm == "reader with text" else []
    captions = [*(train[i].known_captions for i in some), *text]
    tokenizer = Tokenizer.from_captions({c.text for of in captions for c in of})
    reader = choose_reader(train, some, tokenizer, text)
    return [reader.captions(episode.obs) for episode in episodes]


def cell():
    """Scores one arm, and keeps that."""
    train = Episodes(deciphered() if arm == "ours, deciphered" else data, "train")
    some = choose_annotated(train, annotated, seed)
    arms = {arm: fitted(train, some)} if ARMS[arm] is None else trained(train)
    episodes = fresh_episodes()
    true = [episode.captions for episode in episodes]
    said = {caption.text for i in some for caption in train[i].known_captions}
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out, "scores.jsonl"), "a") as file:
        for name, captions in arms.items():
            result = score(true, captions)
            row = dict(arm=name, N=annotated, seed=seed, **recall_of_new(true, captions, said))
            row |= {key: result[key] for key in ("f1", "f1_exact", "word_f1")}
            file.write(json.dumps(row) + "\n")


def recall_of_new(true, written, said):
    """The share of captions found whose text no annotated episode has; none, where there are none
    such."""
    new = [[caption for caption in of if caption.text not in said] for of in true]
    count = sum(map(len, new))
    found = sum(len(match(*pair)) for pair in zip(new, written, strict=True))
    return dict(new=found / count) if count else {}


def read_scores():
    """The rows of all cells. Raises ValueError, where a kill left half a line too."""
    path, rows = Path(out, "scores.jsonl"), []
    if not path.exists():
        raise ValueError(f"{out}: nothing was scored yet; --arm=ours --annotated=8 is a cell")
    kinds = dict(arm=str, N=int, seed=int, f1=float, word_f1=float)
    for n, line in enumerate(regular_file(path).read_bytes().splitlines(), 1):
        row = read_line(line)
        about = {key: type(row.get(key)) for key in kinds} if isinstance(row, dict) else row
        if about != kinds or type(row.get("new", 0.0)) is not float:
            raise ValueError(f"{path}, line {n}: no arm, N, seed, f1, word_f1; remove the line")
        rows.append(row)
    return rows


def table():
    """Mean of each arm over seeds +- half of its 95 % interval, a column for each N: F1, word F1,
    and recall of captions whose text was never annotated; and by how much ours is better, paired
    by seed."""
    rows = read_scores()
    counts, scores = sorted({row["N"] for row in rows}), {}
    titles = dict(f1="F1", word_f1="word F1", new="recall, never annotated")
    for key, title in titles.items():
        print(f"{title + ' on fresh worlds':44}" + "".join(f"  {f'N={N}':>15}" for N in counts))
        scores[key] = {}
        for row in rows:
            of_arm = scores[key].setdefault(row["arm"], {})
            of_arm.setdefault(row["N"], {})[row["seed"]] = row.get(key)
        for name, of_arm in scores[key].items():
            values = [of_arm.get(N, {}).values() for N in counts]
            show(name, [[x for x in of if x is not None] for of in values])
        print()
    ours = scores["f1"].pop("ours", {})
    if ours:
        print("F1 of ours minus that, by seed")
    for name, of_arm in scores["f1"].items() if ours else ():
        pairs = [(ours.get(N, {}), of_arm.get(N, {})) for N in counts]
        show(name, [[a[s] - b[s] for s in a.keys() & b.keys()] for a, b in pairs])


def show(name, cells):
    """A line of the table: the mean of each cell's numbers, and its interval."""
    texts = []
    for numbers in cells:
        mean = f"{np.mean(numbers):.3f}" if numbers else ""
        texts.append(mean + f" +- {interval(numbers):.3f}" if len(numbers) > 1 else mean)
    print(f"{name:44}" + "".join(f"  {text:>15}" for text in texts))


def draw_plot():
    """F1 against annotated episodes: the mean of each arm, from its worst to its best seed."""
    try:
        import matplotlib
    except ImportError:
        remedy = "pip install -r requirements-extra.txt"
        raise ValueError(f"--plot needs matplotlib: {remedy}") from None
    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 11}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    cells = {}  # F1 of each seed, by arm and N
    for row in read_scores():
        if row["N"] and row["arm"] in DRAWN:
            cells.setdefault((row["arm"], row["N"]), []).append(row["f1"])
    every = sorted({N for _, N in cells})
    for name, (label, colour, marker) in DRAWN.items():
        counts = [N for N in every if (name, N) in cells]
        if counts:
            of = [cells[name, N] for N in counts]
            axes.plot(counts, [*map(np.mean, of)], color=colour, marker=marker, label=label)
            spread = [*map(min, of)], [*map(max, of)]
            axes.fill_between(counts, *spread, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, every)
    axes.set(ylim=(0, 1), xlabel="annotated episodes", ylabel="F1 on fresh worlds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    kind = dict(metadata=dict(Date=None)) if plot.endswith(".svg") else {}  # the same again
    figure.savefig(plot, **kind)
    print(plot)


def main():
    configure(globals())
    check_range(globals(), 0, "annotated seed")
    if arm and arm not in ARMS:
        raise ValueError(f"--arm={arm}: one of {', '.join(ARMS)}")
    if arm and not annotated and arm != "ours, deciphered":
        raise ValueError("--annotated=0: only --arm='ours, deciphered' has captions then")
    if arm:
        cell()
    table()
    if plot:
        draw_plot()


if __name__ == "__main__":
    run(main)

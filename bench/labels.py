"""
How many labels captions cost: caption F1 on held-out episodes against the number N of annotated episodes.

    python bench/labels.py --quick                       minutes: N = 8, one seed, 200 updates: shows that it runs, proves nothing
    python bench/labels.py --jobs=2                      the full curve, hours; a csv row per run, goes on where it was interrupted
    python bench/labels.py --only=finetune,ours --N=8    a part of it
    python bench/labels.py --report                      the table and the plot of the rows that are there

Every run is `python train.py` with the settings below, so all arms share observations, tokenizer, warm-up and number of updates. A seed
chooses which episodes are annotated and the initial weights. No arm sees a validation label: the last weights count, and
settings were chosen beforehand, with the same number of trials for each arm (TRIALS), on the val split, at N = 8 and seed 100.
"""
import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from data import Caption, Episodes, choose_annotated  # noqa: E402

SIZES, SEEDS, TRIALS = (2, 8, 32, 128), range(5), 3
OURS = "--self_weight=0.5 --predict_weight=0.5"
ARMS = dict(
    finetune="--predict_weight=0 --annotated_fraction=1.0",
    pseudo="--predict_weight=0 --self_weight=1.0 --accept=0.9 --accept_unit=token --teacher={teacher} --write_from=0",
    ours=OURS,
    cut=f"{OURS} --cut=True",
)
"""finetune: grounding loss alone. pseudo: a fixed teacher (the finetune run) labels, tokens above a confidence teach a student.
ours: an EMA target writes, captions accepted as a whole teach encoder and predictor. cut: ours, without the gradient from the
predictor to the encoder."""


def knn(test, train, annotated, k=3, chunk=1024):
    """Each step takes the caption on which most of its k nearest annotated steps agree (a step's label: the caption that starts there)."""
    texts = [None] + sorted({c.text for i in annotated for c in train.captions(i)})
    x = torch.cat([train.obs(i) for i in annotated])
    mean, std = x.mean(0), x.std(0).clamp(min=1e-2)
    scaled = lambda obs: ((obs - mean) / std).clamp(-1, 1)                              # as the encoder's projector sees them
    labels, first = torch.zeros(len(x), dtype=torch.int64), 0
    for i in annotated:
        for c in train.captions(i): labels[first + c.start] = texts.index(c.text)
        first += train.steps(i)
    x, written = scaled(x), []
    for i in range(len(test)):
        nearest = torch.cdist(scaled(test.obs(i)), x).topk(k, largest=False).indices    # (N, k)
        said = labels[nearest].mode(1).values.tolist()
        written.append([Caption(t, t + 1, texts[s]) for t, s in enumerate(said) if s])
    return evaluate.score([test.captions(i) for i in range(len(test))], written)["f1"]


def command(arm, N, seed, args):
    teacher = args.out / f"finetune-{N}-{seed}"
    settings = ARMS[arm].format(teacher=teacher).split()
    shared = dict(n_annotated=N, seed=seed, data=args.data, max_iters=args.updates, eval_interval=args.updates, resume=True)
    shared["out_dir"] = args.out / f"{arm}-{N}-{seed}"
    return [sys.executable, "train.py", *settings, *(f"--{name}={value}" for name, value in shared.items())]


def one_run(arm, N, seed, args):
    done = subprocess.run(command(arm, N, seed, args), cwd=ROOT, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(done.args)}\n{done.stderr[-2000:]}")
    row = json.loads((args.out / f"{arm}-{N}-{seed}/results.json").read_text())["captions"]["encoder"]
    return dict(arm=arm, N=N, seed=seed, updates=args.updates, **{k: round(row[k], 4) for k in ("f1", "precision", "recall", "entropy")})


def rows_of(path):
    if not path.exists(): return []
    return [dict(row, N=int(row["N"]), seed=int(row["seed"]), f1=float(row["f1"])) for row in csv.DictReader(path.open())]


def add_row(path, row):
    new = not path.exists()
    with path.open("a") as f:
        writer = csv.DictWriter(f, row)
        if new: writer.writeheader()
        writer.writerow(row)


def run_all(args):
    done = {(row["arm"], row["N"], row["seed"]) for row in rows_of(args.csv)}
    for stage in (["finetune"], [arm for arm in args.only if arm != "finetune"]):       # the pseudo-labelling teachers come first
        todo = [(arm, N, seed) for seed in args.seeds for N in args.N for arm in stage if arm in args.only and (arm, N, seed) not in done]
        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(lambda job: one_run(*job, args), todo):
                add_row(args.csv, row)
                print(row, flush=True)


T975 = [np.nan, np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]    # of Student's t, by number of values


def interval(values):
    """Mean and half the 95 % interval of at most 10 values."""
    return float(np.mean(values)), float(T975[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan


def labels_needed(curve, f1):
    """The N at which a curve {N: f1} reaches f1, on a log axis; nan outside."""
    sizes = sorted(curve)
    for a, b in zip(sizes, sizes[1:], strict=False):
        if curve[a] <= f1 <= curve[b]:
            share = (f1 - curve[a]) / max(curve[b] - curve[a], 1e-9)
            return float(np.exp(np.log(a) + share * np.log(b / a)))
    return np.nan


def data_advantage(table, arm, N, resamples=1000):
    """How many times fewer labels `arm` needs for finetune's F1 at N (Le Scao & Rush 2021, arXiv 2103.08493): median, 95 % bootstrap."""
    rng, found = np.random.default_rng(0), []
    seeds = sorted(set.intersection(*(set(by_seed) for by_size in table.values() for by_seed in by_size.values())))
    for _ in range(resamples):
        drawn = rng.choice(seeds, len(seeds))
        mean = {name: {n: np.mean([by_seed[s] for s in drawn]) for n, by_seed in table[name].items()} for name in ("finetune", arm)}
        found.append(N / labels_needed(mean[arm], mean["finetune"][N]))
    if np.isnan(found).mean() > 0.05: return None                                       # the curves do not overlap at this F1
    return [float(np.nanpercentile(found, p)) for p in (50, 2.5, 97.5)]


def report(args):
    table = {}
    for row in rows_of(args.csv): table.setdefault(row["arm"], {}).setdefault(row["N"], {})[row["seed"]] = row["f1"]
    train, test = Episodes(args.data, "train"), Episodes(args.data, "test")
    sizes = sorted({n for by_size in table.values() for n in by_size})
    seeds = sorted({s for by_size in table.values() for by_seed in by_size.values() for s in by_seed})
    table["kNN"] = {n: {s: knn(test, train, choose_annotated(len(train), n, s)) for s in seeds} for n in sizes}
    print(f"caption F1 on {len(test)} test episodes, mean +- half the 95 % interval over seeds {seeds}\n")
    print("| arm | " + " | ".join(f"N = {n}" for n in sizes) + " |\n|---|" + "---|" * len(sizes))
    for arm, by_size in table.items():
        cells = [interval(list(by_size[n].values())) if n in by_size else None for n in sizes]
        print(f"| {arm} | " + " | ".join(f"{c[0]:.3f} +- {c[1]:.3f}" if c else "" for c in cells) + " |")
    ours = table.get("ours", {})
    for arm in set(table) - {"ours"}:
        pairs = {n: [ours[n][s] - f1 for s, f1 in table[arm][n].items() if s in ours[n]] for n in table[arm] if n in ours}
        said = ", ".join("N = {}: {:+.3f} +- {:.3f}".format(n, *interval(d)) for n, d in sorted(pairs.items()) if d)
        print(f"ours - {arm}, paired: {said}")
    for n in set(ours) & set(table.get("finetune", {})):
        found = data_advantage({arm: table[arm] for arm in ("ours", "finetune")}, "ours", n)
        said = "the curves do not overlap" if found is None else "{:.1f} ({:.1f} .. {:.1f})".format(*found)
        print(f"data advantage at finetune's F1 with N = {n}: {said}")
    plot(table, args.out / "labels.png")


def plot(table, path):
    try: import matplotlib.pyplot as plt  # noqa: I001
    except ImportError: return print("no plot: `pip install matplotlib` draws one")
    plt.switch_backend("Agg")
    for arm, by_size in table.items():
        sizes = sorted(by_size)
        mean, half = np.array([interval(list(by_size[n].values())) for n in sizes]).T
        plt.errorbar(sizes, mean, half, label=arm, capsize=3)
    plt.xscale("log", base=2)
    plt.xlabel("annotated episodes N")
    plt.ylabel("caption F1, held-out episodes")
    plt.legend()
    plt.savefig(path, dpi=120)
    print(f"plot: {path}")


if __name__ == "__main__":
    numbers = lambda text: [int(x) for x in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N = 8, one seed, 200 updates")
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--N", type=numbers, default=list(SIZES), help="numbers of annotated episodes")
    parser.add_argument("--seeds", type=numbers, default=list(SEEDS))
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ARMS), help=f"arms, of {','.join(ARMS)}")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--data", default="data/crafter")
    parser.add_argument("--out", type=Path, default=Path("out/labels"))
    args = parser.parse_args()
    if args.quick: args.N, args.seeds, args.updates, args.out = [8], [0], 200, args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)
    args.out, args.csv = args.out.resolve(), (args.out / "labels.csv").resolve()
    if not args.report: run_all(args)
    report(args)

"""
How many labels captions cost: caption F1 on held-out episodes against the number N of annotated episodes.

    python bench/labels.py --quick                       minutes: N = 8, one seed, 200 updates: shows that it runs, proves nothing
    python bench/labels.py --jobs=2                      the full curve, an hour; a csv row per run, goes on where it was interrupted
    python bench/labels.py --jobs=2 --ablate             the ablations of ours, at N = 8
    python bench/labels.py --only=finetune,ours --N=8    a part of it
    python bench/labels.py --report                      the table and the plot of the rows that are there
    python bench/labels.py --report --test_seeds         the same on worlds nobody has looked at (made for it)

Every run is `python train.py` with the settings below and its defaults, so all arms share observations, tokenizer, warm-up, number of
updates and of annotated windows in an update. A seed chooses which episodes are annotated and the initial weights. No arm sees a
validation label: the last weights count.
"""
import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import in_context  # noqa: E402

import checkpoint  # noqa: E402
import evaluate  # noqa: E402
from data import Episodes, Tokenizer  # noqa: E402
from encoder import Encoder  # noqa: E402

SIZES, SEEDS = (2, 8, 32, 128), range(5)
OURS = "--through=text --predict_weight=1.0"
ARMS = dict(
    finetune="--predict_weight=0 --self_weight=0 --annotated_fraction=1.0 --batch_size=32",
    pseudo="--predict_weight=0 --accept=0.9 --teacher={teacher} --write_from=0",
    ours=OURS,
    cut=f"{OURS} --cut=True",
)
"""finetune: grounding loss alone. pseudo: a fixed teacher (the finetune run) labels, captions above a confidence teach a student.
ours: an EMA target writes, captions accepted as a whole teach encoder and predictor. cut: ours, without the gradient from the
predictor to the encoder."""
ABLATIONS = {                             # what is changed in ours
    "no predictor": "--predict_weight=0", "no loss_self": "--self_weight=0", "no EMA": "--ema=0", "unsure silence": "--accept_silence=0",
    "through hidden": "--through=hidden", "next spoken": "--ahead=spoken", "K = 1": "--K=1", "K = 4": "--K=4", "K = 16": "--K=16",
    "features hidden": "--drop=0.2", "no brevity": "--brevity=0", "frozen LM": "--freeze=lm"}
VARIANTS = {"latent loss": "latent", "shared weights": "shared"}                        # of ours too, by variants.py
TRIALS = ("tuning trials, on val, N = 8, seeds 100 and 101: some thirty of what all arms share, with finetune; "
          "nine of ours (cut is ours) and nine of pseudo")


def folder(arm, N, seed, args):
    return args.out / f"{arm.replace(' ', '-')}-{N}-{seed}"


def run_train(settings, updates, program=("train.py",), **more):
    """Runs train.py with `settings` (text) and `more`, and returns its row of scores on the test split."""
    more = dict(max_iters=updates, eval_interval=updates, resume=True) | more
    command = [sys.executable, *program, *settings.split(), *(f"--{name}={value}" for name, value in more.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(done.args)}\n{done.stderr[-2000:]}")
    row = json.loads((more["out_dir"] / "results.json").read_text())["captions"]["encoder"]
    log = json.loads((more["out_dir"] / "log.jsonl").read_text().splitlines()[-1])
    right = log.get("target_accepted_right", float("nan"))                              # of the captions it would learn from, on val
    return dict(updates=updates, **{k: round(row[k], 4) for k in ("f1", "precision", "recall", "entropy")}, accepted_right=round(right, 4))


def one_run(arm, N, seed, args):
    settings = ARMS[arm] if arm in ARMS else f"{OURS} {ABLATIONS.get(arm, '')}"
    settings = settings.format(teacher=folder("finetune", N, seed, args))
    program = ("bench/variants.py", VARIANTS[arm]) if arm in VARIANTS else ("train.py",)
    row = run_train(settings, args.updates, program, n_annotated=N, seed=seed, data=args.data, out_dir=folder(arm, N, seed, args))
    return dict(arm=arm, N=N, seed=seed) | row


def rows_of(path):
    if not path.exists(): return []
    kinds = dict(N=int, seed=int, f1=float)
    return [row | {k: kinds[k](row[k]) for k in kinds if k in row} for row in csv.DictReader(path.open())]


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


def fresh_worlds(args):
    """Test episodes from worlds that no run and no person has looked at, and the F1 of every run on them, as a csv of its own."""
    from domains import crafter_play
    where, found = args.out / "fresh", args.out / "fresh.csv"
    crafter_play.make(where, train=1, val=1, test=50, first_seed=1_000_000)
    test, done = Episodes(where, "test"), {(row["arm"], row["N"], row["seed"]) for row in rows_of(found)}
    for row in rows_of(args.csv):
        if (row["arm"], row["N"], row["seed"]) in done: continue
        run = folder(row["arm"], row["N"], row["seed"], args)
        tokenizer = Tokenizer.from_file(checkpoint.chosen(run) / "tokenizer.json")
        f1 = evaluate.captions(Encoder.from_pretrained(run), test, range(len(test)), tokenizer, "cpu")["f1"]
        add_row(found, dict(arm=row["arm"], N=row["N"], seed=row["seed"], f1=round(f1, 4)))
    return found, test


T975 = [np.nan, np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]    # of Student's t, by number of values


def interval(values):
    """Mean and half the 95 % interval of at most 10 values."""
    return float(np.mean(values)), float(T975[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan


def labels_needed(curve, f1):
    """The N at which a curve {N: f1} reaches f1, on a log axis; its smallest if it begins above, nan if it never does."""
    sizes = sorted(curve)
    if f1 < curve[sizes[0]]: return sizes[0]
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
    found, test = fresh_worlds(args) if args.test_seeds else (args.csv, Episodes(args.data, "test"))
    table = {}
    for row in rows_of(found): table.setdefault(row["arm"], {}).setdefault(row["N"], {})[row["seed"]] = row["f1"]
    curves = {arm: table[arm] for arm in ARMS if arm in table}
    sizes = sorted({n for by_size in curves.values() for n in by_size})
    seeds = sorted({s for by_size in curves.values() for by_seed in by_size.values() for s in by_seed})
    curves |= in_context.rows(test, Episodes(args.data, "train"), sizes, seeds, args.icl)
    kind = "fresh" if args.test_seeds else "test"
    print(f"caption F1 on {len(test)} {kind} episodes, mean +- half the 95 % interval over seeds {seeds}; {TRIALS}\n")
    print("| arm | " + " | ".join(f"N = {n}" for n in sizes) + " |\n|---|" + "---|" * len(sizes))
    for arm, by_size in curves.items():
        print(f"| {arm} | " + " | ".join(said(list(by_size[n].values())) if n in by_size else "" for n in sizes) + " |")
    ours = table.get("ours", {})
    print("\n| ours minus, paired | " + " | ".join(f"N = {n}" for n in sizes) + " |\n|---|" + "---|" * len(sizes))
    for arm in [*curves, *(arm for arm in ABLATIONS | VARIANTS if arm in table)]:
        if arm == "ours": continue
        by_size = (curves | table)[arm]
        pairs = {n: [ours[n][s] - f1 for s, f1 in by_size[n].items() if s in ours[n]] for n in by_size if n in ours}
        print(f"| {arm} | " + " | ".join(said(pairs[n], "+") if pairs.get(n) else "" for n in sizes) + " |")
    for n in sorted(set(ours) & set(table.get("finetune", {}))):
        found = data_advantage({arm: table[arm] for arm in ("ours", "finetune")}, "ours", n)
        text = "outside the curve of ours" if found is None else "{:.1f} times fewer ({:.1f} .. {:.1f})".format(*found)
        print(f"data advantage at finetune's F1 with N = {n}: {text}")
    plot(curves, args.out / f"labels-{kind}.png")


def said(values, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.3f} +- {half:.3f}"


def plot(table, path):
    try: import matplotlib.pyplot as plt  # noqa: I001
    except ImportError: return print("no plot: `pip install matplotlib` draws one")
    plt.switch_backend("Agg")
    for arm, by_size in table.items():
        sizes = sorted(by_size)
        mean, half = np.array([interval(list(by_size[n].values())) for n in sizes]).T
        plt.errorbar(sizes, mean, half, label=arm, capsize=3, linestyle="-" if arm in ARMS else ":")
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
    parser.add_argument("--test_seeds", action="store_true", help="report on fresh worlds, made for it")
    parser.add_argument("--ablate", action="store_true", help="the ablations of ours, at N = 8")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--N", type=numbers, default=list(SIZES), help="numbers of annotated episodes")
    parser.add_argument("--seeds", type=numbers, default=list(SEEDS))
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ARMS), help=f"of {','.join(ARMS | ABLATIONS | VARIANTS)}")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--icl", metavar="PYTHIA", help="also prompt this pretrained language model, a folder or a name on the hub")
    parser.add_argument("--data", default="data/crafter")
    parser.add_argument("--out", type=Path, default=Path("out/labels"))
    args = parser.parse_args()
    if args.ablate: args.N, args.only = [8], ["ours", *ABLATIONS, *VARIANTS]
    if args.quick: args.N, args.seeds, args.updates, args.out = [8], [0], 200, args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)
    args.out, args.csv = args.out.resolve(), (args.out / "labels.csv").resolve()
    if not args.report: run_all(args)
    report(args)

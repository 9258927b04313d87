"""
The same run with several seeds, in one table: caption F1 with its 95 % interval, and what the predictor gains from hearing the encoder.

    for s in 0 1 2; do python train.py --seed=$s --out_dir=out/seed-$s; done
    for s in 0 1 2; do python train.py --seed=$s --out_dir=out/deaf-$s --condition=False; done
    python bench/seeds.py 'out/seed-*' --without='out/deaf-*'
"""
import argparse
import glob
import json
from pathlib import Path

import numpy as np
from labels import said

KINDS = {1: "first token of a caption", 3: "all but silence"}                           # rows of evaluate.forecasts


def results(pattern):
    found = [json.loads((Path(folder) / "results.json").read_text()) for folder in sorted(glob.glob(pattern))]
    if not found: raise SystemExit(f"{pattern}: no runs there; see --help")
    return found


def table(*rows):
    for n, row in enumerate(rows):
        print("| " + " | ".join(row) + " |" + ("\n" + "|---" * len(row) + "|") * (n == 0))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", help="pattern of run folders, quoted")
parser.add_argument("--without", help="pattern of the runs with --condition=False, in the same order")
args = parser.parse_args()

runs = results(args.runs)
f1 = {name: [run["captions"][name]["f1"] for run in runs] for name in runs[0]["captions"]}
table(["caption F1", *(f"run {n}" for n in range(len(runs))), "mean +- 95 %"],
      *([name, *(f"{x:.3f}" for x in values), said(values)] for name, values in f1.items()))
if args.without:
    losses = lambda found: np.array([run["forecasts"]["true"] for run in found])         # (runs, 4, K)
    gain = losses(results(args.without)) - losses(runs)
    print("\nloss of a predictor that never hears the encoder, minus this one's, in nats, mean +- 95 %")
    table(["targets", *(f"j = {j + 1}" for j in range(gain.shape[2]))],
          *([name, *(said(gain[:, k, j], "+") for j in range(gain.shape[2]))] for k, name in KINDS.items()))

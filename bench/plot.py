"""
Draws the curves of one or more runs from their log.jsonl.

    python bench/plot.py out/*                               losses, F1, what collapses first; writes out/curves.png

Needs matplotlib (pip install -r requirements-extra.txt); without it the last line of every run is printed as a table.
"""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import may_be_cut  # noqa: E402

PANELS = ("ground", "predict", "self", "f1", "precision", "recall", "silence", "entropy", "distinct", "accepted", "norm", "tokens_per_s")


def read(folders):
    """{run: its log's lines} of the folders that have a log.jsonl."""
    runs = {}
    for folder in map(Path, folders):
        if not (folder / "log.jsonl").exists(): continue
        try: runs[str(folder)] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        except ValueError as error: sys.exit(f"{folder}/log.jsonl: not json lines: {error}")
    return {name: lines for name, lines in runs.items() if lines}


def table(runs):
    shown = [key for key in PANELS if any(key in lines[-1] for lines in runs.values())]
    width = max(map(len, runs))
    print(f"{'run':{width}} {'step':>7} " + " ".join(f"{key:>9.9}" for key in shown))
    for name, lines in runs.items():
        cells = (f"{lines[-1][key]:9.3f}" if isinstance(lines[-1].get(key), (int, float)) else " " * 9 for key in shown)
        print(f"{name:{width}} {lines[-1]['step']:7} " + " ".join(cells))


def draw(runs, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = [key for key in PANELS if any(key in line for lines in runs.values() for line in lines)]
    figure, axes = plt.subplots(-(-len(shown) // 3), 3, figsize=(14, 3 * -(-len(shown) // 3)), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown):]: axis.remove()
    for axis, key in zip(axes.flat, shown, strict=False):
        for i, (name, lines) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
            if points: axis.plot(*zip(*points, strict=True), marker=".", color=f"C{i}", label=name)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    print(f"drew {len(shown)} curves of {len(runs)} runs: {path}")


def main(folders):
    if {"-h", "--help"} & set(folders): sys.exit(print(__doc__.strip()))
    runs = read(folders)
    if not runs: sys.exit(f"no log.jsonl in {' '.join(folders) or 'no folder'}: name runs, e.g. python bench/plot.py out/*")
    table(runs)
    try: draw(runs, os.path.join(os.path.commonpath([str(Path(name).parent) for name in runs]), "curves.png"))
    except ImportError: print("pip install -r requirements-extra.txt draws the curves (matplotlib)")


if __name__ == "__main__":
    may_be_cut()
    main(sys.argv[1:])

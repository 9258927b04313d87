"""
Runs beside each other: F1 on their test episodes, how surely one is better, and what was set.

    python -m bench.compare out/a out/b [out/c ..]

A row a run. Intervals hold 95 % of 1000 draws of the test episodes. "minus the first" draws the
same episodes for both, so what is hard for both cancels out: an interval beyond 0 tells them apart
on other such episodes, but not from another seed.
"""

from configurator import docstring, run
import sys

from bench.arms import captions_of
from bench.intervals import counts_of, f1_of, percentiles, resampled
from encoder import load
from runtime.dataset import Episodes
from runtime.distributed import pick_device

APART = {"out_dir", "resume", "device", "wandb"}  # settings that change no result


def scored(out_dir):
    """Settings of a run, its test episodes' true captions, and their counts (E, 2)."""
    encoder, tokenizer, _, config = load(out_dir, pick_device("auto"))
    episodes = Episodes(config["data"], "test")
    true = [episode.captions for episode in episodes]
    return config, true, counts_of(true, captions_of(encoder, episodes, tokenizer))


def differing(configs):
    """Of each of the settings {name: value}, those that are not the same in all, as text."""
    names = [name for name in {k: 0 for config in configs for k in config} if name not in APART]
    differ = [name for name in names if len({repr(c.get(name)) for c in configs}) > 1]
    return [" ".join(f"{name}={c[name]}" for name in differ if name in c) for c in configs]


def rows(runs):
    """F1, its interval, and the same of the difference to the first, of runs' counts (E, 2)."""
    first, draws = f1_of(runs[0]), resampled(runs[0])
    for counts in runs:
        f1, drawn = f1_of(counts), resampled(counts)
        yield f1, percentiles(drawn), f1 - first, percentiles(drawn - draws)


def main():
    out_dirs = sys.argv[1:]
    if len(out_dirs) < 2 or any(out_dir.startswith("-") for out_dir in out_dirs):
        raise ValueError(docstring(__file__))
    configs, true, counts = zip(*map(scored, out_dirs), strict=True)
    for out_dir, captions in zip(out_dirs, true, strict=True):
        if captions != true[0]:
            raise ValueError(f"{out_dir}: other test episodes than those of {out_dirs[0]}")
    width = max(map(len, [*out_dirs, "run"]))
    print(f"{'run':{width}}     F1  95 %             minus the first  95 %               settings")
    for n, (f1, (low, high), gain, (least, most)) in enumerate(rows(counts)):
        beside = f"{gain:+15.3f}  {least:+.3f} .. {most:+.3f}" if n else ""
        cells = f"{out_dirs[n]:{width}}  {f1:.3f}  {low:.3f} .. {high:.3f}  {beside:34}"
        print(cells, "", differing(configs)[n])


if __name__ == "__main__":
    run(main)

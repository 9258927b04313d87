"""
Writes README.md into the best checkpoint of a run: its data and settings, how good it is, and how
to load it. Best after `python -m bench.report out/mine`, which measures F1 by caption.

    python -m scripts.card out/mine
"""

from configurator import run
import json
import sys
from pathlib import Path

from data import Episodes
from runtime import checkpoint
from runtime.files import read_json, replace
from runtime.shards import read_meta

SCORES = "f1", "f1_exact", "word_f1", "precision", "recall"
MOST = 100  # captions listed

CARD = """\
# {name}

It reads observations of {obs_dim} numbers a step{rate}, and says what happens in them, as captions.

## Load it

Beside the code that wrote it, with the name under which it was published in the place of the path:

```python
from runtime.pretrained import find_checkpoint; from encoder import Encoder; import data
folder = find_checkpoint("{folder}")
encoder = Encoder.from_pretrained(folder)
tok, step, prob = encoder.annotate(obs)  # (B, steps, {obs_dim}) float32, as in the data set
captions = data.read_stream(tok[0], step[0], data.Tokenizer.from_file(folder / "tokenizer.json"))
```

To publish it: `hf upload you/{name} {folder} --exclude state.pt`.

## How good it is

{scores}

A caption is right if a true one of the same text starts within 3 steps; exact: at the very step;
words: texts need only share words.

## Data

{data}

## Settings

```python
{settings}
```
"""


def table(columns, rows):
    """Lines of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(x).replace("|", "\\|").replace("<", "&lt;") for x in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def on_validation(out_dir, step):
    """The scores of a step as training logged them."""
    log = Path(out_dir, "log.jsonl")
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    row = next((json.loads(x) for x in lines if checkpoint.logged_step(x) == step), {})
    return [f"{row[name]:.3f}" if name in row else "" for name in SCORES]


def scores_of(out_dir, folder):
    """Tables of the scores on validation and, where bench.report measured it, on the test."""
    rows = [["validation", *on_validation(out_dir, int(folder.name[5:]))]]
    results = Path(out_dir, "results.json")
    stamp = (folder / "checksums.json").stat().st_mtime
    if not results.is_file() or results.stat().st_mtime < stamp:
        hint = f"python -m bench.report {out_dir}; python -m scripts.card {out_dir}"
        print(f"F1 by caption is not in it: {hint}", file=sys.stderr)
        return table(["episodes", *SCORES], rows)
    arms = read_json(results)["captions"]
    for arm in ("encoder", "reader alone", "observations shuffled"):
        if arm in arms:
            rows.append([f"test, {arm}", *(f"{arms[arm][name]:.3f}" for name in SCORES)])
    texts = list(arms["encoder"]["texts"].items())
    by_text = [[text, count, f"{f1:.2f}"] for text, (f1, count) in texts[:MOST]]
    return f"{table(['episodes', *SCORES], rows)}\n\n{table(['caption', 'of test', 'F1'], by_text)}"


def describe(folder):
    """A data set: what meta.json says, and how much of it each split has."""
    lines, meta = [], read_meta(folder)
    for split in meta["splits"]:
        episodes = Episodes(folder, split)
        every = range(len(episodes))
        steps = sum(episodes.steps(i) for i in every)
        texts = sum(len(episodes.captions(i)) for i in every)
        lines.append(f"- {split}: {len(episodes)} episodes, {steps:,} steps, {texts:,} captions")
    about = [f"- {key}: {meta.get(key) or 'not told'}" for key in ("source", "licence")]
    return "\n".join([f"`{folder}`", "", *about, *lines]), meta


def write_card(out_dir):
    """Returns the path of the card."""
    folder, config = checkpoint.open_best(out_dir)
    data, meta = describe(config["data"])
    rate = meta["steps_per_second"]
    card = CARD.format(
        name=Path(out_dir).resolve().name,
        folder=folder,
        obs_dim=meta["obs_dim"],
        rate=f" ({rate:g} steps a second)" if rate else "",
        scores=scores_of(out_dir, folder),
        data=data,
        settings="\n".join(f"{name} = {value!r}" for name, value in config.items()),
    )
    path = folder / "README.md"
    replace(path, lambda beside: beside.write_text(card, encoding="utf-8"))
    return path


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError(__doc__.strip())
    print(write_card(sys.argv[1]))


if __name__ == "__main__":
    run(main)

"""
Writes README.md into the best checkpoint of a run: its data and settings, how good it is, and how
to load it. Best after `python -m bench.report out/mine`, which measures F1 by caption.

    python -m scripts.card out/mine
"""

from configurator import docstring, run
import json
import sys
import zlib
from pathlib import Path

from runtime import checkpoint
from runtime.dataset import Episodes
from runtime.files import read_json, replace
from runtime.log import logged_step
from runtime.shards import read_meta

SCORES = "f1", "f1_exact", "word_f1", "precision", "recall"
MOST = 100  # captions listed
MARK = "by scripts.card, as long as nobody edits it:"

CARD = """\
# {name}

Reads observations of {D} numbers a step{rate} and says what happens. Beside the code that wrote it:

```python
from runtime.pretrained import find_checkpoint; from encoder import Encoder; import data
folder = find_checkpoint("{folder}")
encoder = Encoder.from_pretrained(folder)
tok, step, prob = encoder.annotate(obs)  # obs (B, steps, {D}) float32, as in the data set
captions = data.read_stream(tok[0], step[0], data.Tokenizer.from_file(folder / "tokenizer.json"))
```

Once published (`hf upload you/{name} {folder} --exclude state.pt`), its name stands for the path.

{scores}

Right: a true caption of the text starts within 3 steps; exact: at the step; words: of those shared.

{data}

Settings: {settings}
"""


def table(*rows):
    """Lines of Markdown; the first has the names of the columns."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    cells = [[str(x).replace("|", "\\|").replace("<", "&lt;") for x in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def scores_of(out_dir, folder):
    """Tables of the scores on validation and, where bench.report measured it, on the test."""
    log, results = Path(out_dir, "log.jsonl"), Path(out_dir, "results.json")
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    step, by_text = int(folder.name[5:]), ""
    rows = [("validation", json.loads(x)) for x in lines if logged_step(x) == step]
    if results.is_file() and results.stat().st_mtime > (folder / "checksums.json").stat().st_mtime:
        arms = read_json(results)["captions"]
        rows += [(f"test, {arm}", scores) for arm, scores in arms.items()]
        texts = [[x, n, f"{f1:.2f}"] for x, (f1, n) in arms["encoder"]["texts"].items()]
        by_text = table(["caption", "of test", "F1"], *texts[:MOST])
    else:
        hint = f"python -m bench.report {out_dir}; python -m scripts.card {out_dir}"
        print(f"F1 by caption is not in it: {hint}", file=sys.stderr)
    rows = [[name, *(f"{of[x]:.3f}" for x in SCORES)] for name, of in rows]
    return table(["episodes", *SCORES], *rows) + "\n" + by_text


def about_data(folder, meta):
    """How much of a data set each split has, and what meta.json says of it."""
    lines = [f"- {key}: {meta.get(key) or 'not told'}" for key in ("source", "licence")]
    for split in meta["splits"]:
        episodes = Episodes(folder, split)
        steps = sum(episode.steps for episode in episodes)
        texts = sum(len(episode.captions) for episode in episodes)
        lines.append(f"- {split}: {len(episodes)} episodes, {steps:,} steps, {texts:,} captions")
    return "\n".join([f"Data: `{folder}`", "", *lines])


def write_card(out_dir):
    """Returns the path of the card."""
    folder, config = checkpoint.open_best(out_dir)
    meta = read_meta(config["data"])
    rate = meta["steps_per_second"]
    card = CARD.format(
        name=Path(out_dir).resolve().name,
        folder=folder,
        D=meta["obs_dim"],
        rate=f" ({rate:g} steps a second)" if rate else "",
        scores=scores_of(out_dir, folder),
        data=about_data(config["data"], meta),
        settings=", ".join(f"`{name}={value!r}`" for name, value in config.items()),
    )
    path = folder / "README.md"
    if path.is_file() and not is_ours(path.read_bytes()):
        raise ValueError(f"{path} was edited: move it elsewhere, or remove it")
    card += f"\n<!-- {MARK} {zlib.crc32(card.encode())} -->\n"
    replace(path, lambda beside: beside.write_text(card, encoding="utf-8"))
    return path


def is_ours(content):
    """Whether a card is as it was written here."""
    card, _, mark = content.rpartition(b"\n<!-- ")
    return mark == f"{MARK} {zlib.crc32(card)} -->\n".encode()


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError(docstring(__file__))
    print(write_card(sys.argv[1]))


if __name__ == "__main__":
    run(main)

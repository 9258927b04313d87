"""
Prints the grounded captions of an episode beside the true ones, and what the predictor expects.

    python sample.py                                   an episode of the test split
    python sample.py --out_dir=out/mine --episode=3
    python sample.py --json                            a JSON object per written caption
    python sample.py --html=out/episode.html           a page to look at in a browser

A line per caption: step, true caption, written caption, the encoder's confidence (its least sure
token), and the K tokens that the predictor expects next: "+3 place table" begins three steps on.
"""

import os
import shutil
import subprocess
import sys
from json import dumps
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import configure, run
from data import END, SILENCE, Episodes, Tokenizer, match, read_stream, spans
from encoder import Encoder
from runtime import checkpoint
from runtime.distributed import pick_device
from train import Predictor

out_dir = "out/crafter"  # the run to load
data = ""  # folder of a data set; '': the run's
split = "test"  # which of its splits
episode = 0  # which episode
json = False  # a JSON object per written caption instead of text
html = ""  # file to write a self-contained page to
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'


def load(out_dir, device):
    """The best checkpoint of a run: its folder, settings, tokenizer, encoder, predictor or None."""
    folder = checkpoint.best(out_dir)
    checkpoint.verify(folder)
    config = checkpoint.read_json(folder / "config.json")
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    encoder = Encoder.from_pretrained(folder / "encoder").to(device).eval()
    predictor = None
    if config.get("predict_weight") != 0:
        predictor = Predictor.from_pretrained(folder / "predictor").to(device).eval()
    return folder, config, tokenizer, encoder, predictor


def open_episodes(folder, name, encoder):
    """The split asked for. A run's data set is `name` from here, or from above the run's folder."""
    places = [Path(), *folder.resolve().parents]
    name = data or next((p / name for p in places if (p / name / "meta.json").exists()), name)
    episodes = Episodes(name, split)
    wanted, given = len(encoder.projector.mean), episodes.meta["obs_dim"]
    if wanted != given:
        raise ValueError(f"{name}: {given} numbers a step, {folder} wants {wanted}")
    return episodes


@torch.no_grad()
def forecasts(encoder, predictor, obs, tok):
    """The likeliest next K tokens after every step and their probabilities, two of (N, K).

    obs (1, N, D), tok (1, N) as written, in the windows in which annotate() wrote.
    """
    half, N = encoder.T // 2, tok.shape[1]
    ids, probs = [], []
    for start in range(0, max(N - half, 1), half):
        window = slice(start, start + 2 * half)
        first = tok[:, start - 1] if start else torch.full_like(tok[:, 0], END)
        input_tok = torch.cat((first[:, None], tok[:, window][:, :-1]), 1)
        hidden = encoder(obs[:, window], input_tok)
        # a start per step but the last, so one step more
        input_tok, hidden = F.pad(input_tok, (0, 1)), F.pad(hidden, (0, 0, 0, 1))
        block, p = tok[0, window][None, :, None], []  # (1, S, 1): what each start has just heard
        for _ in range(predictor.K):
            logits = predictor.lm.embed_out(predictor(input_tok, hidden, block)[:, :, -1])
            prob, chosen = logits.float().softmax(-1).max(-1)
            block = torch.cat((block, chosen[..., None]), -1)
            p.append(prob)
        new = slice(half if start else 0, None)
        ids.append(block[0, new, 1:].cpu())
        probs.append(torch.stack(p, -1)[0, new].cpu())
    return torch.cat(ids), torch.cat(probs)


def in_words(ids, under_way, tokenizer):
    """A forecast (K,) as text. under_way: its first tokens may finish a caption."""
    parts = []
    for a, b in spans(ids):
        begin = "..." if a == 0 and under_way else f"+{a + 1} "
        parts.append(begin + tokenizer.decode(ids[a:b]).strip())
    return ", ".join(parts)


def judge(episodes, i, written, prob):
    """All captions of an episode in order of time: dict(kind, text, true, written, sure).

    kind: 'hit', 'missed', 'false', or 'unknown' where nobody annotated; true, written: [start, end]
    or None; sure: probability of the least sure token.
    """
    true, annotated = episodes.captions(i), episodes.records[i]["annotated"]
    hits = {w: t for t, w in match(true, written)}
    rows = [
        dict(kind="missed", text=t.text, true=[t.start, t.end], written=None, sure=None)
        for t in true
        if t not in hits.values()
    ]
    for w in written:
        known = annotated == "all" or any(a <= w.start < b for a, b in annotated)
        kind = "hit" if w in hits else "false" if known else "unknown"
        span = [hits[w].start, hits[w].end] if w in hits else None
        sure = round(prob[w.start : w.end].min().item(), 3)
        rows.append(dict(kind=kind, text=w.text, true=span, written=[w.start, w.end], sure=sure))
    return sorted(rows, key=lambda row: (row["written"] or row["true"])[0])


def read(encoder, predictor, episodes, i, tokenizer):
    """Rows of `judge` with what was expected after each; tok, prob (N,), forecasts (N, K)."""
    obs = episodes.obs(i)[None].to(encoder.projector.mean.device)
    tok, prob = encoder.annotate(obs)
    nothing = torch.zeros(obs.shape[1], 0, dtype=torch.int64)
    ahead = forecasts(encoder, predictor, obs, tok) if predictor else (nothing, nothing)
    tok, prob = tok[0].cpu(), prob[0].cpu()
    rows = judge(episodes, i, read_stream(tok, tokenizer), prob)
    for row in rows:
        start = (row["written"] or row["true"])[0]
        row["expected"] = in_words(ahead[0][start].tolist(), tok[start] > SILENCE, tokenizer)
    return rows, tok, prob, ahead


def as_json(rows, name):
    """The written captions, an object a line, as scripts.pack takes them."""
    for row in rows:
        if row["written"]:
            start, end = row["written"]
            line = dict(episode=name, start=start, end=end, text=row["text"], unit="steps")
            print(dumps(line | {key: row[key] for key in ("kind", "sure", "expected")}))


def as_text(rows):
    """A table as wide as the terminal; piped, as wide as it needs."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    longest = max([7] + [len(row["text"]) for row in rows])
    width = min(longest, max((room - 17) // 2, 7))
    print(f"{'step':>5}  {'true':{width}}  {'written':{width}}  sure  expected next"[:room])
    for row in rows:
        text = row["text"] if len(row["text"]) <= width else row["text"][: width - 1] + "…"
        true, written = (text if row[side] else "" for side in ("true", "written"))
        sure = "" if row["sure"] is None else f"{row['sure']:.2f}"
        start = (row["written"] or row["true"])[0]
        line = f"{start:5}  {true:{width}}  {written:{width}}  {sure:4}  {row['expected']}"
        print(line[:room].rstrip())


def main():
    configure(globals())
    if html:
        here = os.path.dirname(os.path.abspath(__file__))
        environment = os.environ | {"PYTHONPATH": here}
        command = [sys.executable, "-m", "scripts.page", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment).returncode)
    folder, config, tokenizer, encoder, predictor = load(out_dir, pick_device(device))
    episodes = open_episodes(folder, config["data"], encoder)
    if not 0 <= episode < len(episodes):
        raise ValueError(f"--episode={episode}: {split} has episodes 0 .. {len(episodes) - 1}")
    rows, *_ = read(encoder, predictor, episodes, episode, tokenizer)
    name = episodes.records[episode]["id"]
    if json:
        return as_json(rows, name)
    print(f"episode {name} of {episodes.folder}, {split}; {folder}\n")
    as_text(rows)


if __name__ == "__main__":
    run(main)

"""
Shows the grounded captions of episodes beside the true ones, with what the predictor expects to be said next.

    python sample.py                                         an episode of the test split, as text
    python sample.py --out_dir=out/crafter --episode=3
    python sample.py --html=out/episode.html                 one page to look at in a browser
    python sample.py --html=out/index.html --episodes=0-20   an index with scores, and a page for each
    python sample.py --json                                  a JSON object per written caption
    python sample.py --follow < raw                          captions a stream of raw embeddings as it arrives

A line per caption: step, true caption, written caption, the encoder's confidence (its least sure token), and the K tokens the
predictor expects after that step, knowing nothing later: "+3 place table" begins three steps on.
"""
import shutil
import sys
import time
from collections import Counter, deque
from json import dumps, loads
from pathlib import Path

import numpy as np
import torch

import checkpoint
import evaluate
import page
from configurator import Fault, configure, may_be_cut, stop
from data import END, SILENCE, Episodes, Tokenizer, read_stream, spans
from encoder import Encoder
from train import Predictor, pick_device

out_dir = "out/crafter"               # the run to load
data = ""                             # folder of a data set; default: the run's
split = "test"                        # which of its splits
episode = 0                           # which episode
episodes = ""                         # or several: 'first-last', both included
html = ""                             # file to write a self-contained page to
json = False                          # a JSON object per written caption instead of text
recording = ""                        # caption a Minecraft recording: an mp4 with its jsonl beside it, or the stem of one in `recordings`
recordings = "recordings"             # folder that domains/vpt.py downloaded to
weights = "foundation-model-1x.weights"   # of the VPT network the run's data set was made with
follow = False                        # caption a stream: raw embeddings on stdin, step after step
dtype = "float32"                     # of the embeddings on stdin: 'float32' | 'float16'
device = "auto"                       # 'auto' | 'cpu' | 'cuda' | 'mps'


@torch.no_grad()
def forecasts(encoder, predictor, obs, tok):
    """The likeliest next K tokens after every step and their probabilities, (N, K), in the windows in which annotate() wrote.

    obs (1, N, D), tok (1, N) the stream as written.
    """
    half, N, found = encoder.window // 2, tok.shape[1], []
    for start in range(0, max(N - half, 1), half):
        here = slice(start, start + 2 * half)
        prev = tok[:, start - 1] if start else torch.full_like(tok[:, 0], END)
        message = predictor.message(encoder(obs[:, here], tok[:, here], prev), encoder)
        steps = torch.arange(half if start else 0, message.shape[1], device=tok.device)
        found += [predictor.forecast(tok[:, here], prev, message, some) for some in steps.split(32)]
    return [torch.cat(x, 1)[0].cpu() for x in zip(*found, strict=True)]


def in_words(ids, under_way, tokenizer, spoken):
    """A forecast as text; ids (K,). under_way: its first tokens may finish a caption."""
    if spoken: return " ".join(tokenizer.decode(ids[a:b]) for a, b in spans(ids))
    return ", ".join(("..." if a == 0 and under_way else f"+{a + 1} ") + tokenizer.decode(ids[a:b]).strip() for a, b in spans(ids))


def judge(episodes, i, written, prob):
    """All true and written captions of an episode, in order of time, as dict(kind, text, true, written, sure).

    kind: 'hit', 'missed', 'false', or 'unknown' where nobody annotated; true and written: [start, end] or None.
    """
    true, annotated = episodes.captions(i), episodes.records[i]["annotated"]
    hits = {w: t for t, w in evaluate.match(true, written)}
    inside = lambda c: annotated == "all" or any(a <= c.start < b for a, b in annotated)
    rows = [dict(kind="missed", text=t.text, true=[t.start, t.end], written=None, sure=None) for t in true if t not in hits.values()]
    for w in written:
        kind = "hit" if w in hits else "false" if inside(w) else "unknown"
        rows.append(dict(kind=kind, text=w.text, true=[hits[w].start, hits[w].end] if w in hits else None,
                         written=[w.start, w.end], sure=round(prob[w.start:w.end].min().item(), 3)))
    return sorted(rows, key=lambda row: (row["written"] or row["true"])[0])


@torch.no_grad()
def read(encoder, predictor, episodes, i, tokenizer, where):
    """An episode's captions as in `judge` with what was expected after each; the stream (N,), its probabilities (N,); forecasts (N, K)."""
    obs = episodes.obs(i)[None].to(where)
    tok, prob = encoder.annotate(obs)
    ahead = forecasts(encoder, predictor, obs, tok) if predictor else [torch.zeros(len(obs[0]), 0, dtype=torch.int64)] * 2
    tok, prob = tok[0].cpu(), prob[0].cpu()
    rows = judge(episodes, i, read_stream(tok, tokenizer), prob)
    for row in rows:
        start = (row["written"] or row["true"])[0]
        row["expected"] = in_words(ahead[0][start].tolist(), tok[start] > SILENCE, tokenizer, predictor and predictor.ahead == "spoken")
    return rows, tok, prob, ahead


def as_json(rows, name):
    """The written captions, a JSON object each; `python data.py pack` takes them as captions, corrected or not."""
    for row in rows:
        if row["written"]:
            start, end = row["written"]
            print(dumps(dict(episode=name, start=start, end=end, text=row["text"], unit="steps", kind=row["kind"], sure=row["sure"],
                             expected=row["expected"])), flush=True)


def as_text(rows):
    """A table as wide as the terminal; piped, as wide as it needs."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10 ** 6
    width = min(max([7] + [len(row["text"]) for row in rows]), max((room - 17) // 2, 7))
    fit = lambda text: text if len(text) <= width else text[:width - 1] + "…"
    print(f"{'step':>5}  {'true':{width}}  {'written':{width}}  sure  expected next"[:room])
    for row in rows:
        true, written = (fit(row["text"]) if row[side] else "" for side in ("true", "written"))
        sure = "" if row["sure"] is None else f"{row['sure']:.2f}"
        print(f"{(row['written'] or row['true'])[0]:5}  {true:{width}}  {written:{width}}  {sure:4}  {row['expected']}"[:room].rstrip())


def captions_of(stream, tokenizer):
    """From a stream's (token, probability) as they come, each caption when it is complete: (start, end, text, least probability)."""
    ids, sure = [], 1.0
    for t, (token, prob) in enumerate(stream):
        if token > SILENCE or ids and token == END: ids, sure = [*ids, token], min(sure, prob)
        if ids and token <= SILENCE:
            end = t + (token == END)
            yield end - len(ids), end, tokenizer.decode(ids), sure
            ids, sure = [], 1.0
    if ids: yield t + 1 - len(ids), t + 1, tokenizer.decode(ids), sure


def arriving(obs_dim, kind, where, clock):
    """Observations (1, D) from stdin, one after another; clock[0] is when the last one came."""
    size = obs_dim * np.dtype(kind).itemsize
    for step, raw in enumerate(iter(lambda: sys.stdin.buffer.read(size), b"")):
        if len(raw) < size: stop(f"stdin ended inside step {step}: {len(raw)} of its {size} bytes; a step is {obs_dim} numbers of {kind}")
        obs = np.frombuffer(raw, kind).astype(np.float32)
        if not np.isfinite(obs).all(): stop(f"stdin, step {step}: not a finite number; is it {kind}, {obs_dim} numbers a step?")
        clock[0] = time.perf_counter()
        yield torch.from_numpy(obs)[None].to(where)


def written(stream, clock, taken):
    for tok, prob in stream:
        step = tok.item(), prob.item()
        taken.append(time.perf_counter() - clock[0])
        yield step


def follow_stdin(encoder, tokenizer, where):
    """Prints each caption when it is complete, and at the end how long a step took."""
    if dtype not in ("float32", "float16"): stop(f"--dtype={dtype}: one of 'float32', 'float16'")
    if sys.stdin.isatty(): stop("--follow reads raw embeddings from stdin: python sample.py --follow < raw")
    clock, taken = [0.0], deque(maxlen=10_000)               # the latest steps: constant memory
    stream = encoder.follow(arriving(len(encoder.projector.mean), dtype, where, clock))
    for start, end, text, sure in captions_of(written(stream, clock, taken), tokenizer):
        line = dumps(dict(start=start, end=end, text=text, unit="steps", sure=round(sure, 3))) if json else f"{start:5}  {sure:.2f}  {text}"
        print(line, flush=True)
    if taken:
        p50, p99 = np.percentile(taken, (50, 99)) * 1000
        print(f"a step took {p50:.2f} ms (p50), {p99:.2f} ms (p99); latest {len(taken)} steps", file=sys.stderr)


def caption_recording(encoder, tokenizer, where, folder):
    """Prints the captions of one recording straight from its mp4; folder: the data set that the run was trained on."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "domains"))
    from vpt import VPT, embed_recording
    named = Path(recordings, f"{recording}.mp4")
    mp4 = Path(recording) if recording.endswith(".mp4") else next(Path(recordings).rglob(named.name), named)
    try:
        stride = loads((Path(folder) / "made-with.json").read_text())["stride"]
        obs = embed_recording(mp4, mp4.with_suffix(".jsonl"), VPT.from_weights(weights).to(where), stride)
    except (OSError, ValueError, KeyError) as error: stop(f"{mp4}: {error}; --recordings=folder, --weights=file")
    tok, prob = encoder.annotate(obs.float()[None].to(where))
    print(f"{mp4}: {len(obs)} steps of {stride} frames\n\n step  sure  written")
    stream = zip(tok[0].tolist(), prob[0].tolist(), strict=True)
    for start, _, text, sure in captions_of(stream, tokenizer): print(f"{start:5}  {sure:.2f}  {text}")


def chosen(count):
    """The episodes asked for, out of `count`."""
    if not episodes: first = last = episode
    else:
        try: first, last = (int(x) for x in (episodes if "-" in episodes else f"{episodes}-{episodes}").split("-"))
        except ValueError: stop(f"--episodes={episodes}: first-last, for example 0-20")
    asked = f"--episodes={episodes}" if episodes else f"--episode={episode}"
    if not 0 <= first <= last < count: stop(f"{asked}: {split} has episodes 0 .. {count - 1}")
    return range(first, last + 1)


def data_of(run, name):
    """Where a run's data set is: `name` from the working directory, else from the nearest folder above the run that has it."""
    return next((place / name for place in (Path(), *run.resolve().parents) if (place / name / "meta.json").exists()), name)


def main():
    folder = checkpoint.chosen(out_dir)
    checkpoint.verify(folder)
    if bool(json) + bool(html) + follow > 1: stop("one of --json, --html and --follow")
    trained = loads((folder / "config.json").read_text())
    dataset = data or data_of(folder, trained["data"])
    where = pick_device(device)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    encoder = Encoder.from_pretrained(folder / "encoder").to(where).eval()
    if follow: return follow_stdin(encoder, tokenizer, where)
    if recording: return caption_recording(encoder, tokenizer, where, dataset)
    predictor = None if trained.get("predict_weight") == 0 else Predictor.from_pretrained(folder / "predictor").to(where).eval()
    spoken = bool(predictor) and predictor.ahead == "spoken"
    source = Episodes(dataset, split)
    ours, theirs = len(encoder.projector.mean), source.meta["obs_dim"]
    if ours != theirs: stop(f"{source.folder}: observations of {theirs} numbers, but {folder} was trained on {ours}; --data names another")
    pages = []
    for i in chosen(len(source)):
        name = source.records[i]["id"]
        rows, tok, prob, ahead = read(encoder, predictor, source, i, tokenizer, where)
        if json: as_json(rows, name)
        elif html:
            path = page.beside(html, i) if episodes else html
            about = dict(id=name, split=split, source=str(source.folder), run=str(folder), rate=source.meta["steps_per_second"])
            size = page.write(path, about, rows, tok, prob, ahead, spoken, tokenizer, source.pictures(i))
            pages.append(dict(id=name, link=path, steps=len(tok), **Counter(row["kind"] for row in rows)))
            print(f"{path}  {size / 1e6:.1f} MB")
        else:
            print(f"episode {name} of {source.folder}, {split}; {folder}\n")
            as_text(rows)
            if episodes: print()
    if pages and episodes: print(page.write_index(html, f"{source.folder}, {split}; {folder}", pages))


if __name__ == "__main__":
    may_be_cut()
    configure(globals())
    try: main()
    except Fault as fault: stop(str(fault))

"""
One self-contained page per episode: page.html with all that it shows inside, no network.

It shows an episode and corrects its captions; Save downloads them as scripts.pack takes them.

    python -m scripts.page out/mine                      an index of a split, and a page an episode
    python -m scripts.page out/mine --episodes=0-20      of some of its episodes
    python -m scripts.page out/mine --episode=3          one page alone

Without pictures it draws the features that move most, named by the data set's features.txt, a
line each. The index begins with the episodes of which a label would tell most.
"""

from configurator import check_range, configure, run
import base64
import math
import re
import struct
import sys
import zlib
from collections import Counter
from itertools import groupby, pairwise
from json import dumps
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

import sample
from data import END, SILENCE
from encoder import load
from runtime.dataset import Episodes
from runtime.distributed import pick_device
from runtime.files import replace
from runtime.shards import read_line

out_dir = "out/crafter"  # the run to load
data = ""  # folder of a data set; '': the run's
split = "test"  # which of its splits
episodes = ""  # which of its episodes: 'first-last', both included; '': all
episode = ""  # or one alone: its name or its number
html = ""  # file to write; '': pages/<split>.html in the run
min_prob = 0.0  # captions with a less sure token are left out
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'

BUDGET = 10_000_000  # bytes of pictures in a page, at most
TEXTS = 1000  # that complete as one types, at most
NAMES = {END: "(end)", SILENCE: "(silence)"}
FOLDER = Path(__file__).parent


def png_chunk(kind, body):
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png(image):
    """(h, w, 3) uint8 -> the bytes of a PNG file."""
    h, w, _ = image.shape
    rows = np.pad(image.reshape(h, w * 3), ((0, 0), (1, 0)))  # a row starts with its filter, 0
    header = png_chunk(b"IHDR", struct.pack(">2I5B", w, h, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")


def strips(pictures):
    """Pictures (N, h, w, 3) uint8 -> dict(w, h, per, images): `per` pictures in each PNG.

    One under the other, zlib finds the last picture in its window: a third of the size. Halved
    until they fit into BUDGET.
    """
    while True:
        N, h, w, _ = pictures.shape
        per = max(8192 // h, 1)
        images = []
        for a in range(0, N, per):
            strip = png(pictures[a : a + per].reshape(-1, w, 3))
            images.append("data:image/png;base64," + base64.b64encode(strip).decode())
        if sum(map(len, images)) <= BUDGET:
            return dict(w=w, h=h, per=per, images=images)
        pictures = pictures[:, ::2, ::2]


def named_features(folder, D):
    """The lines of the data set's features.txt, a name for each of D features."""
    path = folder / "features.txt"
    if not path.is_file():
        return [f"feature {k}" for k in range(D)]
    names = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if len(names) != D:
        raise ValueError(f"{path}: {len(names)} lines; one for each of the {D} features is wanted")
    return names


def heat_map(features, obs, names):
    """The features of obs (N, D), those that move most first, as many as fit into BUDGET; a byte
    each step: mean +- 2 deviations."""
    mean, scale = features.mean.cpu(), features.scale.cpu()
    z = ((obs.float() - mean) * scale).clamp(-2, 2)  # (N, D)
    heard = z.std(0, correction=0)
    most = max(BUDGET * 3 // 4 // len(z), 1)  # base64 writes 3 bytes as 4
    order = [k for k in heard.argsort(descending=True)[:most].tolist() if heard[k] > 0]
    rows = (z[:, order].T * 63.5 + 127).round().byte().contiguous()
    values = base64.b64encode(zlib.compress(rows.numpy().tobytes(), 6)).decode()
    return dict(names=[names[k] for k in order], values=values)


def silences(captions, annotated, steps):
    """Annotated spans in which no caption stands: [[start, end], ..]; none where all is."""
    silent = np.zeros(steps + 2, np.int8)  # shifted by one, so that spans end inside
    for a, b in [] if annotated == "all" else annotated:
        silent[a + 1 : b + 1] = 1
    for a, b, _ in captions:
        silent[a + 1 : b + 1] = 0
    return np.flatnonzero(np.diff(silent)).reshape(-1, 2).tolist()


def texts_of(source):
    """The texts of a data set, the most frequent first."""
    splits = [Episodes(source.folder, name) for name in source.meta["splits"]]
    texts = Counter(c.text for part in splits for episode in part for c in episode.captions)
    return [text for text, _ in texts.most_common(TEXTS)]


def by_step(stream):
    """The first slot of each of N steps, and where the last ends, (N + 1,); and the probability of
    each step's least sure token (N,)."""
    _, step, prob = stream
    N = int(step[-1]) + 1
    first = torch.searchsorted(step, torch.arange(N + 1))
    return first, torch.ones(N).scatter_reduce(0, step, prob.float(), "amin")


def doubts(stream, ahead):
    """Of 100 steps, how many the encoder would write otherwise, and how many begin otherwise than
    the predictor, if there is one, expects."""
    first, least = by_step(stream)
    ids, probs = (x[:-1, :1] for x in ahead)  # nothing follows the last step
    expected = probs * (ids == stream[0][first[1:-1], None])
    surprise = dict(surprise=100 * (1 - expected).mean().item()) if expected.numel() else {}
    return dict(doubt=100 * (1 - least).mean().item()) | surprise


def as_words(ids, tokenizer):
    """Tokens as text; runs of them are decoded at once, since a letter may be several."""
    parts = []
    for name, same in groupby(ids, NAMES.get):
        same = list(same)
        parts += [name] * len(same) if name else [tokenizer.decode(same).strip()]
    return " ".join(parts)


def fill_page(path, about):
    """Writes page.html with its parts and `about` inside; returns its size in bytes."""
    text = dumps(about, separators=(",", ":"), ensure_ascii=False)
    text = text.replace("<", "\\u003c")  # no caption can end the script

    def part(found):
        return text if found[1] == "data" else (FOLDER / found[1]).read_text(encoding="utf-8")

    page = re.sub("{{(.+?)}}", part, (FOLDER / "page.html").read_text(encoding="utf-8"))
    content = page.encode()
    replace(path, lambda beside: beside.write_bytes(content))
    return len(content)


def pair_near_misses(rows):
    """What is false within 3 steps of something else that was missed gets its text as `near`: of
    those the one with most words in common, then the nearest. Each is taken once."""
    missed = {}  # texts by their start
    for row in rows:
        if row["kind"] == "missed":
            missed.setdefault(row["true"][0], []).append(row["text"])
    for row in (row for row in rows if row["kind"] == "false"):
        start, words, around = row["written"][0], Counter(row["text"].split()), []
        for t in range(start - 3, start + 4):
            for text in missed.get(t, []):
                alike = (words & Counter(text.split())).total()
                around += [(alike, -abs(t - start), t, text)] * (text != row["text"])
        if around:
            *_, t, row["near"] = max(around)
            missed[t].remove(row["near"])


def learning_curves(path):
    """{name: [[step, value], ..]} of the finite numbers in a log.jsonl, where there is one."""
    curves = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        row = read_line(line)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            continue  # half a line, or what is no evaluation
        for name, value in row.items():
            if name != "step" and type(value) in (int, float) and math.isfinite(value):
                curves.setdefault(name, []).append([row["step"], value])
    return curves


def thousandths(p):
    return (p.float() * 1000).round().int().tolist()


def write_page(path, about, rows, stream, ahead, tokenizer, pictures, **more):
    """The page of an episode: what sample.annotate_episode returns, and more: `rate` in steps per
    second, `texts` that complete, `silences`, `features` to draw. Returns its size in bytes."""
    tok, (ids, probs) = stream[0].tolist(), ahead
    first, least = by_step(stream)
    used = {*tok, *ids.flatten().tolist()}
    words = {i: as_words([i], tokenizer) for i in used}
    said = [as_words(tok[a:b], tokenizer) for a, b in pairwise(first.tolist())]
    content = dict(about=about, rows=rows, words=words) | more
    content |= dict(tok=tok, first=first.tolist(), said=said, prob=thousandths(least))
    content |= dict(ahead=ids.tolist(), chance=thousandths(probs))
    content["pictures"] = None if pictures is None else strips(np.asarray(pictures))
    return fill_page(path, content)


def page_of(index, i):
    """Where the page of episode i goes, beside its index."""
    return str(Path(index).with_name(f"{Path(index).stem}-{i}.html"))


def write_index(path, title, rate, pages, curves=None):
    """Links to pages of dict(id, link, steps, hit, missed, false, doubt, and surprise where there
    is a predictor), in the order in which labels would tell; what their rows say together; and
    learning curves. rows: of each caption its step, kind, text, near and sure."""
    pages = [page | dict(link=quote(Path(page["link"]).name)) for page in pages]
    pages.sort(key=lambda page: -page["doubt"] - page.get("surprise", 0))
    fill_page(path, dict(title=title, rate=rate, pages=pages, curves=curves))


def asked_for(source):
    """The numbers of the episodes asked for."""
    if episode:
        return [sample.number_of(source, split, episode)]
    if not episodes:
        return range(len(source))
    first, _, last = episodes.partition("-")
    try:
        first, last = int(first), int(last or first)
    except ValueError:
        raise ValueError(f"--episodes={episodes}: first-last, for example 0-20") from None
    has = f"--episodes={episodes}: {split} has episodes 0 .. {len(source) - 1}"
    if not 0 <= first <= last or first >= len(source):
        raise ValueError(has)
    if last >= len(source):
        print(f"{has}, so it ends there", file=sys.stderr)
    return range(first, min(last + 1, len(source)))


def index_file():
    """Where the index goes; the folder of the default is made."""
    if not html:
        Path(out_dir, "pages").mkdir(exist_ok=True)
    elif not Path(html).parent.is_dir():
        raise ValueError(f"--html={html}: no folder {Path(html).parent}; create it first")
    return html or str(Path(out_dir, "pages", f"{split}.html"))


def main():
    configure(globals(), bare="out_dir")
    check_range(globals(), 0, "min_prob", most=1)
    if episode and episodes:
        raise ValueError("one of --episode and --episodes")
    encoder, tokenizer, folder, config = load(out_dir, pick_device(device))
    predictor, index = sample.predictor_of(folder, config, encoder.device), index_file()
    source = Episodes(data or config["data"], split)
    names, texts = named_features(source.folder, source.meta["obs_dim"]), texts_of(source)
    rate, pages = source.meta["steps_per_second"], []
    for i in asked_for(source):
        name, annotated = source[i].id, source[i].annotated
        steps = source[i].steps
        path = html if html and episode else page_of(index, i)
        rows, stream, ahead = sample.annotate_episode(
            encoder, predictor, source, i, tokenizer, min_prob
        )
        pair_near_misses(rows)
        about = dict(id=name, split=split, source=str(source.folder), run=str(folder))
        pictures = source[i].pictures
        spans = silences(source[i].captions, annotated, steps)
        more = dict(rate=rate, texts=texts, silences=spans)
        if pictures is None:
            more["features"] = heat_map(encoder.projector.features, source[i].obs, names)
        size = write_page(path, about, rows, stream, ahead, tokenizer, pictures, **more)
        print(f"{path}  {size / 1e6:.1f} MB")
        kinds = Counter(row["kind"] for row in rows)
        scores = doubts(stream, ahead) | kinds
        keys = "step", "kind", "text", "near", "sure"
        scores["rows"] = [[row.get(key) for key in keys] for row in rows]
        pages.append(dict(id=name, link=path, steps=steps, **scores))
    if not episode:
        curves = learning_curves(folder.parent / "log.jsonl")
        write_index(index, f"{source.folder}, {split}; {folder}", rate, pages, curves)
        print(index)


if __name__ == "__main__":
    run(main)

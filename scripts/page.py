"""
One self-contained page per episode: page.html with data and pictures inside, no network.

    python -m scripts.page --html=out/episode.html                     an episode of out/crafter
    python -m scripts.page --html=out/index.html --episodes=0-20       an index, and a page for each
"""

import base64
import struct
import zlib
from collections import Counter
from json import dumps
from pathlib import Path

import numpy as np

import sample
from configurator import configure, run
from data import END, SILENCE, Episodes
from runtime.distributed import pick_device

out_dir = "out/crafter"  # the run to load
data = ""  # folder of a data set; '': the run's
split = "test"  # which of its splits
episode = 0  # which episode
episodes = ""  # or several: 'first-last', both included
html = "out/episode.html"  # file to write
json = False  # not with a page
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'

BUDGET = 10_000_000  # bytes of pictures in a page, at most
TEMPLATE = Path(__file__).with_name("page.html")


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


def fill(path, content):
    """Writes the template with `content` inside; returns its size in bytes."""
    text = dumps(content, separators=(",", ":"), ensure_ascii=False)
    text = text.replace("<", "\\u003c")  # no caption can end the script
    page = TEMPLATE.read_text().replace("DATA_GOES_HERE", text, 1).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(page)
    return len(page)


def thousandths(p):
    return (p.float() * 1000).round().int().tolist()


def write(path, about, rows, tok, prob, ahead, tokenizer, pictures):
    """The page of one episode, from what sample.read returns. Returns its size in bytes."""
    ids, probs = ahead
    used = {*tok.tolist(), *ids.flatten().tolist()} - {END, SILENCE}
    words = {END: "(end)", SILENCE: "(silence)"}
    words |= {i: tokenizer.decode([i]).strip() for i in used}
    content = dict(about=about, rows=rows, words=words)
    content |= dict(tok=tok.tolist(), prob=thousandths(prob))
    content |= dict(ahead=ids.tolist(), chance=thousandths(probs))
    content["pictures"] = None if pictures is None else strips(np.asarray(pictures))
    return fill(path, content)


def page_of(index, i):
    """Where the page of episode i goes, beside its index."""
    return str(Path(index).with_name(f"{Path(index).stem}-{i}.html"))


def write_index(path, title, pages):
    """Links and scores of several episodes: pages of dict(id, link, steps, hit, missed, false)."""
    pages = [page | dict(link=Path(page["link"]).name) for page in pages]
    fill(path, dict(title=title, pages=pages))


def chosen(count):
    """The episodes asked for, out of `count`."""
    first, _, last = (episodes or str(episode)).partition("-")
    asked = f"--episodes={episodes}" if episodes else f"--episode={episode}"
    try:
        first, last = int(first), int(last or first)
    except ValueError:
        raise ValueError(f"{asked}: first-last, for example 0-20") from None
    if not 0 <= first <= last < count:
        raise ValueError(f"{asked}: {split} has episodes 0 .. {count - 1}")
    return range(first, last + 1)


def main():
    configure(globals())
    if json:
        raise ValueError("one of --json and --html")
    encoder, predictor, tokenizer, config = sample.load(out_dir, pick_device(device))
    folder = config["folder"]
    source = Episodes(data or sample.data_of(folder, config["data"]), split)
    pages = []
    for i in chosen(len(source)):
        name = source.records[i]["id"]
        path = page_of(html, i) if episodes else html
        rows, tok, prob, ahead = sample.read(encoder, predictor, source, i, tokenizer)
        about = dict(id=name, split=split, source=str(source.folder), run=str(folder))
        about["rate"] = source.meta["steps_per_second"]
        size = write(path, about, rows, tok, prob, ahead, tokenizer, source.pictures(i))
        print(f"{path}  {size / 1e6:.1f} MB")
        kinds = Counter(row["kind"] for row in rows)
        pages.append(dict(id=name, link=path, steps=len(tok), **kinds))
    if episodes:
        write_index(html, f"{source.folder}, {split}; {folder}", pages)
        print(html)


if __name__ == "__main__":
    run(main)

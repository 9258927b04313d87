"""
One self-contained page per episode: page.html with the episode's data and pictures inside, no network, no build step.

    python sample.py --html=out/episode.html                 calls `write`; with --episodes also `write_index`
"""
import base64
import struct
import zlib
from json import dumps
from pathlib import Path

import numpy as np

from data import END, SILENCE

BUDGET = 10_000_000                       # bytes of pictures in a page, at most
TEMPLATE = Path(__file__).with_name("page.html")


def png(image):
    """(h, w, 3) uint8 -> the bytes of a PNG file."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    h, w, _ = image.shape
    rows = np.pad(image.reshape(h, w * 3), ((0, 0), (1, 0)))                            # every row starts with its filter, 0: none
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", w, h, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b""))


def strips(pictures):
    """Pictures (N, h, w, 3) uint8 -> dict(w, h, per, images): PNGs as data URLs, `per` pictures one under the other in each.

    Below one another, zlib finds the last picture in its window: a third of the size. Halved until they fit into BUDGET.
    """
    while True:
        N, h, w, _ = pictures.shape
        per = max(8192 // h, 1)
        images = [base64.b64encode(png(pictures[a:a + per].reshape(-1, w, 3))).decode() for a in range(0, N, per)]
        if sum(map(len, images)) <= BUDGET: return dict(w=w, h=h, per=per, images=["data:image/png;base64," + x for x in images])
        pictures = pictures[:, ::2, ::2]


def fill(path, data):
    """Writes the template with `data` inside to path; returns its size in bytes."""
    text = dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")   # no caption can end the script
    page = TEMPLATE.read_text().replace("DATA_GOES_HERE", text, 1).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(page)
    return len(page)


def write(path, about, rows, tok, prob, ahead, spoken, tokenizer, pictures):
    """The page of one episode; rows, tok (N,), prob (N,) and ahead (two of (N, K)) as from sample.read. Returns its size in bytes."""
    ids, probs = ahead
    words = {i: tokenizer.decode([i]).strip() for i in {*tok.tolist(), *ids.flatten().tolist()} - {END, SILENCE}}
    thousandths = lambda p: (p.float() * 1000).round().int().tolist()
    return fill(path, dict(about=about, rows=rows, words={END: "(end)", SILENCE: "(silence)"} | words, spoken=spoken, tok=tok.tolist(),
                           prob=thousandths(prob), ahead=ids.tolist(), chance=thousandths(probs),
                           pictures=None if pictures is None else strips(np.asarray(pictures))))


def beside(path, i):
    """Where the page of episode i goes, beside its index."""
    return str(Path(path).with_name(f"{Path(path).stem}-{i}.html"))


def write_index(path, title, pages):
    """Links and scores of several episodes: pages of dict(id, link, steps, hit, missed, false)."""
    fill(path, dict(title=title, pages=[p | dict(link=Path(p["link"]).name) for p in pages]))
    return path

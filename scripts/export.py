"""
Writes what an encoder says of a split as subtitles or files of ELAN, one an episode.

    python -m scripts.export out/mine --format=vtt --out=clips     clips/NAME.vtt, beside NAME.mp4
    python -m scripts.export out/mine --format=eaf --out=clips     opens in ELAN with that video

`scripts.pack --captions='clips/*.vtt'` reads them again, at the same steps, and knows that an
encoder wrote them; but a .srt has no place to say so, and counts as a person's.
"""

from configurator import check_range, configure, run
import glob
import html
import math
import mimetypes
import os
import re
from pathlib import Path

from tqdm import tqdm

import sample
from encoder import load
from runtime.dataset import Caption, Episodes
from runtime.distributed import pick_device
from runtime.files import replace
from scripts.annotations import WRITTEN, library

out_dir = "out/crafter"  # the run to load
data = ""  # folder of a data set; '': the run's
split = "test"  # which of its splits
format = "vtt"  # 'vtt' | 'srt' | 'eaf'
out = ""  # folder for the files
videos = ""  # folder of the videos that files of ELAN play; '': the files' own
hold = 2.0  # seconds a subtitle stays, or until the next; 0: a step, which is all a caption has
min_prob = 0.0  # captions with a less sure token are left out
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'

FASTEST = 500  # steps per second: a step takes more than a millisecond, in which the files count
UNSEEN = r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]"  # what no XML may have


def said_by(encoder, episodes, i, tokenizer):
    """The captions that an encoder writes of an episode, in order, without unseen characters."""
    rows, *_ = sample.annotate_episode(encoder, None, episodes, i, tokenizer, min_prob)
    said = [(row["written"], re.sub(UNSEEN, " ", row["text"])) for row in rows if row["written"]]
    return sorted(Caption(*span, " ".join(text.split())) for span, text in said if text.strip())


def held(captions, steps, rate):
    """The same captions, each until the next later one begins, or `hold` seconds."""
    starts = sorted({caption.start for caption in captions}) + [steps]
    until = dict(zip(starts, starts[1:], strict=False))
    room = round(hold * rate)
    return [c._replace(end=max(c.end, min(c.start + room, until[c.start]))) for c in captions]


def milliseconds(caption, rate):
    """Its first millisecond, and the last before its end: no other step has them."""
    start, end = (1000 * step / rate for step in caption[:2])
    return math.ceil(start - 1e-6), math.floor(end + 1e-6)


def subtitles(captions, rate):
    """The text of a .vtt or .srt file."""
    vtt, blocks = format == "vtt", []
    for n, caption in enumerate(captions, 1):
        times = (divmod(ms, 1000) for ms in milliseconds(caption, rate))
        times = (f"{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02},{ms:03}" for s, ms in times)
        line = " --> ".join(times).replace(",", "." if vtt else ",")
        text = caption.text.replace("-->", "->")
        text = html.escape(text, quote=False) if vtt else text
        blocks.append(f"{n}\n{line}\n{text}\n")
    return "\n".join([f"WEBVTT {WRITTEN}\n"] * vtt + blocks)


def write_elan(path, captions, rate, video):
    """A file for ELAN, in whose tiers nothing overlaps; video: the file that it plays, or None."""
    eaf, ends = library("pympi", "pympi-ling").Eaf(author=WRITTEN), {"captions": 0}
    eaf.rename_tier("default", "captions")
    for caption in captions:
        free = [tier for tier, end in ends.items() if end <= caption.start]
        tier = free[0] if free else f"captions {len(ends) + 1}"
        if not free:
            eaf.add_tier(tier)
        ends[tier] = caption.end
        eaf.add_annotation(tier, *milliseconds(caption, rate), caption.text)
    for tier in ends:
        eaf.get_parameters_for_tier(tier)["ANNOTATOR"] = WRITTEN
    if video:
        kind = mimetypes.guess_type(video)[0]
        eaf.add_linked_file(video.resolve().as_uri(), os.path.relpath(video, path.parent), kind)
    eaf.to_file(path)


def write_file(path, captions, steps, rate):
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "eaf":
        beside = Path(videos or path.parent).glob(f"{glob.escape(path.stem)}.*")
        kinds = {x: mimetypes.guess_type(x)[0] or "" for x in beside}
        video = next((x for x, kind in kinds.items() if re.match("video|audio", kind)), None)
        replace(path, lambda hidden: write_elan(hidden, captions, rate, video))
    else:
        text = subtitles(held(captions, steps, rate), rate)
        replace(path, lambda hidden: hidden.write_text(text, encoding="utf-8"))


def paths_for(episodes):
    """Where the file of each episode goes. Raises ValueError rather than replace one."""
    paths = [Path(out, f"{episode.id}.{format}") for episode in episodes]
    for path in paths:
        if not path.resolve().is_relative_to(Path(out).resolve()):
            raise ValueError(f"{path} would not be in {out}: pack with another name")
        if path.exists():
            raise ValueError(f"{path} is there: remove it, or choose another --out")
    return paths


def main():
    configure(globals(), bare="out_dir")
    check_range(globals(), 0, "min_prob", most=1)
    check_range(globals(), 0, "hold")
    if format not in ("vtt", "srt", "eaf") or not out:
        raise ValueError(f"--format={format} --out={out}: 'vtt', 'srt' or 'eaf', and a folder")
    encoder, tokenizer, _, config = load(out_dir, pick_device(device))
    folder = data or config["data"]
    episodes = Episodes(folder, split)
    rate = episodes.meta["steps_per_second"]
    if not rate or rate > FASTEST:
        hint = "pack it with --fps=.." if not rate else f"more than {FASTEST} cannot be told apart"
        raise ValueError(f"{folder}: steps_per_second is {rate}, and files have seconds; {hint}")
    paths, count = paths_for(episodes), 0
    for i, path in enumerate(tqdm(paths, "writing", disable=None)):
        captions = said_by(encoder, episodes, i, tokenizer)
        write_file(path, captions, episodes[i].steps, rate)
        count += len(captions)
    print(f"{len(paths)} files with {count} captions in {out}, such as {paths[0]}")


if __name__ == "__main__":
    run(main)

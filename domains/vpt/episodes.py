"""
For embed.py: the split of a recording, a person's annotations, and a writer that adds episodes to
a data set as they come.
"""

import collections
import csv
import hashlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch

from runtime.dataset import Caption, Episode, record_faults, write_shard
from runtime.distributed import RANK, WORLD
from runtime.files import alone, read_json, regular_file, replace
from runtime.patterns import composed, matching
from runtime.shards import SPLITS, Shard, read_shard, shard_path, shard_paths, write_meta

LONGEST = 1e9  # seconds or frames into a recording: more is a mistake
SHARD = 16  # recordings, then a shard is written
SHARD_SECONDS = 600  # or so long after its first recording
LICENCE = (
    "numbers derived from OpenAI's VPT contractor recordings, MIT (c) OpenAI 2022; "
    "Minecraft's pictures are not included"
)


def split_of(stem):
    """train, val or test, 90 : 5 : 5, by a hash of <player>-<session>, the name without its time.

    So the pieces of a session stay together.
    """
    session = stem.rsplit("-", 2)[0]
    percent = int(hashlib.sha256(session.encode()).hexdigest(), 16) % 100
    if percent < 90:
        return "train"
    return "val" if percent < 95 else "test"


def by_stem(folder, endings):
    """{stem: path} of the files below a folder, sorted. Of two with one name the first counts."""
    paths = [Path(path) for path in matching(f"{folder}/**") if path.endswith(tuple(endings))]
    if not paths:
        raise ValueError(f"{folder}: no {' or '.join(endings)} file in this folder")
    stems = {path.stem: path for path in sorted(paths, reverse=True)}
    return dict(sorted(stems.items()))


# -----------------------------------------------------------------------------
# a person's annotations


def read_annotations(path, stems):
    """A person's CSV -> {stem: [(start, end, unit, text)]}, unit 'second' or 'frame'.

    Raises ValueError with file and line.
    """
    try:
        with open(regular_file(path), newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise ValueError(f"{path}: no line in it; the columns are recording,start,end,text")
    spans = collections.defaultdict(list)
    for number, row in enumerate(rows, start=2):
        try:
            stem, span = read_row(row)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{path}, line {number}: needs the columns recording,start,end,text with "
                "0 <= start <= end in seconds (or recording,start_frame,end_frame,text)"
            ) from None
        spans[stem].append(span)
        if "\n" in row["text"]:
            problem = "a text of several lines: is a quote left open?"
            print(f"warning: {path}, row {number}: {problem}", file=sys.stderr)
    absent = sorted(spans.keys() - set(map(composed, stems)))
    if absent:
        print(
            f"{path}: {len(absent)} recordings are not there, such as {absent[0]}", file=sys.stderr
        )
    return spans | {stem: spans[composed(stem)] for stem in stems if composed(stem) in spans}


def read_row(row):
    unit = "frame" if "start_frame" in row else "second"
    suffix = "_frame" if unit == "frame" else ""
    start, end = float(row["start" + suffix]), float(row["end" + suffix])
    if not 0 <= start <= end < LONGEST or None in row:  # more fields than columns
        raise ValueError
    stem = row["recording"].strip().removesuffix(".mp4")
    return composed(stem), (start, end, unit, " ".join(row["text"].split()))


def annotations_to_steps(spans, fps, stride, steps):
    """A person's spans of one recording -> captions, and annotated spans [start, end], in steps.

    A span without a text is annotated: there is nothing to say.
    """
    captions, annotated = [], []
    for start, end, unit, text in sorted(spans):
        scale = (1 if unit == "frame" else fps) / stride
        first = math.floor(start * scale)
        if first >= steps:
            continue
        last = max(min(math.ceil(end * scale), steps), first + 1)
        annotated.append([first, last])
        if text:
            captions.append(Caption(first, last, text))
    return captions, annotated


# -----------------------------------------------------------------------------
# the data set


def plan(stems):
    """{(split, index): stems} of the shards of parts, whatever part makes them."""
    shards = {}
    for split in SPLITS:
        own = sorted(stem for stem in stems if split_of(stem) == split)
        shards |= {(split, n // SHARD): own[n : n + SHARD] for n in range(0, len(own), SHARD)}
    return shards


class Writer:
    """Adds episodes to a data set. `with` it, an interrupted run keeps what is finished."""

    def __init__(self, folder, settings, part=None):
        """settings: what the data set is made with. part: {(split, index): stems} of the shards
        that this process makes, and nobody else; None: the next that are free, as episodes come.
        Raises ValueError if it was begun otherwise."""
        self.folder, self.part = Path(folder), part
        with alone(self.folder, wait=True):
            check_begun(self.folder / "made-with.json", settings)
        paths = part and [shard_path(folder, *shard) for shard in part]
        self.ids, self.width = read_written(self.folder, paths)
        if part is not None and not self.ids <= {*itertools.chain(*part.values())}:
            other = "shards hold other recordings than these would: were some added?"
            raise ValueError(f"{folder}: its {other} Choose another --out")
        self.coming = {}  # of a part: {shard: [stem, ..]} that are still to be read
        for shard, stems in (part or {}).items():
            if not shard_path(folder, *shard).exists():
                self.coming[shard] = [*stems]
        self.waiting = {}  # split, or shard of a part: (time of the first, [Episode])
        self.added = collections.Counter()  # by split
        self.skipped = {}  # stem: why
        self.broken_lines = 0

    def add(self, stem, obs, captions, annotated, broken_lines=0):
        """obs: list of (n, D); captions and annotated spans in steps."""
        obs = torch.cat(obs)
        episode = Episode(stem, obs, captions, annotated)
        faults = list(record_faults(episode.record(), len(obs)))
        if self.width not in (None, obs.shape[1]):
            faults.append(f"{obs.shape[1]} numbers a step, the others have {self.width}")
        if not obs.isfinite().all():
            faults.append("not all numbers are finite")
        if faults:
            return self.skip(stem, faults[0])  # one recording never ends the run
        self.width = obs.shape[1]
        self.added[split_of(stem)] += 1
        self.broken_lines += broken_lines
        if self.part is not None:
            return self.arrived(stem, episode)
        since, episodes = self.waiting.setdefault(split_of(stem), (time.time(), []))
        episodes.append(episode)
        if len(episodes) == SHARD or time.time() - since > SHARD_SECONDS:
            self.write(split_of(stem))

    def skip(self, stem, why):
        self.skipped[stem.encode(errors="backslashreplace").decode()] = why
        if self.part is not None:
            self.arrived(stem)

    def arrived(self, stem, *episode):
        """Writes a shard of a part once nothing more comes for it."""
        shard = next(shard for shard, stems in self.coming.items() if stem in stems)
        episodes = self.waiting.setdefault(shard, [])
        episodes += episode
        self.coming[shard].remove(stem)
        if not self.coming[shard]:
            del self.coming[shard], self.waiting[shard]
            if episodes:
                write_shard(self.folder, *shard, sorted(episodes, key=lambda e: e.id))

    def write(self, split):
        _, episodes = self.waiting.pop(split)
        with alone(self.folder, wait=True):  # processes write one after another
            paths = (shard_path(self.folder, split, n) for n in itertools.count())
            index = next(n for n, path in enumerate(paths) if not path.exists())
            write_shard(self.folder, split, index, episodes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for split in list(self.waiting) if self.part is None else ():  # a part's are not whole
            self.write(split)

    def finish(self, **meta):
        """Writes meta.json, tells what was added and skipped. ValueError if there is nothing."""
        added = ", ".join(f"{n} {split}" for split, n in self.added.items()) or "none"
        print(
            f"added to {self.folder}: {added}; {len(self.ids)} were there, "
            f"{len(self.skipped)} skipped, {self.broken_lines} broken lines"
        )
        for why, count in collections.Counter(self.skipped.values()).most_common():
            example = next(stem for stem, reason in self.skipped.items() if reason == why)
            print(f"  {count} skipped: {why}, such as {example}")
        lines = "".join(f"{stem}\t{why}\n" for stem, why in self.skipped.items())
        path = self.folder / f"skipped-{RANK}.txt"
        replace(path, lambda beside: beside.write_text(lines, encoding="utf-8"))
        if self.part is not None:
            return print("a part is there; the same command without --part joins them")
        with alone(self.folder, wait=True):
            self.join(meta)

    def join(self, meta):
        if WORLD == 1:  # or another process may be writing one
            close_gaps(self.folder)
        paths = shard_paths(self.folder)
        names = {path.name.partition("-")[0] for path in paths}
        splits = [split for split in SPLITS if split in names]
        if splits:  # by every process: the last sees all
            meta |= dict(obs_dim=Shard(paths[0]).width, licence=LICENCE, splits=splits)
            write_meta(self.folder, dtype="bfloat16", **meta)
        elif WORLD == 1:
            raise ValueError(f"{self.folder}: nothing to train on, all recordings were skipped")


def check_begun(path, settings):
    """Latents of two networks must not end up in one data set."""
    if path.exists():
        try:
            made_with = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{error}: delete it if the data set was begun with these settings, "
                "else use another --out"
            ) from None
        if made_with != settings:
            raise ValueError(
                f"{path.parent} was begun with other settings ({json.dumps(made_with)}); "
                "use another --out, or these"
            )
    replace(path, lambda beside: beside.write_text(json.dumps(settings)))


def close_gaps(folder):
    """Numbers shards anew where one is not there, for all its recordings were skipped."""
    for split in SPLITS:
        for n, path in enumerate(sorted(folder.glob(f"{split}-?????.safetensors"))):
            target = shard_path(folder, split, n)
            if path != target:
                path.with_suffix(".jsonl").rename(target.with_suffix(".jsonl"))
                path.rename(target)


def read_written(folder, some=None):
    """The ids of a data set's episodes, or of some of its shards, and the width of their
    observations, None where there are none. A shard that is not as written is removed."""
    ids, width = set(), None
    for path in shard_paths(folder) if some is None else filter(Path.exists, some):
        faults, _ = read_shard(path, record_faults)
        if not faults:
            shard = Shard(path)
            own, width = {record["id"] for record in shard.records()}, shard.width
            if ids & own:
                again = "is in another shard too: were recordings added between two parts?"
                raise ValueError(f"{path}: {min(ids & own)} {again} Choose another --out")
            ids |= own
        elif some is not None or RANK == 0:  # of many processes one, before it writes any
            path.unlink(missing_ok=True)
            path.with_suffix(".jsonl").unlink(missing_ok=True)
            print(f"{faults[0]}; its recordings are read again", file=sys.stderr)
    return ids, width

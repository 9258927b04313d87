"""
A data set on disk: captions and episodes, one shard after the other, and what may be wrong in them.

    meta.json                  obs_dim, dtype, steps_per_second, source, licence, splits, parts
    train-00000.safetensors    obs (N, D), episodes back to back; offsets (E+1,); crc (N,) of steps
    train-00000.jsonl          a line each: id, annotated ("all" or [[start, end], ..]), captions
    train-00000-pictures.safetensors   optional: (N, h, w, 3) uint8 of each episode, by its id
    text-00000.jsonl           optional: captions of episodes without observations, a line each

    for episode in Episodes("data/mine", "train"):
        episode.id, episode.obs, episode.captions    # observations are read when asked for
"""

import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import torch

from runtime import shards
from runtime.files import regular_file, replace
from runtime.shards import read_meta

TEXT = "text-00000.jsonl"  # captions of episodes without observations
LONGEST = 1000  # characters of a caption: more is a mistake
NO_LINE = r"[\n\r\ud800-\udfff]"  # what a line of Unicode cannot have


class Caption(NamedTuple):
    """A text, the step at which the observations so far determine it, and its end (exclusive).

    A stream keeps no end: that of a caption read from it is start + 1.
    """

    start: int
    end: int
    text: str

    def fault(self, steps):
        """What is wrong with it in an episode of so many steps, whatever its parts are, or None."""
        if not is_span(self[:2], steps):
            return f"{self.start!r:.40} .. {self.end!r:.40} is no span in 0 .. {steps}"
        if not isinstance(self.text, str) or is_empty(self.text):
            return f"{self.text!r:.80} is no text"
        if re.search(NO_LINE, self.text) or len(self.text) > LONGEST:
            return f"not one line of at most {LONGEST:,} characters"


def captions_in(record):
    """The captions of a record, composed (NFC) as decode(encode(text)) gives texts back."""
    listed = record["captions"]
    return [Caption(c["start"], c["end"], normalize("NFC", c["text"])) for c in listed]


class Episode(NamedTuple):
    """What write_shard takes: obs (N, D) numpy or torch, annotated "all" or [[start, end], ..]."""

    id: str
    obs: np.ndarray
    captions: list
    annotated: object = "all"
    pictures: np.ndarray = None  # (N, h, w, 3) uint8

    def record(self):
        """Its line in a shard."""
        captions = [caption._asdict() for caption in self.captions]
        return dict(id=self.id, annotated=self.annotated, captions=captions)


def write_shard(folder, split, index, episodes):
    """Writes one shard. Raises ValueError for what a reader would refuse."""
    path = shards.shard_path(folder, split, index)
    records = [e.record() for e in episodes]
    for e, record in zip(episodes, records, strict=True):
        for fault in record_faults(record, len(e.obs)):
            raise ValueError(f"{path}, episode {e.id}: {fault}")
    pictures = {e.id: e.pictures for e in episodes if e.pictures is not None}
    shards.write_rows(path, [torch.as_tensor(e.obs) for e in episodes], records, pictures)


def is_empty(text):
    """Whether nothing of a text can be seen: spaces, or characters of no width."""
    return not any(character.isprintable() and character != " " for character in text)


def is_span(span, steps):
    if not isinstance(span, (list, tuple)) or [type(x) for x in span] != [int, int]:
        return False
    return 0 <= span[0] < span[1] <= steps


def id_fault(name):
    """What is wrong with an episode's id, or None."""
    if not isinstance(name, str) or re.search(NO_LINE, name):
        return f"id {name!r:.80} is no text"


def caption_fault(stored, steps):
    """What is wrong with a caption of a record, or None."""
    if not isinstance(stored, dict) or stored.keys() != {*Caption._fields}:
        return f"not just start, end and text: {stored!r:.80}"
    return Caption(**stored).fault(steps)


def record_faults(record, steps):
    """What is wrong with an episode's record (or what it is instead of one), a line each."""
    if isinstance(record, str):
        yield record
        return
    name, annotated, captions = (record.get(key) for key in ("id", "annotated", "captions"))
    if steps < 1:
        yield "has no steps"
    if fault := id_fault(name):
        yield fault
    listed = isinstance(annotated, list) and all(is_span(span, steps) for span in annotated)
    if annotated != "all" and not listed:
        yield f'annotated {annotated!r:.80} is neither "all" nor [[start, end], ..] in 0 .. {steps}'
    if not isinstance(captions, list):
        yield f"captions {captions!r:.80} is no list"
        return
    for n, caption in enumerate(captions):
        fault = caption_fault(caption, steps)
        if fault:
            yield f"caption {n}: {fault}"


def write_text(folder, captions):
    """Captions of episodes without observations, a list an episode: the split `text`."""
    lines = [shards.write_line(dict(captions=[c._asdict() for c in of])) for of in captions]
    replace(Path(folder, TEXT), lambda beside: beside.write_text("".join(lines)))


def read_text(folder):
    """What write_text wrote; [] where nothing was. Raises ValueError."""
    path, text = Path(folder, TEXT), []
    lines = regular_file(path).read_bytes().splitlines() if path.exists() else []
    for n, record in enumerate(map(shards.read_line, lines), 1):
        if isinstance(record, dict):
            record |= dict(id="", annotated="all")
        for fault in record_faults(record, 2**40):
            raise ValueError(f"{path}, line {n}: {fault}")
        text.append(captions_in(record))
    return text


class Stored:
    """An episode of a data set: id, steps N, annotated, captions; all else is read when asked."""

    def __init__(self, shard, first, steps, record):
        self.shard, self.first, self.steps = shard, first, steps
        self.id, self.annotated = record["id"], record["annotated"]
        self.captions = captions_in(record)

    @property
    def obs(self):
        """(N, D) in the stored dtype."""
        return self.window()

    def window(self, start=0, stop=None):
        """Observations start .. stop, no further than the last, (n, D). Raises ValueError."""
        stop = self.steps if stop is None else min(stop, self.steps)
        obs, broken, infinite = self.shard.read(self.first + start, self.first + stop)
        for problem, rows in {"is not as written": broken, "is NaN or Inf": infinite}.items():
            if rows.any():
                step = start + int(rows.int().argmax())
                place = f"{self.shard.path}, episode {self.id}, step {step}"
                raise ValueError(f"{place}: obs {problem}")
        return obs

    @property
    def pictures(self):
        """(N, h, w, 3) uint8, or None."""
        return self.shard.pictures(self.id)

    @property
    def known(self):
        """Which steps are annotated, (N,) bool."""
        known = np.zeros(self.steps, bool)
        for start, end in [[0, self.steps]] if self.annotated == "all" else self.annotated:
            known[start:end] = True
        return known

    @property
    def known_captions(self):
        known = self.known
        return [caption for caption in self.captions if known[caption.start]]


class Episodes:
    """One split of a data set, a sequence of episodes."""

    def __init__(self, folder, split):
        self.folder, self.meta, self.episodes = Path(folder), read_meta(folder), []
        for path in shards.split_paths(folder, split, self.meta):
            shard = shards.Shard(path, self.meta)
            starts, steps = shard.offsets.tolist(), shard.offsets.diff().tolist()
            rows = zip(starts, steps, shard.records(), strict=False)
            for line, (first, n, record) in enumerate(rows, 1):
                for fault in record_faults(record, n):
                    raise ValueError(f"{path.with_suffix('.jsonl')}, line {line}: {fault}")
                self.episodes.append(Stored(shard, first, n, record))
        if not self.episodes:
            splits = ", ".join(self.meta["splits"])
            missing = f"{split}-00000.safetensors is missing; meta.json names {splits}"
            raise ValueError(f"{self.folder}: {missing}")

    def __len__(self):
        return len(self.episodes)

    def __getitem__(self, i):
        return self.episodes[i]

    def identity(self):
        """A number that changes with all that the data set holds, but pictures."""
        about = [self.meta["obs_dim"], self.meta["dtype"]]
        for e in self:
            about.append([e.shard.path.name, e.first, e.steps, e.id, e.annotated, e.captions])
        sums = [shard.sum() for shard in dict.fromkeys(e.shard for e in self)]
        return zlib.crc32(json.dumps([*about, *sums, *read_text(self.folder)]).encode())


def choose_annotated(episodes, n, seed):
    """The episodes that keep their captions; nested: the first 8 of 64 are the same 8."""
    order = np.random.default_rng(seed).permutation(len(episodes)).tolist()
    return [i for i in order if episodes[i].annotated][:n]

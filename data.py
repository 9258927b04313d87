"""
Text and episodes: tokenizer, captions <-> streams, caption F1, episodes on disk, training windows.

A stream answers every step with the captions that begin there, each its tokens and then END, and
at last with SILENCE, which asks for the next observation:

    step        0        1                                   2        3
    text        SILENCE  ' collect' ' wood' END SILENCE      SILENCE  ' drink' END SILENCE

    meta.json                  obs_dim, dtype, steps_per_second, source, licence, splits, parts
    train-00000.safetensors    obs (N, D), episodes back to back; offsets (E+1,); crc (N,) of steps
    train-00000.jsonl          a line each: id, annotated ("all" or [[start, end], ..]), captions
    train-00000-pictures.safetensors   optional: (N, h, w, 3) uint8 of each episode, by its id
    text-00000.jsonl           optional: captions of episodes without observations, a line each
"""

import json
import re
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from runtime import shards
from runtime.files import read_json, regular_file, replace
from runtime.pretrained import read_bpe
from runtime.shards import read_meta

END, SILENCE = 0, 1
SPECIAL = {"<|endoftext|>": END, "<|padding|>": SILENCE}  # of Pythia, which never used the second

# -----------------------------------------------------------------------------
# tokenizer

EVERY_BYTE = [bytes([b]) for b in range(256)]
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text <-> token ids. Ids 0 and 1 are END and SILENCE."""

    def __init__(self, pieces, spaces=None, stored=None):
        """pieces: the bytes of the tokens 2, 3, ..; every single byte must be among them.
        spaces: the tokens of Pythia that are runs of spaces, {text: id}."""
        self.pieces, self.spaces = pieces, spaces
        self.vocab_size = len(pieces) + 2
        self.stored = stored or {"pieces": [piece.decode("latin-1") for piece in pieces]}
        ranks = {piece: i for i, piece in enumerate(pieces, start=2)}
        self.bpe = tiktoken.Encoding(
            "grounding", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_captions(cls, texts):
        """All bytes, and the words of `texts`."""
        words = {word for text in texts for word in re.findall(r" ?[^\W\d_]+| ?\d+", text)}
        words = sorted(word.encode() for word in words if len(word.encode()) > 1)
        return cls(EVERY_BYTE + words)

    @classmethod
    def from_file(cls, path):
        """Reads what `save` wrote, or the tokenizer.json of a Pythia. Raises ValueError."""
        stored = read_json(path)
        try:
            if "pieces" not in stored:
                pieces, spaces = read_bpe(stored, SPECIAL)
                return cls(pieces, spaces, stored)
            pieces = [piece.encode("latin-1") for piece in stored["pieces"]]
            if pieces[:256] != EVERY_BYTE or len({b"", *pieces}) <= len(pieces):
                raise ValueError("pieces are not every byte, then words, each once")
            return cls(pieces)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not byte-level BPE as Pythia's ({reason})") from None

    def save(self, path):
        Path(path).write_text(json.dumps(self.stored, ensure_ascii=False), encoding="utf-8")

    def encode(self, text):
        """str -> list of ids. Special tokens in it are ordinary text."""
        if not self.spaces:
            return self.bpe.encode_ordinary(normalize("NFC", text))
        longest_first = "|".join(sorted(self.spaces, reverse=True))
        ids = []
        for part in re.split(f"({longest_first})", normalize("NFC", text)):
            ids += [self.spaces[part]] if part in self.spaces else self.bpe.encode_ordinary(part)
        return ids

    def decode(self, ids):
        """list of ids -> str in NFC, without END and SILENCE; what is no UTF-8 becomes U+FFFD."""
        pieces = (
            self.pieces[i - 2] if i < self.vocab_size else b"\xff" for i in ids if i > SILENCE
        )
        return normalize("NFC", b"".join(pieces).decode("utf-8", errors="replace"))


# -----------------------------------------------------------------------------
# captions <-> streams, and how two lists of captions compare


class Caption(NamedTuple):
    """A text, the step at which the observations so far determine it, and its end (exclusive).

    A stream keeps no end: that of a caption read from it is start + 1.
    """

    start: int
    end: int
    text: str


def captions_in(record):
    """The captions of a record, composed (NFC) as decode(encode(text)) gives texts back."""
    listed = record["captions"]
    return [Caption(c["start"], c["end"], normalize("NFC", c["text"])) for c in listed]


def write_stream(captions, steps, tokenizer):
    """Captions -> the slots of a stream: tok (L,) int64, and the step of each, step (L,) int64.

    L is steps, and the tokens and END of every caption. Captions of one step stay in their order.
    """
    starting = defaultdict(list)
    for caption in sorted(captions, key=lambda caption: caption.start):
        ids = tokenizer.encode(caption.text)
        if not ids:
            raise ValueError(f"caption at step {caption.start} has no tokens: {caption.text!r}")
        starting[caption.start] += [*ids, END]
    said = [[*starting[t], SILENCE] for t in range(steps)]
    tok = np.array([token for ids in said for token in ids], np.int64)
    return tok, np.repeat(np.arange(steps), [len(ids) for ids in said])


def spans(tok):
    """[first, last) slots of every caption: its tokens up to and with END, or to SILENCE."""
    captions, first = [], None
    for i, token in enumerate([*tok, SILENCE]):
        if first is None and token > SILENCE:
            first = i
        elif first is not None and token <= SILENCE:
            captions.append((first, i + (token == END)))
            first = None
    return captions


def read_stream(tok, step, tokenizer):
    """The slots of a stream (L,) -> its captions."""
    tok = [int(token) for token in tok]
    starts = [(int(step[first]), tokenizer.decode(tok[first:last])) for first, last in spans(tok)]
    return [Caption(start, start + 1, text) for start, text in starts]


def match(true, written, tolerance=3):
    """Largest one-to-one matching of captions with the same text that start within +- `tolerance`
    steps: [(true, written), ..]."""
    pairs = []
    waiting = defaultdict(list)
    for caption in sorted(written):
        waiting[caption.text].append(caption)
    for caption in sorted(true):
        queue = waiting[caption.text]
        while queue and queue[0].start < caption.start - tolerance:
            queue.pop(0)
        if queue and queue[0].start <= caption.start + tolerance:
            pairs.append((caption, queue.pop(0)))
    return pairs


def f1(hits, n_written, n_true):
    return 2 * hits / max(n_written + n_true, 1)


def word_overlap(true, written, tolerance=3):
    """The largest sum of word F1 over pairs of captions, one to one and in order, that start within
    +- `tolerance` steps, as SODA has it for dense captions (Fujita et al., ECCV 2020)."""
    true, written = (
        [(c.start, Counter(c.text.split())) for c in sorted(captions)]
        for captions in (true, written)
    )
    best = [0.0] * (len(written) + 1)  # of the captions so far and the first j written ones
    for start, words in true:
        diagonal = 0.0
        for j, (other_start, other_words) in enumerate(written, 1):
            pair = 0.0
            if abs(start - other_start) <= tolerance:
                shared = (words & other_words).total()
                pair = f1(shared, words.total(), other_words.total())
            diagonal, best[j] = best[j], max(best[j], best[j - 1], diagonal + pair)
    return best[-1]


def score(true, written):
    """Lists of captions per episode -> dict of f1, precision, recall, and (f1, count) per text;
    f1_exact, where captions start at the very step; word_f1, where texts need only share words."""
    hits, said, real = Counter(), Counter(), Counter()
    exact = overlap = longer = 0
    for true_ones, written_ones in zip(true, written, strict=True):
        hits.update(caption.text for caption, _ in match(true_ones, written_ones))
        said.update(caption.text for caption in written_ones)
        real.update(caption.text for caption in true_ones)
        exact += len(match(true_ones, written_ones, tolerance=0))
        overlap += word_overlap(true_ones, written_ones)
        longer += max(len(true_ones), len(written_ones))
    return dict(
        f1=f1(hits.total(), said.total(), real.total()),
        f1_exact=f1(exact, said.total(), real.total()),
        word_f1=overlap / max(longer, 1),
        precision=hits.total() / max(said.total(), 1),
        recall=hits.total() / max(real.total(), 1),
        texts={t: (f1(hits[t], said[t], real[t]), real[t]) for t, _ in real.most_common()},
    )


# -----------------------------------------------------------------------------
# episodes on disk

TEXT = "text-00000.jsonl"  # captions of episodes without observations
LONGEST = 1000  # characters of a caption: more is a mistake
NO_LINE = r"[\n\r\ud800-\udfff]"  # what a line of Unicode cannot have


class Episode(NamedTuple):
    """What write_shard takes: obs (N, D) numpy or torch, annotated "all" or [[start, end], ..]."""

    id: str
    obs: np.ndarray
    captions: list
    annotated: object = "all"
    pictures: np.ndarray = None  # (N, h, w, 3) uint8


def write_shard(folder, split, index, episodes):
    """Writes one shard. Raises ValueError for what a reader would refuse."""
    path = shards.shard_path(folder, split, index)
    records = []
    for e in episodes:
        captions = [caption._asdict() for caption in e.captions]
        records.append(dict(id=e.id, annotated=e.annotated, captions=captions))
        for fault in record_faults(records[-1], len(e.obs)):
            raise ValueError(f"{path}, episode {e.id}: {fault}")
    pictures = {e.id: e.pictures for e in episodes if e.pictures is not None}
    shards.write(path, [torch.as_tensor(e.obs) for e in episodes], records, pictures)


def is_span(span, steps):
    if not isinstance(span, (list, tuple)) or [type(x) for x in span] != [int, int]:
        return False
    return 0 <= span[0] < span[1] <= steps


def caption_fault(caption, steps):
    """What is wrong with a caption of a record, or None."""
    if not isinstance(caption, dict) or caption.keys() != {"start", "end", "text"}:
        return f"not just start, end and text: {caption!r:.80}"
    start, end, text = caption["start"], caption["end"], caption["text"]
    if not is_span((start, end), steps):
        return f"{start!r:.40} .. {end!r:.40} is no span in 0 .. {steps}"
    if not isinstance(text, str) or not text.strip():
        return f"{text!r:.80} is no text"
    if re.search(NO_LINE, text) or len(text) > LONGEST:
        return f"not one line of at most {LONGEST:,} characters"


def record_faults(record, steps):
    """What is wrong with an episode's record (or what it is instead of one), a line each."""
    if isinstance(record, str):
        yield record
        return
    name, annotated, captions = (record.get(key) for key in ("id", "annotated", "captions"))
    if steps < 1:
        yield "has no steps"
    if not isinstance(name, str) or re.search(NO_LINE, name):
        yield f"id {name!r:.80} is no text"
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


class Episodes:
    """One split of a data set: reads the index, the text, and the windows asked for."""

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.index, self.records = [], []  # index: (shard, first row, rows) of each episode
        for path in shards.split_paths(folder, split, self.meta):
            shard = shards.Shard(path, self.meta)
            firsts, steps = shard.offsets.tolist(), shard.offsets.diff().tolist()
            self.index += [(shard, first, n) for first, n in zip(firsts, steps, strict=False)]
            for line, (record, n) in enumerate(zip(shard.records(), steps, strict=True), 1):
                for fault in record_faults(record, n):
                    raise ValueError(f"{path.with_suffix('.jsonl')}, line {line}: {fault}")
                self.records.append(record)
        if not self.index:
            splits = ", ".join(self.meta["splits"])
            missing = f"{split}-00000.safetensors is missing; meta.json names {splits}"
            raise ValueError(f"{self.folder}: {missing}")

    def __len__(self):
        return len(self.index)

    def identity(self):
        """A number that changes with all that the data set holds, but pictures."""
        rows = [(shard.path.name, first, n) for shard, first, n in self.index]
        sums = [shard.sum() for shard in dict.fromkeys(shard for shard, *_ in self.index)]
        about = self.meta["obs_dim"], self.meta["dtype"], rows, sums, self.records
        return zlib.crc32(json.dumps([*about, *read_text(self.folder)]).encode())

    def steps(self, i):
        return self.index[i][2]

    def obs(self, i, start=0, stop=None):
        """Observations start .. stop of episode i, (n, D) in the stored dtype."""
        shard, first, steps = self.index[i]
        stop = steps if stop is None else min(stop, steps)
        obs, broken, infinite = shard.read(first + start, first + stop)
        for problem, rows in {"is not as written": broken, "is NaN or Inf": infinite}.items():
            if rows.any():
                step = start + int(rows.int().argmax())
                name = self.records[i]["id"]
                raise ValueError(f"{shard.path}, episode {name}, step {step}: obs {problem}")
        return obs

    def captions(self, i):
        return captions_in(self.records[i])

    def pictures(self, i):
        return self.index[i][0].pictures(self.records[i]["id"])

    def known(self, i):
        """Which steps of episode i are annotated, (N,) bool."""
        steps, annotated = self.steps(i), self.records[i]["annotated"]
        known = np.zeros(steps, bool)
        for a, b in [[0, steps]] if annotated == "all" else annotated:
            known[a:b] = True
        return known

    def known_captions(self, i):
        known = self.known(i)
        return [caption for caption in self.captions(i) if known[caption.start]]


def choose_annotated(episodes, n, seed):
    """The episodes that keep their captions; nested: the first 8 of 64 are the same 8."""
    order = np.random.default_rng(seed).permutation(len(episodes)).tolist()
    return [i for i in order if episodes.records[i]["annotated"]][:n]


# -----------------------------------------------------------------------------
# training windows


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, T, D)
    tok: torch.Tensor  # (B, L) int64, the slots of the text; SILENCE where there is none
    step: torch.Tensor  # (B, L) int64, the step of each, 0 .. T-1
    known: torch.Tensor  # (B, L) bool, targets that somebody annotated
    pseudo: torch.Tensor  # (B, L) bool, targets that a reader read
    told: torch.Tensor  # (B, L) bool, the predictor's targets: all that have a text
    noise: torch.Tensor  # (B, 2T) uniform, with which an encoder draws text of its own

    def to(self, device):
        return Batch(*(x.to(device, non_blocking=True) for x in self))

    def pin(self):
        """In memory from which a GPU copies while it computes."""
        return Batch(*(x.pin_memory() for x in self)) if torch.cuda.is_available() else self


class Windows:
    """Windows of T steps. Window n of step s is a pure function of (seed, s, n).

    The first half of one that starts within an episode has no targets: its past is cut off, and
    annotate() is only primed with it.
    """

    def __init__(self, episodes, text, tokenizer, T, seed, micro_batch):
        """text: {episode: its captions, which of its steps are annotated, known (N,) bool, and
        which have a text at all, told (N,) bool}. micro_batch: windows in a Batch."""
        self.episodes, self.text, self.tokenizer = episodes, text, tokenizer
        self.T, self.seed, self.micro_batch = T, seed, micro_batch
        self.pool, self.streams = sorted(text), {}

    def stream(self, i):
        """The slots of episode i: tok, step, known, told (L,)."""
        if i not in self.streams:
            captions, known, told = self.text[i]
            tok, step = write_stream(captions, len(known), self.tokenizer)
            self.streams[i] = [torch.from_numpy(x) for x in (tok, step, known[step], told[step])]
        return self.streams[i]

    def window(self, step, n):
        """obs (T, D), noise (2T,), and tok, step, known, told (L,) of one window."""
        rng = np.random.default_rng([self.seed, step, n])
        i = self.pool[rng.integers(len(self.pool))]
        # some begin before the episode and some end after it, and are shifted into it: so its first
        # steps and its last are taught as often as the others
        N, half = self.episodes.steps(i), self.T // 2
        start = min(max(int(rng.integers(-half, N - half)), 0), max(N - self.T, 0))
        noise = torch.from_numpy(rng.random(2 * self.T, dtype=np.float32))
        obs = self.episodes.obs(i, start, start + self.T)
        obs = obs if len(obs) == self.T else F.pad(obs, (0, 0, 0, self.T - len(obs)))
        tok, step, known, told = self.stream(i)
        first, last = torch.searchsorted(step, torch.tensor([start, start + self.T])).tolist()
        tok, step, known, told = (x[first:last] for x in (tok, step - start, known, told))
        taught = step >= (self.T // 2 if start else 0)
        return obs, noise, tok, step, known & taught, told & taught

    def batch(self, step, windows):
        """The given windows of a step, e.g. range(batch_size), as a list of Batches: those with
        as many slots together, so that little is padded."""
        rows = sorted((self.window(step, n) for n in windows), key=lambda row: len(row[2]))
        firsts = range(0, len(rows), self.micro_batch)
        return [self.padded(rows[first : first + self.micro_batch]) for first in firsts]

    def padded(self, rows):
        """Windows, the longest last -> a Batch."""
        obs, noise, *slots = zip(*rows, strict=True)
        # long windows have few different lengths: on a GPU each takes a compilation
        room = self.T // 4 if self.T > 32 else 1
        L = -(-len(slots[0][-1]) // room) * room

        def stacked(rows, value):
            return torch.stack([F.pad(row, (0, L - len(row)), value=value) for row in rows])

        tok, step, known, told = map(stacked, slots, (SILENCE, self.T - 1, False, False))
        obs, noise = torch.stack(obs), torch.stack(noise)
        return Batch(obs, tok, step, known, told & ~known, told, noise).pin()

    def batches(self, steps, windows):
        """The batches of a range of steps; the next one is read while the present one is in use."""
        with ThreadPoolExecutor(1) as pool:
            coming = None
            for step in [*steps, None]:
                batch = coming and coming.result()
                coming = pool.submit(self.batch, step, windows) if step is not None else None
                if batch:
                    yield batch

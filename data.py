"""
Text: tokenizer, captions <-> streams, caption F1, training windows.

A stream answers every step with the captions that begin there, each its tokens and then END, and
at last with SILENCE, which asks for the next observation:

    step        0        1                                   2        3
    text        SILENCE  'collect' ' wood' END SILENCE       SILENCE  'drink' END SILENCE
"""

import json
import math
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from runtime.dataset import Caption
from runtime.files import read_json
from runtime.pretrained import read_bpe

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
    tok, captions = [int(token) for token in tok], []
    for first, last in spans(tok):
        start = int(step[first])
        captions.append(Caption(start, start + 1, tokenizer.decode(tok[first:last])))
    return captions


def shortest_repeat(episodes):
    """The fewest steps after which the same text starts again in lists of captions; or infinite."""
    shortest = math.inf
    for captions in episodes:
        latest = {}
        for caption in sorted(captions):
            repeat = caption.start - latest.get(caption.text, -math.inf)
            shortest, latest[caption.text] = min(shortest, repeat), caption.start
    return shortest


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
    written = [(caption.start, Counter(caption.text.split())) for caption in sorted(written)]
    best = [0.0] * (len(written) + 1)  # of the captions so far and the first j written ones
    for caption in sorted(true):
        words = Counter(caption.text.split())
        diagonal = 0.0
        for j, (start, other_words) in enumerate(written, 1):
            pair = 0.0
            if abs(caption.start - start) <= tolerance:
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
        texts={text: (f1(hits[text], said[text], n), n) for text, n in real.most_common()},
    )


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
        self.pool, self.slots_of = sorted(text), {}

    def slots(self, i):
        """The slots of episode i: tok, step, known, told (L,)."""
        if i not in self.slots_of:
            captions, known, told = self.text[i]
            tok, step = write_stream(captions, len(known), self.tokenizer)
            self.slots_of[i] = tok, step, known[step], told[step]
        return self.slots_of[i]

    def window(self, step, n):
        """obs (T, D), noise (2T,), and tok, step, known, told (L,) of one window."""
        rng = np.random.default_rng([self.seed, step, n])
        i = self.pool[rng.integers(len(self.pool))]
        # some begin before the episode and some end after it, and are shifted into it: so its first
        # steps and its last are taught as often as the others
        N, half = self.episodes[i].steps, self.T // 2
        start = min(max(int(rng.integers(-half, N - half)), 0), max(N - self.T, 0))
        noise = torch.from_numpy(rng.random(2 * self.T, dtype=np.float32))
        obs = self.episodes[i].window(start, start + self.T)
        obs = obs if len(obs) == self.T else F.pad(obs, (0, 0, 0, self.T - len(obs)))
        tok, step, known, told = self.slots(i)
        first, last = step.searchsorted((start, start + self.T))
        tok, step, known, told = (x[first:last] for x in (tok, step, known, told))
        taught = step >= (start + half if start else 0)
        return obs, noise, tok, step - start, known & taught, told & taught

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
            padded = np.full((len(rows), L), value, rows[0].dtype)
            for i, row in enumerate(rows):
                padded[i, : len(row)] = row
            return torch.from_numpy(padded)

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

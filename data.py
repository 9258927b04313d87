"""
Text and episodes: a tokenizer, captions <-> streams, episodes on disk, and the windows that training reads.

A stream has one token per time step: SILENCE, or a caption's tokens followed by END, from the caption's start on.

    python data.py pack --help               your own observations and captions -> a data set
    python data.py show data/crafter         what is in one, and what will hurt training

    python data.py check data/crafter        reads a whole data set and reports every fault; shards.py has the format
"""
import functools
import json
import re
import sys
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import shards
from configurator import Fault
from shards import Episode, Shard, read_meta, shard_path, write_meta, write_shard  # noqa: F401 (all of a data set from one import)

END, SILENCE = 0, 1                       # Pythia's <|endoftext|> and its unused <|padding|>
SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"   # GPT-2's


class Tokenizer:
    """Text <-> token ids with tiktoken. Ids 0 and 1 are END and SILENCE; text encodes to them only where it spells Pythia's names."""

    def __init__(self, pieces, pattern=SPLIT_PATTERN, stored=None):
        """pieces: list of bytes, the tokens with ids 2, 3, ..; every single byte must be among them. stored: what `save` writes."""
        self.pieces = pieces
        self.vocab_size = len(pieces) + 2
        self.stored = stored or {"pieces": [piece.decode("latin-1") for piece in pieces]}
        self.raw, self.added, self.normalise = {}, {}, str                # text -> id of what is cut out before and after normalising
        ranks = {piece: i for i, piece in enumerate(pieces, start=2)}
        self.bpe = tiktoken.Encoding("grounding", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def from_captions(cls, texts):
        """All bytes, and every word as it occurs in `texts` (tiktoken looks a whole piece up before it merges bytes)."""
        words = {word.encode() for text in texts for word in re.findall(r" ?[^\W\d_]+| ?\d+", text)}
        return cls([bytes([b]) for b in range(256)] + sorted(word for word in words if len(word) > 1))

    @classmethod
    def from_file(cls, path):
        """Reads what `save` wrote, or the tokenizer.json of a Pythia model; its ids are those of the `tokenizers` library.

        Raises FileNotFoundError, or ValueError with one line for a tokenizer.json that asks for anything but byte-level BPE after NFC.
        """
        if not Path(path).exists(): raise FileNotFoundError(f"{path} is missing: the tokenizer comes with the checkpoint")
        try: stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as e: raise ValueError(f"{path} is not JSON ({e}): fetch it again") from None
        if "pieces" in stored: return cls([piece.encode("latin-1") for piece in stored["pieces"]])
        _refuse_unsupported(stored, path)
        added = {entry["content"]: entry for entry in stored["added_tokens"]}
        ids = {text: i for text, i in stored["model"]["vocab"].items() if text not in added}
        pieces = {i: bytes(_BYTE[c] for c in text) for text, i in ids.items()}
        pieces |= {entry["id"]: text.encode() for text, entry in added.items()}
        if sorted(pieces) != list(range(len(pieces))): raise ValueError(f"{path}: the token ids have holes or occur twice")
        tokenizer = cls([pieces[i] for i in range(2, len(pieces))], stored=stored)
        tokenizer.raw, tokenizer.added = ({text: e["id"] for text, e in added.items() if e["normalized"] == n} for n in (False, True))
        if stored["normalizer"]: tokenizer.normalise = functools.partial(unicodedata.normalize, "NFC")
        return tokenizer

    def save(self, path):
        Path(path).write_text(json.dumps(self.stored, ensure_ascii=False), encoding="utf-8")

    def encode(self, text):
        """str -> list of ids. Where a tokenizer.json was read: NFC first, and the added tokens cut out, longest first."""
        ids, special = [], self.raw | self.added
        for part in _cut(text, self.raw):
            for word in _cut(self.normalise(part), self.added):
                ids += [special[word]] if word in special else self.bpe.encode_ordinary(word)
        return ids

    def decode(self, ids):
        """Text of a list of ids; END and SILENCE are left out, broken UTF-8 and ids without a token become U+FFFD."""
        pieces = (self.pieces[i - 2] if i < self.vocab_size else b"\xff" for i in ids if i > SILENCE)
        return b"".join(pieces).decode("utf-8", errors="replace")


# GPT-2's characters for the bytes of a vocabulary in JSON: printable ones stand for themselves, the others for 256, 257, ..
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}


def _cut(text, tokens):
    """Splits text at the given tokens, the leftmost first, of those the longest, and keeps them."""
    if not tokens: return [text]
    return re.split("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")", text)


def _refuse_unsupported(stored, path):
    """One line where a tokenizer.json is not byte-level BPE as Pythia's: END and SILENCE first, merges in the order of the ids."""
    model, split, end = stored["model"], stored["pre_tokenizer"] or {}, [t for t in stored["added_tokens"] if t["id"] <= SILENCE]
    merged = [model["vocab"][m.replace(" ", "") if isinstance(m, str) else "".join(m)] for m in model.get("merges", ())]
    for what, fine in {
        f"normalizer {stored['normalizer']}": (stored["normalizer"] or {}).get("type", "NFC") == "NFC",
        f"pre-tokenizer {split}": split.get("type") == "ByteLevel" and not split["add_prefix_space"] and split.get("use_regex", True),
        f"model {model['type']}": model["type"] == "BPE" and not any(model.get(k) for k in
            ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")),
        "merges that are not in the order of their ids": all(a < b for a, b in zip(merged, merged[1:], strict=False)),
        "no tokens 0 and 1 for END and SILENCE": len(end) == 2,
        "added tokens that strip or stand alone": not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in stored["added_tokens"]),
    }.items():
        if not fine: raise ValueError(f"{path}: {what} cannot be read, only byte-level BPE as Pythia's")


class Caption(NamedTuple):
    """A text from the step on at which the observations so far determine it (start), to its last step (end, exclusive)."""
    start: int
    end: int
    text: str


def write_stream(captions, steps, tokenizer):
    """Captions -> stream (steps,) int64. A caption that comes while another is being written waits; the last may be cut off by the end."""
    tok, free = np.full(steps, SILENCE), 0
    for caption in sorted(captions, key=lambda c: c.start):
        ids = tokenizer.encode(caption.text)
        if ids and min(ids) <= SILENCE: ids = tokenizer.bpe.encode_ordinary(caption.text)   # "<|padding|>" in a caption is ordinary text
        if not ids: raise ValueError(f"caption at step {caption.start} has no tokens: {caption.text!r}; give it a text or remove it")
        start = max(caption.start, free)
        ids = np.array(ids + [END])[:max(steps - start, 0)]
        tok[start:start + len(ids)] = ids
        free = start + len(ids)
    return tok


def spans(tok):
    """[start, stop) of every caption in a stream (steps,): its tokens up to and with END; SILENCE, or the stream's end, also ends it."""
    found, start = [], None
    for t, token in enumerate(tok):
        if start is None and token > SILENCE: start = t
        if start is not None and token == END: found.append((start, t + 1))
        if start is not None and token == SILENCE: found.append((start, t))
        if token <= SILENCE: start = None
    return found + [(start, len(tok))] * (start is not None)


def read_stream(tok, tokenizer):
    """Stream -> captions; the inverse of write_stream, but a caption that waited starts where it was written and ends at its END."""
    return [Caption(a, b, tokenizer.decode(tok[a:b])) for a, b in spans([int(t) for t in tok])]


class Episodes:
    """One split of a data set on disk: nothing is read but the index, the text and the windows asked for. Raises Fault."""

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.shards, self.index, self.records = [], [], []         # index: (shard, first row, rows) of each episode
        for path in sorted(self.folder.glob(f"{split}-?????.safetensors")):
            shard = Shard(path, self.meta)
            for n, (record, faults) in enumerate(shard.lines(), 1):
                for fault in faults: raise Fault(f"{path.with_suffix('.jsonl')}, line {n}: {fault}")
                self.records.append(record)
            offsets = shard.offsets.tolist()
            self.index += [(len(self.shards), a, b - a) for a, b in zip(offsets, offsets[1:], strict=False)]
            self.shards.append(shard)
        if not self.index: raise Fault(f"{self.folder}: no {split}-00000.safetensors, so no episodes of the split {split}")

    def __len__(self):
        return len(self.index)

    def identity(self):
        """A number that changes with what the data set holds (all but the observations themselves)."""
        return zlib.crc32(json.dumps([self.meta["obs_dim"], self.meta["dtype"], self.index, self.records]).encode())

    def steps(self, i):
        return self.index[i][2]

    def obs(self, i, start=0, stop=None):
        """Observations start .. stop of episode i, a float32 copy (n, D)."""
        shard, first, rows = self.index[i]
        obs, broken, infinite = self.shards[shard].read(first + start, first + min(stop or rows, rows))
        for what, where in {"is not what was written: the file is corrupted": broken, "is NaN or Inf": infinite}.items():
            if where.any():
                raise Fault(f"{self.shards[shard].path}, episode {self.records[i]['id']}, step {start + int(where.argmax())}: obs {what}")
        return obs.float()

    def captions(self, i):
        return [Caption(**c) for c in self.records[i]["captions"]]

    def pictures(self, i):
        """(N, h, w, 3) uint8, or None where none were kept."""
        return self.shards[self.index[i][0]].pictures(self.records[i]["id"])

    def stream(self, i, tokenizer):
        """The stream of episode i and which of its steps are annotated: tok (N,) int64, known (N,) bool."""
        steps, annotated = self.steps(i), self.records[i]["annotated"]
        if annotated == "all": return write_stream(self.captions(i), steps, tokenizer), np.ones(steps, bool)
        inside = [c for c in self.captions(i) if any(a <= c.start < b for a, b in annotated)]
        tok, known = write_stream(inside, steps, tokenizer), np.zeros(steps, bool)
        for a, b in annotated: known[a:b] = True
        for a, b in spans(tok): known[a:b] = True                   # a caption that spills past its span extends it
        return tok, known


class Batch(NamedTuple):
    obs: torch.Tensor                     # (B, T, D) float32
    tok: torch.Tensor                     # (B, T) int64, SILENCE where nothing is known
    known: torch.Tensor                   # (B, T) bool
    inside: torch.Tensor                  # (B, T) bool, False beyond the episode's end
    prev: torch.Tensor                    # (B,) int64, the token before the window
    noise: torch.Tensor                   # (B, T) uniform, with which the target encoder draws its text
    keep: torch.Tensor                    # (B, D) float32, 0 where the student does not see a feature

    def to(self, device):
        return Batch(*(x.to(device, non_blocking=True) for x in self))

    def part(self, a, b):
        return Batch(*(x[a:b] for x in self))


class Windows:
    """The windows of T steps that training reads. Window n of step s is a pure function of (seed, s, n)."""

    def __init__(self, episodes, annotated, tokenizer, T, fraction, drop, seed):
        """annotated: the episodes whose captions may be read; fraction: share of windows from them; drop: share of features hidden."""
        self.episodes, self.T, self.fraction, self.drop, self.seed = episodes, T, fraction, drop, seed
        self.streams = {i: episodes.stream(i, tokenizer) for i in annotated}
        self.annotated = list(annotated)
        self.others = [i for i in range(len(episodes)) if i not in self.streams]
        if not self.others: self.fraction = 1
        if not self.annotated: self.fraction = 0

    def window(self, step, n):
        rng = np.random.default_rng([self.seed, step, n])
        from_annotated = int((n + 1) * self.fraction) > int(n * self.fraction)   # a fixed share of every batch
        i = int(rng.choice(self.annotated if from_annotated else self.others))
        start = int(rng.integers(max(self.episodes.steps(i) - self.T, 0) + 1))
        obs = self.episodes.obs(i, start, start + self.T)
        inside = torch.arange(self.T) < len(obs)
        tok, known = torch.full((self.T,), SILENCE), torch.zeros(self.T, dtype=torch.bool)
        prev = END
        if i in self.streams:
            stream, annotated = self.streams[i]
            tok[:len(obs)] = torch.from_numpy(stream[start:start + self.T])
            known[:len(obs)] = torch.from_numpy(annotated[start:start + self.T])
            if start and annotated[start - 1]: prev = int(stream[start - 1])
        obs = torch.nn.functional.pad(obs, (0, 0, 0, self.T - len(obs)))
        noise = torch.from_numpy(rng.random(self.T, dtype=np.float32))   # MPS has no float64
        keep = torch.from_numpy(rng.random(obs.shape[1], dtype=np.float32) >= self.drop).float()
        return Batch(obs, tok.where(known, SILENCE), known, inside, torch.tensor(prev), noise, keep)

    def ahead(self, steps, windows):
        """The batches of the given steps one after another; the next is read while the present one is in use."""
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self.batch, step, windows) for step in steps[:1]]
            for step in steps:
                batch = coming.pop().result()
                if step != steps[-1]: coming = [reader.submit(self.batch, step + 1, windows)]
                yield batch

    def batch(self, step, windows):
        """The given windows of a step, e.g. range(batch_size)."""
        return Batch(*map(torch.stack, zip(*(self.window(step, n) for n in windows), strict=True)))


def choose_annotated(n_episodes, n_annotated, seed):
    """The training episodes that keep their captions; nested: the first 8 of 64 are the same 8."""
    return np.random.default_rng(seed).permutation(n_episodes)[:n_annotated].tolist()


if __name__ == "__main__":
    from configurator import may_be_cut
    may_be_cut()
    if sys.argv[1:2] == ["pack"]:
        import pack
        pack.configure(vars(pack), sys.argv[2:])
        try: sys.exit(pack.main())
        except KeyboardInterrupt: sys.exit("interrupted; the same call goes on from here")
    if sys.argv[1:2] == ["show"]:
        import show
        sys.exit(show.main(sys.argv[2:]))
    if sys.argv[1:2] == ["check"] and len(sys.argv) == 3 and sys.argv[2] not in ("-h", "--help"): sys.exit(shards.check(sys.argv[2]))
    if not {"-h", "--help"} & set(sys.argv): sys.exit("python data.py pack .., show <folder> or check <folder>; --help tells more")
    print(__doc__.strip())

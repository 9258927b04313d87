"""
Experiment 1, Minecraft: recordings of players -> episodes of VPT embeddings with captions, ready for train.py.

    pip install -r requirements-vpt.txt                                          # PyAV, to read videos
    python domains/vpt.py download --index=all_10xx_Jun_29.json --hours=20 --out=recordings
    python domains/vpt.py embed --weights=foundation-model-1x.weights --recordings=recordings --out=data/vpt
    torchrun --nproc_per_node=8 domains/vpt.py embed ...                         # the same, on eight GPUs
    python domains/vpt.py pack --latents=folder --annotations=person.csv --out=data/vpt      # from embeddings you have already

Weights: https://openaipublic.blob.core.windows.net/minecraft-rl/models/foundation-model-1x.weights (or 2x, 3x, bc-*, rl-*).
Every command goes on where it was stopped. Recordings go to train, val and test (90, 5, 5 %) by a hash of player and session, so that
the pieces of one session stay together. A person's annotations are a CSV `recording,start,end,text` in seconds (or, with the columns
start_frame,end_frame, in frames): only these spans count as annotated; an empty text says that there is nothing to say.
"""
import argparse
import collections
import csv
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))                  # the repository, for data.py
from vpt_captions import KINDS, MORE_KINDS, annotate, to_steps  # noqa: E402
from vpt_download import download  # noqa: E402
from vpt_network import VPT  # noqa: E402
from vpt_recordings import FPS, draw_arrow, pictures, read_cursor, read_lines, video_library  # noqa: E402

from data import Caption, Episode, write_meta, write_shard  # noqa: E402

CHUNK = 128                               # frames that pass the network at a time
SHARD, SHARD_SECONDS = 16, 600            # a shard is closed with so many recordings, or so long after its first
LICENCE = "numbers derived from OpenAI's VPT contractor recordings, MIT (c) OpenAI 2022; Minecraft's pictures are not included"
RANK, LOCAL = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))                  # torchrun sets them
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))


# ---- from recordings to latents ----

def chunks(frames):
    """Frames one by one -> (number of the first, (n, size, size, 3)), CHUNK at a time."""
    start, part = 0, []
    for frame in frames:
        part.append(frame)
        if len(part) == CHUNK:
            yield start, np.stack(part)
            start, part = start + CHUNK, []
    if part: yield start, np.stack(part)


def embed_chunk(vpt, start, frames, state, stride):
    """Frames (n, size, size, 3) from frame `start` on -> latents of every stride-th frame (m, D) bfloat16 on the CPU, and the new state."""
    device = vpt.final_ln.weight.device
    first = torch.tensor([start == 0], device=device)
    latent, state = vpt(torch.from_numpy(frames).to(device)[None], first, state)
    return latent[0, -start % stride::stride].bfloat16().cpu(), state


def embed_recording(mp4, jsonl, vpt, stride=4, cursor=None):
    """One recording -> obs (steps, D) bfloat16, a step every `stride` frames. ValueError if it cannot be read."""
    state, obs = None, []
    for start, frames in chunks(pictures(mp4, read_lines(jsonl), vpt.size, draw_arrow() if cursor is None else cursor)):
        latent, state = embed_chunk(vpt, start, frames, state, stride)
        obs.append(latent)
    if not obs: raise ValueError("no frames or no lines")
    return torch.cat(obs)


class Recordings(torch.utils.data.IterableDataset):
    """Yields, from a worker process, (mp4, start, frames (n, size, size, 3)) and at the end of a recording (mp4, None, known), known being
    {captions, annotated, broken}, or a text: why it has to be skipped. Arrays, for tensors would go through shared memory, often small."""

    def __init__(self, paths, size, cursor, spans, args):
        self.paths, self.size, self.cursor, self.spans, self.args = paths, size, cursor, spans, args

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for mp4 in self.paths[worker.id::worker.num_workers]:
            try:
                yield from self.read(mp4)
            except Exception as error:    # one recording never ends the run
                yield mp4, None, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def read(self, mp4):
        if not mp4.with_suffix(".jsonl").exists(): raise ValueError("no jsonl beside the video")
        lines, n = read_lines(mp4.with_suffix(".jsonl")), 0
        if not any(lines): raise ValueError("no line of the jsonl can be read")
        for start, frames in chunks(pictures(mp4, lines, self.size, self.cursor)):
            yield mp4, start, frames
            n = start + len(frames)
        if not n: raise ValueError("no frames in the video")
        steps, broken = -(-n // self.args.stride), lines[:n].count(None)
        if self.spans is not None:
            captions, annotated = person(self.spans.get(mp4.stem, []), FPS, self.args.stride, steps)
        else:
            captions = to_steps(annotate(lines[:n], self.args.kinds, self.args.lag), self.args.stride, steps)
            annotated = "all" if any(line and line.stats for line in lines[:n]) else []
        yield mp4, None, dict(captions=captions, annotated=annotated, broken=broken)


def decoded(todo, workers, load):
    """The items of load(todo, workers). Where a video kills the process that decodes it, the recordings that may be to blame are read
    again one at a time, from their first frame, and the one that does it again is skipped."""
    done = set()
    try:
        for item in load(todo, workers):
            if item[1] is None: done.add(item[0])
            yield item
    except (RuntimeError, EOFError, ConnectionError) as error:                  # killed while it was sending
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error): raise
        if len(todo) == 1:
            yield todo[0], None, "the process that decoded it was killed: by the video, or for want of memory (fewer --workers)"
            return
        suspects = [left[0] for w in range(workers) if (left := [mp4 for mp4 in todo[w::workers] if mp4 not in done])]
        for mp4 in suspects: yield from decoded([mp4], 1, load)
        rest = [mp4 for mp4 in todo if mp4 not in done | {*suspects}]
        if rest: yield from decoded(rest, workers, load)


def ignore_interrupt(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the parent, which stops its workers


def embed(args):
    """The command: every recording under args.recordings that is not yet in args.out."""
    video_library()
    vpt, cursor = VPT.from_weights(args.weights), read_cursor(args.cursor) if args.cursor else draw_arrow()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available(): raise ValueError("--device=cuda, but torch sees none; use --device=cpu")
    vpt.to(f"cuda:{LOCAL}" if cuda else args.device).bf16 = cuda and args.dtype == "bfloat16"
    paths = named(Path(args.recordings).rglob("*.mp4"), args.recordings, "no .mp4")
    spans = read_annotations(args.annotations, paths) if args.annotations else None
    shards = Shards(args.out, dict(weights=Path(args.weights).name, stride=args.stride, kinds=list(args.kinds), lag=args.lag,
                                   annotations=args.annotations and Path(args.annotations).name))
    todo = [path for stem, path in list(paths.items())[RANK::WORLD] if stem not in shards.ids]
    load = lambda paths, workers: torch.utils.data.DataLoader(
        Recordings(paths, vpt.size, cursor, spans, args), batch_size=None, num_workers=workers,
        multiprocessing_context="forkserver",                                   # a fork of a process that has threads may hang
        worker_init_fn=ignore_interrupt, collate_fn=tuple)                      # no tensors made of the arrays
    frames, waited, began = 0, 0.0, time.time()
    state, obs, bar = {}, collections.defaultdict(list), tqdm(total=len(todo), unit="recording", disable=RANK > 0)
    with shards:
        asked = time.time()
        for mp4, start, piece in decoded(todo, args.workers, load):
            waited += time.time() - asked
            if start == 0: state[mp4], obs[mp4] = None, []     # also where it is read again
            if start is not None:
                latent, state[mp4] = embed_chunk(vpt, start, piece, state[mp4], args.stride)
                obs[mp4].append(latent)
                frames += len(piece)
            else:
                shards.finish(mp4.stem, obs.pop(mp4, None), piece)
                state.pop(mp4, None)
                bar.update()
                bar.set_postfix_str(f"{frames / (time.time() - began):.0f} frames/s, {len(shards.skipped)} skipped")
            asked = time.time()
        bar.close()
    took = time.time() - began
    if frames:
        limit = "decoding: more --workers, if there are cores" if waited > took / 2 else f"the network on {args.device}"
        print(f"{frames} frames in {took:.0f} s, {frames / took:.0f} per second; waited {waited:.0f} s for frames. The limit: {limit}")
    return shards.report(obs_dim=vpt.D, steps_per_second=FPS / args.stride, source=f"VPT contractor recordings, {Path(args.weights).name}")


# ---- from latents on disk ----

def read_latents(path, stride):
    """A recording's latents, .npy (N, D) or BASALT's .npz, every stride-th -> (steps, D) bfloat16. ValueError if it is something else."""
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if path.suffix == ".npz":
        if "embeddings" not in found: raise ValueError("no array 'embeddings' in the .npz")
        found = found["embeddings"]
    if found.ndim != 2 or not found.size: raise ValueError("not an array of frames x numbers")
    rows = np.ascontiguousarray(found[::stride])
    if rows.dtype.kind == "V" and rows.dtype.itemsize == 2: obs = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    elif rows.dtype.kind == "f": obs = torch.from_numpy(rows.astype(np.float32)).bfloat16()
    else: raise ValueError(f"numbers of type {rows.dtype}, not float or bfloat16")
    if not obs.isfinite().all(): raise ValueError("not all numbers are finite")
    return obs


def pack(args):
    """The command: a folder of latents and a person's annotations -> episodes."""
    paths = named((p for p in Path(args.latents).rglob("*") if p.suffix in (".npy", ".npz")), args.latents, "no .npy or .npz")
    spans = read_annotations(args.annotations, paths) if args.annotations else {}
    annotations = args.annotations and Path(args.annotations).name
    shards, D = Shards(args.out, dict(latents=True, stride=args.stride, fps=args.fps, annotations=annotations)), None
    with shards:
        for stem, path in tqdm(paths.items(), unit="recording"):
            if stem in shards.ids and D: continue
            try:
                obs = read_latents(path, args.stride)
                if len(obs[0]) != (D := D or len(obs[0])): raise ValueError(f"{len(obs[0])} numbers a frame, the first recording has {D}")
                captions, annotated = person(spans.get(stem, []), args.fps, args.stride, len(obs))
                if stem not in shards.ids: shards.finish(stem, [obs], dict(captions=captions, annotated=annotated, broken=0))
            except (ValueError, OSError, EOFError) as error:
                shards.finish(stem, None, str(error))
    return shards.report(obs_dim=D, steps_per_second=args.fps / args.stride, source="VPT latents")


# ---- what both share ----

def named(paths, folder, none):
    """{stem: path}, sorted by stem. SystemExit if there are none; of two with the same name the first by path counts."""
    found = {path.stem: path for path in sorted(paths, reverse=True)}
    if not found: raise SystemExit(f"{folder}: {none} file in this folder")
    return dict(sorted(found.items()))


def split_of(stem):
    """train, val or test by a hash of <player>-<session>, the name without date and time: the pieces of a session stay together."""
    session = stem.rsplit("-", 2)[0]
    place = int(hashlib.sha256(session.encode()).hexdigest(), 16) % 100
    return "train" if place < 90 else "val" if place < 95 else "test"


def read_annotations(path, recordings):
    """A person's CSV -> {stem: [(start, end, unit, text)]}, unit 'second' or 'frame'. SystemExit if it is no such CSV."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None
    spans = collections.defaultdict(list)
    for number, row in enumerate(rows, start=2):
        unit = "frame" if "start_frame" in row else "second"
        keys = ("start_frame", "end_frame") if unit == "frame" else ("start", "end")
        try:
            start, end, stem, text = *(float(row[key]) for key in keys), row["recording"].strip().removesuffix(".mp4"), row["text"] or ""
            if not 0 <= start <= end: raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise SystemExit(f"{path}, line {number}: needs the columns recording,start,end,text with 0 <= start <= end in seconds "
                             "(or recording,start_frame,end_frame,text)") from None
        spans[stem].append((start, end, unit, " ".join(text.split())))
    unknown = sorted(spans.keys() - recordings.keys())
    if unknown: print(f"{path}: {len(unknown)} recordings that are not there, such as {unknown[0]}", file=sys.stderr)
    return dict(spans)


def person(spans, fps, stride, steps):
    """Spans (start, end, unit, text) of one recording -> captions (start, end, text) and annotated spans [start, end] in steps."""
    captions, annotated = [], []
    for start, end, unit, text in sorted(spans):
        scale = (1 if unit == "frame" else fps) / stride
        a, b = math.floor(start * scale), min(math.ceil(end * scale), steps)
        if a >= steps: continue           # beyond the recording's end
        b = max(b, a + 1)
        annotated.append([a, b])
        if text: captions.append((a, b, text))
    return captions, annotated


class Shards:
    """Writes episodes to a data set as they come, some to a shard, and knows which are there. `with` it, an interrupted run keeps them."""

    def __init__(self, folder, settings):
        self.folder, self.open, self.done, self.skipped, self.broken = Path(folder), {}, collections.Counter(), {}, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "made-with.json"                  # latents of two networks must not end up in one data set
        if path.exists() and json.loads(path.read_text()) != settings:
            raise SystemExit(f"{folder} was begun with other settings ({path.read_text()}); use another --out, or these")
        path.with_name(f".{path.name}.{RANK}").write_text(json.dumps(settings))
        os.replace(path.with_name(f".{path.name}.{RANK}"), path)
        there = list(self.folder.glob("*-?????.safetensors"))
        self.ids = {json.loads(line)["id"] for shard in there for line in shard.with_suffix(".jsonl").read_text().splitlines()}
        last = max((int(shard.stem[-5:]) for shard in there), default=-1)
        self.next = last + 1 + (RANK - last - 1) % WORLD       # of all numbers a rank uses those that are its own modulo WORLD

    def finish(self, stem, obs, known):
        """obs: list of (n, D); known: captions, annotated spans and how many lines were broken, or a text: why it is skipped."""
        if isinstance(known, str):
            self.skipped[stem] = known
            return
        split = split_of(stem)
        since, episodes = self.open.setdefault(split, (time.time(), []))
        episodes.append(Episode(stem, torch.cat(obs), [Caption(*caption) for caption in known["captions"]], known["annotated"]))
        self.done[split] += 1
        self.broken += known["broken"]
        if len(episodes) == SHARD or time.time() - since > SHARD_SECONDS: self.close(split)

    def close(self, split):
        write_shard(self.folder, split, self.next, self.open.pop(split)[1])
        self.next += WORLD

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for split in list(self.open): self.close(split)

    def report(self, **meta):
        """Prints what was done and what was not, and why; writes meta.json. Returns the exit status."""
        added = ", ".join(f"{n} {split}" for split, n in self.done.items()) or "none"
        print(f"added to {self.folder}: {added}; {len(self.ids)} were there, {len(self.skipped)} skipped, {self.broken} broken lines")
        for why, n in collections.Counter(self.skipped.values()).most_common():
            print(f"  {n} skipped: {why}, such as {next(stem for stem in self.skipped if self.skipped[stem] == why)}")
        (self.folder / f"skipped-{RANK}.txt").write_text("".join(f"{stem}\t{why}\n" for stem, why in self.skipped.items()))
        splits = [s for s in ("train", "val", "test") if any(self.folder.glob(f"{s}-?????.safetensors"))]
        if splits: write_meta(self.folder, dtype="bfloat16", licence=LICENCE, splits=splits, **meta)     # by every rank: the last sees all
        if not splits and WORLD == 1: print(f"nothing to train on in {self.folder}", file=sys.stderr)
        return 0 if splits or WORLD > 1 else 1


# ---- the command line ----

def kinds(text):
    chosen = tuple(text.split(","))
    unknown = set(chosen) - {*KINDS, *MORE_KINDS}
    if unknown: raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} unknown; there are {', '.join(KINDS + MORE_KINDS)}")
    return chosen


def number(least, kind=int):
    def parse(text):
        if not least <= kind(text) < float("inf"): raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return kind(text)
    return parse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("download", help="fetch recordings that an index lists")
    get.add_argument("--index", required=True, help="a name in OpenAI's store (all_10xx_Jun_29.json), a URL or a file")
    get.add_argument("--hours", type=number(0, float), required=True, help="of video; about 2 GB each")
    get.add_argument("--connections", type=number(1), default=8)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--annotations", help="a person's, CSV: recording,start,end,text")
    both.add_argument("--stride", type=number(1), default=4, help="frames to a step: 4 makes 5 steps a second (default)")
    see = commands.add_parser("embed", parents=[both], help="recordings -> episodes, with the VPT network")
    see.add_argument("--weights", required=True, help="foundation-model-1x.weights, or another policy's")
    see.add_argument("--recordings", required=True, help="folder with mp4 and jsonl, searched to all depths")
    see.add_argument("--kinds", type=kinds, default=KINDS, help=f"of captions: {','.join(KINDS)} (default); more: {','.join(MORE_KINDS)}")
    see.add_argument("--lag", type=number(0, float), default=5.0, help="seconds a caption may wait for the same event to come again (5)")
    see.add_argument("--cursor", help="OpenAI's mouse_cursor_white_16x16.png, in place of the built-in arrow")
    see.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    see.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the convolutions on CUDA (bfloat16)")
    see.add_argument("--workers", type=number(1), default=max(1, (os.cpu_count() or 1) // LOCAL_WORLD), help="that decode, per GPU")
    put = commands.add_parser("pack", parents=[both], help="latents on disk -> episodes")
    put.add_argument("--latents", required=True, help="folder with a .npy or BASALT .npz per recording, a latent per frame")
    put.add_argument("--fps", type=number(1, float), default=FPS, help="latents per second in these files (20)")
    for command in (get, see, put): command.add_argument("--out", required=True, help="folder to write")
    return parser.parse_args()


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # leave through __exit__, which keeps what is finished
    try:
        if args.command != "download": sys.exit(embed(args) if args.command == "embed" else pack(args))
        seconds, failed = download(args.index, args.hours, args.out, args.connections)
        print(f"{seconds / 3600:.2f} hours in {args.out}, {len(failed)} recordings not to be had (listed in {args.out}/missing.txt)")
        sys.exit(0 if seconds else 1)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)                     # without waiting for connections and workers
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

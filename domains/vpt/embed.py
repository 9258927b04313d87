"""
Experiment 1, Minecraft: recordings of players -> episodes of VPT embeddings with captions.

    pip install -r requirements-vpt.txt                                    # PyAV, to read videos
    python -m domains.vpt.embed --weights=foundation-model-1x.weights --recordings=recordings \
        --out=data/vpt
    torchrun --nproc_per_node=8 -m domains.vpt.embed ...                   # the same on eight GPUs

Weights: https://openaipublic.blob.core.windows.net/minecraft-rl/models/foundation-model-1x.weights
(or 2x, 3x, bc-*, rl-*). Recordings: `python -m domains.vpt.download --help`.

The same command goes on where it was stopped, and makes again what is damaged. With --part=3/64 it
makes the third of 64 parts, wherever the others are made; then the same command without it joins
them, and makes what is missing. Captions come from
the game's counters or, with --annotations, from a person: a CSV `recording,start,end,text` in
seconds (or, with the columns start_frame,end_frame, in frames). Only its spans count as annotated
then; an empty text says that there is nothing to say.
"""

from configurator import check_range, configure, run
import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from domains.vpt.captions import KINDS, MORE_KINDS, annotate, to_steps
from domains.vpt.episodes import (
    Writer,
    annotations_to_steps,
    by_stem,
    plan,
    read_annotations,
)
from domains.vpt.network import VPT
from domains.vpt.recordings import (
    FPS,
    chunks,
    draw_arrow,
    pictures,
    read_cursor,
    read_lines,
    video_library,
)
from runtime.distributed import (
    LOCAL_RANK,
    LOCAL_WORLD,
    RANK,
    WORLD,
    pick_device,
    portion,
    tell_ranks,
)
from runtime.program import end_with_parent

weights = ""  # file of a VPT policy
recordings = ""  # folder with .mp4 and .jsonl, searched to all depths
out = ""  # folder of the data set
annotations = ""  # a person's CSV; '': captions from the game's counters
stride = 4  # frames of a step: 4 makes 5 steps a second
kinds = ""  # of captions, 'mine,craft'; '': all of captions.KINDS; there are also jump and damage
lag = 5.0  # seconds that a caption may wait for the same event to come again
cursor = ""  # OpenAI's mouse_cursor_white_16x16.png; '': an arrow
device = "auto"  # 'auto' | 'cpu' | 'cuda'
bf16 = True  # the convolutions in bfloat16, on CUDA
workers = 0  # processes that decode, per GPU; 0: all cores
part = ""  # '3/64': the third of 64 parts of the shards alone; '': all, and what parts have made


# -----------------------------------------------------------------------------
# from frames to latents


def embed_chunk(vpt, start, frames, state, stride):
    """Frames (n, size, size, 3) from frame `start` on -> latents (m, D) bfloat16, new state.

    Latents are of every stride-th frame of the recording, on the CPU.
    """
    device = vpt.final_ln.weight.device
    first = torch.tensor([start == 0], device=device)
    latent, state = vpt(torch.from_numpy(frames).to(device)[None], first, state)
    return latent[0, -start % stride :: stride].bfloat16().cpu(), state


def embed_recording(mp4, vpt, stride, cursor):
    """A recording -> obs (steps, D) bfloat16. Raises ValueError if it cannot be read."""
    state, obs = None, []
    lines = read_lines(mp4.with_suffix(".jsonl"))
    for start, frames in chunks(pictures(mp4, lines, vpt.size, cursor)):
        latent, state = embed_chunk(vpt, start, frames, state, stride)
        obs.append(latent)
    if not obs:
        raise ValueError("no frames or no lines")
    return torch.cat(obs)


# -----------------------------------------------------------------------------
# captions of a recording: lines, number of steps -> captions, annotated spans


def from_counters(stem, lines, steps, stride, kinds, lag):
    captions = to_steps(annotate(lines, kinds, lag), stride, steps)
    counted = any(line and line.stats for line in lines)
    return captions, "all" if counted else []


def from_person(stem, lines, steps, stride, spans):
    return annotations_to_steps(spans.get(stem, []), FPS, stride, steps)


# -----------------------------------------------------------------------------
# reading, in worker processes


class Recordings(IterableDataset):
    """Frames of recordings, in chunks: (mp4, start, (n, size, size, 3)), start counted in frames.

    At the end of each comes (mp4, None, {captions, annotated, broken_lines}) or, with a text in
    place of the dict, why it has to be skipped. Frames are arrays, for tensors would go through
    shared memory, which is often small.
    """

    def __init__(self, paths, size, cursor, stride, caption):
        self.paths = paths
        self.size, self.cursor, self.stride, self.caption = size, cursor, stride, caption

    def __iter__(self):
        worker = get_worker_info()
        for mp4 in self.paths[worker.id :: worker.num_workers]:
            try:
                yield from self.read(mp4)
            except ValueError as error:
                yield mp4, None, str(error)
            except Exception as error:  # one recording never ends the run
                yield mp4, None, f"{type(error).__name__}: {error}"

    def read(self, mp4):
        jsonl = mp4.with_suffix(".jsonl")
        if not jsonl.is_file():
            raise ValueError("no jsonl beside the video")
        lines = read_lines(jsonl)
        if not any(lines):
            raise ValueError("no line of the jsonl can be read")
        n_frames = 0
        for start, frames in chunks(pictures(mp4, lines, self.size, self.cursor)):
            yield mp4, start, frames
            n_frames = start + len(frames)
        if not n_frames:
            raise ValueError("no frames in the video")
        lines = lines[:n_frames]
        steps = -(-n_frames // self.stride)
        captions, annotated = self.caption(mp4.stem, lines, steps, self.stride)
        broken_lines = lines.count(None)
        yield mp4, None, dict(captions=captions, annotated=annotated, broken_lines=broken_lines)


def begin_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    end_with_parent()  # the server that forked it lives as long as it does


def load(paths, workers, **options):
    """The items of Recordings, read by some processes."""
    return DataLoader(
        Recordings(paths, **options),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="forkserver",  # a fork of a process with threads may hang
        worker_init_fn=begin_worker,
        collate_fn=tuple,  # makes no tensors of the arrays
    )


def decoded(paths, workers, load):
    """The items of load(paths, workers), also where a video kills the process that decodes it.

    Then the recordings that may be to blame are read again one at a time, from their first frame,
    and the one that does it again is skipped.
    """
    done = set()
    try:
        for mp4, start, content in load(paths, workers):
            if start is None:
                done.add(mp4)
            yield mp4, start, content
        return
    except (RuntimeError, EOFError, ConnectionError) as error:  # killed, or killed while it sent
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
    if len(paths) == 1:
        why = "by the video, or for want of memory (fewer --workers)"
        yield paths[0], None, f"the process that decoded it was killed: {why}"
        return
    shares = [[mp4 for mp4 in paths[i::workers] if mp4 not in done] for i in range(workers)]
    suspects = [share[0] for share in shares if share]
    for mp4 in suspects:
        yield from decoded([mp4], 1, load)
    rest = [mp4 for mp4 in paths if mp4 not in done and mp4 not in suspects]
    if rest:
        yield from decoded(rest, workers, load)


# -----------------------------------------------------------------------------
# the program


def embed(items, vpt, stride, writer, progress):
    """What `decoded` yields -> episodes. Returns frames, and the seconds spent waiting for them."""
    state, obs = {}, {}  # of the recordings under way
    n_frames, waited = 0, 0.0
    while True:
        asked = time.time()
        mp4, start, content = next(items, (None, None, None))
        waited += time.time() - asked
        if mp4 is None:
            return n_frames, waited
        if start is None:
            state.pop(mp4, None)
            finish(writer, mp4.stem, obs.pop(mp4, None), content)
            progress.set_postfix_str(f"{n_frames} frames, {len(writer.skipped)} skipped")
            progress.update()
            continue
        if start == 0:  # also where a recording is read again
            state[mp4], obs[mp4] = None, []
        latent, state[mp4] = embed_chunk(vpt, start, content, state[mp4], stride)
        obs[mp4].append(latent)
        n_frames += len(content)


def finish(writer, stem, obs, content):
    if isinstance(content, str):
        writer.skip(stem, content)
    else:
        writer.add(stem, obs, **content)


def chosen_kinds():
    chosen = kinds.split(",") if kinds else KINDS
    unknown = sorted(set(chosen) - {*KINDS, *MORE_KINDS})
    if unknown:
        there = ", ".join([*KINDS, *MORE_KINDS])
        raise ValueError(f"--kinds: {', '.join(unknown)} unknown; there are {there}")
    return chosen


def load_network():
    name = pick_device(device)
    vpt = VPT.from_weights(weights)
    vpt.bf16 = bf16 and name == "cuda"
    return vpt.to(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)


def cores_per_process():
    return max((os.cpu_count() or 1) // LOCAL_WORLD, 1)


def made_with():
    return dict(
        weights=Path(weights).name,
        stride=stride,
        kinds=chosen_kinds(),
        lag=lag,
        annotations=Path(annotations).name if annotations else None,
    )


def main():
    configure(globals())
    if not weights or not recordings or not out:
        raise ValueError("--weights, --recordings and --out are needed; --help explains them")
    check_range(globals(), 1, "stride", most=1e6)
    check_range(globals(), 0, "lag workers")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` keeps what is finished
    try:
        embed_recordings()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for the workers


def embed_recordings():
    tell_ranks()
    video_library()
    vpt = load_network()
    paths = by_stem(recordings, [".mp4"])
    caption = functools.partial(from_counters, kinds=chosen_kinds(), lag=lag)
    if annotations:
        caption = functools.partial(from_person, spans=read_annotations(annotations, paths))
    if part:
        shards = portion([*plan(paths).items()], part)[RANK::WORLD]
        writer = Writer(out, made_with(), dict(shards))
        mine = [paths[stem] for stems in writer.coming.values() for stem in stems]
    else:
        writer = Writer(out, made_with())
        mine = [path for stem, path in list(paths.items())[RANK::WORLD] if stem not in writer.ids]
    image = read_cursor(cursor) if cursor else draw_arrow()
    options = dict(size=vpt.size, cursor=image, stride=stride, caption=caption)
    n_workers = workers or cores_per_process()
    items = decoded(mine, n_workers, functools.partial(load, **options))
    began = time.time()
    with writer, tqdm(total=len(mine), unit="recording", disable=RANK > 0) as progress:
        n_frames, waited = embed(items, vpt, stride, writer, progress)
    print_speed(n_frames, time.time() - began, waited)
    source = f"VPT contractor recordings, {Path(weights).name}"
    writer.finish(steps_per_second=FPS / stride, source=source)


def print_speed(n_frames, seconds, waited):
    if not n_frames:
        return
    decoding = "decoding: more --workers, if there are cores"
    limit = decoding if waited > seconds / 2 else "the network"
    print(
        f"{n_frames} frames in {seconds:.0f} s, {n_frames / seconds:.0f} per second; "
        f"waited {waited:.0f} s for frames. The limit: {limit}"
    )


if __name__ == "__main__":
    run(main)

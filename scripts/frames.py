"""
Turns videos into episodes of frame embeddings, an array (steps, dims) each, for scripts.pack.

    pip install -r requirements-extra.txt        PyAV reads the videos, transformers the backbone
    python -m scripts.frames --videos='clips/*.mp4' --out=episodes --fps=5
    python -m scripts.pack --obs='episodes/*.npy' --captions=captions.csv --fps=5 --out=data/mine

clips/a.mp4 becomes episodes/a.npy and a-pictures.npy, (steps, h, w, 3) uint8, for the page. Step n
is what is on the screen n/fps seconds after the first frame, by the video's time stamps.

The backbone is an image model of transformers: a folder with config.json, model.safetensors and
preprocessor_config.json, or a name, from the Hugging Face cache or a download. An embedding is its
pooled output. Where it would crop the centre, the whole frame is squeezed into that size instead.

The same command goes on where it was stopped, and reads again what changed. With --part=3/64 it
reads every 64th video, from the third on; then the same command without it joins them. A video
that cannot be read is one line, the others go on, and the exit code is 2.
"""

from configurator import check_range, configure, run
import contextlib
import math
import os
import sys
import types
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime.distributed import note_of, pick_device, portion
from runtime.files import FULL, alone, checksum, read_json, regular_file, replace, write_json
from runtime.patterns import composed, matching
from runtime.pretrained import find_checkpoint
from runtime.shards import row_checksums

videos = ""  # the files, e.g. 'clips/*.mp4'
out = ""  # folder of the episodes
fps = 5.0  # steps per second
backbone = "facebook/dinov2-small"  # or a folder
pictures = 128  # pixels of a picture's longer side; 0: none are kept
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'
part = ""  # '3/64': the third of 64 parts of the videos alone; '': all, and what parts have made

BATCH = 32  # frames that the backbone takes at a time
ROUNDING = 1e-3  # seconds to which some containers (Matroska, FLV) round time stamps
GAP = 3600  # seconds without a new frame: more is a broken time stamp


def timed(path):
    """(seconds, frame) of a video, then (its end, None): the last lasts as long as the one before,
    or as it says itself, where that is longer.

    Raises ValueError where time stamps are broken, or less is there than the file says.
    """
    import av

    began, now, lasts, stands, said = None, 0.0, 1 / fps, 0.0, None
    remux = f"remux it: ffmpeg -i '{path}' -c copy '{Path(path).with_suffix('.mp4')}'"
    remux += ", or without -c copy, where that does not help"
    with av.open(f"file:{regular_file(path)}") as container:  # a name may have a colon
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.time is None:
                raise ValueError(f"a frame without a time stamp; {remux}")
            began = frame.time if began is None else began
            gap = frame.time - began - now
            if not 0 <= gap < GAP:
                jump = f"the time stamps jump from {now:.3f} to {now + gap:.3f} s"
                raise ValueError(f"{jump}; {remux}")
            now, lasts = now + gap, gap or lasts
            stands = float((frame.duration or 0) * frame.time_base)
            if frame.duration == said and stands < 2 * lasts:
                stands = 0.0  # some files say the same of all frames
            said = frame.duration
            yield now, frame
        length = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6
    if began is None or began + now + max(lasts, stands) < 0.9 * length:  # some count from zero
        raise ValueError(f"only {now:.1f} of {length:.1f} s are there")
    yield now + max(lasts, min(stands, length - now if length else stands)), None


def sampled(path):
    """(image, n) of a video: the frames that are seen, upright, each at n steps in a row.

    Raises ValueError where it cannot be read.
    """
    step = 0
    try:
        for (_, frame), (end, _) in pairwise(timed(path)):
            n = math.ceil((end - ROUNDING) * fps) - step  # steps before the next frame
            if n > 0:
                yield frame.to_image().rotate(frame.rotation, expand=True), n
                step += n
    except Exception as error:  # whatever the library raises for a garbled file
        raise ValueError(f"not read ({type(error).__name__}: {error})") from None


def small(image):
    """A picture of it to keep, (h, w, 3) uint8."""
    scale = min(pictures / max(image.size), 1)
    return np.asarray(image.resize([math.ceil(side * scale) for side in image.size]))


def load_backbone():
    """The image model, and what prepares images for it. Raises ValueError."""
    try:
        import av  # noqa: F401
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ValueError(f"{error}; pip install -r requirements-extra.txt") from None
    folder = find_checkpoint(backbone)
    try:
        # not to say so is to be asked on stdin whether the folder's own programs may run
        safe = dict(trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(folder, **safe)
        model, found = AutoModel.from_pretrained(folder, output_loading_info=True, **safe)
    except Exception as error:  # whatever the library raises for a garbled folder
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"--backbone={backbone}: {reason}") from None
    if found["missing_keys"]:  # transformers would draw them by chance
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise ValueError(f"--backbone={backbone}: its weights lack {names}; choose another")
    if getattr(processor, "do_center_crop", False):
        processor.size, processor.do_center_crop = processor.crop_size, False
    return model.eval().to(pick_device(device)), processor


@torch.no_grad()
def embed_images(images, model, processor):
    """Images -> (n, D) float32."""
    pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
    forward = getattr(model, "get_image_features", model)  # of a model of images and text
    return forward(pixel_values=pixels).pooler_output.flatten(1).float().cpu().numpy()


def read_video(path, model, processor):
    """A video -> its embeddings (steps, D), and pictures (steps, h, w, 3) or an empty list."""
    rows, shown = [], []
    frames = sampled(path)
    while batch := list(islice(frames, BATCH)):
        images, steps = zip(*batch, strict=True)
        rows.append(embed_images(images, model, processor).repeat(steps, axis=0))
        if pictures:
            shown.append(np.repeat([small(image) for image in images], steps, axis=0))
    return np.concatenate(rows), np.concatenate(shown) if shown else shown


def save(array, path):
    def fill(beside):
        with open(beside, "wb") as file:  # its write, for np.save does not say that a disk is full
            np.save(types.SimpleNamespace(write=file.write), array)

    replace(path, fill)


def find_videos():
    """{name of its episode: path}. Raises ValueError where two videos would be the same file."""
    found = {}
    for path in matching(videos):
        name = composed(Path(path).stem)
        if name in found or name.endswith("-pictures"):
            raise ValueError(f"{path}: {name}.npy is another file's; rename it")
        found[name] = path
    if not found:
        raise ValueError(f"--videos={videos}: no such files; quote it, as in 'clips/*.mp4'")
    return found


def read_record(path, settings):
    """{name of a video: [bytes, CRC-32]} of a frames.json. Raises ValueError."""
    record = read_json(path)
    if not settings.items() <= record.items():
        changed = [name for name in settings if record.get(name) != settings[name]]
        was = ", ".join(f"{name} {record.get(name)} not {settings[name]}" for name in changed)
        raise ValueError(f"{out} was made otherwise ({was}); choose another --out")
    return record["videos"]


def read_records(settings):
    """{name: [bytes, CRC-32]} of the videos that were made in out, by parts as well; None where two
    calls made it of different ones.

    Raises ValueError where the folder has anything else.
    """
    folder, made = Path(out), {}
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(folder.glob("frames*.json"))
    if not paths and any(folder.glob("*.npy")):
        raise ValueError(f"{out}: arrays that were not made here; choose another --out")
    for path in paths:
        for name, state in read_record(path, settings).items():
            made[name] = state if made.get(name, state) == state else None
    return dict(sorted(made.items()))


def write_episode(name, path, model, processor):
    """Reads a video, and writes its episode with the embeddings last."""
    rows, shown = read_video(path, model, processor)
    if pictures:
        save(shown, Path(out, f"{name}-pictures.npy"))
    save(rows, Path(out, f"{name}.npy"))


def make():
    """The episodes of all videos. Raises ValueError at the end where some cannot be read."""
    paths = dict(portion([*find_videos().items()], part))
    model, processor = load_backbone()
    whole = [x.cpu().reshape(1, -1) for x in model.state_dict().values()]
    weights = sum(int(row_checksums(x)[0]) for x in whole)
    settings = dict(fps=fps, pictures=pictures, weights=weights)
    with contextlib.nullcontext() if part else alone(out):
        make_episodes(paths, settings, model, processor)
    if part:
        return print(f"{out}: part {part} is there; the same command without --part joins them")
    stale = sorted(read_records(settings).keys() - paths.keys())
    if stale:
        which = f"{len(stale)} episodes of videos that are not named now, such as {stale[0]}"
        print(f"warning: {out} has {which}: remove those that are not to count", file=sys.stderr)
    print(f"{out}: {len(paths)} episodes; next: scripts.pack --obs='{out}/*.npy' --fps={fps:g}")


def make_episodes(paths, settings, model, processor):
    """The episodes that are not there. paths: {name: video}; settings: how they are made."""
    made, unread = read_records(settings), 0
    own = {name: made.get(name) for name in paths} if part else made
    note, record = Path(out, note_of("frames.json", part)), settings | dict(videos=own)
    write_json(record, note)
    for path in [] if part else Path(out).glob("frames-*.json"):
        path.unlink()
    for name, path in tqdm(paths.items(), unit="video", disable=None):
        try:
            state = [os.path.getsize(regular_file(path)), checksum(path)]
            if made.get(name) == state and Path(out, f"{name}.npy").exists():
                continue
            write_episode(name, path, model, processor)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            tqdm.write(f"{path}: {error}", file=sys.stderr)
            unread += 1
            continue
        record["videos"][name] = state
        write_json(record, note)
    if unread:
        raise ValueError(f"{unread} of {len(paths)} videos were not read; {out} has the others")


def main():
    configure(globals())
    if not videos or not out:
        raise ValueError("--videos and --out are needed; python -m scripts.frames --help")
    check_range(globals(), 1e-3, "fps", most=500)
    check_range(globals(), 0, "pictures", most=4096)
    make()


if __name__ == "__main__":
    run(main)

"""
Captions of one Minecraft recording, straight from its mp4.

    python -m domains.vpt.sample --out_dir=out/exp1 --recording=clip.mp4 --weights=..

A line per caption: its start in seconds, the probability of its least sure token, its text.
"""

from configurator import configure, run
import glob
from pathlib import Path

from domains.vpt.embed import embed_recording
from domains.vpt.network import VPT
from domains.vpt.recordings import FPS, draw_arrow, read_cursor
from encoder import load
from runtime.distributed import pick_device
from runtime.files import read_json
from runtime.patterns import matching
from sample import with_confidence

out_dir = "out/exp1"  # the run to load
recording = ""  # an mp4 with its jsonl beside it, or the stem of one in `recordings`
recordings = "recordings"  # folder that domains/vpt/download.py wrote
weights = "foundation-model-1x.weights"  # of the VPT network that made the run's data set
data = ""  # folder of that data set; '': as the run names it
cursor = ""  # as in domains/vpt/embed.py
device = "auto"  # 'auto' | 'cpu' | 'cuda'


def find_recording():
    if not recording:
        raise ValueError("--recording is needed: an mp4, or the stem of one in --recordings")
    if recording.endswith(".mp4"):
        mp4 = Path(recording)
    else:
        found = matching(f"{recordings}/**/{glob.escape(recording)}.mp4")
        mp4 = Path(*found[:1] or [recordings, f"{recording}.mp4"])
    for path in (mp4, mp4.with_suffix(".jsonl")):
        if not path.is_file():
            raise ValueError(f"{path} is missing; --recording=clip.mp4 or --recordings=folder")
    return mp4


def stride_of(dataset):
    """Frames of a step in the run's data set, as embed.py noted them."""
    path = Path(dataset, "made-with.json")
    try:
        stride = read_json(path).get("stride")
    except ValueError:
        stride = None
    if not isinstance(stride, int) or stride < 1:
        hint = "--data=folder of a data set of domains/vpt"
        raise ValueError(f"{path}: no stride to be read; {hint}")
    return stride


def main():
    configure(globals())
    mp4 = find_recording()
    name = pick_device(device)
    encoder, tokenizer, _, config = load(out_dir, name)
    stride = stride_of(data or config["data"])
    vpt = VPT.from_weights(weights).to(name)
    try:
        obs = embed_recording(mp4, vpt, stride, read_cursor(cursor) if cursor else draw_arrow())
    except ValueError as error:
        raise ValueError(f"{mp4}: {error}") from None
    stream = (x[0].cpu() for x in encoder.annotate(obs.float()[None].to(name)))  # (L,) each
    print(f"{mp4}: {len(obs) * stride / FPS:g} seconds\n\n seconds  sure  written")
    for caption, sure in with_confidence(*stream, tokenizer):
        print(f"{caption.start * stride / FPS:8g}  {sure:.2f}  {caption.text}")


if __name__ == "__main__":
    run(main)

"""What the VPT tests share: its programs, recordings and weights made on the spot, the samples."""

from configurator import run
import contextlib
import importlib
import io
import json
import os
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = Path(os.environ.get("SHARED", ROOT.parent / "shared")) / "vpt"
SYNTHETIC = SAMPLES / "samples/synthetic"
with_samples = pytest.mark.skipif(not SAMPLES.exists(), reason=f"needs the samples in {SAMPLES}")
torch.set_num_threads(1)


def vpt(program, *args):
    """`python -m domains.vpt.<program> args` -> (exit status, stdout, stderr)."""
    args = [*map(str, args)]
    module = importlib.import_module(f"domains.vpt.{program}")
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", [program, *args]),
        mock.patch.dict(vars(module)),
    ):
        try:
            run(module.main)
        except SystemExit as left:
            status = left.code or 0
    return status, out.getvalue(), err.getvalue()


def recipe(name, shape, salt=0):
    """Weights from a tensor's name alone: the same on every machine."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + salt) & 0xFFFFFFFF)
    values = rng.standard_normal(shape or (1,)).astype(np.float32).reshape(shape)
    if name.endswith("b_nd"):
        return torch.from_numpy(values * np.float32(0.2))
    if name.endswith("bias"):
        return torch.from_numpy(values * np.float32(0.1))
    if len(shape) == 1:
        return torch.from_numpy(1 + values * np.float32(0.1))
    return torch.from_numpy(values * np.float32(1 / np.sqrt(np.prod(shape[1:]))))


def fill(vpt):
    vpt.load_state_dict(
        {name: recipe(name, tuple(p.shape)) for name, p in vpt.state_dict().items()}
    )
    return vpt.eval().requires_grad_(False)


def small(module=None, **sizes):
    """A network of the published layout: 32 numbers, 2 layers, a window of 4, 32 x 32 pixels."""
    from domains.vpt import network as vpt_network

    kwargs = dict(channels=[4, 8, 8], D=32, heads=2, layers=2, window=4, size=32) | sizes
    return fill((module or vpt_network).VPT(**kwargs))


def save_weights(path, vpt=None):
    """A .weights file as published: the network under net., the heads beside it."""
    tensors = {"net." + name: p for name, p in (vpt or small()).state_dict().items()}
    torch.save(
        tensors
        | {
            "value_head.linear.weight": torch.zeros(1, 32),
            "pi_head.camera.linear_layer.bias": torch.zeros(121),
        },
        path,
    )
    return path


def barcode(number):
    """A frame (360, 640, 3) whose top 30 rows say its number: 12 blocks, bit 0 on the left."""
    frame = np.full((360, 640, 3), 90, np.uint8)
    frame[30:, :, 1] = np.linspace(0, 255, 640, dtype=np.uint8)
    for bit in range(12):
        frame[:30, bit * 53 : (bit + 1) * 53] = 255 * (number >> bit & 1)
    return frame


def read_barcode(frame):
    return sum(int(frame[15, bit * 53 + 26].mean() > 127) << bit for bit in range(12))


def make_video(path, frames, rate=20):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=rate, options=dict(preset="ultrafast", crf="15")
        )
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def tick(stats=None, gui=False, inventory=False, x=640.0, y=360.0, **fields):
    """A line of the jsonl; stats: {"mine_block:oak_log": 1}."""
    named = {"minecraft." + key.replace(":", ":minecraft."): n for key, n in (stats or {}).items()}
    return (
        dict(
            mouse=dict(x=x, y=y, buttons=[], newButtons=[]),
            keyboard=dict(keys=[]),
            isGuiOpen=gui,
            isGuiInventory=inventory,
            hotbar=0,
            stats=named,
        )
        | fields
    )


def make_recording(folder, stem, ticks, extra=1):
    """<stem>.jsonl with these ticks (str or bytes as they are), <stem>.mp4 with `extra` frames."""
    rows = [
        row
        if isinstance(row, bytes)
        else row.encode()
        if isinstance(row, str)
        else json.dumps(row).encode()
        for row in ticks
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    return make_video(
        folder / f"{stem}.mp4", [barcode(min(i, len(ticks) - 1)) for i in range(len(ticks) + extra)]
    )


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def synthetic_truth():
    """What happens in the synthetic recording."""
    return json.loads((SYNTHETIC / "truth.json").read_text())

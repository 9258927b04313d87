"""
Embeddings of recordings that are on disk already -> episodes.

    python -m domains.vpt.latents --latents=folder --annotations=person.csv --out=data/vpt

A file per recording with a latent per frame, (frames, D) numbers: a .npy, or a BASALT .npz with its
array "embeddings". Recordings go to train, val and test as in embed.py; so does the CSV.
"""

from configurator import check_range, configure, run
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from domains.vpt.episodes import Writer, annotations_to_steps, by_stem, read_annotations

latents = ""  # folder with .npy or .npz, searched to all depths
out = ""  # folder of the data set
annotations = ""  # a person's CSV: recording,start,end,text
stride = 4  # latents of a step: 4 makes 5 steps a second
fps = 20.0  # latents per second in these files


def read_latents(path, stride):
    """Every stride-th latent of a file: (steps, D) bfloat16. Raises ValueError."""
    try:
        rows = open_array(path)
    except Exception as error:  # whatever numpy raises for a garbled file
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0]) from None
    if rows is None:
        raise ValueError("no array 'embeddings' in the .npz")
    if rows.ndim != 2 or not rows.size:
        raise ValueError("not an array of frames x numbers")
    return to_bfloat16(np.ascontiguousarray(rows[::stride]))


def open_array(path):
    """The array of a file, or None where an .npz has none of that name."""
    if not path.is_file():  # to open a pipe would hang
        raise ValueError("no file")
    if path.suffix == ".npy":  # np.load would go by the content, and unpickle if it could
        return np.lib.format.open_memmap(path, mode="r")
    arrays = np.lib.npyio.NpzFile(path)
    return np.asarray(arrays["embeddings"]) if "embeddings" in arrays else None


def to_bfloat16(rows):
    if rows.dtype.kind == "V" and rows.dtype.itemsize == 2:  # as ml_dtypes saves bfloat16
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    if rows.dtype.kind == "f":
        return torch.from_numpy(rows.astype(np.float32)).bfloat16()
    raise ValueError(f"numbers of type {rows.dtype}, not float or bfloat16")


def add_all(paths, spans, writer, stride, fps):
    """Writes the episodes that are not there yet."""
    for stem, path in tqdm(paths.items(), unit="recording"):
        if stem in writer.ids:
            continue
        try:
            obs = read_latents(path, stride)
        except ValueError as error:
            writer.skip(stem, str(error))
            continue
        captions, annotated = annotations_to_steps(spans.get(stem, []), fps, stride, len(obs))
        writer.add(stem, [obs], captions, annotated)


def main():
    configure(globals())
    if not latents or not out:
        raise ValueError("--latents and --out are needed; --help explains them")
    check_range(globals(), 1, "stride", most=1e6)
    check_range(globals(), 0.1, "fps", most=1e6)
    paths = by_stem(latents, [".npy", ".npz"])
    spans = read_annotations(annotations, paths) if annotations else {}
    csv = Path(annotations).name if annotations else None
    with Writer(out, dict(latents=True, stride=stride, fps=fps, annotations=csv)) as writer:
        add_all(paths, spans, writer, stride, fps)
    writer.finish(steps_per_second=fps / stride, source="VPT latents")


if __name__ == "__main__":
    run(main)

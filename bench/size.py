"""
How memory and time of each part grow with the data, on recordings made for it.

    python -m bench.size                             some minutes of a core
    python -m bench.size --steps=6000 --dims=1024    hours

A recording is noise, in which a feature jumps where a caption stands. Of four recordings three are
annotated. Each part runs in a process of its own, on one thread: the peak of its anonymous memory
beyond what it began with, and the processor's time. What programs hold at most is set so low that
a few recordings reach it. A slope is that of the straight line through the larger half of a row:
what one recording more takes. The exit code is 1 where a part's memory grows by more than a fifth
of a recording with each.
"""

from configurator import check_range, configure, run
import ctypes
import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._inductor  # what else train.py would import within what is measured
from tqdm import tqdm

import bench.report
import encoder
import scripts.decipher
import scripts.pack
import scripts.page
import scripts.show
import train
from bench.faults import fork
from data import Windows
from encoder import Features, Reader, choose_reader, load, written_captions
from runtime.dataset import Caption, Episodes, choose_annotated

recordings = "4,8,16,32"  # how many there are, a column each
steps = 1000  # of a recording
dims = 512  # float16 numbers a step
folder = ""  # for what is made and then removed; '': where the system keeps such

TEXTS = "open the door", "close the door", "light the lamp", "walk on"
PAUSE = 50  # steps from caption to caption
T = 8
TRAIN = """--n_embd=16 --n_layer=1 --n_head=2 --K=2 --batch_size=16 --max_iters=10
    --learning_rate=0.02 --warmup_iters=0 --eval_interval=10 --device=cpu""".split()  # it is silent


# -----------------------------------------------------------------------------
# recordings


def captions_of(rng):
    """Of an episode: a caption every PAUSE steps."""
    starts = range(PAUSE // 4 + int(rng.integers(PAUSE // 2)), steps - 1, PAUSE)
    return [Caption(t, t + 1, TEXTS[rng.choice(4, p=(0.4, 0.3, 0.2, 0.1))]) for t in starts]


def lines_of(name, captions):
    return "".join(json.dumps(dict(episode=name) | c._asdict()) + "\n" for c in captions)


def make(place, n):
    """n recordings in raw/, captions of three of four, and text of twice as many others."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (steps, dims)).astype(np.float16)
    (place / "raw").mkdir()
    known = text = ""
    for i in range(n):
        obs, captions = rng.permutation(noise), captions_of(rng)
        for caption in captions:
            obs[caption.start, TEXTS.index(caption.text)] = 1
        np.save(place / f"raw/r{i}.npy", obs)
        known += lines_of(f"r{i}", captions) if i % 4 else ""
        text += "".join(lines_of(f"t{i}-{k}", captions_of(rng)) for k in range(2))
    (place / "captions.jsonl").write_text(known)
    (place / "text.jsonl").write_text(text)


# -----------------------------------------------------------------------------
# the parts, each given the folder of what was made


def program(module, *arguments):
    """A program as its command line runs it."""
    sys.argv = [module.__name__, *map(str, arguments)]
    module.main()


def pack(place):
    files = f"--obs={place}/raw/*.npy", f"--captions={place}/captions.jsonl"
    program(scripts.pack, *files, f"--out={place}/data", "--val=0.25", "--test=0.25")


def show(place):
    program(scripts.show, place / "data")


def measure(place):
    Features(dims, past=T // 2).measure(Episodes(place / "data", "train"))


def annotated(episodes):
    return choose_annotated(episodes, len(episodes), 0)


def tokenizer_of(episodes):
    return train.Tokenizer.from_captions({c.text for episode in episodes for c in episode.captions})


def fit(place):
    episodes = Episodes(place / "data", "train")
    choose_reader(episodes, annotated(episodes), tokenizer_of(episodes), [], T // 2)


def training(place):
    where = f"--data={place}/data", f"--out_dir={place}/run", f"--T={T}"
    program(train, *TRAIN, *where, "--n_annotated=1000000")


def text(place):
    _, tokenizer, run, _ = load(place / "run")
    episodes = Episodes(place / "data", "train")
    reader = Reader.from_pretrained(run / "reader", tokenizer)
    reader.train_text = []  # it would not read again
    train.text_of(episodes, annotated(episodes), reader)


def batches(place, n=10):
    """n batches of 64 windows of 128 steps."""
    episodes = Episodes(place / "data", "train")
    known = {i: (e.captions, e.known, e.known) for i, e in enumerate(episodes)}
    windows = Windows(episodes, known, tokenizer_of(episodes), 128, 0, 64)
    for step in range(n):
        windows.batch(step, range(64))


def slices(place, n=10):
    """As many rows, as many at a time, from the files that were packed."""
    files = [np.load(path, mmap_mode="c") for path in sorted((place / "raw").glob("*.npy"))]
    rng = np.random.default_rng(0)
    for _ in range(n):
        chosen = [(rng.integers(len(files)), rng.integers(steps - 127)) for _ in range(64)]
        torch.stack([torch.from_numpy(files[i][start : start + 128]) for i, start in chosen])


def annotate(place):
    encoder, tokenizer, _, _ = load(place / "run")
    obs = (episode.obs for episode in Episodes(place / "data", "test"))
    written_captions(encoder, obs, tokenizer, steps)


def report(place):
    program(bench.report, place / "run")


def decipher(place):
    where = f"--data={place}/data", f"--text={place}/text.jsonl", f"--out={place}/deciphered"
    program(scripts.decipher, *where, "--n_annotated=1")


def page(place):
    program(scripts.page, place / "run", f"--html={place}/page.html", "--device=cpu")


PARTS = {
    "pack": pack,
    "show": show,
    "Features.measure": measure,
    "fit of the reader": fit,
    "train, 10 updates": training,
    "text of the reader": text,
    "10 x Windows.batch": batches,
    "the same by memmap": slices,
    "annotate": annotate,
    "report": report,
    "decipher": decipher,
    "page": page,
}


# -----------------------------------------------------------------------------
# what they take


def anonymous(process):
    """Bytes of a process that no file has; 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def measured(task, output):
    """MB at the peak of task() beyond what it began with, and the processor's seconds. It prints to
    the file `output`. Raises ValueError where it fails."""
    least = most = anonymous(os.getpid())  # a fork begins with as much
    process = fork(task, output)
    while not (ended := os.wait4(process, os.WNOHANG))[0]:
        most = max(most, anonymous(process))
        time.sleep(0.005)
    _, status, usage = ended
    if status:
        raise ValueError(output.read_text()[-2000:])
    return (most - least) / 1e6, usage.ru_utime + usage.ru_stime


def lower_bounds():
    """What programs hold at most, so low that a few recordings reach it; and what they free is
    given back at once."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, which otherwise rises
    scripts.pack.SHARD = 2 * 2 * dims * steps  # bytes: two recordings
    encoder.TOGETHER = 2 * dims * steps
    encoder.ROWS = 500
    scripts.decipher.SAMPLE = 4096


def measure_all(place, n):
    """{part: (MB, seconds)} with n recordings."""
    place.mkdir()
    make(place, n)
    parts = tqdm(PARTS.items(), f"{n} recordings", leave=False, disable=None)
    taken = {name: measured(partial(part, place), place / "output.txt") for name, part in parts}
    shutil.rmtree(place)
    return taken


def slope(counts, figures):
    """What one recording more takes. Of few recordings a reader is chosen from fewer."""
    first = min(len(counts) // 2, len(counts) - 2)
    return np.polyfit(counts[first:], figures[first:], 1)[0]


def show_table(counts, taken, unit, digits):
    print(f"{unit:20}" + "".join(f"{n:>9}" for n in counts) + "    slope")
    for part in PARTS:
        figures = [of[part][unit == "seconds"] for of in taken]
        figures.append(slope(counts, figures))
        print(f"{part:20}" + "".join(f"{x:9.{digits}f}" for x in figures))


def growing(counts, taken):
    """Parts that hold something of all recordings."""
    for part in PARTS:
        if slope(counts, [of[part][0] for of in taken]) > 0.2 * 2 * dims * steps / 1e6:
            yield part


def main():
    configure(globals())
    check_range(globals(), 200, "steps")
    check_range(globals(), len(TEXTS), "dims")
    counts = [int(n) for n in recordings.split(",") if n.isdecimal() and int(n) >= 4]
    if len(counts) < 2:
        raise ValueError(f"--recordings={recordings}: two numbers or more, as 4,8; from 4 on")
    torch.set_num_threads(1)
    lower_bounds()
    with tempfile.TemporaryDirectory(dir=folder or None) as made:
        taken = [measure_all(Path(made, str(n)), n) for n in counts]
    size = 2 * dims * steps / 1e6
    print(f"recordings of {steps:,} steps x {dims:,} float16, {size:.1f} MB each\n")
    show_table(counts, taken, "MB", 1)
    print()
    show_table(counts, taken, "seconds", 2)
    grow = list(growing(counts, taken))
    print(f"\nmemory grows with the data: {', '.join(grow) or 'none'}")
    sys.exit(int(bool(grow)))


if __name__ == "__main__":
    run(main)

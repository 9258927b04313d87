"""
What faults do to a run: kills it, fills its disk, flips bytes of what it wrote and of what it reads, and counts what came of it.

    python bench/faults.py                       50 kills, a disk filled at 20 sizes, 200 flipped bytes; about half an hour on two cores
    python bench/faults.py --kills=3 --flips=20 --disks=2          the short form that the tests run

A kill is a SIGKILL at a random moment (much of this run is saving, so many fall into a save); then the run is resumed until it ends, and
its last checkpoint compared with that of an uninterrupted run, bit for bit. A flipped byte is harmless if all that is read is as it was.
"""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import train  # noqa: E402
from configurator import Fault, configure  # noqa: E402
from data import Caption, Episode, Episodes, write_meta, write_shard  # noqa: E402
from encoder import Encoder  # noqa: E402

SETTINGS = """--hidden_size=32 --num_hidden_layers=2 --num_attention_heads=2 --T=16 --K=2 --batch_size=4 --n_annotated=6 --device=cpu
    --write_from=5 --accept=0.0001 --accept_unit=token --self_weight=0.1 --max_iters=16 --eval_interval=2 --eval_episodes=1
    --resume=True""".split()


def make_data(folder):
    """Episodes whose captions can be read off the observations."""
    rng, texts = np.random.default_rng(0), ["open door", "walk"]
    for split, count in dict(train=8, val=1, test=1).items():
        episodes = []
        for n in range(count):
            obs, captions = rng.random((40, 6)).astype(np.float32), []
            for start in range(3, 35, 8):
                obs[start, k := int(rng.integers(2))] = 3
                captions.append(Caption(start, start + 1, texts[k]))
            episodes.append(Episode(f"{split}-{n}", obs, captions))
        write_shard(folder, split, 0, episodes)
    write_meta(folder, obs_dim=6, dtype="float32", splits=["train", "val", "test"])
    return folder


def run(data, out, kill_after=None, limit=None):
    """A run of train.py in a process of its own: (exit code, its words). Its files may have at most `limit` bytes.

    kill_after: (evaluations, seconds) of which to wait for the first and then for the second.
    """
    said_in = data.parent / "said.txt"
    if not (child := os.fork()):
        said = os.open(said_in, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2): os.dup2(said, stream)
        sys.stdout, sys.stderr, code = open(1, "w"), open(2, "w"), 0
        if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            torch.set_num_threads(1)
            train.conclude = lambda *_: None
            train.main(configure(vars(train), [*SETTINGS, f"--data={data}", f"--out_dir={out}"]))
        except Fault as fault: code = print(fault) or 2
        except BaseException: code = traceback.print_exc() or 1
        finally:
            for stream in (sys.stdout, sys.stderr): stream.flush()
            os._exit(code)
    if kill_after:
        log = out / "log.jsonl"
        while not log.exists() or log.read_text().count("\n") < kill_after[0]: time.sleep(0.001)
        time.sleep(kill_after[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said_in.read_text()


def same(one, two):
    """Whether two checkpoints are equal bit for bit: all weights, and all the state with the optimizer."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    equal = all((one / path).read_bytes() == (two / path).read_bytes() for path in files)
    flat = lambda x: [v.tolist() if isinstance(v, torch.Tensor) else v for v in torch.utils._pytree.tree_leaves(x)]
    states = [flat(torch.load(folder / "state.pt", weights_only=True)) for folder in (one, two)]
    return equal and len(files) == 6 and states[0] == states[1]


def kills(n, data, folder, rng):
    """Kills n runs at random moments and resumes each: how many end as the uninterrupted one, and when they were killed."""
    started = time.perf_counter()
    assert run(data, folder / "whole")[0] == 0, (folder / "said.txt").read_text()
    lasts, equal, saving, started_over = time.perf_counter() - started, 0, 0, 0
    for _ in tqdm(range(n), "kills"):
        out = folder / "killed"
        run(data, out, kill_after=(rng.randrange(8), rng.uniform(0, lasts / 8)))
        saving += any(out.glob(".step-*"))
        started_over += checkpoint.newest(out) is None
        code, said = run(data, out)
        equal += code == 0 and same(checkpoint.newest(folder / "whole"), checkpoint.newest(out))
        shutil.rmtree(out)
    return equal, saving, started_over


def disks(n, data, folder, rng):
    """Runs on n disks too small: how many end in one line, with what was saved before intact."""
    size, fine, real = sum(s for s, _ in checkpoint.checksums(checkpoint.newest(folder / "whole")).values()), 0, 0
    for i in tqdm(range(n), "full disks"):
        disk = folder / f"disk-{i}"
        disk.mkdir()
        room = int(size * rng.uniform(0.1, 3.9))                                        # it keeps up to three and writes another
        tmpfs = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True).returncode == 0
        real += tmpfs
        code, said = run(data, disk / "out", limit=None if tmpfs else max(room // 12, 1))
        left = list((disk / "out").glob("step-*"))
        for path in left: checkpoint.verify(path)                                       # raises Fault where one is not whole
        ended = code == 2 and said.count("make room") == 1 and "Traceback" not in said and not list((disk / "out").glob(".step-*"))
        fine += ended
        if not ended: tqdm.write(f"{room:,} bytes of {size:,}: exit code {code}: {said[-600:]}")
        if tmpfs: subprocess.run(["umount", disk], check=True)
    return fine, real


def read(data, out):
    """All that a fault could make wrong: observations, text, weights, state."""
    found = []
    for split in ("train", "val", "test"):
        episodes = Episodes(data, split)
        found += [(episodes.obs(i).tolist(), episodes.captions(i), episodes.records[i]["annotated"]) for i in range(len(episodes))]
    folder = checkpoint.chosen(out)
    checkpoint.verify(folder)
    weights = Encoder.from_pretrained(out).state_dict()
    return found, {name: x.tolist() for name, x in weights.items()}, (folder / "state.pt").read_bytes(), folder.name


def flips(n, data, folder, rng):
    """Changes a random byte of a random file of data set and checkpoint, n times: how often that was an error, harmless, or neither."""
    out, count = folder / "whole", dict(caught=0, harmless=0, traceback=0, wrong=0)
    files = [path for path in [*data.iterdir(), *checkpoint.chosen(out).rglob("*")] if path.is_file()]
    right = read(data, out)
    for i in tqdm(range(n), "flipped bytes"):
        path = rng.choice(files)
        before = path.read_bytes()
        at, changed = rng.randrange(len(before)), bytearray(before)
        if i % 4 == 0: at = rng.randrange(min(len(before), 200))                        # headers are small, and matter
        changed[at] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        try: outcome = "harmless" if read(data, out) == right else "wrong"
        except Fault: outcome = "caught"
        except Exception as error:
            outcome = "traceback"
            tqdm.write(f"{path}, byte {at}, {before[at]} -> {changed[at]}: {type(error).__name__}: {error}")
        if outcome == "wrong": tqdm.write(f"{path}, byte {at}, {before[at]} -> {changed[at]}: read as if it were right")
        count[outcome] += 1
        path.write_bytes(before)
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = make_data(folder / "data")
        equal, saving, over = kills(args.kills, data, folder, rng)
        fine, real = disks(args.disks, data, folder, rng)
        count = flips(args.flips, data, folder, rng)
    print(f"""
| fault | times | outcome |
|---|---|---|
| SIGKILL at a random moment, then --resume=True | {args.kills} | {equal} ended bit-identical ({saving} killed within a save, \
{over} before the first) |
| disk full ({real} tmpfs) | {args.disks} | {fine} ended in one line with all earlier checkpoints intact |
| a byte changed in data set or checkpoint | {args.flips} | {count['caught']} clear errors, {count['harmless']} harmless, \
{count['traceback']} tracebacks, {count['wrong']} wrong |""")
    return int(equal < args.kills or fine < args.disks or count["wrong"] + count["traceback"] > 0)


if __name__ == "__main__": sys.exit(main())

"""
What faults do to a run: kills it, fills its disk, changes bytes of what it wrote and reads.

    python -m bench.faults                                       about half an hour on two cores
    python -m bench.faults --kills=2 --flips=30 --disks=2        the short form

Generated faults of all that programs read are in bench/faults_cases.py.

A kill is a SIGKILL at a random moment. Then the run is resumed until it ends, and its last
checkpoint compared with that of an uninterrupted run, bit for bit. A changed byte is harmless if
all that is read is as it was.
"""

import configurator
import argparse
import functools
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

import train
from data import Caption, Episode, Episodes, write_shard
from encoder import Encoder
from runtime import checkpoint
from runtime.shards import write_meta

SETTINGS = """train.py --n_embd=32 --n_layer=2 --n_head=2 --T=16 --K=2 --batch_size=4
    --n_annotated=6 --device=cpu
    --max_iters=16 --eval_interval=2 --resume=True""".split()


def make_data(folder):
    """Episodes whose captions can be read off the observations."""
    rng, texts = np.random.default_rng(0), ["open door", "walk"]
    for split, count in dict(train=8, val=1, test=1).items():
        episodes = []
        for n in range(count):
            obs, captions = rng.random((40, 6)).astype(np.float32), []
            for start in range(3, 35, 8):
                k = int(rng.integers(2))
                obs[start, k] = 3
                captions.append(Caption(start, start + 1, texts[k]))
            episodes.append(Episode(f"{split}-{n}", obs, captions))
        write_shard(folder, split, 0, episodes)
    splits = ["train", "val", "test"]
    write_meta(folder, obs_dim=6, dtype="float32", steps_per_second=None, splits=splits)
    return folder


def fork(task, output, limit=None):
    """Does task() in a process of its own, which prints to the file `output`. Returns its id.

    limit: bytes that no file may exceed, as on a full disk.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        torch.set_num_threads(1)
        task()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process):
    """Its exit code; -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def trains(data, out):
    sys.argv = [*SETTINGS, f"--data={data}", f"--out_dir={out}"]
    configurator.run(train.main)


def run(data, out, kill_after=None, limit=None):
    """A run of train.py in a process of its own: (exit code, what it printed).

    kill_after: (evaluations, seconds) to wait for before it is killed.
    """
    output = data.parent / "output.txt"
    process = fork(functools.partial(trains, data, out), output, limit)
    if kill_after:
        log = out / "log.jsonl"
        while not log.exists() or log.read_text().count("\n") < kill_after[0]:
            time.sleep(0.001)
        time.sleep(kill_after[1])
        os.kill(process, signal.SIGKILL)
    return wait(process), output.read_text()


def same(one, two):
    """Whether two checkpoints are equal bit for bit: all weights, and all the state."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    equal = all((one / path).read_bytes() == (two / path).read_bytes() for path in files)
    states = []
    for folder in (one, two):
        leaves = torch.utils._pytree.tree_leaves(torch.load(folder / "state.pt", weights_only=True))
        states.append([x.tolist() if isinstance(x, torch.Tensor) else x for x in leaves])
    return equal and len(files) == 4 and states[0] == states[1]


def kills(n, data, folder, rng):
    """How many of n killed and resumed runs end as the uninterrupted one, and when they died."""
    started = time.perf_counter()
    code, printed = run(data, folder / "whole")
    assert code == 0, printed
    seconds = time.perf_counter() - started
    equal = saving = before_first = 0
    for _ in tqdm(range(n), "kills"):
        out = folder / "killed"
        run(data, out, kill_after=(rng.randrange(8), rng.uniform(0, seconds / 8)))
        saving += any(out.glob(".step-*"))
        before_first += checkpoint.newest(out) is None
        code, printed = run(data, out)
        whole = checkpoint.newest(folder / "whole")
        equal += code == 0 and same(whole, checkpoint.newest(out))
        shutil.rmtree(out)
    return equal, saving, before_first


def disks(n, data, folder, rng):
    """How many of n runs on disks too small end in one line, with what was saved before intact."""
    sizes = checkpoint.checksums(checkpoint.newest(folder / "whole")).values()
    size = sum(size for size, _ in sizes)
    intact = real = 0
    for i in tqdm(range(n), "full disks"):
        disk = folder / f"disk-{i}"
        disk.mkdir()
        room = int(size * rng.uniform(0.1, 2.9))  # a run keeps two, of which the last is best here
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk]
        tmpfs = subprocess.run(mount, capture_output=True).returncode == 0
        real += tmpfs
        code, printed = run(data, disk / "out", limit=None if tmpfs else max(room // 12, 1))
        for path in checkpoint.checkpoints(disk / "out"):
            checkpoint.verify(path)  # raises where one is not whole
        one_line = printed.count("make room") == 1 and "Traceback" not in printed
        ended = code == 2 and one_line and not list((disk / "out").glob(".step-*"))
        intact += ended
        if not ended:
            tqdm.write(f"{room:,} bytes of {size:,}: exit code {code}: {printed[-600:]}")
        if tmpfs:
            subprocess.run(["umount", disk], check=True)
    return intact, real


def read(data, out):
    """All that a fault could make wrong: observations, text, weights, state."""
    content = []
    for split in ("train", "val", "test"):
        episodes = Episodes(data, split)
        for i in range(len(episodes)):
            annotated = episodes.records[i]["annotated"]
            content.append((episodes.obs(i).tolist(), episodes.captions(i), annotated))
    folder = checkpoint.best(out)
    checkpoint.verify(folder)
    weights = Encoder.from_pretrained(folder / "encoder").state_dict()
    weights = {name: x.tolist() for name, x in weights.items()}
    return content, weights, (folder / "state.pt").read_bytes(), folder.name


def flips(n, data, folder, rng):
    """Changes a random byte of a random file, n times: how often it was caught, or harmless."""
    out, count = folder / "whole", dict(caught=0, harmless=0, traceback=0, wrong=0)
    paths = [*data.iterdir(), *checkpoint.best(out).rglob("*")]
    paths = sorted(path for path in paths if path.is_file())
    right = read(data, out)
    for i in tqdm(range(n), "changed bytes"):
        path = rng.choice(paths)
        before = path.read_bytes()
        # headers are small, and matter
        at = rng.randrange(min(len(before), 200) if i % 4 == 0 else len(before))
        changed = bytearray(before)
        changed[at] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        try:
            outcome = "harmless" if read(data, out) == right else "wrong"
        except (ValueError, FileNotFoundError):
            outcome = "caught"
        except Exception as error:
            outcome = "traceback"
            tqdm.write(f"{type(error).__name__}: {error}")
        if outcome in ("wrong", "traceback"):
            tqdm.write(f"{path}, byte {at}: {before[at]} -> {changed[at]}: {outcome}")
        count[outcome] += 1
        path.unlink()  # a new file: the old one may still be mapped
        path.write_bytes(before)
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = make_data(folder / "data")
        equal, saving, before_first = kills(args.kills, data, folder, rng)
        intact, real = disks(args.disks, data, folder, rng)
        count = flips(args.flips, data, folder, rng)
    killed = (
        f"{equal} ended bit-identical ({saving} killed within a save, {before_first} before one)"
    )
    print(f"""
| fault | times | outcome |
|---|---|---|
| SIGKILL at a random moment, then --resume | {args.kills} | {killed} |
| disk full ({real} tmpfs) | {args.disks} | {intact} ended in one line, all checkpoints intact |
| a byte changed in data set or checkpoint | {args.flips} | {count["caught"]} clear errors, \
{count["harmless"]} harmless, {count["traceback"]} tracebacks, {count["wrong"]} wrong |""")
    good = equal == args.kills and intact == args.disks
    return int(not good or count["wrong"] + count["traceback"] > 0)


if __name__ == "__main__":
    sys.exit(main())

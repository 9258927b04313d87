"""
What a kill does to a run.

    python -m bench.faults --times=8

A kill is a SIGKILL at a random moment. Then the run is resumed until it ends, and its last
checkpoint compared with that of an uninterrupted run, bit for bit. Faults of all that programs read
are in bench/faults_cases.py.
"""

from configurator import check_range, configure
from configurator import run as run_program
import functools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from runtime import checkpoint
from runtime.dataset import Caption, Episode, write_shard
from runtime.shards import write_meta

times = 50  # runs
seed = 0  # of the moments

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
    run_program(train.main)


def run(data, out, kill_after=None):
    """A run of train.py in a process of its own: (exit code, what it printed).

    kill_after: (evaluations, seconds) to wait for before it is killed.
    """
    output = data.parent / "output.txt"
    process = fork(functools.partial(trains, data, out), output)
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


def main():
    configure(globals())
    check_range(globals(), 1, "times")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder, "data"))
        equal, saving, before_first = kills(times, data, Path(folder), rng)
    print(f"{equal} of {times} killed runs ended bit-identical", end="; ")
    print(f"{saving} were killed within a save, {before_first} before one")
    sys.exit(equal < times)


if __name__ == "__main__":
    run_program(main)

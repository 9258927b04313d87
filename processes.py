"""
Many processes, one run: `torchrun --nproc_per_node=8 train.py`. Each takes its share of a step's windows, and what counts is added
up over all of them, so nothing depends on how many there are. In a process alone all of this does nothing.
"""
import contextlib
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun


def join(where):
    """Joins the processes that torchrun started, if it did; returns the device of this one."""
    if WORLD == 1: return where
    if where == "cuda":
        where = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(where)
    store, *_ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("restart " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)   # else addresses of the dead are found
    backend, patience = "nccl" if where.startswith("cuda") else "gloo", timedelta(hours=1)            # the first evaluates meanwhile
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=patience)
    return where


def say(text):
    """Prints once, not once per process."""
    if RANK == 0: tqdm.write(text)


def share(n):
    """The windows, of n, that are this process's: as even as can be, in order."""
    return range(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def total(x):
    """The sum over all processes, in place."""
    if WORLD > 1: dist.all_reduce(x)
    return x


def tell(what):
    """What the first process has, in all of them; the others wait for it."""
    what = [what]
    if WORLD > 1: dist.broadcast_object_list(what)
    return what[0]


def parallel(model):
    """The model, whose backward averages the gradients over all processes."""
    return DistributedDataParallel(model) if WORLD > 1 else model


def settle(run, batch):
    """DDP regroups its buckets after its first backward, which changes the order of sums: two that change nothing come first."""
    for _ in range(2 * (WORLD > 1)): (run(batch, batch.tok, batch.known).sum() * 0).backward()


def quiet(run, last):
    """Only with the last micro-batch of a step are gradients exchanged."""
    return run.no_sync() if WORLD > 1 and not last else contextlib.nullcontext()


def leave():
    if WORLD > 1: dist.destroy_process_group()
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_DFL)


def listen():
    """A list that SIGTERM and SIGINT put their names in; a second Ctrl-C ends the process at once."""
    came = []

    def note(number, frame):
        came.append(signal.Signals(number).name)
        os.write(2, f"\n{came[-1]}: finishing this step, then saving\n".encode())       # print is not safe in here
        if number == signal.SIGINT and WORLD == 1: signal.signal(signal.SIGINT, signal.SIG_DFL)   # torchrun passes each on: it comes twice

    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, note)
    return came

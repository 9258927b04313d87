"""
Many processes, one run: `torchrun --nproc_per_node=8 train.py`. Each takes its share of a step's
windows, and sums run over all of them, so nothing depends on how many there are. Alone, all of this
does nothing.
"""

import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# set by torchrun
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def pick_device(device):
    """'auto' becomes the best device there is. Raises ValueError where there is no such device."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"--device={device}: one of auto, cpu, cuda, mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch sees none; --device=cpu")
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def together():
    """Around what waits for the others: where one of them is gone we end as well, in one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if not isinstance(error, dist.DistError) and "gloo" not in reason.lower():
            raise
        print(f"process {RANK} ends, for it has lost another one ({reason})", file=sys.stderr)
        sys.exit(2)


@together()
def init(device):
    """Joins the processes that torchrun started, if any. Returns this one's device, autocast."""
    device = pick_device(device)
    if WORLD > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if WORLD > 1:
        # a prefix of its own for each restart, or the addresses of dead processes are found
        store, *_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        an_hour = timedelta(hours=1)  # rank 0 evaluates while the others wait
        dist.init_process_group(backend, None, an_hour, WORLD, RANK, store)
    # on a CPU everything is repeatable to the last bit
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.startswith("cuda") and not bf16:
        print0("this GPU has no bfloat16: training is in float32")
    return device, torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=bf16)


def print0(text):
    """Prints once, not once per process."""
    if RANK == 0:
        tqdm.write(text)


def share(n):
    """This process's part of n windows: as even as can be, in order."""
    if n < WORLD:
        raise ValueError(f"--batch_size={n}: each of {WORLD} processes needs one")
    return range(n * RANK // WORLD, n * (RANK + 1) // WORLD)


@together()
def all_reduce(x):
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


@together()
def broadcast(value):
    """What the first process has, in all of them; the others wait for it."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


@together()
def wrap(model):
    """The model, whose backward averages the gradients over all processes."""
    if WORLD == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


@together()
def settle(loss):
    """Two backwards of nothing: DDP regroups its buckets after the first, so its sums change."""
    if WORLD > 1:
        for _ in range(2):
            (loss() * 0).backward()


@contextlib.contextmanager
def no_sync(ddp, last):
    """Gradients are exchanged with the last micro-batch of a step alone."""
    with together(), contextlib.nullcontext() if WORLD == 1 or last else ddp.no_sync():
        yield


def catch_signals():
    """A list that SIGTERM and SIGINT put their names in. A second Ctrl-C ends at once."""
    caught = []

    def note(number, frame):
        caught.append(signal.Signals(number).name)
        os.write(2, f"\n{caught[-1]}: finishing this step, then saving\n".encode())
        if number == signal.SIGINT and WORLD == 1:  # torchrun passes each on, so it comes twice
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return caught


def leave():
    if WORLD > 1:
        dist.destroy_process_group()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)

"""
Many processes, one run: `torchrun --nproc_per_node=8 train.py`. Each takes its share of a step's
windows, and sums run over all of them, so nothing depends on how many there are. Alone, all of this
does nothing.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from runtime.program import tell

NAMES = "RANK", "WORLD_SIZE", "MASTER_ADDR"
ALONE = 0, 1, 0, 1, 0


def ranks(environment):
    """(rank, processes, rank and processes on this machine, restarts so far) as torchrun tells
    them, or whoever gives all of NAMES; and a line on what may be left over from elsewhere."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    given = [name for name in NAMES if name in environment]
    here = " and ".join(f"{name}={environment[name]}" for name in given)
    if not by_torchrun and len(given) < len(NAMES):
        only = [name for name in given if name != "MASTER_ADDR"]
        return ALONE, f"{here} in the environment, but no torchrun: ignored" if only else ""
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", world)
        restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) if by_torchrun else 0
        numbers = rank, world, *map(int, local), restarts
    except (KeyError, ValueError):
        return ALONE, f"{here} in the environment are no numbers: ignored"
    if not 0 <= rank < world:
        return ALONE, f"{here} in the environment: there is no such process, so ignored"
    told = f"process {rank} of {world}, for the environment has {here}"
    return numbers, told if world > 1 and not by_torchrun else ""


(RANK, WORLD, LOCAL_RANK, LOCAL_WORLD, RESTARTS), LEFT_OVER = ranks(os.environ)
RESTARTED = RESTARTS > 0
ANSWER = 60  # seconds
PATIENCE = timedelta(minutes=30 if "TORCHELASTIC_RUN_ID" in os.environ else 2)


def pick_device(device):
    """'auto' becomes the best device there is. Raises ValueError where there is no such device."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"--device={device}: one of auto, cpu, cuda, mps")
    there = dict(cuda=torch.cuda.is_available, mps=torch.backends.mps.is_available)
    if device in there and not there[device]():
        raise ValueError(f"--device={device}: torch sees none; --device=cpu")
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def exits_with_peers():
    """Around what waits for the others: where one of them is gone we end as well, in one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if not isinstance(error, dist.DistError) and "gloo" not in reason.lower():
            raise
        tell(f"process {RANK} ends, for it has lost another one ({reason})")
        sys.exit(2)


def find_agent():
    """Raises ValueError where the store of torchrun is not there: it is before its processes."""
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            socket.create_connection(address, ANSWER).close()
    except OSError as error:
        alone = f"to run alone, unset TORCHELASTIC_RUN_ID {' '.join(NAMES)}"
        raise ValueError(f"no torchrun at {address[0]}:{address[1]} ({error}); {alone}") from None


def meet():
    """The store at which the processes meet. Raises ValueError where the others do not come."""
    find_agent()
    try:
        return next(dist.rendezvous("env://", timeout=PATIENCE))[0]
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        alone = f"to run alone, unset {' '.join(NAMES)}"
        raise ValueError(f"not all of {WORLD} processes came ({reason}); {alone}") from None


def tell_ranks():
    """Says from where this process has its rank, where that may be a mistake."""
    if LEFT_OVER:
        print(LEFT_OVER, file=sys.stderr)
    if WORLD > LOCAL_WORLD and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        why = "or nodes that count restarts otherwise wait for each other"
        print0(f"warning: before torchrun, export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, {why}")


@exits_with_peers()
def init(device):
    """Joins the processes that torchrun started, if any. Returns this one's device, autocast."""
    tell_ranks()
    device = pick_device(device)
    if WORLD > 1 and device == "cuda":
        device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(device)
    if WORLD > 1:
        store = meet()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # it outlives a restart: without a prefix the addresses of dead processes are found
            store = dist.PrefixStore(str(RESTARTS), store)
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


def portion(things, part):
    """Of a list what part "3/64" of a program makes: every 64th thing, from the third on; of ""
    all of them. Raises ValueError."""
    if not part:
        return things
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part)
    n, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= n <= of:
        raise ValueError(f"--part={part}: as 3/64, the third of 64")
    return things[n - 1 :: of]


def note_of(name, part):
    """ "packed.json" of a part: "packed-3-of-64.json"; no two parts write one file."""
    stem, _, ending = name.partition(".")
    return f"{stem}-{part.replace('/', '-of-')}.{ending}" if part else name


@exits_with_peers()
def all_reduce(x):
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


@exits_with_peers()
def broadcast(value):
    """What the first process has, in all of them; the others wait for it."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


@exits_with_peers()
def gather(values):
    """The union of every process's {key: value}."""
    if WORLD == 1:
        return values
    every = [None] * WORLD
    dist.all_gather_object(every, values)
    return {key: value for of in every for key, value in of.items()}


@exits_with_peers()
def place(model, device, shard):
    """The model on its device. shard: each process holds its part of every weight alone, and so of
    gradients and AdamW's moments; a layer at work gathers the other parts (PyTorch's FSDP2)."""
    if not shard:
        return model.to(device)
    from torch.distributed.fsdp import fully_shard  # slow to import

    warnings.filterwarnings("ignore", "FSDP2-wrapped .* a view")  # nothing writes into one in place
    mesh = dist.init_device_mesh(device.partition(":")[0], (WORLD,))
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in itertools.chain(*stacks):
        fully_shard(layer, mesh=mesh)
    for part in model.children():  # embeddings: read before, within and after its forward
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def is_sharded(x):
    """Whether a module, or a tensor, has only a part of its weights here."""
    return hasattr(x, "unshard") or hasattr(x, "full_tensor")


@contextlib.contextmanager
def gathered(part):
    """Around what needs all weights of a sharded part at once: to save it, to write with it."""
    groups = [module for module in part.modules() if is_sharded(module)]
    with exits_with_peers():
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
    yield
    for group in groups:
        group.set_reshard_after_forward(group is not part, recurse=False)
        group.reshard()


@exits_with_peers()
def full_tensor(x):
    """What a sharded tensor is a part of, on all processes; of another tensor, itself."""
    return x.full_tensor() if is_sharded(x) else x


def local_part(x, like):
    """Of a tensor that is whole, what belongs here where `like`, a weight, is sharded."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


@exits_with_peers()
def clip_grad_norm(model, largest):
    """Scales the gradients to a norm of at most `largest`. Returns what it was."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), largest)).item()


@exits_with_peers()
def wrap(model):
    """The model, whose backward averages the gradients over all processes."""
    if WORLD == 1 or is_sharded(model):
        return model
    # not gradient_as_bucket_view: three processes would not go on bit for bit
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = False  # none changes; to say it above warns since PyTorch 2.13
    return ddp


@exits_with_peers()
def warm_up(loss):
    """Two backwards of nothing: DDP regroups its buckets after the first, so its sums change."""
    if WORLD > 1:
        for _ in range(2):
            (loss() * 0).backward()


@contextlib.contextmanager
def no_sync(ddp, last):
    """Gradients are exchanged with the last micro-batch of a step alone, but sharded ones with
    each: nobody has room for the whole."""
    exchanged = WORLD == 1 or last or is_sharded(ddp)
    with exits_with_peers(), contextlib.nullcontext() if exchanged else ddp.no_sync():
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

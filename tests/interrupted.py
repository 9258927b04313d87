"""
Runs train.py as a command would, but something happens at a step, in the last process:

    PYTHONPATH=. python tests/interrupted.py TERM 7 --data=..

TERM, INT: that signal; INTINT: twice; KILL: between forward and backward; NAN: the loss from then
on; none: nothing.
"""

from configurator import run
import functools
import importlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

import train
from bench.faults import fork, wait
from runtime import checkpoint, distributed, log


def main(what, at, arguments):
    batches, forward = train.Windows.batches, train.Grounding.forward
    here = distributed.RANK == distributed.WORLD - 1 and not distributed.RESTARTED
    signals = dict(TERM=["TERM"], INT=["INT"], INTINT=["INT"] * 2).get(what, [])
    now = [-1]

    def interrupted(self, steps, windows):
        for step, batch in zip(steps, batches(self, steps, windows), strict=True):
            now[0] = step
            for name in signals:
                if here and step == at:
                    os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
            yield batch

    def gone_bad(self, *inputs):
        loss, parts = forward(self, *inputs)
        if here and what == "KILL" and now[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        bad = here and what == "NAN" and now[0] >= at
        return (loss * float("nan"), parts) if bad else (loss, parts)

    train.Windows.batches, train.Grounding.forward = interrupted, gone_bad
    sys.argv = ["train.py", *arguments]
    run(train.main)


def read_rank():
    """Takes RANK and WORLD_SIZE from the environment again: a fork has what was imported before."""
    for module in (distributed, checkpoint, log):
        importlib.reload(module)


def one(rank, n, meeting, dtype, *rest):
    """One of the processes of `start`."""
    torch.set_default_dtype(dtype)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(n), TORCHELASTIC_RUN_ID="test")
    read_rank()
    if n > 1:
        store = distributed.dist.FileStore(f"{meeting}/store", n)
        distributed.dist.rendezvous = lambda *_, **__: iter([(store, rank, n)])
    main(*rest)


def start(n, arguments, what="none", at=-1, dtype=torch.float32, limit=None):
    """Trains in n processes: [(exit status, what it printed), ..].

    limit: bytes that no file may exceed, as on a full disk.
    """
    importlib.import_module("torch._inductor")  # train.py needs it: once, before the forks
    with tempfile.TemporaryDirectory() as meeting:
        outputs, processes = [Path(meeting, f"{rank}.txt") for rank in range(n)], []
        for rank, output in enumerate(outputs):
            task = functools.partial(one, rank, n, meeting, dtype, what, at, arguments)
            processes.append(fork(task, output, limit))
        codes = [wait(process) for process in processes]
        return list(zip(codes, [output.read_text() for output in outputs], strict=True))


if __name__ == "__main__":
    read_rank()
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

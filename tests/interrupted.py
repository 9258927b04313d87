"""
Runs train.py as a command would, but something happens at a step, in the last process:

    PYTHONPATH=. python tests/interrupted.py TERM 7 --data=..

TERM, INT: that signal; INTINT: twice; KILL: between forward and backward; NAN: the loss from then
on; none: nothing.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch

import train
from configurator import run
from runtime import checkpoint, distributed


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


def child(rank, n, meeting, dtype, limit, what, at, arguments):
    """One of the processes of `start`."""
    output = os.open(f"{meeting}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr, code = open(1, "w"), open(2, "w"), 1
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(dtype)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if n > 1:
            for module in (distributed, checkpoint):
                module.RANK, module.WORLD = rank, n
            store = distributed.dist.FileStore(f"{meeting}/store", n)
            distributed.dist.rendezvous = lambda _: iter([(store, rank, n)])
        main(what, at, arguments)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(n, arguments, what="none", at=-1, dtype=torch.float32, limit=None):
    """Trains in n processes: [(exit status, what it printed), ..].

    limit: bytes that no file may exceed, as on a full disk.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as meeting:
        rest = n, meeting, dtype, limit, what, at, arguments
        children = [context.Process(target=child, args=(rank, *rest)) for rank in range(n)]
        for process in children:
            process.start()
        for process in children:
            process.join()
        printed = [Path(f"{meeting}/{rank}.txt").read_text() for rank in range(n)]
    return list(zip([process.exitcode for process in children], printed, strict=True))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

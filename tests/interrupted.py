"""
Runs train.py as a command would, but something happens at a step, in the last process:

    PYTHONPATH=. python tests/interrupted.py TERM 7 --data=..

TERM, INT, KILL: that signal; INTINT: twice; NAN: the loss from then on; none: nothing.
"""

import os
import signal
import sys

import train
from configurator import run
from runtime import distributed


def main(what, at, arguments):
    batches, forward = train.Windows.batches, train.Grounding.forward
    here = distributed.RANK == distributed.WORLD - 1 and not distributed.RESTARTED
    signals = dict(TERM=["TERM"], INT=["INT"], KILL=["KILL"], INTINT=["INT"] * 2).get(what, [])
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
        bad = here and what == "NAN" and now[0] >= at
        return (loss * float("nan"), parts) if bad else (loss, parts)

    train.Windows.batches, train.Grounding.forward = interrupted, gone_bad
    sys.argv = ["train.py", *arguments]
    run(train.main)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

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
    pseudo_labels, forward = train.pseudo_labels, train.Grounding.forward
    here = distributed.RANK == distributed.WORLD - 1 and not distributed.RESTARTED
    signals = dict(TERM=["TERM"], INT=["INT"], KILL=["KILL"], INTINT=["INT"] * 2).get(what, [])
    now = [-1]

    def interrupted(target, batch, step):
        now[0] = step
        for name in signals:
            if here and step == at:
                os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return pseudo_labels(target, batch, step)

    def gone_bad(self, *inputs):
        loss, parts = forward(self, *inputs)
        bad = here and what == "NAN" and now[0] >= at
        return (loss * float("nan"), parts) if bad else (loss, parts)

    train.pseudo_labels, train.Grounding.forward = interrupted, gone_bad
    sys.argv = ["train.py", *arguments]
    run(train.main)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

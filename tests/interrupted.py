"""Runs train.py as a command would, but something happens at the start of step `at`: python interrupted.py TERM 7 --data=.. (for tests)

TERM, INT or KILL: that signal to this process; NAN or INF: losses of that step; twice INT twice; torchrun starts as many as it is told.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import processes  # noqa: E402
import train  # noqa: E402
from configurator import Fault, configure, stop  # noqa: E402


def main(what, at, arguments):
    write, forward = train.write, train.Grounding.forward
    now = []

    def write_and_interrupt(target, batch, step):
        now[:] = [step]
        fresh = not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if what in ("TERM", "INT", "KILL") and step == at and fresh and processes.RANK == processes.WORLD - 1:
            os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        return write(target, batch, step)

    def forward_gone_bad(self, *inputs):
        sums = forward(self, *inputs)
        bad = what in ("NAN", "INF") and now and now[0] >= at and (at < 0 or now[0] < at + 2) and processes.RANK == processes.WORLD - 1
        return sums * float(what) if bad else sums

    train.write, train.Grounding.forward = write_and_interrupt, forward_gone_bad
    try: train.main(configure(vars(train), arguments))
    except Fault as fault: stop(str(fault))


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

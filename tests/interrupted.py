"""
Runs train.py as a command would, but something happens at step `at`, in the last process: python interrupted.py TERM 7 --data=..

TERM, INT, KILL: that signal, at the start of the step; INTINT: twice; NAN: the losses from then on; none: nothing.
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
    write, forward, now = train.write, train.Grounding.forward, [-1]
    here = processes.RANK == processes.WORLD - 1 and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

    def write_interrupted(target, batch, step):
        now[0] = step
        for name in dict(TERM=["TERM"], INT=["INT"], KILL=["KILL"], INTINT=["INT"] * 2).get(what, []):
            if here and step == at: os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return write(target, batch, step)

    def forward_gone_bad(self, *inputs):
        return forward(self, *inputs) * (float("nan") if here and what == "NAN" and now[0] >= at else 1)

    train.write, train.Grounding.forward = write_interrupted, forward_gone_bad
    try: train.main(configure(vars(train), arguments))
    except Fault as fault: stop(str(fault))


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

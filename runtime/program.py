"""
What a program does around its work: its faults are one line on stderr, text that others wrote
cannot steer the terminal, and the ways to end it by hand are quiet. Needs no package.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time

# what a terminal obeys: C0 but \t and \n, DEL, C1, line separators, reversals of direction
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HOME = re.compile(r"(?:^|(?<=,))~[\w.-]*(?=[/,]|$)")
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|alloc_cpu|overflow", re.IGNORECASE)
OTHERS_FIRST = 30  # seconds within which torchrun has ended all processes when one failed


class Shown:
    """A stream on which control characters are shown, and what it cannot encode: \\x1b."""

    def __init__(self, stream, obeyed=""):
        self.stream, self.obeyed = stream, obeyed

    def show(self, found):
        return found[0] if found[0] in self.obeyed else ascii(found[0])[1:-1]

    def write(self, text):
        text, encoding = CONTROL.sub(self.show, text), self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def open_streams():
    """Opens stdin, stdout and stderr that were closed, or the next files would be in their place,
    and warnings of a library in them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))


def one_line(error):
    """The first line of what an exception says, or of what kind it is where it says nothing."""
    try:
        lines = str(error).splitlines()
    except BaseException:  # its own code may fail
        lines = []
    return lines[0] if lines else type(error).__name__


def tell(fault):
    """Prints a fault. Of many processes of torchrun one tells what all see, and ends the others."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHERS_FIRST)
    print(fault, file=sys.stderr)


def fault_of(error):
    """What the user is told of an exception; None where it is a fault of the program."""
    if isinstance(error, ImportError):
        return f"{one_line(error)}; pip install -r requirements.txt"
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(one_line(error)):
        return f"out of memory ({one_line(error)}); smaller settings or files need less"


def run(main):
    """Runs a program. A user's mistake (ValueError, OSError) is one line and exit code 2."""
    open_streams()
    shown = contextlib.redirect_stdout(Shown(sys.stdout))
    with shown, contextlib.redirect_stderr(Shown(sys.stderr, "\r")):
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stderr.close()  # `| head` has seen enough; to && and a scheduler it is no success
            os._exit(141)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            tell(fault)
            sys.exit(2)


def end_imports(kind, error, trace):
    """sys.excepthook while a program is imported: Ctrl-C is quiet, a missing package is a line."""
    if issubclass(kind, ImportError):
        print(fault_of(error), file=sys.stderr)
        raise SystemExit(2)
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def expand(value, what):
    """A path, or several with commas between, whose ~ is a home folder. what: names it in the
    ValueError where none is known: a folder called ~ is one that somebody will remove."""

    def home(found):
        folder = os.path.expanduser(found[0])
        if folder == found[0]:
            raise ValueError(f"{what}: no home folder {folder}; write the path out")
        return folder

    return HOME.sub(home, str(value))


def end_with_parent():
    """Ends a worker, from now on, when its parent has ended, by SIGKILL too: nothing else would."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def workers(n):
    """A pool of n processes (0: one a core) that end when this one does. Ctrl-C is for this one."""
    context = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` ends them
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit
    try:
        return context.Pool(n or os.cpu_count(), end_with_parent)
    finally:
        signal.signal(signal.SIGINT, before)

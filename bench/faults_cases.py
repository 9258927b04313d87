"""
Generated faults: something a program reads is broken, and the program is run.

    python -m bench.faults_cases --seed=0             500 cases, two minutes on one core

Each case breaks one file (bench/faults_injuries.py says how), of a data set, a run, a pretrained
folder, of what scripts.pack reads or of recordings, or is what the world does
(bench/faults_world.py). Good outcomes: one line that names the place, and exit code 2; or a result
as without the fault. Bad ones, all told and counted:

    traceback     anything else on stderr, or a line that does not say where
    hang          no end within SECONDS
    silent        another result, and not a word
    loss          a file that was not broken is changed or gone
"""

import configurator
import contextlib
import faulthandler
import fnmatch
import io
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from bench import faults_injuries as injuries
from bench import faults_subjects as subjects
from bench import faults_world as world
from bench.faults_injuries import DETECTABLE, WHOLE

n = 500  # cases, over all that is broken
seed = 0  # of what is drawn

SECONDS = 120  # others may use the machine too
INPUT = [injury for injury in WHOLE if injury is not injuries.truncate]
JSON = injuries.json_value, injuries.json_kind
CSV = injuries.csv_field, injuries.csv_columns, *INPUT
# name: how it is made, how it is used, and which injuries which of its files get
SUBJECTS = {
    "data set": (
        subjects.make_set,
        subjects.use_set,
        {
            "set/*": WHOLE + DETECTABLE,
            "set/meta.json": JSON,
            "set/*.jsonl": (injuries.json_line, injuries.edited_by_hand),
            "set/*.safetensors": (injuries.tensor_header,),
        },
    ),
    "run": (
        subjects.make_run,
        subjects.use_run,
        {
            "run/*": WHOLE + DETECTABLE,
            "run/step*/*.json": JSON,
            "run/log.jsonl": (world.environment,),
        },
    ),
    "pretrained": (
        subjects.make_pretrained,
        subjects.use_pretrained,
        {
            "*.json": WHOLE + JSON,
            "*config.json": JSON,
            "*.safetensors": (*WHOLE, injuries.tensor_header),
        },
    ),
    "pack": (
        subjects.make_packed,
        subjects.use_packed,
        {
            "raw/*": (*WHOLE, *[world.linked, world.linked_below, world.renamed] * 2),
            "raw/*.npy": (injuries.array_header, world.numbers),
            "raw/*.safetensors": (injuries.tensor_header,),
            "captions.csv": (*CSV, world.unit, world.encoding, world.decomposed, world.linked),
            "out/*.safetensors": (world.storage, world.killed, world.at_once),
            "more.jsonl": (injuries.json_kind, *[injuries.json_line] * 5, *INPUT),
            "out/*": WHOLE + DETECTABLE,
            "out/*.json": JSON,
        },
    ),
    "recordings": (
        subjects.make_recordings,
        subjects.use_recordings,
        {
            "rec/a*": (injuries.truncate, *INPUT),
            "rec/a*.jsonl": (*DETECTABLE, injuries.json_line),
            "rec/a*.json": JSON,
            "a.weights": WHOLE,
            "person.csv": CSV,
            "*/train*": WHOLE + DETECTABLE,
            "*/made-with.json": WHOLE + DETECTABLE + JSON,
        },
    ),
}
CHANGING = "run/log.jsonl", "run/.lock", "counted/*", "told/*"  # may be other files afterwards
OUTCOMES = "told", "as good", "traceback", "hang", "silent", "loss"


class Captured(io.TextIOWrapper):
    """What a program writes, as a terminal in UTF-8 takes it."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8")

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode()


class Hang(BaseException):
    pass


def hang(*_):
    raise Hang


def attempt(use, folder, broken):
    """What became of a use: (exit code, "hang" or "traceback"), its result, stdout, stderr."""
    out, err, result = Captured(), Captured(), []
    code = 0
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            configurator.run(lambda: result.append(use(folder, broken)))
    except SystemExit as ended:
        code = ended.code
    except Hang:
        code = "hang"
    except KeyboardInterrupt:
        raise
    except BaseException:  # also the panics of a library in Rust
        code = "traceback"
        err.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return code, result, out.text(), err.text().strip()


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def judge(code, result, out, err, right, folder, broken, before, injury):
    """The outcome of a case."""
    if code in ("hang", "traceback"):
        return code
    now = files(folder)
    changing = CHANGING if code else (*CHANGING, "out/*")  # a pack that ends well writes
    lost = [name for name, content in before.items() if now.get(name) != content]
    lost = [name for name in lost if not any(fnmatch.fnmatch(name, x) for x in changing)]
    if set(lost) - {broken}:
        return "loss"
    last = [line for line in err.splitlines() if not line.startswith("warning: ")]
    if code == 2 and len(last) == 1 and (str(folder) in last[0] or last[0].startswith("--")):
        return "told"
    if code != 0:
        return "traceback"
    if broken.startswith("rec/"):  # that recording is skipped, or read in part
        right = {key: x for key, x in right.items() if key[1] not in broken}
    if result[0] == right or injury is injuries.edited_by_hand:  # and valid: it counts
        return "as good"
    return "told" if err or "1 skipped" in out else "silent"


def run_case(name, folder, right, rng):
    """Breaks a file of a fresh copy of a subject and uses it: (outcome, how to see it)."""
    _, use, patterns = SUBJECTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name("whole"), folder)
    names = sorted(name for name, content in files(folder).items() if content)
    pattern, ways = rng.choice(list(patterns.items()))
    broken = rng.choice([x for x in names if fnmatch.fnmatch(x, pattern)])
    injury = rng.choice(ways)
    meanwhile = injury(folder / broken, rng) or contextlib.nullcontext()
    before = files(folder)
    with meanwhile:
        code, result, out, err = attempt(use, folder, broken)
    outcome = judge(code, result, out, err, right, folder, broken, before, injury)
    about = f"{name}, {broken}, {injury.__name__}: {outcome}, exit code {code}"
    return outcome, f"{about}: {err[-900:]}"


def run_subject(name, n, rng):
    """n cases of a subject: {outcome: how many}."""
    make, use, _ = SUBJECTS[name]
    count = Counter()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "case")
        folder.mkdir()
        with contextlib.redirect_stdout(Captured()), contextlib.redirect_stderr(Captured()):
            make(folder)
        shutil.copytree(folder, folder.with_name("whole"))
        _, (right,), _, _ = attempt(use, folder, "")
        for _ in tqdm(range(n), name, disable=None):
            outcome, about = run_case(name, folder, right, rng)
            count[outcome] += 1
            if outcome not in ("told", "as good"):
                tqdm.write(about)
    return count


def main():
    configurator.configure(globals())
    configurator.check_range(globals(), 1, "n")
    torch.set_num_threads(1)
    total = Counter()
    print(f"| broken | cases | {' | '.join(OUTCOMES)} |\n|{'---|' * (len(OUTCOMES) + 2)}")
    for name in SUBJECTS:
        times = -(-n // len(SUBJECTS))
        count = run_subject(name, times, random.Random(f"{seed} {name}"))
        total += count
        print(f"| {name} | {times} | {' | '.join(str(count[x]) for x in OUTCOMES)} |", flush=True)
    print(f"| all | {total.total()} | {' | '.join(str(total[x]) for x in OUTCOMES)} |")
    sys.exit(total["told"] + total["as good"] < total.total())


if __name__ == "__main__":
    configurator.run(main)

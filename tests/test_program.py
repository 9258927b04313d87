"""What every program does around its work: what it says, and how it ends."""

from configurator import configure, run
import ast
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from tqdm import tqdm

from model import find_checkpoint
from runtime import program
from runtime.distributed import pick_device

HEAD = f"""'''What it does.'''
import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure, run
out = ""  # a folder
def main():
    configure(globals())
"""


def start(tmp_path, body, *options, prefix=(), **environment):
    """A program that does this in its main, in a process of its own."""
    script = tmp_path / "prog.py"
    lines = [f"    {line}" for line in body.splitlines()]
    script.write_text("\n".join([HEAD, *lines, "if __name__ == '__main__':", "    run(main)"]))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [*prefix, sys.executable, *options, str(script)]
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def ended(tmp_path, body, *options, **environment):
    process = start(tmp_path, body, *options, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# -----------------------------------------------------------------------------
# text that others wrote


HOSTILE = {
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b2J": r"\x9b2J",
    "a\rb": r"a\rb",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\x7f\x00": r"\x7f\x00",
    "plain é 王\ttab": "plain é 王\ttab",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_shown_on_a_terminal_not_obeyed(text, capsys):
    def main():
        print(text)
        raise ValueError(f"{text.replace(chr(13), '')}: no such episode")

    with pytest.raises(SystemExit):
        run(main)
    said = capsys.readouterr()
    assert said.out == HOSTILE[text] + "\n"
    assert said.err == HOSTILE[text].replace(r"\r", "") + ": no such episode\n"


def test_a_progress_bar_stays_in_its_line(capsys):
    run(lambda: list(tqdm(range(3), "caption \x1b[2J", ascii=True)))
    said = capsys.readouterr().err
    assert "\rcaption \\x1b[2J: 100%" in said and "\x1b" not in said


def test_what_a_terminal_cannot_show_ends_no_program(tmp_path):
    code, out, err = ended(tmp_path, "print('\\u738b \\udc80')", PYTHONIOENCODING="latin-1")
    assert (code, out, err) == (0, "\\u738b \\udc80\n", "")


# -----------------------------------------------------------------------------
# how it ends


def test_streams_that_are_closed_are_no_fault_and_get_no_file(tmp_path):
    body = f"""
import os
file = open({str(tmp_path / "file")!r}, "w")
print("seen by nobody", file=sys.stderr, flush=True)
os.write(2, b"a library's warning")
assert sys.stdin.read() == ""
raise ValueError("told to nobody")"""
    code, out, err = ended(tmp_path, body, prefix=["bash", "-c", 'exec "$@" <&- 2>&-', "x"])
    assert (code, out, err) == (2, "", "") and (tmp_path / "file").read_text() == ""
    code, _, err = ended(tmp_path, "print(1)", prefix=["bash", "-c", 'exec "$@" >&-', "x"])
    assert (code, err) == (0, "")


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    code, _, err = ended(tmp_path, "print(1)", prefix=["bash", "-c", 'exec "$@" >/dev/full', "x"])
    assert code == 2 and err == "[Errno 28] No space left on device\n"


def test_help_needs_no_docstrings_at_run_time(tmp_path):
    code, out, err = ended(tmp_path, "sys.argv[1:] = ['--help']\nconfigure(globals())", "-OO")
    assert out.startswith("What it does.\n") and "a folder" in out and (code, err) == (0, "")


def test_a_missing_package_is_one_line(tmp_path):
    for where in "import nowhere", "def main():\n    import nowhere":
        (tmp_path / "late.py").write_text(f"{HEAD}    pass\n{where}\nrun(main)")
        command = [sys.executable, tmp_path / "late.py"]
        shown = subprocess.run(command, capture_output=True, text=True)
        line = "No module named 'nowhere'; pip install -r requirements.txt\n"
        assert (shown.returncode, shown.stderr) == (2, line)


def test_ctrl_c_while_packages_are_loaded_is_quiet(tmp_path):
    slow = f"{HEAD}    pass\nimport time\nprint(flush=True)\ntime.sleep(60)"
    (tmp_path / "slow.py").write_text(slow)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, tmp_path / "slow.py"], **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"") and process.returncode == -signal.SIGINT


def programs():
    """The files that are run, and what they import first."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if "__main__" in text and "configurator" in text and "tests" not in path.parts:
            body = ast.parse(text).body
            yield path, next(x for x in body if isinstance(x, (ast.Import, ast.ImportFrom)))


def test_every_program_imports_the_configurator_before_what_takes_seconds():
    found = dict(programs())
    assert len(found) > 20
    for path, first in found.items():
        name = getattr(first, "module", None) or first.names[0].name
        assert name == "configurator", path


def test_a_program_run_as_a_file_says_how_it_is_run(tmp_path):
    for path in "scripts/pack.py", "domains/vpt/embed.py", "domains/crafter_play.py":
        shown = subprocess.run(
            [sys.executable, ROOT / path, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        name = path.removesuffix(".py").replace("/", ".")
        assert shown.returncode == 1 and shown.stderr == f"cd {ROOT} && python -m {name}\n"


@pytest.mark.parametrize("size", [2**46, 2**62])
def test_out_of_memory_is_one_line(size, capsys):
    for allocate in torch.empty, bytearray:
        with pytest.raises(SystemExit) as stopped:
            run(lambda allocate=allocate: allocate(size))
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("out of memory")
        assert said.count("\n") == 1 and said.endswith("smaller settings or files need less\n")


def test_a_fault_of_the_program_itself_is_a_traceback():
    for error in RuntimeError("size mismatch"), KeyError("x"), AssertionError():
        with pytest.raises(type(error)):
            run(lambda error=error: (_ for _ in ()).throw(error))


def test_of_many_processes_the_first_tells_what_all_see(tmp_path):
    torchrun = dict(TORCHELASTIC_RUN_ID="x", LOCAL_RANK="1")
    body = "print(flush=True)\nraise ValueError('seen by all')"
    process = start(tmp_path, body, **torchrun)
    process.stdout.readline()
    time.sleep(0.1)
    process.terminate()  # as torchrun does where the first one has failed
    assert process.communicate(timeout=60)[1] == ""
    alone = f"from runtime import program\nprogram.OTHERS_FIRST = 0.1\n{body}"
    assert ended(tmp_path, alone, **torchrun) == (2, "\n", "seen by all\n")
    assert ended(tmp_path, body, **torchrun | dict(LOCAL_RANK="0"))[2] == "seen by all\n"


WORKERS = """
from runtime.program import workers
import os, time
with workers(2) as pool:
    pool.map_async(time.sleep, [60, 60])
    print(*[process.pid for process in pool._pool], flush=True)
    time.sleep(60)
"""


def is_running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
@pytest.mark.parametrize("name", ["TERM", "INT", "KILL"])
def test_workers_end_with_their_parent_and_without_a_word(tmp_path, name):
    process = start(tmp_path, WORKERS)
    pids = process.stdout.readline().split()
    process.send_signal(getattr(signal, f"SIG{name}"))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == dict(TERM=143, INT=130, KILL=-9)[name]
    assert name == "KILL" or not said  # then Python tells that it tidied up
    until = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


# -----------------------------------------------------------------------------
# what a user types


def test_a_tilde_is_a_home_folder_in_every_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, right in {
        "~/x": f"{tmp_path}/x",
        "~": f"{tmp_path}",
        "~/a.csv,~/b.csv": f"{tmp_path}/a.csv,{tmp_path}/b.csv",
        "a~b": "a~b",
        "./~/x": "./~/x",
        "~ 5 hours of play": "~ 5 hours of play",
        "": "",
    }.items():
        assert program.expand(text, "") == right
    (tmp_path / "script.py").write_text("out = ''  # a folder\n")
    (tmp_path / "config.py").write_text("out = '~/x'\n")
    for argument in "--out=~/x", str(tmp_path / "config.py"):
        namespace = dict(__file__=str(tmp_path / "script.py"), out="")
        assert configure(namespace, [argument]) == dict(out=f"{tmp_path}/x")


def test_a_home_folder_that_nobody_has_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("out = ''  # a folder\n")
    with pytest.raises(ValueError, match="--out=~nouser/x: out: no home folder ~nouser; write"):
        configure(dict(__file__=str(tmp_path / "script.py")), ["--out=~nouser/x"])
    with pytest.raises(ValueError, match="no home folder ~nouser"):
        find_checkpoint("~nouser/x")
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # nor has the user an entry
    with pytest.raises(ValueError, match="HF_HOME is not set, and neither is HOME"):
        find_checkpoint("EleutherAI/pythia-160m")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device={device}: torch sees none"):
        pick_device(device)


def test_a_stream_without_an_encoding_takes_all():
    stream = io.StringIO()
    program.Shown(stream).write("\x1b 王")
    assert stream.getvalue() == "\\x1b 王"

"""The bench of generated faults: it runs, and tells each bad outcome."""

import random
import sys
import time

import pytest

from bench import faults_cases, faults_injuries

pytest.importorskip("av")


@pytest.mark.parametrize("name", faults_cases.SUBJECTS)
def test_every_fault_is_told_or_harmless(name):
    count = faults_cases.run_subject(name, 6, random.Random(f"3 {name}"))
    assert count["told"] + count["as good"] == 6


def in_two_lines(folder):
    print("a\nb", file=sys.stderr)
    sys.exit(2)


def removes(folder):
    (folder / "other").unlink()
    raise ValueError(f"{folder}: broken")


def says(text):
    def use(folder):
        raise ValueError(text.format(folder))

    return use


USES = {
    "told": says("{}/file is broken"),
    "as good": lambda folder: 1,
    "silent": lambda folder: 2,
    "traceback": lambda folder: {}["key"],
    "traceback of two lines": in_two_lines,
    "traceback that names no file": says("'key'"),
    "hang": lambda folder: time.sleep(30),
    "loss": removes,
}


@pytest.mark.parametrize("outcome", USES)
def test_each_outcome_is_told_from_the_others(outcome, monkeypatch, capsys):
    def make(folder):
        for name in ("file", "other"):
            (folder / name).write_text("content")

    def use(folder, broken):
        return USES[outcome](folder) if broken else 1

    subject = make, use, {"file": [faults_injuries.empty]}
    monkeypatch.setattr(faults_cases, "SUBJECTS", {"a subject": subject})
    monkeypatch.setattr(faults_cases, "SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["faults_cases", "--n=1"])
    bad = outcome not in ("told", "as good")
    with pytest.raises(SystemExit) as ended:
        faults_cases.main()
    assert ended.value.code == bad
    said = capsys.readouterr().out
    kind = next(x for x in faults_cases.OUTCOMES if outcome.startswith(x))
    row = " | ".join(str(int(x == kind)) for x in faults_cases.OUTCOMES)
    assert f"| all | 1 | {row} |" in said and ("a subject, file, empty: " in said) == bad

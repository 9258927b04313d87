"""The commands of the documents are commands of the repository."""

from configurator import settings
import re

import pytest
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"\bpython (?:-m )?([\w./]+)((?: +[^\s|&;`)]+)*)")
OTHERS = {"tokenize", "venv", "pip"}  # modules of Python's own


def commands(document):
    """(program, its arguments) of each command in a document; lines that end in \\ go on."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for program, arguments in COMMAND.findall(text):
        if program not in OTHERS:
            yield program.removesuffix(".py").replace("/", "."), arguments.split()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_command_names_a_program_and_settings_that_it_has(document):
    found = list(commands(document))
    for program, arguments in found:
        path = ROOT / (program.replace(".", "/") + ".py")
        assert path.exists(), program
        names = {x[2:].partition("=")[0] for x in arguments if re.match(r"--\w", x)}
        names -= {"help", "resume", "json", "shard"}
        assert names <= settings(path).keys(), (program, names)
        for config in (x for x in arguments if x.startswith("config/")):
            assert (ROOT / config).exists(), config
    assert found

"""Who may import whom."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

TOP = {"model", "encoder", "data", "train", "sample", "configurator"}
FOLDERS = {"runtime", "scripts", "domains", "bench"}
PATHS = [*ROOT.glob("*.py"), *(path for x in sorted(FOLDERS) for path in (ROOT / x).rglob("*.py"))]
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PATHS}
BODIES = {name: ast.parse(path.read_text()).body for path, name in NAMES.items()}


def imported(nodes):
    """The names that the import statements among nodes bring in: modules, and what is in them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_anywhere(statement):
    return set(imported(ast.walk(statement)))


def test_the_top_files_import_no_program_but_the_maker_of_the_default_data():
    assert BODIES.keys() >= TOP
    for name in TOP:
        for statement in BODIES[name]:
            names = imported_anywhere(statement)
            names = {x for x in names if x.split(".")[0] in FOLDERS - {"runtime"}}
            maker = (name, getattr(statement, "name", "")) == ("train", "open_data")
            assert names == ({"domains", "domains.crafter_play"} if maker else set()), name


def test_runtime_knows_nothing_of_the_top_files():
    for name in BODIES:
        if name.startswith("runtime."):
            names = set.union(*map(imported_anywhere, BODIES[name]))
            assert not TOP & names, name


def test_no_import_runs_in_a_circle():
    graph = {name: BODIES.keys() & set(imported(body)) for name, body in BODIES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_no_module_starts_another_by_its_name_in_a_string():
    starting = {"import_module", "run_module", "run_path", "__import__"}
    for name, body in BODIES.items():
        assert "runpy" not in set().union(*map(imported_anywhere, body)), name
        for node in ast.walk(ast.Module(body, [])):
            called = getattr(node, "func", None)
            if starting & {getattr(called, "attr", ""), getattr(called, "id", "")}:
                started = {getattr(x, "value", None) for x in node.args}
                assert not started & {*NAMES.values()}, name

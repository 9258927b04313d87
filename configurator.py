"""
Settings in plain Python: the assignments at the top of a program, each with a comment.

    python train.py config/crafter.py --K=4         a file of overrides, then single ones, in order

Strict: an unknown name, a wrong type or a broken file is one line on stderr and exit code 2.
"""

import ast
import contextlib
import difflib
import math
import sys
import types
from pathlib import Path

from runtime.program import end_imports, expand, one_line
from runtime.program import run as run

sys.excepthook = end_imports


def settings(script):
    """{name: (default, comment)} of the literals above the first function, but CONSTANTS."""
    source = Path(script).read_text(encoding="utf-8")
    lines = source.splitlines()
    defaults = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.UnaryOp)):
            name = node.targets[0].id
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            if not (name.isupper() and len(name) > 1):  # K and T are settings
                defaults[name] = ast.literal_eval(node.value), comment
    return defaults


def docstring(script):
    """Its __doc__, which python -OO leaves out."""
    return ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8"))).strip()


def from_file(path, defaults=()):
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; a setting is given as --name=value")
    namespace = {}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8-sig"), path, "exec"), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{path}: {type(error).__name__}: {one_line(error)}") from None
    named = {name: value for name, value in namespace.items() if not str(name).startswith("_")}
    tools = types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type
    return {name: x for name, x in named.items() if name in defaults or not isinstance(x, tools)}


def from_argument(argument, defaults):
    name, equals, text = argument[2:].partition("=")
    value = text if equals else True  # --json is --json=True
    if not equals and type(defaults.get(name, [True])[0]) is not bool:
        raise ValueError(f"{argument}: a value is wanted, as in {argument}=..")
    if equals and type(defaults.get(name, [None])[0]) is not str:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
    return {name: value}


def checked(name, value, defaults, source):
    if name not in defaults:
        near = difflib.get_close_matches(str(name), defaults, 1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them"
        raise ValueError(f"{source}: unknown setting {name!r}; {hint}")
    default = defaults[name][0]
    if type(default) is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default):
        expected = f"{name} is of type {type(default).__name__} (default {default!r})"
        raise ValueError(f"{source}: {expected}, got {value!r:.80}")
    return expand(value, f"{source}: {name}") if type(value) is str else value


def configure(namespace, argv=None, bare=None):
    """Overrides a program's settings (in its globals()) from the command line. Returns them.

    bare: the setting that an argument gives which is neither --name=value nor a file of overrides.
    """
    defaults = settings(namespace["__file__"])
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ("-h", "--help"):
            print(docstring(namespace["__file__"]) + "\n\nSettings (--name=value):")
            for name, (default, comment) in defaults.items():
                print(f"  --{name}={default!r}".ljust(35), comment)
            sys.exit(0)
        if argument.startswith("--"):
            given = from_argument(argument, defaults)
        elif bare and not argument.endswith(".py"):
            given = {bare: argument}
        else:
            given = from_file(argument, defaults)
        namespace.update({name: checked(name, given[name], defaults, argument) for name in given})
    return {name: namespace[name] for name in defaults}


def check_range(namespace, least, names, most=math.inf):
    """Raises ValueError where one of the named settings lies outside least .. most."""
    for name in names.split():
        if not (least <= namespace[name] <= most and namespace[name] < math.inf):
            bounds = f"at least {least}" + (f", at most {most}" if most < math.inf else ", finite")
            raise ValueError(f"--{name}={namespace[name]}: {bounds}")

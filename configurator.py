"""
Settings in plain Python: the assignments at the top of a program, each with a comment.

    python train.py config/crafter.py --K=4         a file of overrides, then single ones, in order

Strict: an unknown name, a wrong type or a broken file is one line on stderr and exit code 2.
"""

import ast
import difflib
import math
import sys
from pathlib import Path


def settings(script):
    """{name: (default, comment)} of the literals above the first function, but CONSTANTS."""
    source = Path(script).read_text()
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


def check(name, value, defaults, source):
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, 1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them"
        raise ValueError(f"{source}: unknown setting {name!r}; {hint}")
    default = defaults[name][0]
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default):
        kind = type(default).__name__
        expected = f"{name} is of type {kind} (default {default!r})"
        raise ValueError(f"{source}: {expected}, got {value!r:.80}")
    return value


def from_file(path, defaults):
    namespace = {}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    except OSError as error:
        others = {str(other) for other in Path(path).parent.glob("*.py")} - {path}
        near = difflib.get_close_matches(path, others, 1)
        hint = f"did you mean {near[0]}?" if near else "a setting is given as --name=value"
        raise ValueError(f"{path}: {error.strerror}; {hint}") from None
    except (Exception, SystemExit) as error:
        line = getattr(error, "lineno", None) or "?"
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    given = {name: value for name, value in namespace.items() if not name.startswith("_")}
    return {name: check(name, value, defaults, path) for name, value in given.items()}


def from_argument(argument, defaults):
    name, equals, text = argument[2:].partition("=")
    default = defaults.get(name, [None])[0]
    if not equals and type(default) is bool:
        text = "True"  # --json is --json=True
    elif not equals:
        raise ValueError(f"{argument}: a setting is given as --name=value")
    try:
        value = text if isinstance(default, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return {name: check(name, value, defaults, argument)}


def configure(namespace, argv=None):
    """Overrides the settings in `namespace` (a program's globals()) from the command line.

    Returns all of them as a dict. Raises ValueError.
    """
    defaults = settings(namespace["__file__"])
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ("-h", "--help"):
            print((namespace["__doc__"] or "").strip() + "\n\nSettings (--name=value):")
            for name, (default, comment) in defaults.items():
                print(f"  --{name}={default!r}".ljust(35), comment)
            sys.exit(0)
        read = from_argument if argument.startswith("--") else from_file
        namespace.update(read(argument, defaults))
    return {name: namespace[name] for name in defaults}


def check_range(namespace, least, names, most=math.inf):
    """Raises ValueError where one of the named settings lies outside least .. most."""
    for name in names.split():
        if not least <= namespace[name] <= most:
            bounds = f"at least {least}" + (f", at most {most}" if most < math.inf else "")
            raise ValueError(f"--{name}={namespace[name]}: {bounds}")


def run(main):
    """Runs a program. A user's mistake (ValueError, OSError) is one line and exit code 2."""
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has seen enough
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)

"""
Configuration in plain Python: the settings of a script are the assignments at its top, each with a comment.

    python train.py config/crafter.py --K=4            a file of overrides, then single ones, in the order given

Strict: whatever cannot be meant is one line on stderr and exit code 2.
"""
import ast
import difflib
import signal
import sys
from pathlib import Path


class Fault(ValueError):
    """What a user can mend, in one line: which file or setting, what is wrong with it, what to do."""


def settings(script):
    """{name: (default, comment)} of the literal assignments at the top of a script, read from its source."""
    source = Path(script).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): break
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name): continue
        try: default = ast.literal_eval(node.value)
        except ValueError: continue
        found[node.targets[0].id] = default, lines[node.end_lineno - 1].partition("  # ")[2]
    return found


def may_be_cut():
    """`| head` ends a script that shows things quietly. Not for training, where a socket may break too."""
    if hasattr(signal, "SIGPIPE"): signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def stop(message):
    print(message, file=sys.stderr)
    sys.exit(2)


def checked(name, value, known, where):
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        stop(f"{where}: unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; --help lists them"))
    default = known[name][0]
    if isinstance(default, float) and type(value) is int: value = float(value)
    if default is not None and value is not None and type(value) is not type(default) and not (
            isinstance(default, str) and isinstance(value, list)):                      # one data set, or a list of them
        stop(f"{where}: {name} is a {type(default).__name__} (default {default!r}), got {value!r}")
    return value


def require(namespace, choices, least, most):
    """Stops where a setting cannot be meant: choices {name: allowed values}, least and most {name: bound}."""
    value = {name: x for name, x in namespace.items() if x is not None}
    for name, allowed in choices.items():
        if value[name] not in allowed: stop(f"--{name}={value[name]}: one of {', '.join(map(repr, allowed))}")
    for name in least.keys() & value.keys():
        if not value[name] >= least[name]: stop(f"--{name}={value[name]}: at least {least[name]}")
    for name in most.keys() & value.keys():
        if not value[name] <= most[name]: stop(f"--{name}={value[name]}: at most {most[name]}")


def from_file(path, known):
    try: source = Path(path).read_text()
    except OSError as error:
        near = difflib.get_close_matches(str(path), map(str, Path(path).parent.glob("*.py")), 1)
        stop(f"{path}: {error.strerror}; " + (f"did you mean {near[0]}?" if near else "a setting is given as --name=value"))
    namespace = {}
    try: exec(compile(source, path, "exec"), namespace)
    except Exception as error: stop(f"{path}, line {getattr(error, 'lineno', None) or '?'}: {type(error).__name__}: {error}")
    return {name: checked(name, value, known, path) for name, value in namespace.items() if not name.startswith("_")}


def from_argument(argument, known):
    name, equals, text = argument[2:].partition("=")
    if not equals and type(known.get(name, [None])[0]) is bool: text = "True"          # --json is --json=True
    elif not equals: stop(f"{argument}: a setting is given as --name=value")
    try: value = ast.literal_eval(text)
    except (ValueError, SyntaxError): value = text
    if name in known and isinstance(known[name][0], str) and not isinstance(value, list): value = text
    return {name: checked(name, value, known, argument)}


def configure(namespace, argv=None):
    """Overrides the settings in `namespace` (a script's globals()) from the command line; returns and prints them all."""
    known = settings(namespace["__file__"])
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ("-h", "--help"):
            may_be_cut()
            print((namespace["__doc__"] or "").strip() + "\n\nSettings (--name=value):")
            for name, (default, comment) in known.items(): print(f"  --{name}={default!r}".ljust(35), comment)
            sys.exit(0)
        namespace.update((from_argument if argument.startswith("--") else from_file)(argument, known))
    return {name: namespace[name] for name in known}

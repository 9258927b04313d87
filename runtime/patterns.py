"""
The files that a pattern such as 'episodes/**/*.npy' names, as glob has patterns. What glob passes
over in silence is found here, or told: linked folders, loops, links to nothing, and the two forms
that Unicode has for é, of which a disk keeps either.
"""

import fnmatch
import glob
import os
import sys
from pathlib import Path
from unicodedata import normalize


def composed(name):
    """A name in the form in which names are compared."""
    return normalize("NFC", name)


def names_in(folder):
    try:
        return sorted(os.listdir(folder or "."))
    except NotADirectoryError:
        return []
    except OSError as error:
        print(f"warning: left out: {folder}, {error.strerror}", file=sys.stderr)
        return []


def named(folder, part):
    """The paths in a folder that a part of a pattern names: itself, where there is one of that
    name, though it has brackets."""
    exact = os.path.join(folder, part)
    if os.path.lexists(exact):
        return [exact]
    pattern = composed(part if glob.has_magic(part) else glob.escape(part))
    names = [name for name in names_in(folder) if fnmatch.fnmatch(composed(name), pattern)]
    return [os.path.join(folder, x) for x in names if x[0] != "." or part[0] == "."]


def folders_below(folder, seen, above=()):
    """A folder and those below, but hidden ones. Links are followed; each folder comes once, and
    none that was seen."""
    real = os.path.realpath(folder)
    if real in above:
        print(f"warning: left out: {folder}, a link back to {real}", file=sys.stderr)
    if real in seen:
        return
    seen.add(real)
    yield folder
    for name in names_in(folder):
        path = os.path.join(folder, name)
        if name[0] != "." and os.path.isdir(path):
            yield from folders_below(path, seen, (*above, real))


def matching(pattern):
    """The paths that a pattern names, sorted. Links that lead nowhere are told and left out."""
    parts = Path(pattern).parts
    paths = [""]
    for part in parts + ("*",) * (parts[-1:] == ("**",)):
        if part == "**":
            seen = set()
            paths = [x for folder in paths for x in folders_below(folder or ".", seen)]
        else:
            paths = [path for folder in paths for path in named(folder, part)]
    paths = sorted(set(paths) - {""})
    if parts[-1:] == ("**",):  # what lies below, not where
        paths = [path for path in paths if not os.path.isdir(path)]
    dead = {path for path in paths if os.path.islink(path) and not os.path.exists(path)}
    if dead:
        which = f"{len(dead)} links that lead nowhere, such as {min(dead)}"
        print(f"warning: left out: {which}", file=sys.stderr)
    return [path for path in paths if path not in dead]


def listed(text):
    """The paths of a list with commas between; of a pattern, those that it names. A comma may be in
    a name, where that is there."""
    paths, pieces = [], text.split(",")
    while pieces:
        for n in range(len(pieces), 0, -1):
            found = matching(",".join(pieces[:n]))
            if found:
                break
        paths += found or pieces[:n]
        pieces = pieces[n:]
    return [path for path in paths if path]

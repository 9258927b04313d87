"""
Injuries for bench.faults_cases: ways to break a file, each drawn from a random generator.

An injury (path, rng) changes a file in place. Those of DETECTABLE are for formats with checksums,
or no reader could notice; the others leave what is no file of that format, or says nothing else.
"""

import copy
import json
import os
import re
import struct

DEEP = "[" * 200_000
# what no field of these formats may be; "DEEP" stands for DEEP, "HALF" for half a character
NASTY = [None, -1, 10**400, 1e308, float("nan"), float("-inf"), [], {}, [[]], "", "HALF", "DEEP"]
NASTY += ["x" * 140_000, [None], {"x": None}, "\n"]
NUMBERS = ["-1", "nan", "inf", "1e400", "1" + "0" * 400, "x", "[3]", "0x3", "1,5"]
# fields of the header of an .npy of (N, 4) '<f4', and what they cannot be
TYPES = [b"'|O'", b"'<c8'", b"None", b"''", b"[('a', '<f4')]", b"'<U1'", b"'<M8[s]'", b"'<f'"]
SHAPES = [b"(30,)", b"()", b"(-30, 4)", b"(1" + b"0" * 400 + b", 4)", b"(1, 4)", b"None"]
HEADER = {rb"'<f4'": TYPES, rb"\(\d+, 4\)": SHAPES}


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def empty(path, rng):
    path.write_bytes(b"")


def remove(path, rng):
    path.unlink()


def folder(path, rng):
    path.unlink()
    path.mkdir()


def dangling(path, rng):
    path.unlink()
    path.symlink_to("nowhere")


def loop(path, rng):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path, rng):
    path.unlink()
    os.mkfifo(path)


def flip(path, rng):
    content = bytearray(path.read_bytes())
    # headers are small, and matter
    at = rng.randrange(min(len(content), rng.choice([8, 200, len(content)])))
    content[at] ^= rng.randrange(1, 256)
    path.write_bytes(content)


WHOLE = truncate, empty, remove, folder, dangling, loop, pipe
DETECTABLE = (flip,)

# -----------------------------------------------------------------------------
# JSON


def break_value(value, rng, words=NASTY):
    """A copy of a JSON object, one of whose values is another now, as text."""
    value = copy.deepcopy(value)
    inner, place = value, None
    while inner and isinstance(inner, (dict, list)) and (place is None or rng.random() < 0.7):
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        place = inner, rng.choice(keys)
        inner = inner[place[1]]
    place[0][place[1]] = rng.choice(words)
    text = json.dumps(value)
    return text.replace('"HALF"', '"\\ud800"').replace('"DEEP"', DEEP)


def json_value(path, rng):
    path.write_text(break_value(json.loads(path.read_text()), rng))


def json_kind(path, rng):
    path.write_text(rng.choice(["null", "5", "[]", '"x"', "{", "{}", DEEP, "NaN", "\ufeff"]))


def json_line(path, rng, by_hand=False):
    lines = path.read_text().splitlines()
    n = rng.randrange(len(lines))
    record = json.loads(lines[n])
    if by_hand:
        record.pop("crc", None)
    lines[n] = break_value(record, rng) if rng.random() < 0.8 else rng.choice(["null", "{", "{}"])
    path.write_text("\n".join(lines) + "\n")


def edited_by_hand(path, rng):
    json_line(path, rng, by_hand=True)


# -----------------------------------------------------------------------------
# safetensors, numpy, CSV


def tensor_header(path, rng):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    about = rng.choice([x for name, x in header.items() if name != "__metadata__"])
    if rng.random() < 0.3:
        about["dtype"] = rng.choice(["F64", "U8", "BOOL", "F4", "I64", "F16"])  # another size
    elif rng.random() < 0.3:
        about["shape"] = rng.choice([[], [0], about["shape"] + [1], [-1], [2**62, 4], [2] * 99])
    text = break_value(header, rng) if rng.random() < 0.5 else json.dumps(header)
    sizes = len(text.encode()), rng.choice([0, 2**63, 2**64 - 1])
    at = rng.random() < 0.1
    path.write_bytes(struct.pack("<Q", sizes[at]) + text.encode() + content[8 + size :])


def array_header(path, rng):
    content = path.read_bytes()
    pattern, words = rng.choice(list(HEADER.items()))
    header = re.sub(pattern, lambda _: rng.choice(words), content[10:128])
    path.write_bytes(content[:8] + struct.pack("<H", len(header)) + header + content[128:])


def csv_field(path, rng):
    """A field of a line of episode,start,end,text is one that it cannot be."""
    lines = path.read_text().splitlines()
    n = rng.randrange(1, len(lines))
    fields = lines[n].split(",", 3)
    column = rng.randrange(4)
    words = ["nobody", "x" * 140_000, "\0"], NUMBERS, NUMBERS, ["x" * 140_000, "a,b", '"open']
    fields[column] = rng.choice(words[column])
    lines[n] = rng.choice([",".join(fields), ",".join(fields), ",".join(fields[:3]), ";" * 3])
    path.write_text("\n".join(lines) + "\n")


def csv_columns(path, rng):
    head, rest = path.read_text().split("\n", 1)
    heads = ["", "episode;start;end;text", "episode,start", "episode,start,start,text", "\0", '"']
    path.write_text(rng.choice(heads) + "\n" + rest)

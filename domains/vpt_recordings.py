"""
Contractor recordings of Minecraft: <stem>.mp4 (640x360, 20 frames per second), <stem>.jsonl (a line per frame) and, where it is
there, <stem>-options.json. Read as they are: lines broken or missing, fields null, a cursor that the video lacks.

    lines = read_lines("a.jsonl")                                    # one Line per frame, None where the line is broken
    for frame in pictures("a.mp4", lines, 128, draw_arrow()): ...    # (128, 128, 3) uint8 RGB, as the network was trained on

Frame i belongs to line i, by number: the video repeats its last frame, so it has one more than there are lines.
Source of the format and its quirks: OpenAI's loader (Video-Pre-Training) and the recorder in MineRL's scripts/mcp_patch.diff.
"""
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

FPS, WIDTH, HEIGHT = 20, 640, 360
WINDOW_HEIGHT = 720                       # of the player's window, in whose pixels the mouse is given


class Line(NamedTuple):
    """One tick. cursor: (x, y) in window pixels; buttons: held, and newly pressed (0 is attack); stats: counters since the world began."""
    gui: bool = False
    inventory: bool = False               # the open screen is the player's inventory
    cursor: tuple | None = None
    buttons: frozenset = frozenset()
    pressed: frozenset = frozenset()
    hotbar: int | None = None             # the selected slot, 0 .. 8; older recorders do not have it
    stats: dict = {}


def read_lines(path):
    """jsonl -> list of Line, None where a line cannot be read, so that line i stays with frame i."""
    rows = Path(path).read_bytes().split(b"\n")
    if not rows[-1].strip(): rows.pop()
    return release_stuck_attack([read_line(row) for row in rows])


def read_line(row):
    try:
        tick = json.loads(row.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(tick, dict): return None
    mouse, stats = (tick.get(key) if isinstance(tick.get(key), dict) else {} for key in ("mouse", "stats"))
    place = (mouse.get("x"), mouse.get("y"))
    slot = tick.get("hotbar")
    return Line(gui=tick.get("isGuiOpen") is True, inventory=tick.get("isGuiInventory") is True,
                cursor=place if all(isinstance(p, (int, float)) and math.isfinite(p) for p in place) else None,
                buttons=buttons(mouse.get("buttons")), pressed=buttons(mouse.get("newButtons")),
                hotbar=slot if isinstance(slot, int) and 0 <= slot <= 8 else None,
                stats={key: n for key, n in stats.items() if isinstance(n, int)})


def buttons(found):
    return frozenset(b for b in found if b in (0, 1, 2)) if isinstance(found, list) else frozenset()


def release_stuck_attack(lines):
    """A recorder that starts while attack is held reports it held until it is pressed anew: not held, in truth."""
    if not lines or not lines[0] or lines[0].pressed != {0}: return lines
    again = next((i for i, line in enumerate(lines) if i and line and 0 in line.pressed), len(lines))
    return [line and line._replace(buttons=line.buttons - {0}) for line in lines[:again]] + lines[again:]


def hotbar_changes(lines):
    """Lines that show another slot than the line before; the wheel or key that caused it acted on the line before."""
    return [i for i in range(1, len(lines)) if lines[i - 1] and lines[i] and None not in (lines[i - 1].hotbar, lines[i].hotbar)
            and lines[i - 1].hotbar != lines[i].hotbar]


def window_height(mp4):
    """Of the player's window, from <stem>-options.json where there is one; 720 otherwise."""
    path = Path(mp4).with_name(Path(mp4).stem + "-options.json")
    try:
        height = json.loads(path.read_bytes())["windowHeight"]
        return height if isinstance(height, int) and height > 0 else WINDOW_HEIGHT
    except (OSError, ValueError, KeyError, TypeError):
        return WINDOW_HEIGHT


def video_library():
    try:
        import av
        return av
    except ImportError:
        raise SystemExit("reading videos needs PyAV: pip install -r requirements-vpt.txt") from None


def decode(path, check=True):
    """Frames of a video in order, (h, w, 3) uint8 RGB. ValueError if it cannot be read or, with `check`, is no contractor's recording."""
    av = video_library()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video: raise ValueError("no video in the file")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"   # the parallel ones are the processes
            rate, size = float(stream.average_rate or 0), (stream.width, stream.height)
            if check and abs(rate - FPS) > 0.5: raise ValueError("the video has not 20 frames per second")
            if check and size != (WIDTH, HEIGHT): raise ValueError("the video is not 640x360")
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(f"unreadable video ({error.strerror})") from None


def pictures(mp4, lines, size, cursor):
    """What the network sees: one (size, size, 3) uint8 RGB per line, cursor (16, 16, 4) drawn where a screen is open.

    ValueError if frames and lines do not pair. A video one frame longer is as it should be; a jsonl whose last line is cut short
    keeps the frames it has lines for; any other difference of more than one means that the pairs are unknown.
    """
    height, line, n = window_height(mp4), Line(), 0
    for frame in decode(mp4):
        if n < len(lines):
            line = lines[n] or line       # on a broken line the screen is taken to be as it was
            if line.gui and line.cursor: draw(cursor, frame, *(int(p * HEIGHT / height) for p in line.cursor))
            yield resize(frame, size)
        n += 1
    cut_short = bool(lines) and lines[-1] is None and n > len(lines)
    if abs(n - len(lines)) > 1 and not cut_short: raise ValueError("frames and lines differ in number by more than one")


def draw(cursor, frame, x, y):
    """Alpha-blends the cursor's (h, w, 4) onto the frame in place, its top left corner at column x, row y; what lies outside is cut off."""
    left, top = max(x, 0), max(y, 0)
    part = cursor[top - y:, left - x:][:max(frame.shape[0] - top, 0), :max(frame.shape[1] - left, 0)]
    if not part.size: return
    under, alpha = frame[top:top + part.shape[0], left:left + part.shape[1]], part[..., 3:] / 255
    under[:] = (under * (1 - alpha) + part[..., :3] * alpha).astype(np.uint8)


ARROW = """
#...............
##..............
#o#.............
#oo#............
#ooo#...........
#oooo#..........
#ooooo#.........
#oooooo#........
#ooooooo#.......
#ooooooo##......
#oooo###........
#oo#oo#.........
#o#.#oo#........
##..#oo#........
.....##.........
................"""


def draw_arrow():
    """Our own stand-in for the cursor that OpenAI's loader draws: (16, 16, 4) uint8 RGBA."""
    colour = {"#": (0, 0, 0, 255), "o": (255, 255, 255, 255), ".": (0, 0, 0, 0)}
    return np.array([[colour[c] for c in row] for row in ARROW.split()], dtype=np.uint8)


def read_cursor(path):
    """The 16 x 16 top left corner of a picture with transparency, such as OpenAI's mouse_cursor_white_16x16.png: (16, 16, 4) RGBA."""
    av = video_library()
    try:
        with av.open(str(path)) as picture:
            return next(picture.decode(video=0)).to_ndarray(format="rgba")[:16, :16]
    except (av.FFmpegError, IndexError, StopIteration, OSError):
        raise ValueError(f"{path}: not a picture; leave --cursor out to draw the built-in arrow") from None


@functools.lru_cache
def taps(before, after):
    """For each output cell the two input cells and their weights in 1/2048."""
    place = (np.arange(after) + 0.5) * before / after - 0.5
    first = np.floor(place).astype(int)
    weight = np.where((first < 0) | (first >= before - 1), 0, place - first)
    first = first.clip(0, before - 1)
    rounded = [np.rint(w * 2048).astype(np.int32)[:, None] for w in (1 - weight, weight)]
    return first, (first + 1).clip(max=before - 1), *rounded


def resize(frame, size):
    """Bilinear, without antialiasing, in the integers of OpenCV's INTER_LINEAR: (h, w, 3) uint8 -> (size, size, 3) uint8."""
    top, bottom, upper, lower = taps(frame.shape[0], size)
    left, right, near, far = taps(frame.shape[1], size)
    rows = frame[np.concatenate([top, bottom])]                                # (2 * size, w, 3)
    across = (rows[:, left] * near + rows[:, right] * far) >> 4                # (2 * size, size, 3)
    upper, lower = upper[:, :, None], lower[:, :, None]
    return ((((upper * across[:size]) >> 16) + ((lower * across[size:]) >> 16) + 2) >> 2).astype(np.uint8)

"""
Contractor recordings of Minecraft: <stem>.mp4 (640x360, 20 frames per second), <stem>.jsonl (a line
per frame) and, at times, <stem>-options.json. Read as they are, with broken lines and null fields.

    lines = read_lines("a.jsonl")                    # a Line per frame, None where it is broken
    for frame in pictures("a.mp4", lines, 128, draw_arrow()):
        ...                                          # (128, 128, 3) uint8 RGB, as in VPT's training

Frame i belongs to line i, by number: the video repeats its last frame, so it has one more.
Sources of the format: OpenAI's loader (openai/Video-Pre-Training), and the recorder in
minerllabs/minerl, scripts/mcp_patch.diff.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.files import read_json, regular_file

FPS, WIDTH, HEIGHT = 20, 640, 360
WINDOW_HEIGHT = 720  # of the player's window, in whose pixels the mouse is given
CHUNK = 128  # frames that are handed on at a time

# -----------------------------------------------------------------------------
# the jsonl


class Line(NamedTuple):
    """One tick of the game."""

    gui: bool = False  # a screen is open
    inventory: bool = False  # it is the player's inventory
    cursor: tuple | None = None  # (x, y) in pixels of the window
    stats: dict = {}  # counters since the world began


def read_lines(path):
    """jsonl -> list of Line, None where one cannot be read, so that line i stays with frame i."""
    rows = Path(path).read_bytes().split(b"\n")
    if not rows[-1].strip():
        rows.pop()
    return [read_line(row) for row in rows]


def read_line(row):
    try:
        tick = json.loads(row.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(tick, dict):
        return None
    mouse = dict_in(tick, "mouse")
    cursor = mouse.get("x"), mouse.get("y")
    stats = dict_in(tick, "stats")
    return Line(
        gui=tick.get("isGuiOpen") is True,
        inventory=tick.get("isGuiInventory") is True,
        cursor=cursor if all(map(is_place, cursor)) else None,
        stats={key: count for key, count in stats.items() if isinstance(count, int)},
    )


def dict_in(tick, key):
    """A field that some recorders leave null."""
    return tick[key] if isinstance(tick.get(key), dict) else {}


def is_place(x):
    return isinstance(x, (int, float)) and abs(x) < 1e9  # not NaN, and pixels of some window


def window_height(mp4):
    """Of the player's window in pixels, from <stem>-options.json where it is told."""
    path = Path(mp4).with_name(Path(mp4).stem + "-options.json")
    try:
        height = read_json(path).get("windowHeight")
    except (OSError, ValueError):
        return WINDOW_HEIGHT
    return height if isinstance(height, int) and 0 < height < 1e9 else WINDOW_HEIGHT


# -----------------------------------------------------------------------------
# the video


def video_library():
    """PyAV. Raises ValueError where it is not installed."""
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV: pip install -r requirements-vpt.txt") from None
    return av


def decode(path):
    """Frames of a video in order, (360, 640, 3) uint8 RGB. ValueError if it is no recording."""
    av = video_library()
    if not Path(path).is_file():  # to open a pipe would hang
        raise ValueError("unreadable video (no file)")
    try:
        with av.open(f"file:{path}") as container:
            if not container.streams.video:
                raise ValueError("no video in the file")
            stream = container.streams.video[0]
            check_video(stream)
            stream.thread_type = "NONE"  # processes run in parallel, not threads
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(f"unreadable video ({error.strerror})") from None


def check_video(stream):
    if abs(float(stream.average_rate or 0) - FPS) > 0.5:
        raise ValueError(f"the video has not {FPS} frames per second")
    if (stream.width, stream.height) != (WIDTH, HEIGHT):
        raise ValueError(f"the video is not {WIDTH}x{HEIGHT}")


def pictures(mp4, lines, size, cursor):
    """What the network sees, a (size, size, 3) uint8 RGB per line.

    cursor (16, 16, 4) is drawn where a screen is open. A video one frame longer than its lines is
    as it should be. A jsonl whose last line is cut short keeps the frames it has lines for. Raises
    ValueError if the numbers differ otherwise: then nobody knows which line is of which frame.
    """
    height = window_height(mp4)
    line, n_frames = Line(), 0
    for frame in decode(mp4):
        if n_frames < len(lines):
            line = lines[n_frames] or line  # on a broken line the screen is as it was
            if line.gui and line.cursor:
                x, y = line.cursor
                draw_cursor(cursor, frame, int(x * HEIGHT / height), int(y * HEIGHT / height))
            yield resize(frame, size)
        n_frames += 1
    cut_short = bool(lines) and lines[-1] is None and n_frames > len(lines)
    if abs(n_frames - len(lines)) > 1 and not cut_short:
        raise ValueError("frames and lines differ in number by more than one")


def chunks(frames):
    """Frames -> (number of the first, (n, size, size, 3)), CHUNK at a time."""
    start, chunk = 0, []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == CHUNK:
            yield start, np.stack(chunk)
            start, chunk = start + CHUNK, []
    if chunk:
        yield start, np.stack(chunk)


# -----------------------------------------------------------------------------
# the cursor, which the video lacks

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
COLOURS = {"#": (0, 0, 0, 255), "o": (255, 255, 255, 255), ".": (0, 0, 0, 0)}


def draw_arrow():
    """Our stand-in for the cursor that OpenAI's loader draws: (16, 16, 4) uint8 RGBA."""
    return np.array([[COLOURS[c] for c in row] for row in ARROW.split()], dtype=np.uint8)


def read_cursor(path):
    """The top left of a picture, such as OpenAI's mouse_cursor_white_16x16.png: (16, 16, 4)."""
    av = video_library()
    regular_file(path)
    try:
        with av.open(f"file:{path}") as picture:
            return next(picture.decode(video=0)).to_ndarray(format="rgba")[:16, :16]
    except (av.FFmpegError, IndexError, StopIteration, OSError):
        raise ValueError(f"{path}: not a picture; without --cursor an arrow is drawn") from None


def draw_cursor(cursor, frame, x, y):
    """Blends cursor (h, w, 4) onto the frame in place, its top left corner at column x, row y."""
    left, top = max(x, 0), max(y, 0)
    under = frame[top:, left:]
    cursor = cursor[top - y :, left - x :][: under.shape[0], : under.shape[1]]  # what lies inside
    under = under[: cursor.shape[0], : cursor.shape[1]]
    alpha = cursor[..., 3:] / 255
    under[:] = (under * (1 - alpha) + cursor[..., :3] * alpha).astype(np.uint8)


# -----------------------------------------------------------------------------
# resizing, bit for bit as OpenCV's INTER_LINEAR: bilinear in integers, without antialiasing


@functools.lru_cache
def taps(n_in, n_out):
    """For each output cell the two input cells, and their weights in 1/2048."""
    place = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    first = np.floor(place).astype(int)
    at_edge = (first < 0) | (first >= n_in - 1)
    weight = np.where(at_edge, 0, place - first)
    first = first.clip(0, n_in - 1)
    second = (first + 1).clip(max=n_in - 1)
    in_2048ths = [np.rint(w * 2048).astype(np.int32)[:, None] for w in (1 - weight, weight)]
    return first, second, *in_2048ths


def resize(frame, size):
    """(h, w, 3) uint8 -> (size, size, 3) uint8."""
    top, bottom, top_weight, bottom_weight = taps(frame.shape[0], size)
    left, right, left_weight, right_weight = taps(frame.shape[1], size)
    rows = frame[np.concatenate([top, bottom])]  # (2 * size, w, 3)
    rows = (rows[:, left] * left_weight + rows[:, right] * right_weight) >> 4
    upper, lower = rows[:size], rows[size:]  # (size, size, 3)
    upper = (upper * top_weight[:, None]) >> 16
    lower = (lower * bottom_weight[:, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)

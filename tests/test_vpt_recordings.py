"""Frame i stays with line i, whatever is broken; the network sees what OpenAI's loader shows."""

import json

import numpy as np
import pytest
from vpt_made import (
    SAMPLES,
    SYNTHETIC,
    make_recording,
    make_video,
    read_barcode,
    synthetic_truth,
    tick,
    with_samples,
)

from domains.vpt.recordings import (
    Line,
    decode,
    draw_arrow,
    draw_cursor,
    pictures,
    read_cursor,
    read_line,
    read_lines,
    resize,
)

pytest.importorskip("av")
ARROW = draw_arrow()


def lines_of(tmp_path, rows):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    return read_lines(tmp_path / "a.jsonl")


def test_a_line_keeps_its_number_whatever_stands_before_it(tmp_path):
    broken = [b"", b"garbage", b"[1]", b"\x00\x00", b"\xff\xfe{", b"[" * 100_000]
    found = lines_of(
        tmp_path, [b'{"hotbar": 0}', *broken, b'{"hotbar": 7}\r', b'{"hotbar": 8}', b'{"hot']
    )
    assert [line is None for line in found] == [
        False,
        True,
        True,
        True,
        True,
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "fields",
    [
        dict(mouse=None, keyboard=None),
        dict(mouse=[]),
        dict(mouse=dict(x=None, y="3", buttons=None)),
        dict(mouse=dict(x=float("nan"), y=1)),
        dict(mouse=dict(x=10**400, y=1)),
        dict(stats=None),
        dict(stats=[1]),
        dict(stats={"a": None, "b": "1", "c": 1.5}),
        dict(isGuiOpen=None, hotbar=None),
        dict(hotbar="3"),
        dict(hotbar=77),
    ],
)
def test_a_field_that_is_null_or_of_another_kind_counts_as_not_there(fields):
    assert read_line(json.dumps(fields).encode()) == Line()


def test_frames_go_with_lines_by_number_and_the_repeated_last_one_is_dropped(tmp_path):
    mp4 = make_recording(tmp_path, "a", [tick() for _ in range(30)])
    assert [read_barcode(frame) for frame in decode(mp4)] == [*range(30), 29]
    assert len(list(pictures(mp4, read_lines(tmp_path / "a.jsonl"), 128, ARROW))) == 30


def test_colours_come_as_red_green_blue(tmp_path):
    frame = np.zeros((360, 640, 3), np.uint8)
    frame[..., 0] = 250
    red, green, blue = next(decode(make_video(tmp_path / "a.mp4", [frame])))[180, 320]
    assert red > 200 and max(green, blue) < 50


@pytest.mark.parametrize("extra, fine", [(0, True), (1, True), (-1, True), (2, False), (-2, False)])
def test_frames_and_lines_that_differ_by_more_than_one_are_refused(tmp_path, extra, fine):
    mp4 = make_recording(tmp_path, "a", [tick() for _ in range(20)], extra=extra)

    def run():
        return len(list(pictures(mp4, read_lines(tmp_path / "a.jsonl"), 32, ARROW)))

    if fine:
        assert run() == 20 + min(extra, 0)
    else:
        with pytest.raises(ValueError, match="differ in number"):
            run()


def test_a_jsonl_cut_short_keeps_the_frames_it_has_lines_for(tmp_path):
    mp4 = make_recording(tmp_path, "a", [tick() for _ in range(20)])
    rows = (tmp_path / "a.jsonl").read_bytes().split(b"\n")[:9]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows)[:-5])
    assert len(list(pictures(mp4, read_lines(tmp_path / "a.jsonl"), 32, ARROW))) == 9


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00\x00\x00\x20ftypisom" + b"\x00" * 100])
def test_a_video_that_cannot_be_read_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="unreadable|no video"):
        list(decode(tmp_path / "a.mp4"))


def test_a_video_of_another_rate_or_size_is_refused(tmp_path):
    frames = [np.zeros((360, 640, 3), np.uint8)] * 3
    with pytest.raises(ValueError, match="20 frames"):
        list(decode(make_video(tmp_path / "a.mp4", frames, rate=30)))
    with pytest.raises(ValueError, match="640x360"):
        list(decode(make_video(tmp_path / "b.mp4", [f[:180, :320] for f in frames])))


def test_the_cursor_is_drawn_where_a_screen_is_open_and_only_there(tmp_path):
    broken = "not a line"
    mp4 = make_recording(
        tmp_path,
        "a",
        [
            tick(),
            tick(gui=True, x=200, y=300),
            broken,
            tick(gui=True, x=-9999, y=1e9),
            tick(x=200, y=300),
        ],
    )
    lines = read_lines(tmp_path / "a.jsonl")
    plain = [resize(frame, 128) for frame in decode(mp4)]
    shown = list(pictures(mp4, lines, 128, ARROW))
    assert [not np.array_equal(a, b) for a, b in zip(shown, plain, strict=False)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    changed = np.argwhere(
        (shown[1] != plain[1]).any(-1)
    )  # the frame is 640 x 360, half the window's 1280 x 720
    first, last = (np.array([y * 128 // 360, x * 128 // 640]) for x, y in [(100, 150), (116, 166)])
    assert (changed.min(0) >= first - 1).all() and (changed.max(0) <= last + 1).all()


def test_the_cursor_follows_the_size_of_the_players_window(tmp_path):
    mp4 = make_recording(tmp_path, "a", [tick(gui=True, x=400, y=600)])
    (tmp_path / "a-options.json").write_text('{"windowHeight": 1440}')
    found = next(pictures(mp4, read_lines(tmp_path / "a.jsonl"), 128, ARROW))
    (tmp_path / "a-options.json").write_text("[]")  # not as it should be: 720
    assert not np.array_equal(
        found, next(pictures(mp4, read_lines(tmp_path / "a.jsonl"), 128, ARROW))
    )
    frame = next(decode(mp4))
    draw_cursor(ARROW, frame, 100, 150)
    assert np.array_equal(found, resize(frame, 128))


@pytest.mark.parametrize(
    "x, y", [(0, 0), (-5, 3), (-16, 0), (-99, -99), (630, 350), (640, 360), (9999, 5)]
)
def test_drawing_beyond_an_edge_draws_the_part_inside(x, y):
    frame, canvas = np.full((360, 640, 3), 40, np.uint8), np.full((600, 900, 3), 40, np.uint8)
    draw_cursor(ARROW, frame, x, y)
    if -100 <= x < 700:
        draw_cursor(ARROW, canvas, x + 120, y + 120)
    assert np.array_equal(frame, canvas[120:480, 120:760])


def test_a_cursor_of_ones_own_is_read_from_a_picture(tmp_path):
    import av

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    with av.open(str(tmp_path / "c.png"), "w", format="image2") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 24, 20, "rgba"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        out.mux(stream.encode())
    assert np.array_equal(read_cursor(tmp_path / "c.png"), pixels[:16, :16])
    (tmp_path / "d.png").write_text("no picture")
    with pytest.raises(ValueError, match="not a picture"):
        read_cursor(tmp_path / "d.png")


@pytest.mark.parametrize("height, width", [(36, 64), (9, 12)])
def test_resizing_is_the_published_formula_in_whole_numbers(height, width):
    """Each output cell written out alone, from the formula, with Python's integers."""
    frame = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)

    def tap(o, n):
        f = (o + 0.5) * n / 16 - 0.5
        i = int(np.floor(f))
        w = 0 if i < 0 or i >= n - 1 else f - i
        i = min(max(i, 0), n - 1)
        return i, min(i + 1, n - 1), round((1 - w) * 2048), round(w * 2048)

    for y, x, c in [(0, 0, 0), (15, 15, 2), (3, 7, 1), (8, 0, 2), (9, 14, 0)]:
        (j0, j1, d0, d1), (i0, i1, c0, c1) = tap(y, height), tap(x, width)
        across = [int(frame[j, i0, c]) * c0 + int(frame[j, i1, c]) * c1 for j in (j0, j1)]
        assert (
            resize(frame, 16)[y, x, c]
            == (((d0 * (across[0] >> 4)) >> 16) + ((d1 * (across[1] >> 4)) >> 16) + 2) >> 2
        )
    assert np.array_equal(resize(frame[:, :height], height), frame[:, :height])


@with_samples
def test_resizing_is_bit_equal_to_opencv():
    import av

    expected = np.load(SAMPLES / "samples/resize/expected.npz")
    for name in ("frame0", "frame1"):
        with av.open(str(SAMPLES / f"samples/resize/{name}.png")) as picture:
            assert np.array_equal(
                resize(next(picture.decode(video=0)).to_ndarray(format="rgb24"), 128),
                expected[name],
            )


@with_samples
def test_the_synthetic_recording_is_read_as_its_truth_says():
    truth = synthetic_truth()
    lines = read_lines(SYNTHETIC / "rec.jsonl")
    frames = [read_barcode(frame) for frame in decode(SYNTHETIC / "rec.mp4")]
    assert (len(lines), len(frames)) == (truth["lines"], truth["video_frames"]) and frames[
        :200
    ] == list(range(200))
    assert len(list(pictures(SYNTHETIC / "rec.mp4", lines, 128, ARROW))) == 200
    assert (
        lines[truth["null_mouse"]].cursor is None
        and lines[truth["negative_cursor_line"]].cursor[0] < 0
    )
    assert next(i for i, line in enumerate(lines) if line.stats) == truth["stats_baseline_line"]


@with_samples
def test_the_broken_recording_keeps_its_alignment():
    truth = synthetic_truth()
    whole, lines = read_lines(SYNTHETIC / "rec.jsonl"), read_lines(SYNTHETIC / "rec-broken.jsonl")
    bad = {truth["broken"]["garbage_line"], truth["broken"]["truncated_line"]}
    assert lines == [None if i in bad else whole[i] for i in range(max(bad) + 1)]
    assert len(list(pictures(SYNTHETIC / "rec.mp4", lines, 128, ARROW))) == len(lines)


@with_samples
def test_a_real_line_is_read():
    (line,) = read_lines(SAMPLES / "samples/readme_example_7x.jsonl")
    assert line.cursor == (274.0, 338.0)
    assert line.stats["minecraft.use_item:minecraft.oak_planks"] == 5

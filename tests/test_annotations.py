"""Captions as annotation tools write them; the files are written by the formats' own libraries."""

import json
import sys

import pytest

from runtime.patterns import listed
from scripts.captions import read_all_captions, read_text_file

STEPS = {"walk01": 100, "run/two": 100, "é": 100}


def read(path, fps=10.0, frame_rate=0.0):
    """{episode: [(start, end, text), ..]}, at ten steps a second."""
    texts, _ = read_all_captions(listed(str(path)), STEPS, fps, "all", frame_rate)
    return {name: [tuple(caption) for caption in of] for name, of in texts.items()}


def refused(path, **settings):
    with pytest.raises(ValueError) as error:
        read(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# ELAN


@pytest.fixture
def eaf():
    return pytest.importorskip("pympi", reason="pip install pympi-ling").Eaf()


def test_a_tier_of_elan_is_a_kind_of_caption(eaf, tmp_path):
    eaf.add_tier("hand")
    eaf.add_annotation("hand", 1200, 2500, "reaches")
    eaf.add_annotation("hand", 4000, 4001, "")
    eaf.add_annotation("default", 3000, 3100, "a   beep\n")
    eaf.to_file(tmp_path / "walk01.eaf")
    said = [(12, 25, "hand reaches"), (30, 31, "a beep"), (40, 41, "hand")]
    assert read(tmp_path / "walk01.eaf") == {"walk01": said}
    assert "--fps" in refused(tmp_path / "walk01.eaf", fps=0.0)


def test_annotations_of_elan_without_times_have_those_of_others(eaf, tmp_path):
    subdivision = "Time_Subdivision", "Symbolic_Association"
    for name in subdivision:
        eaf.add_linguistic_type(name, name, timealignable=name == "Time_Subdivision")
    eaf.add_tier("said")
    eaf.add_annotation("said", 1000, 4000, "a b c")
    eaf.add_tier("words", subdivision[0], "said")
    slots = [*eaf.timeslots, *(eaf.generate_ts_id() for _ in range(2))]  # 1 s, 4 s, and two without
    for first, last, word in ((0, 2, "a"), (2, 3, "b"), (3, 1, "c")):
        name = eaf.generate_annotation_id()
        eaf.annotations[name] = "words"
        eaf.tiers["words"][0][name] = slots[first], slots[last], word, None
    eaf.add_tier("kinds", subdivision[1], "words")
    eaf.tiers["kinds"][1]["k1"] = name, "letter", None, None  # refers to c
    eaf.to_file(tmp_path / "walk01.eaf")
    assert read(tmp_path / "walk01.eaf")["walk01"] == [
        (10, 20, "words a"),
        (10, 40, "said a b c"),
        (20, 30, "words b"),
        (30, 40, "kinds letter"),
        (30, 40, "words c"),
    ]


def test_a_file_of_elan_may_be_named_by_its_video(eaf, tmp_path):
    eaf.add_linked_file("file:///home/a%20b/walk01.mp4", mimetype="video/mp4", time_origin=500)
    eaf.add_annotation("default", 1000, 1100, "beep")
    eaf.to_file(tmp_path / "final version.eaf")
    assert read(tmp_path / "final version.eaf") == {"walk01": [(15, 16, "beep")]}


def test_a_file_without_captions_says_that_nothing_happens(eaf, tmp_path):
    eaf.to_file(tmp_path / "walk01.eaf")
    (tmp_path / "é.txt").write_text("")
    assert read(f"{tmp_path}/*.*") == {"walk01": [], "é": []}


# Praat, Audacity, subtitles


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_intervals_and_points_of_praat(tmp_path, encoding):
    textgrid = pytest.importorskip("praatio.textgrid", reason="pip install praatio")
    grid = textgrid.Textgrid()
    grid.addTier(textgrid.IntervalTier("vowel", [(1.0, 2.0, "ä"), (2.0, 2.5, "o")], 0, 10))
    grid.addTier(textgrid.PointTier("captions", [(3.0, "click")], 0, 10))
    path = tmp_path / "walk01.TextGrid"
    grid.save(path, "long_textgrid", includeBlankSpaces=True)
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert read(path) == {"walk01": [(10, 20, "vowel ä"), (20, 25, "vowel o"), (30, 31, "click")]}


def test_labels_of_audacity(tmp_path):
    path = tmp_path / "walk01.txt"
    path.write_text("1.200000\t2.500000\tsweep\n\\\t200.0\t300.0\n3,000000\t3,000000\ta\tb\n\n")
    assert read(path) == {"walk01": [(12, 25, "sweep"), (30, 31, "a b")]}
    path.write_text("1.2\t2.5\tsweep\n3.0 4.0 beep\n")
    assert "walk01.txt: line 2: no label" in refused(path)


@pytest.mark.parametrize("ending", ["vtt", "srt"])
def test_subtitles(tmp_path, ending):
    webvtt = pytest.importorskip("webvtt", reason="pip install webvtt-py")
    vtt = webvtt.WebVTT()
    vtt.captions.append(webvtt.Caption("00:00:01.200", "00:00:02.500", ["two", "lines"]))
    vtt.captions.append(webvtt.Caption("00:00:03.000", "00:00:04.000", "42"))
    path = tmp_path / f"walk01.{ending}"
    with open(path, "w") as file:
        vtt.write(file, ending)
    assert read(path) == {"walk01": [(12, 25, "two lines"), (30, 40, "42")]}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path)["walk01"][1] == (30, 40, "42")
    path.write_text(path.read_text(encoding="utf-8-sig").replace("0:03", "0:xx"))
    assert "2 lines with times, but 1 subtitles could be read" in refused(path)


def test_tags_and_entities_of_subtitles_are_no_text(tmp_path):
    pytest.importorskip("webvtt", reason="pip install webvtt-py")
    path = tmp_path / "walk01.vtt"
    path.write_text("WEBVTT\n\nNOTE a\n\n00:01.000 --> 00:02.000\n<v Bob>a &lt; <b>b</b> &amp; c\n")
    assert read(path) == {"walk01": [(10, 20, "a < b & c")]}


# BORIS: the columns of its version 8.27


TABULAR = (
    "Observation id,Observation date,Description,Observation duration,Observation type,Source,"
    "Time offset (s),Media duration (s),FPS,Subject,Behavior,Behavioral category,Modifier #1,"
    "Behavior type,Time,Media file name,Image index,Image file path,Comment"
)
AGGREGATED = (
    "Observation id,Observation date,Description,Observation type,Source,Time offset (s),"
    "Coding duration,Media duration (s),FPS (frame/s),Subject,"
    "Observation duration by subject by observation,Behavior,Behavioral category,Modifier #1,"
    "Behavior type,Start (s),Stop (s),Duration (s),Media file name,Image index start,"
    "Image index stop,Image file path start,Image file path stop,Comment start,Comment stop"
)


def boris(columns, *events, delimiter=","):
    """A table of events {column: value}."""
    names = columns.split(",")
    rows = [[str(event.get(name, "")) for name in names] for event in events]
    return "\r\n".join(delimiter.join(row) for row in [names, *rows])


def event(subject, behavior, kind, **more):
    about = {
        "Observation id": "first",
        "Media file name": "/d/walk01.mp4",
        "Time offset (s)": "0.0",
    }
    return about | {"Subject": subject, "Behavior": behavior, "Behavior type": kind} | more


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_states_and_points_of_boris(tmp_path, delimiter):
    events = (
        event("No focal subject", "rest", "START", Time=1.0),
        event("rat", "run", "START", Time=1.5, **{"Modifier #1": "fast"}),
        event("rat", "rear", "POINT", Time=2.0, **{"Modifier #1": "None"}),
        event("No focal subject", "rest", "STOP", Time=3.0),
        event("rat", "run", "STOP", Time=4.0, **{"Modifier #1": "fast"}),
    )
    said = [(10, 30, "rest"), (15, 40, "rat run fast"), (20, 21, "rat rear")]
    path = tmp_path / ("events.csv" if delimiter == "," else "events.TSV")
    path.write_text(boris(TABULAR, *events, delimiter=delimiter))
    assert read(path) == {"walk01": said}
    path.write_text(boris(TABULAR, *events[:4], delimiter=delimiter))
    assert "line 3: 'rat run fast' of first starts, but never stops" in refused(path)
    path.write_text(boris(TABULAR, *events[3:], delimiter=delimiter))
    assert "line 2: 'rest' at (None, '3.0'): seconds are wanted, and a START" in refused(path)


def test_aggregated_events_of_boris(tmp_path):
    shifted = {"Time offset (s)": 60, "Observation id": "run/two", "Media file name": "x.mp4"}
    events = (
        event("rat", "run", "STATE", **{"Start (s)": 1.5, "Stop (s)": 4}),
        event("rat", "rear", "POINT", **{"Start (s)": 62, "Stop (s)": "NA"}, **shifted),
    )
    (tmp_path / "events.csv").write_text(boris(AGGREGATED, *events))
    both = {"walk01": [(15, 40, "rat run")], "run/two": [(20, 21, "rat rear")]}
    assert read(tmp_path / "events.csv") == both


def test_an_observation_of_two_videos_is_no_episode(tmp_path):
    other = event("rat", "rear", "POINT", Time=2.0, **{"Media file name": "/d/b.mp4"})
    path = tmp_path / "events.csv"
    path.write_text(boris(TABULAR, event("rat", "rear", "POINT", Time=1.0), other))
    assert "line 3: first has several videos" in refused(path)


# Label Studio


def exported(*regions, video="/data/upload/1/0a1b2c3d-walk01.mp4", **more):
    results = [dict(value=region, type="x", from_name="y", to_name="z") for region in regions]
    return dict(id=7, data=dict(video=video), annotations=[dict(result=results, **more)])


MOVING = dict(ranges=[dict(start=13, end=50)], timelinelabels=["Moving"])
RUN = dict(start=2.5, end=4.0, instant=False, timeserieslabels=["Run", "Fast"])


def test_labels_of_a_timeline_are_frames(tmp_path):
    path = tmp_path / "project.json"
    box = dict(sequence=[dict(frame=3, x=1)], labels=["Box"], framesCount=9)
    path.write_text(json.dumps([exported(MOVING), exported(video="é.mp4")]))
    # at 25 a second frame 13 is shown from 0.48 s on, frame 50 until 2 s
    assert read(path, frame_rate=25.0) == {"walk01": [(4, 20, "Moving")], "é": []}
    assert "its times are frames: --frame_rate=.." in refused(path)
    path.write_text(json.dumps([exported(box, was_cancelled=True), exported(RUN)]))
    assert read(path) == {"walk01": [(25, 40, "Fast"), (25, 40, "Run")]}


def test_the_short_json_of_label_studio(tmp_path):
    path = tmp_path / "project.json"
    task = dict(video="walk01.mp4", id=1, labels=[MOVING, RUN], annotator=1, created_at="2024.5")
    path.write_text(json.dumps([task]))
    said = [(4, 20, "Moving"), (25, 40, "Fast"), (25, 40, "Run")]
    assert read(path, frame_rate=25.0) == {"walk01": said}


@pytest.mark.parametrize("content", ["[", "[1]", '[{"annotations": [1], "data": {}}]'])
def test_what_label_studio_did_not_write_is_one_line(tmp_path, content):
    path = tmp_path / "project.json"
    path.write_text(content)
    assert refused(path).startswith(f"{path}: ")


# our own table, as it is in the wild


@pytest.mark.parametrize(
    "content",
    [
        "episode,start,end,text\nwalk01,1.5,2.5,größer\n".encode("utf-8-sig"),
        "episode;start;end;text\r\nwalk01;1,5;2,5;größer\r\n".encode("utf-8"),
        "episode\tstart\tend\ttext\nwalk01\t1,5\t2.5\tgrößer\n".encode("utf-16"),
        "episode,start,end,text\nwalk01,1.5,2.5,größer\n".encode("utf-16-le"),
        "episode,start,end,text\nwalk01,1.5,2.5,größer\n".encode("utf-16-be"),
        "episode;start;end;text\n;;;\n\nwalk01;1,5;2,5;größer\n".encode("latin-1"),
        "\nepisode, start ,end,text\nwalk01,1.5,2.5,gro\u0308ßer\n , ,,\n".encode(),
        "start,end,text\n1.5,2.5,größer\n".encode(),
        "sep=;\r\nepisode;start;end;text\r\nwalk01;1,5;2,5;größer\r\n".encode(),
        "episode,start,end,text\rwalk01,1.5,2.5,größer\r".encode(),
    ],
)
def test_tables_from_the_wild(tmp_path, capsys, content):
    path = tmp_path / "walk01.CSV"
    path.write_bytes(content)
    assert read(path) == {"walk01": [(15, 25, "größer")]}
    doubtful = b"gr\xf6" in content and b"\0" not in content
    assert ("read as Windows-1252" in capsys.readouterr().err) == doubtful


def test_names_and_texts_are_composed(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("episode,start,text\ne\u0301,1,cafe\u0301 \u2126 \u095c\n", encoding="utf-8")
    assert read(path) == {"é": [(10, 11, "café Ω \u0921\u093c")]}


@pytest.mark.parametrize("unit", ["sec", "Steps", "ms", "frames", "SECONDS"])
def test_a_unit_is_seconds_or_steps(tmp_path, unit):
    path = tmp_path / "captions.csv"
    path.write_text(f"episode,start,text,unit\nwalk01,1,a,steps\nwalk01,1,a,{unit}\n")
    assert f"captions.csv, line 3: unit {unit!r}: it is 'seconds' or 'steps'" in refused(path)
    line = dict(episode="walk01", start=1, text="a", unit=[unit])
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    assert "it is 'seconds' or 'steps'" in refused(tmp_path / "captions.jsonl")


def test_a_backslash_before_a_quote_is_warned_of(tmp_path, capsys):
    path = tmp_path / "captions.csv"
    path.write_text('episode,start,text\nwalk01,1,a\nwalk01,2,"say \\"hi\\""\n')
    read(path)
    assert 'captions.csv, line 3: a quote in a field is written ""' in capsys.readouterr().err


def test_half_a_millisecond_before_a_step_is_that_step(tmp_path):
    path = tmp_path / "captions.csv"
    rows = [f"walk01,{n / 29.97:.3f},{(n + 2) / 29.97:.3f},a" for n in range(90)]
    path.write_text("\n".join(["episode,start,end,text", *rows]))
    assert read(path, fps=29.97)["walk01"] == [(n, n + 2, "a") for n in range(90)]


@pytest.mark.parametrize("name", ["captions.xlsx", "captions.npy", "captions"])
def test_endings_that_are_not_read_are_told_those_that_are(tmp_path, name):
    (tmp_path / name).write_text("episode,start,text\n")
    assert ".csv .tsv .jsonl .json .eaf .textgrid .txt .srt .vtt" in refused(tmp_path / name)


@pytest.mark.parametrize("ending", ["eaf", "TextGrid", "srt", "vtt"])
def test_broken_files_and_missing_libraries_are_one_line(tmp_path, monkeypatch, ending):
    package = dict(eaf="pympi-ling", TextGrid="praatio").get(ending, "webvtt-py")
    module = dict(eaf="pympi", TextGrid="praatio.textgrid").get(ending, "webvtt")
    pytest.importorskip(module, reason=f"pip install {package}")
    path = tmp_path / f"walk01.{ending}"
    path.write_text("no such thing")
    assert refused(path).startswith(f"{path}: not what its ending says, or broken")
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {package}" in refused(path)


def test_text_is_read_from_the_same_files(tmp_path):
    (tmp_path / "other.txt").write_text("5.0\t6.0\tb\n1.0\t1.0\ta\n")
    [of] = read_text_file(str(tmp_path / "other.txt"), 10.0)
    assert [(c.start, c.text) for c in of] == [(10, "a"), (50, "b")]

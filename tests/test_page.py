"""page.html in headless Chromium: what it shows is what the data says."""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT

from data import (
    END,
    SILENCE,
    Caption,
    Episode,
    Episodes,
    Tokenizer,
    write_meta,
    write_shard,
    write_stream,
)
from encoder import Projector
from scripts import page

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"
)
ABOUT = dict(id="<b>one</b>", split="test", source="data/toy", run="out/toy/step-000001", rate=5)
TEXTS = ["open door", "walk", '</script> quote " and ünïcode']


def episode(path, steps=60, pictures=True, K=4, **more):
    """Writes a page with every kind of caption, and returns what went into it."""
    rng, tokenizer = np.random.default_rng(0), Tokenizer.from_captions(TEXTS)
    rows = [
        dict(kind="hit", text="open door", true=[5, 9], written=[6, 9], sure=0.9, expected=""),
        dict(kind="missed", text=TEXTS[2], true=[20, 30], written=None, sure=None, expected=""),
        dict(kind="false", text="walk", true=None, written=[40, 42], sure=0.51, expected=""),
        dict(kind="unknown", text="walk", true=None, written=[50, 52], sure=0.7, expected=""),
    ]
    for a in range(60, steps - 8, 6):
        rows.append(dict(kind="hit", text="walk", true=[a, a + 1], written=[a, a + 2], sure=0.8))
    tok = torch.from_numpy(
        write_stream(
            [Caption(*r["written"], r["text"]) for r in rows if r["written"]], steps, tokenizer
        )
    )
    ahead = (
        torch.from_numpy(rng.integers(0, tokenizer.vocab_size, (steps, K))),
        torch.from_numpy(rng.random((steps, K))),
    )
    frames = rng.integers(0, 256, (steps, 64, 64, 3), dtype=np.uint8) if pictures else None
    size = page.write(
        path,
        ABOUT,
        rows,
        tok,
        torch.from_numpy(rng.random(steps)),
        ahead,
        tokenizer,
        frames,
        **dict(texts=TEXTS, silences=[]) | more,
    )
    return rows, tok, ahead, tokenizer, frames, size


@pytest.fixture(scope="module")
def browser():
    profile = tempfile.mkdtemp()
    browser = Browser(profile)
    yield browser
    browser.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def shown(browser, tmp_path):
    """Opens a page of `episode`, and checks at the end that nothing went wrong or was fetched."""

    def show(at="", **about):
        told = episode(tmp_path / "episode.html", **about)
        browser.open("about:blank")
        browser.problems.clear()
        browser.open(f"file://{tmp_path / 'episode.html'}{at}")
        return browser, told

    yield show
    browser.js("localStorage.clear()")  # one for all local files
    assert not browser.problems


def cells(browser, table):
    return browser.js(
        f"[...document.querySelectorAll('#{table} tr')]"
        ".map(tr => [...tr.cells].map(td => td.textContent))"
    )


def where(browser):
    return browser.js("+document.getElementById('at').value")


def wait(browser, condition):
    again = "n++ > 500 ? done(false) : setTimeout(look, 10)"
    look = f"(function look() {{ ({condition}) ? done(true) : {again} }})()"
    assert browser.js(f"new Promise(done => {{ let n = 0; {look} }})"), condition


def test_every_caption_stands_in_its_track_and_in_the_list_with_its_mark(shown):
    browser, (rows, *_) = shown()
    mark = dict(hit="✓", missed="○", false="✗", unknown="?")
    for side in ("true", "written"):
        chips = browser.js(
            f"[...document.querySelectorAll('#{side} .chip')].map("
            "c => [c.textContent, c.className, parseInt(c.style.left) / 8, "
            "parseInt(c.lastChild.style.width) / 8])"
        )
        assert chips == [
            [
                f"{mark[r['kind']]} {r['text']}",
                f"chip {r['kind']}",
                r[side][0],
                r[side][1] - r[side][0],
            ]
            for r in rows
            if r[side]
        ]

    def at(span):
        return str(span[0]) if span else "–"

    assert [c[1:5] for c in cells(browser, "list")] == [
        [r["text"], f"{mark[r['kind']]} {r['kind']}", at(r["true"]), at(r["written"])] for r in rows
    ]
    assert (
        browser.js("document.querySelector('h1 + #about').previousElementSibling.textContent")
        == "Episode <b>one</b>"
    )
    assert "1 of 2 captions hit, 1 false" in browser.js(
        "document.getElementById('score').textContent"
    )


def test_a_step_shows_what_was_expected_and_what_was_then_said(shown):
    browser, (_, tok, (ids, probs), tokenizer, *_) = shown("#t=38")

    def name(i):
        return {END: "(end)", SILENCE: "(silence)"}.get(i) or tokenizer.decode([i]).strip()

    next_tokens = tok[39:43].tolist()
    rows = cells(browser, "ahead")
    assert [r[1] for r in rows] == [name(i) for i in ids[38].tolist()] and [r[3] for r in rows] == [
        name(i) for i in next_tokens
    ]
    assert [int(r[2].split()[0]) for r in rows] == pytest.approx(
        (probs[38] * 100).tolist(), abs=0.6
    )
    assert (
        where(browser) == 38
        and browser.js("document.getElementById('where').textContent") == "step 38 / 59 · 7.6 s"
    )


def test_the_picture_is_that_of_the_step(shown):
    browser, (_, _, _, _, frames, _) = shown("#t=7")
    wait(browser, "images[0].complete")
    data = (
        "[...document.getElementById('picture').getContext('2d').getImageData(0, 0, 64, 64).data]"
    )

    def pixels():
        return np.array(browser.js(data)).reshape(64, 64, 4)

    assert (pixels()[..., :3] == frames[7]).all()
    browser.js("seek(33)")
    assert (pixels()[..., :3] == frames[33]).all()
    browser, _ = shown(pictures=False)
    assert (
        browser.js("document.getElementById('picture').offsetHeight") == 0
    )  # no empty frame where there is none


def test_keys_the_bar_and_links_move_it(shown):
    browser, _ = shown("#t=10", pictures=False)
    shift = 8
    for key, held, expected in (
        ("ArrowRight", 0, 11),
        ("ArrowLeft", 0, 10),
        ("ArrowRight", shift, 20),
        ("End", 0, 59),
        ("Home", 0, 0),
    ):
        browser.key(key, modifiers=held)
        assert where(browser) == expected, key
    browser.js(
        "at = document.getElementById('at'), at.value = 25, at.dispatchEvent(new Event('input'))"
    )
    assert "step 25 of 59" in browser.js("at.getAttribute('aria-valuetext')")
    wait(browser, "location.hash === '#t=25'")
    browser.js("document.querySelector('#list tr:nth-child(3) a').click()")
    wait(browser, "+document.getElementById('at').value === 40")
    assert (
        browser.js("document.querySelector('#list tr[aria-current]').cells[1].textContent")
        == "walk"
    )
    assert (
        browser.js("document.getElementById('written-now').textContent")
        == "✗ walk (false, step 40)"
    )
    browser.js("location.hash = '#t=99999'")
    wait(browser, "+document.getElementById('at').value === 59")


def test_space_plays_pauses_and_the_end_stops(shown):
    browser, _ = shown(pictures=False)
    browser.js("document.getElementById('speed').value = 60")
    browser.key(" ")
    wait(browser, "step > 5")
    assert "Pause" in browser.js("document.getElementById('play').textContent")
    browser.key(" ")
    paused = where(browser)
    assert browser.js("new Promise(done => setTimeout(() => done(step), 150))") == paused > 5
    browser.js("document.getElementById('play').click()")
    wait(browser, "step === 59 && !playing")
    assert "Play" in browser.js("document.getElementById('play').textContent")


def test_a_long_episode_stays_smooth_and_below_15_mb(shown):
    browser, (*_, size) = shown(steps=2000)  # noise: pictures that no compression helps
    assert size < 15e6
    browser.js("document.getElementById('speed').value = 60, play(true)")
    took = browser.js("""new Promise(done => { const took = [], old = tick; let last
        tick = now => { const a = performance.now(); old(now); took.push(performance.now() - a);
            took.length < 60 ? 0 : done(took) } })""")
    assert np.median(took) < 12, took  # ms of work in a frame of 16
    browser.js("play(false)")


def test_it_fits_a_phone_and_is_named_for_a_screen_reader(edited):
    browser, _ = edited()
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=360,
        height=740,
        deviceScaleFactor=1,
        mobile=True,
    )
    assert browser.js("document.documentElement.scrollWidth") <= 360
    browser("Emulation.clearDeviceMetricsOverride")
    browser("Accessibility.enable")
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    named = {
        (n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"]
    }
    assert {
        ("slider", "step"),
        ("button", "▶ Play"),
        ("heading", "Episode <b>one</b>"),
        ("columnheader", "sure"),
        ("group", "yours"),
        ("button", "walk"),
        ("combobox", "caption"),
        ("spinbutton", "start"),
    } <= named
    assert all(name for role, name in named if role in ("button", "slider", "combobox", "link"))


def test_the_index_links_the_pages_with_their_scores_most_doubt_first(browser, tmp_path):
    about = dict(steps=60, hit=1, missed=1)
    pages = [
        about | dict(id="a", link=str(tmp_path / "index-0.html"), doubt=1, surprise=2),
        about | dict(id="b", link=str(tmp_path / "index-1.html"), doubt=2.5, surprise=1, false=2),
    ]
    path = tmp_path / "index.html"
    page.write_index(path, "data/toy", pages)
    browser.open(f"file://{path}")
    assert cells(browser, "pages") == [
        ["b", "60", "1", "1", "2", "0.40", "2.5", "1.0"],
        ["a", "60", "1", "1", "0", "0.67", "1.0", "2.0"],
        ["all", "120", "2", "2", "2", "0.50", "", ""],
    ]
    assert browser.js("document.querySelector('#pages a').getAttribute('href')") == "index-1.html"


def test_png_is_the_picture(browser):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    url = "data:image/png;base64," + base64.b64encode(page.png(image)).decode()
    browser.open("about:blank")
    pixels = browser.js(f"""new Promise(done => {{
        const i = new Image(), c = document.createElement('canvas').getContext('2d')
        i.onload = () => {{ c.drawImage(i, 0, 0); done([...c.getImageData(0, 0, 7, 5).data]) }};
        i.src = '{url}' }})""")
    assert (np.array(pixels).reshape(5, 7, 4)[..., :3] == image).all()


# -----------------------------------------------------------------------------
# correcting


@pytest.fixture
def edited(shown):
    """The same page, opened to correct it where the encoder wrote on, unasked."""

    def open_page(at="#t=40", **about):
        browser, told = shown(at, pictures=False, **about)
        browser.js("document.getElementById('edit').open = true")
        wait(browser, "!document.getElementById('yours').hidden")
        return browser, told

    return open_page


def captions(browser):
    """(start, end, text, by) of the captions in the track to edit, as drawn."""
    return [
        (*map(int, re.findall(r", (\d+) to (\d+), by", title)[0]), label, title.split()[-1])
        for label, title in browser.js(
            "[...document.querySelectorAll('#edits .chip')].map(c => [c.textContent, c.title])"
        )
    ]


def press(browser, keys):
    """Presses keys: a text letter by letter, the others by name."""
    for key in keys:
        if key == "Enter":
            browser("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text="\r")
        else:
            browser.key(key)


def drag(browser, chip, part, first, last):
    """Drags with the mouse from a step to another: a part of a chip, or (chip None) the track."""
    browser.js("document.getElementById('edits').scrollIntoView({block: 'center'})")
    chips = "document.querySelectorAll('#edits .chip')"
    box = "lane" if chip is None else f"{chips}[{chip}].querySelector('{part}')"
    x, bottom, height = browser.js(
        "(() => { const lane = document.getElementById('edits')\n"
        f"const {{ bottom, height }} = {box}.getBoundingClientRect()\n"
        "return [lane.getBoundingClientRect().left, bottom, height] })()"
    )
    y = bottom - min(height, 30) / 2  # of the track the last row
    for kind, step in (("Pressed", first), ("Moved", last), ("Released", last)):
        about = dict(x=x + step * 8 + 4, y=y, button="left", clickCount=1)
        browser("Input.dispatchMouseEvent", type="mouse" + kind, buttons=1, **about)


START = [
    (5, 9, "open door", "person"),
    (20, 30, TEXTS[2], "person"),
    (50, 52, "walk", "encoder"),
]


def test_the_true_captions_and_those_of_unknown_steps_are_there_to_correct(edited):
    browser, _ = edited(silences=[[32, 38]])
    assert captions(browser) == [*START[:2], (32, 38, "nothing", "person"), START[2]]
    texts = "[...document.querySelectorAll('#texts option')].map(option => option.value)"
    assert browser.js(texts) == TEXTS
    assert browser.js("document.getElementById('text').list.id") == "texts"


def test_captions_are_corrected_by_keyboard(edited):
    browser, _ = edited()
    press(browser, ["a", *"jump far", "Enter"])  # what are commands elsewhere are letters here
    assert captions(browser) == [*START[:2], (40, 41, "jump far", "person"), START[2]]
    press(browser, ["ArrowRight", "ArrowRight", "e"])
    assert captions(browser)[2] == (40, 43, "jump far", "person")
    press(browser, ["ArrowRight", "s"])
    assert captions(browser)[2] == (43, 46, "jump far", "person")
    press(browser, ["n"])
    assert where(browser) == 50
    press(browser, ["t", *"ing", "Enter"])
    assert captions(browser)[3] == (50, 52, "walking", "person")
    press(browser, ["p", "p", "Delete"])
    assert captions(browser) == [
        START[0],
        (43, 46, "jump far", "person"),
        (50, 52, "walking", "person"),
    ]
    press(browser, ["Escape", "x"])
    assert captions(browser)[1] == (20, 21, "nothing", "person")
    for _ in range(3):
        browser.key("z", modifiers=2)
    assert captions(browser) == [*START[:2], (43, 46, "jump far", "person"), START[2]]


def test_captions_are_corrected_by_mouse(edited):
    browser, _ = edited()
    drag(browser, None, "", 16, 18)
    press(browser, [*"walk", "Enter"])
    assert captions(browser) == [START[0], (16, 19, "walk", "person"), *START[1:]]
    drag(browser, 1, "b", 17, 14)
    assert captions(browser)[1] == (13, 16, "walk", "person")
    drag(browser, 1, "i", 15, 20)
    assert captions(browser)[1] == (13, 21, "walk", "person")
    drag(browser, 3, "b", 50, 50)  # a click selects it
    assert where(browser) == 50
    browser.js("document.getElementById('remove').click()")
    assert captions(browser) == [START[0], (13, 21, "walk", "person"), START[1]]
    drag(browser, None, "", 45, 18)  # what starts in it is no caption
    browser.js("document.getElementById('nothing').click()")
    assert captions(browser) == [
        START[0],
        (13, 21, "walk", "person"),
        (18, 46, "nothing", "person"),
    ]
    for _ in range(5):
        browser.js("document.getElementById('undo').click()")
    assert captions(browser) == START


def test_fields_keep_a_caption_inside_the_episode(edited):
    browser, _ = edited()
    drag(browser, 2, "b", 50, 50)
    browser.js("start.value = 58, end.value = 99, document.getElementById('add').click()")
    assert captions(browser)[2] == (58, 60, "walk", "person")
    drag(browser, 2, "b", 58, 0)
    drag(browser, 2, "b", 58, 59)
    assert captions(browser)[-1][1] <= 60


def test_unsaved_work_survives_a_reload(edited, tmp_path):
    browser, _ = edited()
    press(browser, ["a", *"jump", "Enter"])
    kept = captions(browser)
    browser.open("about:blank")
    browser.open(f"file://{tmp_path / 'episode.html'}")
    wait(browser, "!document.getElementById('yours').hidden")
    assert captions(browser) == kept
    assert "not saved" in browser.js("document.getElementById('work').textContent")
    browser, _ = edited(silences=[[32, 38]])  # of another page with this name, nothing is kept
    assert "jump" not in str(captions(browser))


@pytest.fixture
def save(browser, tmp_path):
    """Presses Ctrl+S, and returns the path of the file that was downloaded."""

    def press_save():
        browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.key("s", modifiers=2)
        path = tmp_path / "captions-_b_one_b_.jsonl"
        for _ in range(500):
            if path.exists():
                return path
            time.sleep(0.01)
        raise AssertionError(list(tmp_path.iterdir()))

    return press_save


def test_what_is_saved_is_packed(edited, save, tmp_path):
    browser, _ = edited()
    press(browser, ["a", *TEXTS[1], "Enter", "n", "e", "a", *"jump"])  # the last without Enter
    path = save()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["by"], "sure" in line) for line in lines] == [
        ("person", False),
        ("person", False),
        ("person", False),
        ("person", True),  # the encoder's once
        ("person", False),
    ]
    assert "not saved" not in browser.js("document.getElementById('work').textContent")
    told = [Caption(line["start"], line["end"], line["text"]) for line in lines]
    assert told == [Caption(*caption[:3]) for caption in captions(browser)]
    arrays = {name: np.random.default_rng(0).random((60, 3)) for name in ("b>", "2", "3", "4")}
    np.savez(tmp_path / "<b>one<.npz", **arrays)
    first = "episode,start,end,text\n<b>one</b>,1,2,jump\n<b>one</2,3,4,walk\n<b>one</3,,,\n"
    (tmp_path / "first.csv").write_text(first)
    command = [sys.executable, "-m", "scripts.pack", f"--obs={tmp_path}/*.npz"]
    command += [f"--captions={tmp_path / 'first.csv'},{path}", f"--out={tmp_path / 'packed'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packed = Episodes(tmp_path / "packed", "train")  # begun by the encoder, so not to test on
    records = {record["id"]: i for i, record in enumerate(packed.records)}
    assert packed.captions(records["<b>one</b>"]) == sorted(told)


def test_a_span_where_nothing_happens_is_a_line_without_text(edited, save):
    browser, _ = edited()
    press(browser, ["x", "ArrowRight", "e"])
    line = json.loads(save().read_text().splitlines()[2])
    silence = dict(start=40, end=42, text="", unit="steps", by="person")
    assert line == dict(episode=ABOUT["id"]) | silence


def test_an_episode_without_captions_is_a_line_of_its_name(edited, save):
    browser, _ = edited()
    press(browser, ["n", "Delete"] + ["Home", "n", "Delete"] * 2)
    assert json.loads(save().read_text()) == dict(episode=ABOUT["id"])


# -----------------------------------------------------------------------------
# what goes into a page


def test_without_pictures_the_features_that_weigh_most_are_drawn(shown):
    obs = torch.zeros(60, 3)
    obs[20, 1] = 1
    obs[30:, 2] = -1
    projector = Projector(3, 4)
    projector.feature_weight[1] = 9
    features = page.heat_map(projector, obs, ["constant", "<i>spike", "late"])
    assert features["names"] == ["<i>spike", "late"]
    browser, _ = shown(pictures=False, features=features)
    assert browser.js("document.getElementById('names').innerText").split() == features["names"]
    drawn = "document.getElementById('map').getContext('2d').getImageData(0, 0, 60, 2).data"
    red, _, blue, alpha = np.array(browser.js(f"[...{drawn}]")).reshape(2, 60, 4).transpose(2, 0, 1)
    z = obs.T[1:].numpy()
    assert (np.abs(alpha - abs(z) * 127) <= 2).all()  # two deviations are opaque
    assert (blue > red)[z > 0].all() and (red > blue)[z < 0].all()
    wide = browser.js("document.getElementById('map').getBoundingClientRect().width")
    assert wide == 60 * 8  # as wide as the tracks


def test_features_have_the_names_in_features_txt(tmp_path):
    assert page.named_features(tmp_path, 2) == ["feature 0", "feature 1"]
    (tmp_path / "features.txt").write_text("wrist x\nwrist y\n")
    assert page.named_features(tmp_path, 2) == ["wrist x", "wrist y"]
    with pytest.raises(ValueError, match="features.txt: 2 lines; one for each of the 3 features"):
        page.named_features(tmp_path, 3)


def test_silences_are_where_somebody_annotated_and_no_caption_stands():
    captions = [Caption(4, 6, "walk"), Caption(9, 12, "walk")]
    assert page.silences(captions, [[0, 7], [8, 10], [11, 13]], 13) == [
        [0, 4],
        [6, 7],
        [8, 9],
        [12, 13],
    ]
    assert page.silences(captions, "all", 13) == []


def test_doubt_and_surprise_are_steps_of_a_hundred():
    tok = torch.tensor([1, 5, 1, 1])
    ahead = torch.tensor([[5, 1], [1, 1], [7, 1], [1, 1]]), torch.tensor([[0.5, 1.0]] * 4)
    told = page.doubts(tok, torch.tensor([1.0, 0.5, 1, 0.5]), ahead)
    assert told["doubt"] == pytest.approx(25)
    assert told["surprise"] == pytest.approx(100 * (0.5 + 0.5 + 1) / 3)
    nothing = torch.zeros(4, 0, dtype=torch.int64)
    assert page.doubts(tok, torch.ones(4), (nothing, nothing)) == dict(doubt=0, surprise=0)


def test_texts_come_from_all_splits_the_most_frequent_first(tmp_path):
    for split, texts in dict(train=["walk"], test=["jump", "jump"]).items():
        captions = [Caption(n, n + 1, text) for n, text in enumerate(texts)]
        write_shard(tmp_path, split, 0, [Episode(split, np.zeros((9, 5), np.float32), captions)])
    about = dict(dtype="float32", steps_per_second=1, splits=["train", "test"])
    write_meta(tmp_path, obs_dim=5, **about)
    assert page.texts_of(Episodes(tmp_path, "test")) == ["jump", "walk"]

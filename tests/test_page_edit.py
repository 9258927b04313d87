"""Captions corrected in page.html, in headless Chromium: by hand, saved, packed, learned."""

import json
import re
import time

import numpy as np
import pytest
from browser import ABOUT, RATE, TEXTS, wait, where
from conftest import program, toy_episode

from runtime.dataset import Caption, Episodes


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
    """(start, end, text, by) of the captions in the track to edit, as drawn, in steps."""
    chips = "[...document.querySelectorAll('#edits .chip')].map(c => [c.textContent, c.title])"
    found = []
    for label, title in browser.js(chips):
        times = re.findall(r" from (\S+)\ss to (\S+)\ss, by", title)[0]
        found.append((*(round(float(time) * RATE) for time in times), label, title.split()[-1]))
    return found


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
    (50, 51, "walk", "encoder"),
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
    assert captions(browser)[3] == (50, 51, "walking", "person")
    press(browser, ["p", "p", "Delete"])
    assert captions(browser) == [
        START[0],
        (43, 46, "jump far", "person"),
        (50, 51, "walking", "person"),
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
    browser.js("start.value = 11.6, end.value = 99, document.getElementById('add').click()")
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
    assert "not saved" in work(browser)
    browser, _ = edited(silences=[[32, 38]])  # of another page with this name, nothing is kept
    assert "jump" not in str(captions(browser))


@pytest.mark.parametrize("rate", [0.3, 10, 29.97, 1000])
def test_the_times_shown_tell_every_step(shown, rate):
    browser, _ = shown(pictures=False, rate=rate)
    again = browser.js("[...Array(2000).keys()].map(step => Math.round(time(step) * rate))")
    assert again == list(range(2000))


def work(browser):
    return browser.js("document.getElementById('work').textContent").replace("\xa0", " ")


def test_what_was_done_is_told(edited, save):
    """In the status, which a screen reader reads out."""
    browser, _ = edited()
    assert work(browser) == "3 captions"
    press(browser, ["a", *"jump", "Enter"])
    kept = "4 captions; not saved yet, kept in this browser"
    assert work(browser) == "jump from 8.0 s to 8.2 s, by person; " + kept
    press(browser, ["n"])
    assert work(browser) == "walk from 10.0 s to 10.2 s, by encoder; " + kept
    save()
    assert work(browser) == "walk from 10.0 s to 10.2 s, by encoder; 4 captions; saved"


def test_a_caption_is_added_where_another_stands(edited, save):
    """By mouse and by keyboard, and each of the three is edited by itself."""
    browser, _ = edited()
    drag(browser, None, "", 5, 6)
    press(browser, [*"walk", "Enter"])
    press(browser, ["Escape", "a", *"jump", "Enter"])
    jump, walk = (5, 6, "jump", "person"), (5, 7, "walk", "person")
    assert captions(browser) == [jump, walk, *START]
    drag(browser, 1, "i", 6, 7)
    walk = (5, 8, "walk", "person")
    assert captions(browser) == [jump, walk, *START]
    press(browser, ["p", "t", *"ing", "Enter"])
    jump = (5, 6, "jumping", "person")
    assert captions(browser) == [jump, walk, *START]
    press(browser, ["n", "n", "Delete"])
    assert captions(browser) == [jump, walk, *START[1:]]
    lines = [json.loads(line) for line in save().read_text().splitlines()]
    assert [line["text"] for line in lines if line["start"] == 1] == ["jumping", "walk"]


def run(path, *arguments):
    """Runs a program, which must succeed; returns what it prints."""
    code, out, err = program(path, *arguments)
    assert code == 0, err
    return out


@pytest.fixture
def save(browser, tmp_path):
    """Presses Ctrl+S, and returns the path of the file that was downloaded."""

    def press_save(name="_b_one_b_"):
        browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.key("s", modifiers=2)
        path = tmp_path / f"captions-{name}.jsonl"
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
    assert "not saved" not in work(browser)
    drawn = [Caption(*caption[:3]) for caption in captions(browser)]
    times = [(c.start / RATE, c.end / RATE, c.text, "seconds") for c in drawn]
    assert [tuple(line[key] for key in ("start", "end", "text", "unit")) for line in lines] == times
    arrays = {name: np.random.default_rng(0).random((60, 3)) for name in ("b>", "2", "3", "4")}
    np.savez(tmp_path / "<b>one<.npz", **arrays)
    first = "episode,start,end,text\n<b>one</b>,1,2,jump\n<b>one</2,3,4,walk\n<b>one</3,,,\n"
    (tmp_path / "first.csv").write_text(first)
    files = [f"--captions={tmp_path / 'first.csv'},{path}", f"--out={tmp_path / 'packed'}"]
    run("scripts/pack.py", f"--obs={tmp_path}/*.npz", f"--fps={RATE}", *files)
    packed = Episodes(tmp_path / "packed", "train")  # begun by the encoder, so not to test on
    of_episode = {episode.id: episode.captions for episode in packed}
    assert of_episode["<b>one</b>"] == sorted(drawn)


@pytest.mark.parametrize(
    "rate, times",
    [
        (5, dict(start=8, end=8.4, unit="seconds")),
        (None, dict(start=40, end=42, unit="steps")),
    ],
)
def test_a_span_where_nothing_happens_is_a_line_without_text(edited, save, rate, times):
    browser, _ = edited(rate=rate)
    press(browser, ["x", "ArrowRight", "e"])
    line = json.loads(save().read_text().splitlines()[2])
    assert line == dict(episode=ABOUT["id"], text="", by="person") | times


def test_an_episode_without_captions_is_a_line_of_its_name(edited, save):
    browser, _ = edited()
    press(browser, ["n", "Delete"] + ["Home", "n", "Delete"] * 2)
    assert json.loads(save().read_text()) == dict(episode=ABOUT["id"])


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
        ("slider", "time"),
        ("button", "▶ Play"),
        ("heading", "Episode <b>one</b>"),
        ("columnheader", "sure"),
        ("group", "yours"),
        ("button", "walk"),
        ("combobox", "caption"),
        ("spinbutton", "start, s"),
    } <= named
    assert all(name for role, name in named if role in ("button", "slider", "combobox", "link"))


# -----------------------------------------------------------------------------
# from the page to what is learned


@pytest.fixture
def recorded(tmp_path):
    """Seven episodes in which somebody jumps at step 33, captions of five that do not say so."""
    rng, rows = np.random.default_rng(0), ["episode,start,end,text"]
    (tmp_path / "raw").mkdir()
    for n in range(7):
        _, obs, captions, *_ = toy_episode(f"ep{n}", rng)
        obs[33, 5] = 1
        np.save(tmp_path / f"raw/ep{n}.npy", obs)
        rows += [f"ep{n},{c.start / 4},{c.end / 4},{c.text}" for c in captions if n < 5]
    (tmp_path / "first.csv").write_text("\n".join(rows))
    return tmp_path


def test_what_is_corrected_in_three_pages_is_learned(browser, save, a_run, recorded, monkeypatch):
    monkeypatch.chdir(recorded)
    pack = ["scripts/pack.py", "--obs=raw/*.npy", "--out=mine", "--fps=4"]
    run(*pack, "--captions=first.csv")
    of_train = ["--split=train", "--data=mine"]
    run("scripts/page.py", a_run.parent, *of_train, "--episodes=0-4", "--html=index.html")
    episodes, files = Episodes("mine", "train"), ["first.csv"]
    for i in [i for i in range(5) if episodes[i].captions]:
        browser.open("about:blank")
        browser.open(f"file://{recorded}/index-{i}.html#t=33")
        browser.js("document.getElementById('edit').open = true")
        press(browser, ["a", *"jump", "Enter"])
        name = episodes[i].id
        files.append(save(name).name)
    browser.js("localStorage.clear()")
    assert len(files) == 4
    run(*pack, f"--captions={','.join(files)}")
    small = "--data=mine --out_dir=out --T=8 --n_embd=32 --n_layer=1 --n_head=2 --K=2 --device=cpu"
    small += " --batch_size=16 --max_iters=60 --eval_interval=60 --warmup_iters=10"
    small += " --learning_rate=1e-2 --projector_lr=1e-2 --predict_weight=0"
    run("train.py", *small.split())
    shown = run("sample.py", "out", "--split=train", "--json", f"--episode={name}")
    written = [json.loads(line) for line in shown.splitlines()]
    assert 33 / 4 in [line["start"] for line in written if line["text"] == "jump"]

"""page.html in headless Chromium: what it shows is what the data says."""

import base64
import shutil
import tempfile

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser

from data import END, SILENCE, Caption, Tokenizer, write_stream
from scripts import page

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"
)
ABOUT = dict(id="<b>one</b>", split="test", source="data/toy", run="out/toy/step-000001", rate=5)
TEXTS = ["open door", "walk", '</script> quote " and ünïcode']


def episode(path, steps=60, pictures=True, K=4):
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


def test_it_fits_a_phone_and_is_named_for_a_screen_reader(shown):
    browser, _ = shown(pictures=False)
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
    } <= named
    assert all(name for role, name in named if role in ("button", "slider", "combobox", "link"))


def test_the_index_links_the_pages_with_their_scores(browser, tmp_path):
    pages = [dict(id="a", link=str(tmp_path / "index-0.html"), steps=60, hit=1, missed=1, false=2)]
    path = tmp_path / "index.html"
    page.write_index(path, "data/toy", pages)
    browser.open(f"file://{path}")
    assert cells(browser, "pages") == [
        ["a", "60", "1", "1", "2", "0.40"],
        ["all", "60", "1", "1", "2", "0.40"],
    ]
    assert browser.js("document.querySelector('#pages a').getAttribute('href')") == "index-0.html"


def test_png_is_the_picture(browser):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    url = "data:image/png;base64," + base64.b64encode(page.png(image)).decode()
    browser.open("about:blank")
    pixels = browser.js(f"""new Promise(done => {{
        const i = new Image(), c = document.createElement('canvas').getContext('2d')
        i.onload = () => {{ c.drawImage(i, 0, 0); done([...c.getImageData(0, 0, 7, 5).data]) }};
        i.src = '{url}' }})""")
    assert (np.array(pixels).reshape(5, 7, 4)[..., :3] == image).all()

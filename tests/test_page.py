"""page.html in headless Chromium: what it shows is what the data says."""

import base64

import numpy as np
import pytest
import torch
from browser import TEXTS, wait, where

from data import END, SILENCE, Caption, Episode, Episodes, write_shard
from encoder import Features
from runtime.shards import write_meta
from scripts import page

PHONE = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)


def cells(browser, table):
    return browser.js(
        f"[...document.querySelectorAll('#{table} tr')]"
        ".map(tr => [...tr.cells].map(td => td.textContent))"
    )


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
        return f"{span[0] / 5:.1f}" if span else "–"

    assert [c[1:5] for c in cells(browser, "list")] == [
        [r["text"], f"{mark[r['kind']]} {r['kind']}", at(r["true"]), at(r["written"])] for r in rows
    ]
    assert (
        browser.js("document.querySelector('h1 + #about').previousElementSibling.textContent")
        == "Episode <b>one</b>"
    )
    assert "1 of 2 captions hit, 2 false" in browser.js(
        "document.getElementById('score').textContent"
    )


def test_a_step_shows_what_was_expected_and_what_was_then_said(shown):
    browser, (_, (tok, step, _), (ids, probs), tokenizer, *_) = shown("#t=38")
    place = "document.getElementById('where').textContent"
    assert where(browser) == 38 and browser.js(place) == "7.6\u00a0s / 11.8"

    def name(i):
        return {END: "(end)", SILENCE: "(silence)"}.get(i) or tokenizer.decode([i]).strip()

    agreed = 0
    for t in (0, 5, 38, 39, 40, 58, 59):
        browser.js(f"seek({t})")
        rows = cells(browser, "ahead")
        expected, silent = ids[t].tolist(), (ids[t] == SILENCE).cumsum(0).tolist()
        assert [r[0] for r in rows] == [f"+{n / 5:.1f}" for n in [1, *(1 + n for n in silent)][:-1]]
        assert [r[1] for r in rows] == [name(i) for i in expected]
        assert [int(r[2].split()[0]) for r in rows] == pytest.approx(
            (probs[t] * 100).tolist(), abs=0.6
        )
        slots = [slot for slot in range(len(tok)) if step[slot] > t][: len(rows)]
        came = [[f"+{(step[slot] - t) / 5:.1f}", name(tok[slot].item())] for slot in slots]
        came += [["", "(the end)"]] * (len(rows) - len(slots))
        assert [r[3:5] for r in rows] == came
        agrees = ["✓" if r[1] == r[4] else "" for r in rows]
        assert [r[5] for r in rows] == agrees
        agreed += agrees.count("✓")
    assert agreed


SAID = "document.getElementById('said').textContent.split(' (≥')"


def test_a_step_shows_all_that_is_said_there_and_its_least_sure_token(shown):
    browser, (_, (_, step, prob), *_) = shown("#t=40", pictures=False)
    least = [prob[step == t].min().item() for t in range(60)]
    assert (step == 40).sum() == 6
    told = {
        40: "open door (end) walk (end) (silence)",
        6: "open door (end) (silence)",
        41: "(silence)",
    }
    for t, words in told.items():
        browser.js(f"seek({t})")
        assert browser.js(SAID) == [words, f"\u00a0{least[t] * 100:.0f}\u00a0%)"]
    curve = browser.js("document.querySelector('#curve polyline').getAttribute('points')")
    points = np.array([point.split(",") for point in curve.split()], float)
    assert points[:, 0].tolist() == [t * 8 + 4 for t in range(60)]
    assert (63 - points[:, 1]) / 62 == pytest.approx(least, abs=1e-3)
    browser, _ = shown("#t=20", pictures=False, also=[written(20, TEXTS[2])])
    assert browser.js(SAID)[0] == f"{TEXTS[2]} (end) (silence)"  # letters of several tokens


def written(start, text):
    """The row of a caption that is written where nobody annotated."""
    return dict(kind="unknown", text=text, true=None, written=[start, start + 1], sure=0.5)


def test_captions_of_one_step_are_all_seen_and_a_long_one_is_cut(shown):
    text = "You see here a blessed rustproof +2 grey dragon scale mail named Ünïcode (worn)."
    also = [written(30, text), written(30, "walk"), written(30, text.upper()), written(52, "walk")]
    browser, _ = shown("#t=30", pictures=False, also=also)
    browser.js("document.getElementById('written').scrollIntoView({block: 'center'})")
    boxes = browser.js("""[...document.querySelectorAll('#written .chip')].map(chip => {
        const { left, right, top, bottom } = chip.firstChild.getBoundingClientRect()
        return [chip.title, chip.caption.start, left, right, top, bottom] })""")
    three = [box for box in boxes if box[1] == 30]
    assert [box[0] for box in three] == [text, "walk", text.upper()]
    wide = [right - left for _, _, left, right, *_ in three]
    assert wide == [312, pytest.approx(50, abs=20), 312]
    for i, (title, _, left, right, top, bottom) in enumerate(boxes):
        for *_, other_left, other_right, other_top, other_bottom in boxes[:i]:
            beside = right <= other_left or other_right <= left
            assert beside or bottom <= other_top or other_bottom <= top
        if title in (text, text.upper()):  # a click finds it
            found = f"document.elementFromPoint({left + 9}, {top + 9}).closest('.chip').title"
            assert browser.js(found) == title
    now = browser.js("document.getElementById('written-now').textContent").split("\n")
    assert now == [f"? {x} (unknown, 6.0\u00a0s)" for x in (text, "walk", text.upper())]
    assert [row[1] for row in cells(browser, "list")].count(text) == 1
    browser("Emulation.setDeviceMetricsOverride", **PHONE)
    assert browser.js("document.documentElement.scrollWidth") == 390
    browser("Emulation.clearDeviceMetricsOverride")


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
    assert "5.0\u00a0s of 11.8" == browser.js("at.getAttribute('aria-valuetext')")
    wait(browser, "location.hash === '#t=25'")
    browser.js("document.querySelector('#list tr:nth-child(3) a').click()")
    wait(browser, "+document.getElementById('at').value === 40")
    assert (
        browser.js("document.querySelector('#list tr[aria-current]').cells[1].textContent")
        == "open door"
    )
    assert (
        browser.js("document.getElementById('written-now').textContent")
        == "✗ open door (false, 8.0\u00a0s)\n✗ walk (false, 8.0\u00a0s)"
    )
    browser.js("location.hash = '#t=99999'")
    wait(browser, "+document.getElementById('at').value === 59")


def test_space_plays_pauses_and_the_end_stops(shown):
    browser, _ = shown(pictures=False)
    browser.js("document.getElementById('speed').selectedIndex = 5")
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
    browser, (*_, size) = shown(steps=1000)  # noise: pictures that no compression helps
    assert size < 15e6
    browser.js("document.getElementById('speed').selectedIndex = 5")
    took = browser.js("""new Promise(done => { const took = [], old = tick; let last
        tick = now => { const a = performance.now(); old(now); took.push(performance.now() - a);
            took.length < 60 && playing ? 0 : done(took) }; play(true) })""")
    # ms of work in a frame of 16; of most, other programs take a part
    assert min(took) < 12, took
    browser.js("play(false)")


def test_the_index_links_the_pages_with_their_scores_most_doubt_first(browser, tmp_path):
    about = dict(steps=60, hit=1, missed=1)
    pages = [
        about | dict(id="a", link=str(tmp_path / "index-0.html"), doubt=1, surprise=2),
        about | dict(id="b", link=str(tmp_path / "index-1.html"), doubt=2.5, surprise=1, false=2),
    ]
    path = tmp_path / "index.html"
    page.write_index(path, "data/toy", 5, pages)
    browser.open(f"file://{path}")
    assert cells(browser, "pages") == [
        ["b", "12.0", "1", "1", "2", "0.40", "2.5", "1.0"],
        ["a", "12.0", "1", "1", "0", "0.67", "1.0", "2.0"],
        ["all", "24.0", "2", "2", "2", "0.50", "", ""],
    ]
    assert browser.js("document.querySelector('#pages a').getAttribute('href')") == "index-1.html"


def test_an_index_without_a_predictor_has_no_column_for_it(browser, tmp_path):
    path = tmp_path / "index.html"
    about = dict(steps=60, link=str(path))
    page.write_index(path, "data/toy", 5, [dict(id=x, doubt=x, **about) for x in (1, 2)])
    browser.open(f"file://{path}")
    assert cells(browser, "pages")[0] == ["2", "12.0", "0", "0", "0", "–", "2.0"]
    assert "surprise" not in browser.js("document.body.innerText")


def test_an_episode_without_a_predictor_has_no_empty_column(shown):
    browser, _ = shown(K=0)
    assert "expects" not in browser.js("document.body.innerText")
    widths = "[top, top.firstElementChild].map(x => x.getBoundingClientRect().width)"
    whole, card = browser.js(f"(() => {{ const top = $('top'); return {widths} }})()")
    assert whole == card


def test_the_index_fits_a_phone(browser, tmp_path):
    path = tmp_path / "index.html"
    about = dict(steps=12345, hit=100, missed=200, false=300, doubt=99.9, surprise=99.9)
    pages = [about | dict(id="person10_wrist1_afternoon_2026", link=str(path))]
    page.write_index(path, "data/toy", 5, pages)
    browser("Emulation.setDeviceMetricsOverride", **PHONE)
    browser.open(f"file://{path}")
    wide = "document.querySelector('.scroll')"
    assert browser.js(f"{wide}.scrollWidth <= {wide}.clientWidth")
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.js("document.querySelector('#pages a').getClientRects().length") == 1  # line
    browser("Emulation.clearDeviceMetricsOverride")


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
# what goes into a page


def test_without_pictures_the_features_that_move_most_are_drawn(shown):
    obs = torch.zeros(60, 3)
    obs[20, 1] = 1
    obs[30:, 2] = -1
    features = page.heat_map(Features(3), obs, ["constant", "<i>spike", "late"])
    assert features["names"] == ["late", "<i>spike"]
    browser, _ = shown(pictures=False, features=features)
    assert browser.js("document.getElementById('names').innerText").split() == features["names"]
    drawn = "document.getElementById('map').getContext('2d').getImageData(0, 0, 60, 2).data"
    red, _, blue, alpha = np.array(browser.js(f"[...{drawn}]")).reshape(2, 60, 4).transpose(2, 0, 1)
    z = obs.T[[2, 1]].numpy()
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
    tok, step = torch.tensor([1, 5, 6, 0, 7, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 1, 1, 2, 3])
    ahead = torch.tensor([[5, 1], [1, 1], [7, 1], [1, 1]]), torch.tensor([[0.5, 1.0]] * 4)
    prob = torch.tensor([1.0, 0.9, 0.5, 1, 0.7, 1, 1, 1, 0.5])
    told = page.doubts((tok, step, prob), ahead)
    assert told["doubt"] == pytest.approx(25)
    assert told["surprise"] == pytest.approx(100 * (0.5 + 0.5 + 1) / 3)
    nothing = torch.zeros(4, 0, dtype=torch.int64)
    assert page.doubts((tok, step, torch.ones(9)), (nothing, nothing)) == dict(doubt=0)
    alone = [x[:1] for x in (tok, step, prob)], [x[:1] for x in ahead]
    assert page.doubts(*alone) == dict(doubt=0)  # nothing comes after it


def test_texts_come_from_all_splits_the_most_frequent_first(tmp_path):
    for split, texts in dict(train=["walk"], test=["jump", "jump"]).items():
        captions = [Caption(n, n + 1, text) for n, text in enumerate(texts)]
        write_shard(tmp_path, split, 0, [Episode(split, np.zeros((9, 5), np.float32), captions)])
    about = dict(dtype="float32", steps_per_second=1, splits=["train", "test"])
    write_meta(tmp_path, obs_dim=5, **about)
    assert page.texts_of(Episodes(tmp_path, "test")) == ["jump", "walk"]

"""page.html in headless Chromium: what it shows is what the data says."""

import base64

import numpy as np
import pytest
import torch
from browser import TEXTS, wait, where

from data import END, SILENCE
from encoder import Features
from runtime.dataset import Caption, Episode, Episodes, write_shard
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
            "(parseInt(c.lastChild.style.width) + 2) / 8])"
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
    assert points[:, 0].tolist() == [t + 0.5 for t in range(60)]
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
    wait(browser, "!document.getElementById('features').hidden")
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


# -----------------------------------------------------------------------------
# near misses, zoom, search; what the index says of all episodes


def rows_of(*told):
    """Rows of kind, step and text."""
    return [
        dict(kind=kind, step=at, text=text, sure=None if kind == "missed" else 0.5)
        | dict(true=None if kind == "false" else [at, at + 1])
        | dict(written=None if kind == "missed" else [at, at + 1])
        for kind, at, text in told
    ]


TRUTH, SAID_INSTEAD = "black castles kingside", "black kingside castles kingside"


def test_near_misses_are_pairs_within_3_steps_with_most_words_in_common():
    rows = rows_of(
        ("missed", 12, TRUTH),
        ("missed", 13, "white moves"),
        ("false", 13, SAID_INSTEAD),
        ("false", 13, "white takes"),
        ("missed", 20, "white moves"),
        ("false", 24, "white takes"),
        ("false", 25, "check"),
        ("missed", 28, "mate"),
    )
    page.pair_near_misses(rows)
    assert [row.get("near") for row in rows] == [
        *(None, None, TRUTH, "white moves"),
        *(None, None, "mate", None),
    ]


def test_a_near_miss_shows_which_words_differ(shown):
    also = rows_of(("missed", 33, TRUTH), ("false", 34, SAID_INSTEAD))
    page.pair_near_misses(also)
    browser, _ = shown("#t=34", pictures=False, also=also)
    chip = "[...document.querySelectorAll('#written .chip')].find(x => x.caption.start === 34)"
    marks = f"[...{chip}.querySelectorAll('del, ins')].map(x => [x.tagName, x.textContent])"
    assert browser.js(marks) == [["DEL", "kingside"]]
    assert browser.js(f"{chip}.textContent") == f"✗ {SAID_INSTEAD}"
    assert browser.js(f"{chip}.title") == f"{SAID_INSTEAD}, true: {TRUTH}"
    differs = "difference('a b c d', 'b x d e').map(x => x.join(' ')).join(', ')"
    assert browser.js(differs) == "del a,  b, del c, ins x,  d, ins e"
    heard = "document.querySelector('#list .spoken').textContent"
    assert browser.js(heard) == f"{SAID_INSTEAD}, true: {TRUTH}"


def chips(browser):
    """Left, right, top of the text and of the bar of each chip that is drawn as written."""
    return browser.js("""[...document.querySelectorAll('#written .chip')].flatMap(chip =>
        [...chip.children].map(part => part.getBoundingClientRect()).map(
            ({ left, right, top }) => [left, right, Math.round(top)]))""")


def test_of_many_captions_no_two_touch_and_texts_stay_readable_in_few_lanes(shown):
    text = "You swap places with your little dog."
    also = [written(step, f"{text} {step}") for step in range(10, 55)]
    browser, _ = shown("#t=30", pictures=False, also=also)
    boxes = chips(browser)
    assert len(boxes) >= 2 * 45
    for i, (left, right, top) in enumerate(boxes):
        for other_left, other_right, other_top in boxes[:i]:
            apart = left >= other_right + 1.5 or other_left >= right + 1.5
            assert top != other_top or apart
    texts = [right - left for left, right, _ in boxes[::2]]
    assert min(texts) >= 50
    lanes = browser.js("document.getElementById('written').offsetHeight") / 29
    assert lanes <= 14
    title = "[...document.querySelectorAll('#written .chip')].at(-1).title"
    assert browser.js(title).startswith(text)


def test_plus_minus_and_the_wheel_zoom_about_the_step(shown):
    browser, _ = shown("#t=500", steps=1000, pictures=False)
    place = "head.getBoundingClientRect().left - tracks.getBoundingClientRect().left"
    before = browser.js(place)
    for key, factor in (("+", 1.25), ("-", 1), ("-", 0.8)):
        browser.key(key)
        assert browser.js("inner.offsetWidth") == pytest.approx(8000 * factor, abs=1)
        assert browser.js(place) == pytest.approx(before, abs=2)
    drawn = "[...document.querySelectorAll('#true .chip')].map(x => x.caption.start)"
    assert {*range(480, 520, 6)} <= {*browser.js(drawn)} and 60 not in browser.js(drawn)
    browser.js("tracks.scrollLeft = 0")
    wait(browser, "[...document.querySelectorAll('#true .chip')].some(x => x.caption.start === 60)")
    turn = "new WheelEvent('wheel', { deltaY: -300, ctrlKey: %s, cancelable: true })"
    assert browser.js(f"tracks.dispatchEvent({turn % 'false'})")  # the page scrolls
    assert not browser.js(f"tracks.dispatchEvent({turn % 'true'})")
    wait(browser, "inner.offsetWidth > 6400 * 2.5")


def test_a_search_chooses_features(shown):
    obs = torch.eye(60)[:, :40].cumsum(0)  # feature k steps up at k
    features = page.heat_map(Features(40), obs, [f"Joint {k}" for k in range(40)])
    browser, _ = shown(pictures=False, features=features)
    wait(browser, "!document.getElementById('features').hidden")
    assert browser.js("names.textContent.split('\\n').length") == 24
    find = "$('find').value = '%s', $('find').oninput(), names.textContent"
    assert browser.js(find % "joint 3, JOINT 17") == "\n".join(
        name for name in features["names"] if name.startswith("Joint 3") or name == "Joint 17"
    )
    told = browser.js("$('found').textContent")  # the first feature never moves
    assert told == "12 shown, 12 of 39 fit"
    browser.js(find % "joint 17")
    alpha = np.array(browser.js("[...map.getContext('2d').getImageData(0, 0, 60, 1).data]"))[3::4]
    assert (alpha[:17] == 0).all() and (alpha[17:] > 100).all()
    assert browser.js(find % "none such") == ""


@pytest.fixture
def index(browser, tmp_path):
    """An index of two pages, opened."""
    told = [
        rows_of(("missed", 12, TRUTH), ("false", 13, SAID_INSTEAD), ("hit", 30, "check")),
        rows_of(("missed", 12, TRUTH), ("false", 13, SAID_INSTEAD), ("false", 40, "check it")),
    ]
    pages = []
    for n, rows in enumerate(told):
        page.pair_near_misses(rows)
        rows = [[r.get(k) for k in ("step", "kind", "text", "near", "sure")] for r in rows]
        rows[-1][-1] = 0.1 + n
        link = tmp_path / f"a #{n}?%.html"
        link.write_text(f"<title>{n}</title>")
        pages.append(dict(id=f"<i>{n}", link=str(link), steps=60, doubt=-n, rows=rows))
    (tmp_path / "log.jsonl").write_text(
        '{"step": 100, "f1": 0.25, "loss": NaN}\nnot JSON\n{"reader": "chosen"}\n'
        '{"step": 200, "f1": 0.75, "loss": 2, "name": "x"}\n{"step": 300, "f1'
    )
    curves = page.learning_curves(tmp_path / "log.jsonl")
    assert curves == dict(f1=[[100, 0.25], [200, 0.75]], loss=[[200, 2]])
    page.write_index(tmp_path / "index.html", "toy", None, pages, curves)
    browser.problems.clear()
    browser.open(f"file://{tmp_path}/index.html")
    yield browser
    assert not browser.problems


def test_the_index_tells_f1_by_text_confusions_and_learning_curves(index):
    scores = [
        [["black castles kingside", "2", "0.00"], ["check", "1", "1.00"]],
        [["black", "2", "0.00"], ["check", "1", "0.67"]],
    ]
    shown = index.js("""[...document.querySelectorAll('#scores tbody')].map(body =>
        [...body.rows].map(row => [...row.cells].map(cell => cell.textContent)))""")
    assert [table[:2] for table in shown] == scores
    assert cells(index, "confused") == [["2", SAID_INSTEAD, TRUTH, SAID_INSTEAD]]
    captions = "[...document.querySelectorAll('#curves figcaption')].map(x => x.innerText)"
    assert index.js(captions) == ["f1 0.75", "loss 2"]
    assert "0.25 .. 0.75, updates 100 .. 200" in index.js("curves.textContent")


def test_the_index_filters_by_text_and_kind_and_links_any_name(index):
    def found(text, kind):
        index.js(f"containing.value = '{text}', kind.value = '{kind}', kind.oninput()")
        return [[row[0], *row[3:]] for row in cells(index, "captions")]

    assert len(found("", "")) == 6 and index.js("matching.textContent") == "6 of 6"
    assert found("", "missed") == [[f"<i>{n}", "○ missed", "–"] for n in (0, 1)]
    assert [row[0] for row in found("CHECK", "")] == ["<i>0", "<i>1"]
    assert [row[2] for row in found("", "unsure")] == ["0.10", "0.50", "0.50", "1.10"]
    found("it", "false")
    index.open(index.js("document.querySelector('#captions a').href"))
    assert index.js("document.title + location.hash") == "1#t=40"


def test_a_page_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    page.write_index(path, "früher", None, [])
    before = path.read_bytes()
    assert "früher".encode() in before

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="page.html cannot be written: No space left on device"):
        page.write_index(path, "später", None, [])
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]

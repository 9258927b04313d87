import multiprocessing.dummy
import sys
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("nle", reason="pip install -r requirements-extra.txt")
from conftest import contents, make_played, program  # noqa: E402
from nle import nethack  # noqa: E402

from domains import nethack_dataset, nethack_game, nethack_play  # noqa: E402
from runtime.dataset import (
    Caption,
    Episodes,  # noqa: E402
)

SMALL = dict(train=1, val=1, test=1, steps=30)


def make(folder, **settings):
    make_played(nethack_play, folder, **SMALL | settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nethack") / "one"
    make(folder)
    return folder


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_processes(made):
    make(made.parent / "two", processes=2, context=multiprocessing.get_context("fork"))
    assert contents(made) == contents(made.parent / "two")


def test_a_game_does_not_depend_on_the_day_it_is_played():
    """Seed 3 has a full moon, seed 5 has none, whatever the calendar says."""
    greetings = [nethack_game.Game(seed).message() for seed in (3, 5)]
    assert ["Full moon" in greeting for greeting in greetings] == [True, False]


def test_another_seed_is_another_game():
    first, second = (nethack_play.play(seed, 20) for seed in (1, 2))
    assert not np.array_equal(first.obs, second.obs)


def test_captions_are_what_the_game_said_each_one_line():
    said = []
    act = nethack_game.Game.act

    def listen(game, keys):
        messages, questions = act(game, keys)
        said.append(" ".join(messages))
        return messages, questions

    with mock.patch.object(nethack_game.Game, "act", listen):
        episode = nethack_play.play(1, 100)
    said = said[-len(episode.obs) :]
    assert len(episode.captions) > 10
    for start, end, text in episode.captions:
        assert text.strip() == text and len(text.splitlines()) == 1 and len(text) <= 200
        assert text in said[start].replace("\n", " ") and end == start + 1


def test_a_caption_for_each_message_in_order_and_none_for_a_question():
    lines = [
        "You kill the newt!  The door\nopens.",
        "",
        "What do you want to eat? [abc or ?*]",
        'You hear "a  b".',
    ]
    texts = ["You kill the newt!", "The door opens.", 'You hear "a  b".']
    assert nethack_play.tell(7, lines) == [Caption(7, 8, text) for text in texts]
    assert nethack_play.tell(0, ["x" * 300]) == [Caption(0, 1, "x" * 200)]


def test_an_observation_has_nothing_of_the_message():
    """But it has what stands around, the status line and the inventory."""
    game = nethack_game.Game(1)
    before = game.seen
    game.act("h")
    assert game.message()
    obs = nethack_play.observe(game.seen, before, "h")

    def differs(**changes):
        return (nethack_play.observe(game.seen | changes, before, "h") != obs).any()

    said = game.seen["message"]
    assert not differs(message=said[::-1].copy()) and not differs(message=said * 0)
    for part in ("glyphs", "blstats", "inv_glyphs"):
        assert differs(**{part: game.seen[part] + 1}), part


def test_an_observation_holds_the_change_of_the_state(made):
    obs = Episodes(made, "train")[0].obs.float().numpy()
    first = 7 * 7 * 14 + nethack.NUMMONS
    state, change = obs[:, first : first + 46], obs[:, first + 46 : first + 92]
    assert np.allclose(state[1:] - state[:-1], change[1:], atol=0.02) and change.any()
    moved, stayed = obs[:, first + 92 : first + 94], obs[:, first + 94]
    assert (stayed == ~moved.any(1)).all() and 0 < stayed.sum() < len(stayed)


def test_an_observation_holds_the_key_and_what_it_was_for():
    """A pet in the west, before; an item held."""
    seen, kitten = nethack_game.Game(1).seen, 32  # the number of a kitten among monsters
    x, y = seen["blstats"][:2]
    glyphs = seen["glyphs"].copy()
    glyphs[y, x - 1] = nethack.GLYPH_PET_OFF + kitten
    before = seen | dict(glyphs=glyphs)

    def aim(keys, *moments):
        parts = np.split(nethack_play.aim(keys, *moments), [19, 33, 47])
        return [np.flatnonzero(part).tolist() for part in parts]

    west, south = aim("h", seen, before), aim("j", seen, before)
    assert west[0] != south[0] and len(west[0]) == 1
    assert west[1] == [12] and west[3] == [kitten] and south[3] != [kitten]
    assert aim("h", before, seen)[2] == [12]  # it came
    letter, item = chr(seen["inv_letters"][0]), seen["inv_glyphs"][0] - nethack.GLYPH_OBJ_OFF
    assert aim("w" + letter, seen, before)[1:] == [[], [], [2 * nethack.NUMMONS + item]]


def test_a_game_that_ends_tells_its_end_in_its_last_step():
    games = (nethack_play.play(seed, 200) for seed in range(20))
    last = next(game for game in games if len(game.obs) < 200)
    texts = [c.text for c in last.captions if c.start == len(last.obs) - 1]
    assert "You die..." in texts


def test_a_game_that_ends_before_it_is_seen_is_seen_from_its_start():
    act = nethack_game.Game.act

    def act_and_die(game, keys):
        told = act(game, keys)
        game.over = game.seen["blstats"][20] >= 3
        return told

    drawn = next(seed for seed in range(99) if np.random.default_rng(seed).integers(40) > 20)
    with mock.patch.object(nethack_game.Game, "act", act_and_die):
        assert 0 < len(nethack_play.play(drawn, 200).obs) < 20


def test_splits_never_share_a_seed(made):
    ids = [Episodes(made, split)[0].id for split in ("train", "val", "test")]
    assert len(set(ids)) == 3


def test_an_interrupted_run_keeps_its_finished_shards(made):
    folder = made.parent / "three"
    make(folder)
    kept = folder / "train-00000.safetensors"
    before = kept.stat().st_mtime_ns
    (folder / "val-00000.safetensors").unlink()  # as if killed before the rename
    make(folder)
    assert kept.stat().st_mtime_ns == before and contents(folder) == contents(made)


def test_a_folder_made_with_other_settings_is_refused(made):
    with pytest.raises(ValueError, match="was made with"):
        make(made, steps=31)


def test_without_nle_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nle", None)
    monkeypatch.delitem(sys.modules, "domains.nethack_game")
    code, _, _ = program("domains/nethack_play.py")
    assert "pip install -r requirements-extra.txt" in code and "\n" not in code


# -----------------------------------------------------------------------------
# recordings


def record(folder, number, keys):
    """A game of these keys, then quit, as nle records it. -> the messages after each key."""
    folder.mkdir(parents=True, exist_ok=True)
    path, seen = str(folder / f"nle.{number}.0.ttyrec3.bz2"), ("message",)
    env = nethack.Nethack(seen, "Agent-@", path, scoreprefix=str(folder / f"nle.{number}."))
    env.set_initial_seeds(number, number, False)
    env.reset(path)
    messages = []
    for key in keys:
        (message,), _ = env.step(ord(key))
        messages.append(bytes(message).split(b"\0")[0].decode())
    over = False
    for key in "#quit\ry" + "\x1b" * 20:
        over = over or env.step(ord(key))[1]
    env.close()
    assert over
    return messages


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three games recorded, read as a data set, and the messages of each."""
    folder = tmp_path_factory.mktemp("recorded")
    messages = [record(folder / "nle_data" / "a", n, "hhjjjkllss:i\x1bkkkk") for n in (1, 2, 3)]
    arguments = f"--recordings={folder}/nle_data", f"--out={folder}/out"
    code, _, error = program("domains/nethack_dataset.py", *arguments)
    assert code == 0, error
    return folder / "out", messages


def test_a_recording_has_a_caption_for_each_message_that_is_new(recorded):
    out, messages = recorded
    for split, said in zip(("test", "val", "train"), messages, strict=True):
        captions = [c for c in Episodes(out, split)[0].captions if 0 < c.start <= len(said)]
        # a screen is recorded with the key pressed at it: what a key brings is one step later
        new = [
            (step, text)
            for step, (text, last) in enumerate(zip(said, ["", *said], strict=False), 1)
            if text and text != last
        ]
        assert [(c.start, c.text) for c in captions] == new


def test_of_a_recording_all_but_the_top_line_is_observed():
    rng = np.random.default_rng(0)
    screens, colors = rng.integers(32, 127, (3, 24, 80), np.uint8), np.zeros((3, 24, 80), np.int8)
    screens[:, 23] = np.frombuffer(
        b"Dlvl:1 $:0 HP:15(15) Pw:2(2) AC:4 Xp:1/0 T:1".ljust(80), np.uint8
    )
    cursors = np.array([[3, 40], [0, 5], [21, 79]])

    def read(row=None, column=40):
        changed = screens.copy()
        if row is not None:
            changed[:, row, column] ^= 1
        return nethack_dataset.read("game", changed, colors, cursors).obs

    plain = read()
    assert np.isfinite(plain).all() and plain.shape == (3, 9 * 9 * 16 + 2 * 10)
    assert plain[0, -20:-10].tolist() == [1, 0, 15, 15, 2, 2, 4, 1, 0, 1]
    for column in range(80):
        assert np.array_equal(read(row=0, column=column), plain)
    assert all((read(row)[0] != plain[0]).any() for row in range(1, 8))
    assert np.array_equal(read(row=8)[0], plain[0])


def test_what_a_list_covers_of_the_top_line_is_no_caption():
    lines = ["You see here a dagger.", "You see he  Weapons", "The door opens.--More--"]
    screens = np.full((3, 24, 80), ord(" "), np.uint8)
    for screen, line in zip(screens, lines, strict=True):
        screen[0, : len(line)] = np.frombuffer(line.encode(), np.uint8)
    screens[1, 5, 30:35] = np.frombuffer(b"(end)", np.uint8)
    cursors = np.array([[3, 40], [5, 36], [0, 23]])
    captions = nethack_dataset.read("game", screens, screens * 0, cursors).captions
    assert [(c.start, c.text) for c in captions] == [(0, lines[0]), (2, "The door opens.")]

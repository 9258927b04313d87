import json
import multiprocessing.dummy
import os
import select
import time
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("crafter", reason="pip install -r requirements.txt")
from conftest import contents, make_played, program  # noqa: E402

from domains import crafter_details, crafter_play  # noqa: E402
from runtime.dataset import (
    Caption,
    Episodes,  # noqa: E402
)

SMALL = dict(train=2, val=1, test=1, steps=40, area=20)


def make(folder, **settings):
    make_played(crafter_play, folder, **SMALL | settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crafter") / "one"
    make(folder)
    return folder


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_processes(made):
    make(made.parent / "two", processes=2, context=multiprocessing.get_context("fork"))
    assert contents(made) == contents(made.parent / "two")


def test_captions_stand_where_the_games_counters_rise():
    """Played again from the same seed: every rise has a caption of its text, and nothing else."""
    env = crafter_play.World(area=(24, 24), seed=2, length=0)
    env.reset()
    rng = np.random.default_rng(2)
    player, rises = crafter_play.Player(env, rng, taste=2.0), []
    for _ in range(rng.integers(crafter_play.HEAD_START)):
        env.step(crafter_play.constants.actions.index(player.act()))
    for step in range(80):
        counts = dict(env._player.achievements)
        env.step(crafter_play.constants.actions.index(player.act()))
        rises += [
            (step, name.replace("_", " "))
            for name, n in env._player.achievements.items()
            if n > counts[name]
        ]
    captions = crafter_play.play(2, 80, 24).captions
    assert len(captions) > 2 and {(c.start, c.text) for c in captions} <= set(rises)
    assert all(
        any(c.text == text and c.start <= step < c.end for c in captions) for step, text in rises
    )


def test_a_folder_made_with_other_settings_is_refused(made):
    with pytest.raises(ValueError, match="was made with"):
        crafter_play.make(made, processes=1, **SMALL | dict(steps=50))


def test_what_is_no_data_set_of_its_own_is_left_alone(tmp_path):
    (tmp_path / "meta.json").write_text("mine")
    with pytest.raises(ValueError, match="something is there; remove it, or choose another --out"):
        make(tmp_path)
    assert (tmp_path / "meta.json").read_text() == "mine"


def test_the_same_event_again_within_eight_steps_is_merged_into_the_first():
    events = [
        (3, "collect_wood"),
        (9, "collect_wood"),
        (10, "eat_cow"),
        (17, "collect_wood"),
        (26, "collect_wood"),
    ]
    merged = [
        Caption(3, 18, "collect wood"),
        Caption(10, 11, "eat cow"),
        Caption(26, 27, "collect wood"),
    ]
    assert crafter_play.events_to_captions(events) == merged


def test_an_observation_is_one_material_a_cell_and_the_inventory_with_its_change(made):
    obs = Episodes(made, "train")[0].obs.numpy()
    cells = obs[:, : 63 * 19].reshape(-1, 63, 19)
    assert (cells[:, :, :13].sum(-1) == 1).all() and (
        cells[:, 31, 13] == 1
    ).all()  # the player stands in the middle
    have, change = obs[:, -32:-16], obs[:, -16:] - 9
    assert np.array_equal(have[1:] - have[:-1], change[1:])


def test_splits_never_share_a_world(made):
    ids = [e.id for split in ("train", "val", "test") for e in Episodes(made, split)]
    assert len(set(ids)) == 4


def test_an_interrupted_run_keeps_its_finished_shards_and_says_what_it_makes(made, capsys):
    folder = made.parent / "three"
    make(folder)
    kept = folder / "train-00000.safetensors"
    before = kept.stat().st_mtime_ns
    (folder / "val-00000.safetensors").unlink()  # as if killed before the rename
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="meta.json is missing"):
        Episodes(folder, "val")
    capsys.readouterr()
    make(folder)
    assert f"making 1 episodes of Crafter in {folder}, once" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before and contents(folder) == contents(made)


def test_a_terminated_run_leaves_no_worker_and_no_data_set(made):
    """Who lives has the pipe open: reading ends when the last of them has."""
    folder, fork = made.parent / "terminated", multiprocessing.get_context("fork")
    ours, theirs = os.pipe()

    def play_for_ever(seed, **options):
        os.write(theirs, b"playing")
        time.sleep(60)

    with (
        mock.patch.multiple(crafter_play, PER_SHARD=1, play=play_for_ever),
        mock.patch.object(multiprocessing, "get_context", lambda _: fork),
    ):
        maker = fork.Process(target=crafter_play.make, args=(folder,), kwargs=SMALL)
        maker.start()
    os.close(theirs)
    assert os.read(ours, 7) == b"playing"
    maker.terminate()
    while said := select.select([ours], [], [], 40)[0] and os.read(ours, 7):
        pass
    os.close(ours)
    assert said == b""  # the end, and no time-out
    with pytest.raises(ValueError, match="meta.json is missing"):
        Episodes(folder, "val")
    make(folder)
    assert contents(folder) == contents(made)


def test_pictures_do_not_change_the_game():
    with_pictures, without = crafter_play.play(3, 30, 20, True), crafter_play.play(3, 30, 20)
    assert np.array_equal(with_pictures.obs, without.obs) and with_pictures.pictures.shape == (
        30,
        64,
        64,
        3,
    )


def test_meta_names_source_and_licence(made):
    meta = json.loads((made / "meta.json").read_text())
    assert meta["obs_dim"] == 1234 and "crafter" in meta["source"] and "MIT" in meta["licence"]


SIDES_OF_FACING = ["west", "east", "north", "south"]


def test_details_are_told_of_the_same_episode_as_it_stands_at_the_captions_start():
    """Read off the observation at the start, in which facing and inventory are stored."""
    plain, where, counts = (
        crafter_play.play(2, 150, 24, details=details) for details in ("", "where", "counts")
    )
    assert np.array_equal(plain.obs, where.obs) and np.array_equal(plain.obs, counts.obs)
    assert len(plain.captions) > 5 and any(c.end > c.start + 1 for c in plain.captions)
    for plain_one, where_one, counts_one in zip(
        plain.captions, where.captions, counts.captions, strict=True
    ):
        assert plain_one[:2] == where_one[:2] == counts_one[:2]
        step, text = plain.obs[plain_one.start], plain_one.text
        have = dict(zip(crafter_play.ITEMS, step[-32:-16].tolist(), strict=True))
        side = SIDES_OF_FACING[step[-37:-33].argmax()]
        told = text if text.startswith(("make", "wake")) else f"{text} {side}"
        assert where_one.text == told
        assert counts_one.text.startswith(told)
        if text.startswith("collect"):
            assert counts_one.text == f"{told}, {have[text.split()[1]]} now"


def test_what_each_event_is_counted_by():
    have = dict(wood=3, stone=2, sapling=1, food=6, drink=5, health=8, energy=7)
    told = {
        "collect drink": "collect drink north, 5 now",
        "place table": "place table north, 3 wood left",
        "place stone": "place stone north, 2 stone left",
        "place furnace": "place furnace north, 2 stone left",
        "place plant": "place plant north",
        "make wood pickaxe": "make wood pickaxe, 3 wood left",
        "eat cow": "eat cow north, food 6",
        "defeat zombie": "defeat zombie north, health 8",
        "wake up": "wake up, energy 7",
    }
    for text, counted in told.items():
        assert crafter_details.tell(text, ("north", have), "counts") == counted


def test_a_data_set_with_details_is_another_and_one_without_is_as_ever(made):
    assert "details" not in json.loads((made / "plan.json").read_text())
    folder = made.parent / "details"
    with mock.patch.dict(SMALL, details="where"):
        make(folder)
        with pytest.raises(ValueError, match="was made with"):
            make(made)
    assert json.loads((folder / "plan.json").read_text())["details"] == "where"
    code, _, error = program("domains/crafter_play.py", "--details=all", f"--out={folder}")
    assert code == 2 and "--details=all" in error

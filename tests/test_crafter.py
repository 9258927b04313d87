import json
import multiprocessing.dummy
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("crafter", reason="pip install -r requirements.txt")
from data import Caption, Episodes  # noqa: E402
from domains import crafter_play  # noqa: E402

SMALL = dict(train=2, val=1, test=1, steps=40, area=20)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def make(folder, processes=1, context=multiprocessing.dummy):
    """In a thread, or in forks: a process that is spawned takes seconds to start."""
    with mock.patch.object(crafter_play, "get_context", lambda _: context):
        crafter_play.make(folder, processes=processes, **SMALL)


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
    obs = Episodes(made, "train").obs(0).numpy()
    cells = obs[:, : 63 * 19].reshape(-1, 63, 19)
    assert (cells[:, :, :13].sum(-1) == 1).all() and (
        cells[:, 31, 13] == 1
    ).all()  # the player stands in the middle
    have, change = obs[:, -32:-16], obs[:, -16:] - 9
    assert np.array_equal(have[1:] - have[:-1], change[1:])


def test_splits_never_share_a_world(made):
    ids = [
        record["id"]
        for split in ("train", "val", "test")
        for record in Episodes(made, split).records
    ]
    assert len(set(ids)) == 4


def test_an_interrupted_run_keeps_its_finished_shards(made, monkeypatch):
    folder = made.parent / "three"
    make(folder)
    kept = folder / "train-00000.safetensors"
    before = kept.stat().st_mtime_ns
    (folder / "val-00000.safetensors").unlink()  # as if killed before the rename
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="meta.json is missing"):
        Episodes(folder, "val")
    make(folder)
    assert kept.stat().st_mtime_ns == before and contents(folder) == contents(made)


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

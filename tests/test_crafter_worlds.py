"""Worlds and games are those of the crafter package, which is slower: bit by bit."""

import importlib
import sys
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("crafter", reason="pip install -r requirements.txt")
import opensimplex  # noqa: E402

from domains import crafter_noise, crafter_play  # noqa: E402
from domains.crafter_play import CREATURES, VIEW, constants, play, view  # noqa: E402
from domains.crafter_player import MOVES, World, engine, objects, worldgen  # noqa: E402


@pytest.fixture(scope="module")
def original():
    """The crafter package, imported anew: nothing in it is replaced."""
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "crafter"]:
            del sys.modules[name]
        return importlib.import_module("crafter")


def state(env):
    world = env._world
    things = [(type(obj).__name__, *obj.pos.tolist(), obj.health) for obj in world.objects]
    return world._mat_map.tolist(), world._obj_map.tolist(), things, world.random.uniform()


@pytest.mark.parametrize("seed, area", [(0, (20, 20)), (1, (20, 20)), (2, (24, 16))])
def test_a_world_has_the_materials_and_the_creatures_of_the_packages(original, seed, area):
    ours, theirs = (kind(area=area, seed=seed) for kind in (World, original.Env))
    ours.reset(), theirs.reset()
    assert theirs._world.objects[1:] and type(theirs) not in World.__mro__
    assert state(ours) == state(theirs)


def test_noise_is_opensimplexs_in_any_place_and_again_in_the_next_world():
    places = np.random.default_rng(0).uniform(-30, 30, (300, 3)).tolist()
    places += [(x, y, z) for x in range(5) for y in range(5) for z in (0, 0.5, 5)]  # ties, zeros
    for seed in range(3):
        noise, original = crafter_noise.OpenSimplex(seed), opensimplex.OpenSimplex(seed)
        assert seed == 0 or all(tuple(place) in noise.noise for place in places)
        assert all(noise.noise3d(*place) == original.noise3(*place) for place in places)


def test_a_full_memory_of_places_changes_no_noise(monkeypatch):
    monkeypatch.setattr(crafter_noise, "MOST", 0)
    noise, before = crafter_noise.OpenSimplex(7), len(crafter_noise.places)
    assert noise.noise3d(0.123, 0.456, 3) == opensimplex.OpenSimplex(7).noise3(0.123, 0.456, 3)
    assert len(crafter_noise.places) == before


def test_a_game_is_the_same_with_the_packages_own_functions(original):
    ours = play(2, 100, 20, pictures=True)
    with (
        mock.patch.object(worldgen, "opensimplex", opensimplex),
        mock.patch.object(engine, "Textures", original.engine.Textures),
        mock.patch.object(engine.World, "__getitem__", original.engine.World.__getitem__),
        mock.patch.object(objects.Object, "distance", original.objects.Object.distance),
        mock.patch.object(crafter_play, "view", view_by_cell),
    ):
        theirs = play(2, 100, 20, pictures=True)
    assert np.array_equal(ours.obs, theirs.obs) and len(ours.obs) > 50
    assert np.array_equal(ours.pictures, theirs.pictures) and ours.captions == theirs.captions


def view_by_cell(env):
    n_materials = len(constants.materials) + 1  # 0: outside the world
    cells = np.zeros((*VIEW, n_materials + len(CREATURES)), np.uint8)
    for x, y in np.ndindex(*VIEW):
        material, obj = env._world[env._player.pos + np.array([x, y]) - VIEW // 2]
        cells[x, y, constants.materials.index(material) + 1 if material else 0] = 1
        if obj is not None:
            cells[x, y, n_materials + CREATURES.index(type(obj))] = 1
    return cells


def test_a_view_shows_each_cell_at_every_edge_of_the_world():
    env = World(area=(14, 11), seed=1)
    env.reset()
    for pos in [(0, 0), (13, 0), (0, 10), (13, 10), (7, 5)]:
        if env._world[pos][1] is None:
            env._world.move(env._player, pos)
        seen = view(env)
        assert seen.dtype == np.uint8 and np.array_equal(seen, view_by_cell(env))
        assert (seen[:, :, 0].any()) == (pos != (7, 5))


def test_cells_outside_of_the_world_are_nothing():
    env = World(area=(9, 9), seed=1)
    env.reset()
    assert all(env._world[x, 4] == env._world[4, x] == (None, None) for x in (-1, 9))
    assert env._world[4, 4][1] is env._player
    x, y = env._player.pos
    assert [env._player.distance((x + 2 * i, y - j)) for i, j in MOVES] == [2, 2, 1, 1]

"""
Episodes of Crafter, a small Minecraft-like world (Hafner 2021, arXiv 2109.06780).

    python -m domains.crafter_play --out=data/crafter --episodes=600

A player with changing goals walks, gathers, crafts, eats, drinks, sleeps and fights. Captions come
from the game's own achievement counters ("collect wood"). An observation is the local 9x7 view
one-hot (materials, objects), facing, sleeping, the inventory, and its change since the last step.

Every episode has a world of its own, made from a seed of its own: the same seed gives the same
bytes on any number of processes, and train, val and test never share a world. A shard that is
there is kept, so an interrupted run goes on.
"""

import json
import os
import sys
from collections import defaultdict, deque
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import check_range, configure, run
from data import Caption, Episode, write_meta, write_shard
from runtime.shards import shard_path

try:
    import crafter
    from crafter import constants, objects
except ImportError:
    sys.exit("the package crafter is missing: run `pip install -r requirements.txt`")

out = "data/crafter"  # folder to write
episodes = 600  # of them a twelfth for val, and a twelfth for test
steps = 200  # of an episode
area = 36  # side of the world, in cells
first_seed = 0  # seed of the first world
processes = 0  # 0: all cores

# -----------------------------------------------------------------------------
# the game


class World(crafter.Env):
    """The game without its pictures, and with creatures in a fixed order.

    The original walks a set of creatures, which is ordered by memory address.
    """

    def _obs(self):
        return None

    def render(self, size=None):
        state = self._world.random.get_state()
        picture = super().render(size)  # night draws noise, and looking must not change the game
        self._world.random.set_state(state)
        return picture

    def _balance_chunk(self, chunk, objs):
        place = self._world._obj_map
        super()._balance_chunk(chunk, sorted(objs, key=lambda obj: place[tuple(obj.pos)]))

    def act(self, name):
        """One step. Returns whether the player died."""
        _, _, dead, _ = self.step(constants.actions.index(name))
        return dead


# -----------------------------------------------------------------------------
# the player

MOVES = {(-1, 0): "move_left", (1, 0): "move_right", (0, -1): "move_up", (0, 1): "move_down"}
GATHER = {
    "wood": "tree",
    "sapling": "grass",
    "stone": "stone",
    "coal": "coal",
    "iron": "iron",
    "diamond": "diamond",
    "drink": "water",
}
PATIENCE = 25  # steps in which a goal is pursued
REACH = 150  # cells that are searched for a target


class Player:
    """Picks a goal, walks to the nearest place where it can be pursued, acts, picks another."""

    def __init__(self, env, rng, taste):
        """taste: the smaller, the more a player's likes differ from one thing to another."""
        self.env, self.rng = env, rng
        self.goal, self.patience = None, 0
        self.taste = defaultdict(lambda: rng.gamma(taste))  # drawn once per episode

    def act(self):
        if self.env._player.sleeping:
            return "noop"
        enemy = self.beside(objects.Zombie) or self.beside(objects.Skeleton)
        if enemy and self.rng.random() < 0.95:
            return self.face(enemy) or "do"
        if self.goal is None or self.patience <= 0:
            self.choose()
        self.patience -= 1
        action = self.pursue()
        if action is None or self.rng.random() < 0.02:
            self.goal = None
            return self.wander()
        return action

    def wander(self):
        return self.rng.choice(list(MOVES.values()))

    def choose(self):
        wishes = self.wishes_to_gather() | self.wishes_to_make() | self.wishes_to_place()
        weights = np.array([wish * self.taste[name] for name, wish in wishes.items()])
        self.goal = str(self.rng.choice(list(wishes), p=weights / weights.sum()))
        self.patience = PATIENCE

    def wishes_to_gather(self):
        have = self.env._player.inventory

        def need(item):
            return 4 if have[item] < 5 else 0.3 * (have[item] < 9)

        wishes = dict(eat=need("food"), drink=need("drink"), sleep=need("energy"))
        wishes["sapling"] = 0.2 * (not have["sapling"])
        wishes["wood"] = 3 if have["wood"] < 5 else 0.2
        if have["wood_pickaxe"]:
            wishes["stone"] = 3 if have["stone"] < 6 else 0.2
            wishes["coal"] = 2 if have["coal"] < 2 else 0.2
        if have["stone_pickaxe"]:
            wishes["iron"] = 3
        if have["iron_pickaxe"]:
            wishes["diamond"] = 3
        return wishes

    def wishes_to_make(self):
        player = self.env._player
        nearby = self.env._world.nearby(player.pos, 1)[0]
        wishes = {}
        for name, info in constants.make.items():
            if player.inventory[name] or not self.can_afford(info):
                continue
            absent = [thing for thing in info["nearby"] if thing not in nearby]
            wishes[f"near {absent[0]}" if absent else name] = 8
        return wishes

    def wishes_to_place(self):
        wishes = {}
        for name, wish in dict(plant=2, stone=0.3, table=8, furnace=8).items():
            is_built = name in ("table", "furnace") and self.route(name)
            if self.can_afford(constants.place[name]):
                wishes[f"place_{name}"] = 0.1 if is_built else wish
        return wishes

    def can_afford(self, info):
        return all(self.env._player.inventory[item] >= n for item, n in info["uses"].items())

    def pursue(self):
        """The next action for the goal; None where it is out of reach."""
        if self.goal in constants.make:
            return self.once(f"make_{self.goal}")
        if self.goal == "sleep":
            return self.once("sleep")
        if self.goal.startswith("place_"):
            return self.place()
        if self.goal.startswith("near "):
            return self.walk(self.goal.removeprefix("near "), near=True)
        if self.goal == "eat":
            return self.walk(objects.Cow)
        return self.walk(GATHER[self.goal])

    def once(self, action):
        self.goal = None
        return action

    def place(self):
        player = self.env._player
        material, obj = self.env._world[player.pos + np.array(player.facing)]
        allowed = constants.place[self.goal.removeprefix("place_")]["where"]
        if material in allowed and obj is None:
            return self.once(self.goal)
        return self.wander()  # looks for a cell where it can stand

    def beside(self, kind):
        """The side on which a creature of this kind stands, or None."""
        player = self.env._player
        for side in MOVES:
            if isinstance(self.env._world[player.pos + np.array(side)][1], kind):
                return side
        return None

    def face(self, side):
        return None if tuple(self.env._player.facing) == side else MOVES[side]

    def walk(self, target, near=False):
        """A move, a turn, or "do" in front of the target, a material or a kind of creature."""
        route = self.route(target)
        if route is None:
            return None
        if len(route) > 1:
            return MOVES[route[0]]
        return self.once("noop") if near else self.face(route[0]) or "do"

    def route(self, target):
        """Sides to take to the nearest target, breadth first; None where none is within reach."""
        world = self.env._world
        start = tuple(int(x) for x in self.env._player.pos)
        came_from, queue = {start: None}, deque([start])
        while queue and len(came_from) < REACH:
            cell = queue.popleft()
            for side in MOVES:
                neighbour = cell[0] + side[0], cell[1] + side[1]
                if neighbour in came_from:
                    continue
                material, obj = world[neighbour]
                if is_target(target, material, obj):
                    return sides_to(cell, came_from) + [side]
                came_from[neighbour] = cell, side
                if obj is None and material in constants.walkable:
                    queue.append(neighbour)
        return None


def is_target(target, material, obj):
    if isinstance(target, type):
        return isinstance(obj, target)
    return material == target and obj is None


def sides_to(cell, came_from):
    sides = []
    while came_from[cell]:
        cell, side = came_from[cell]
        sides.append(side)
    return sides[::-1]


# -----------------------------------------------------------------------------
# an episode

VIEW = np.array([9, 7])
CREATURES = [
    objects.Player,
    objects.Cow,
    objects.Zombie,
    objects.Skeleton,
    objects.Arrow,
    objects.Plant,
]
ITEMS = list(constants.items)
MERGE = 8  # steps within which the same event is the same caption
HEAD_START = 40  # steps


def observe(env, before):
    """The observation (D,) uint8. before: the inventory a step ago; its change is 9 + (-9 .. 9)."""
    player = env._player
    facing = [tuple(player.facing) == side for side in MOVES]
    have = np.array([player.inventory[name] for name in ITEMS])
    change = have - np.array([before[name] for name in ITEMS]) + 9
    parts = [view(env).ravel(), facing, [player.sleeping], have, change]
    return np.concatenate(parts).astype(np.uint8)


def view(env):
    """What stands in each cell around the player, one-hot: (9, 7, materials + 1 + creatures)."""
    n_materials = len(constants.materials) + 1  # 0: outside the world
    cells = np.zeros((*VIEW, n_materials + len(CREATURES)), np.uint8)
    for x in range(VIEW[0]):
        for y in range(VIEW[1]):
            material, obj = env._world[env._player.pos + np.array([x, y]) - VIEW // 2]
            cells[x, y, constants.materials.index(material) + 1 if material else 0] = 1
            if obj is not None:
                cells[x, y, n_materials + CREATURES.index(type(obj))] = 1
    return cells


def events_to_captions(events):
    """(step, name) events -> captions. The same event within MERGE steps extends the first."""
    captions, latest = [], {}
    for step, name in events:
        if name in latest and step - captions[latest[name]].end < MERGE:
            captions[latest[name]] = captions[latest[name]]._replace(end=step + 1)
        else:
            latest[name] = len(captions)
            captions.append(Caption(step, step + 1, name.replace("_", " ")))
    return captions


def play(seed, steps, area, pictures=False, begin=0, taste=2.0):
    """An episode of a world from `seed`: at most `steps` steps, fewer if the player dies.

    It begins after `begin` + up to HEAD_START steps.
    """
    env = World(area=(area, area), seed=seed, length=0)
    env.reset()
    rng = np.random.default_rng(seed)
    player = Player(env, rng, taste)
    play_unseen(env, player, begin + rng.integers(HEAD_START))
    obs, frames, events = [], [], []
    for step in range(steps):
        inventory, counts = dict(env._player.inventory), dict(env._player.achievements)
        dead = env.act(player.act())
        obs.append(observe(env, inventory))
        if pictures:
            frames.append(env.render())
        now = env._player.achievements
        events += [(step, name) for name, count in now.items() if count > counts[name]]
        if dead:
            break
    frames = np.stack(frames) if pictures else None
    return Episode(f"world-{seed}", np.stack(obs), events_to_captions(events), "all", frames)


def play_unseen(env, player, steps):
    """Or else every episode would open alike, and the clock alone would tell captions."""
    for _ in range(steps):
        if env._player.health > 4:
            env.act(player.act())
    env._player.health = constants.items["health"]["max"]


# -----------------------------------------------------------------------------
# the data set

PER_SHARD = 10  # episodes, the unit of work


def make_shard(job):
    folder, split, index, seeds, n_pictures, options = job
    played = [play(seed, pictures=i < n_pictures, **options) for i, seed in enumerate(seeds)]
    write_shard(folder, split, index, played)


def make(
    out,
    train=500,
    val=50,
    test=50,
    steps=200,
    area=36,
    first_seed=0,
    processes=0,
    begin=0,
    taste=2.0,
):
    """Makes what is missing of a data set. Worlds are first_seed .. in the order train, val, test.

    Raises ValueError where the folder was made with other settings.
    """
    counts = dict(train=train, val=val, test=test)
    options = dict(steps=steps, area=area, begin=begin, taste=taste)
    write_plan(Path(out), counts | options | dict(first_seed=first_seed))
    jobs, seed = [], first_seed
    for split, count in counts.items():
        jobs += [(out, split, *shard, options) for shard in missing(out, split, seed, count)]
        seed += count
    with get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        made = pool.imap_unordered(make_shard, jobs)
        for _ in tqdm(made, total=len(jobs), desc=f"playing Crafter, {PER_SHARD} episodes each"):
            pass
    write_meta(
        out,
        obs_dim=len(play(first_seed, 1, area).obs[0]),
        dtype="uint8",
        steps_per_second=None,
        source="crafter, scripted player",
        licence="Crafter is MIT licensed (c) Danijar Hafner",
        splits=list(counts),
    )


def missing(out, split, seed, count):
    """(index, seeds, how many with pictures) of the shards that are not there."""
    for index, first in enumerate(range(0, count, PER_SHARD)):
        if not shard_path(out, split, index).exists():
            seeds = range(seed + first, seed + min(first + PER_SHARD, count))
            yield index, seeds, 2 if split != "train" and index < 2 else 0


def write_plan(folder, settings):
    plan = folder / "plan.json"
    if plan.exists() and json.loads(plan.read_bytes()) != settings:
        raise ValueError(
            f"{folder} was made with {json.loads(plan.read_bytes())}, not {settings}: "
            "remove it, or choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(settings))


def main():
    configure(globals())
    check_range(globals(), 12, "episodes")
    check_range(globals(), 1, "steps")
    check_range(globals(), 9, "area", most=1000)
    check_range(globals(), 0, "processes", most=1000)
    held_out = episodes // 12
    train = episodes - 2 * held_out
    make(out, train, held_out, held_out, steps, area, first_seed, processes)


if __name__ == "__main__":
    run(main)

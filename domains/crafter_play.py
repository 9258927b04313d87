"""
Episodes of Crafter, a small Minecraft-like world (Hafner 2021, arXiv 2109.06780; PyPI package crafter), played by a script.

    python domains/crafter_play.py --out=data/crafter --episodes=600

A player with changing goals walks, gathers, crafts, eats, drinks, sleeps and fights. Captions come from the game's own
achievement counters ("collect wood"); the same event again within 8 steps is merged into the first. An observation is the
local 9x7 view one-hot (materials, objects), facing, sleeping, the inventory, and its change since the last step.
Every episode has a world of its own, made from a seed of its own, so the same seed gives the same bytes on any number of
processes, and train, val and test never share a world. A shard that is there is kept, so an interrupted run goes on.
"""
import argparse
import json
import os
import sys
from collections import defaultdict, deque
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

try:
    import crafter
    from crafter import constants, objects
except ImportError:
    sys.exit("the package crafter is missing: run `pip install -r requirements.txt`")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Caption, Episode, shard_path, write_meta, write_shard  # noqa: E402

PER_SHARD = 10                            # episodes, the unit of work
MERGE = 8                                 # steps within which the same event is the same caption
HEAD_START = 40                           # steps
VIEW = np.array([9, 7])
CREATURES = [objects.Player, objects.Cow, objects.Zombie, objects.Skeleton, objects.Arrow, objects.Plant]
MOVES = {(-1, 0): "move_left", (1, 0): "move_right", (0, -1): "move_up", (0, 1): "move_down"}
ITEMS = list(constants.items)


class World(crafter.Env):
    """The game without its pictures, and with creatures in a fixed order (the original walks a set, ordered by memory address)."""

    def _obs(self): return None

    def render(self, size=None):
        state = self._world.random.get_state()                      # night draws noise, and looking must not change the game
        picture = super().render(size)
        self._world.random.set_state(state)
        return picture

    def _balance_chunk(self, chunk, objs):
        super()._balance_chunk(chunk, sorted(objs, key=lambda o: self._world._obj_map[tuple(o.pos)]))


class Player:
    """Picks a goal, walks to the nearest place where it can be pursued, acts, and picks another."""

    GATHER = dict(wood="tree", sapling="grass", stone="stone", coal="coal", iron="iron", diamond="diamond", drink="water")

    def __init__(self, env, rng, taste):
        """taste: the smaller, the more a player's likes differ from one thing to another."""
        self.env, self.rng, self.goal, self.patience = env, rng, None, 0
        self.taste = defaultdict(lambda: rng.gamma(taste))          # what this player likes to do, drawn once per episode

    def act(self):
        p, world = self.env._player, self.env._world
        if p.sleeping: return "noop"
        enemy = self.beside(objects.Zombie) or self.beside(objects.Skeleton)
        if enemy and self.rng.random() < 0.95: return self.face(enemy) or "do"
        if self.goal is None or self.patience <= 0: self.choose(p)
        self.patience -= 1
        action = self.pursue(p, world)
        if action is None or self.rng.random() < 0.02:
            self.goal = None
            return self.rng.choice(list(MOVES.values()))
        return action

    def choose(self, p):
        have, nearby = p.inventory, self.env._world.nearby(p.pos, 1)[0]
        afford = lambda info: all(have[item] >= n for item, n in info["uses"].items())
        often = lambda need: 4 if have[need] < 5 else 0.3 * (have[need] < 9)
        wishes = dict(eat=often("food"), drink=often("drink"), sleep=often("energy"), sapling=0.2 * (not have["sapling"]))
        wishes["wood"] = 3 if have["wood"] < 5 else 0.2
        if have["wood_pickaxe"]: wishes |= dict(stone=3 if have["stone"] < 6 else 0.2, coal=2 if have["coal"] < 2 else 0.2)
        if have["stone_pickaxe"]: wishes["iron"] = 3
        if have["iron_pickaxe"]: wishes["diamond"] = 3
        for name, info in constants.make.items():
            missing = [thing for thing in info["nearby"] if thing not in nearby]
            if not have[name] and afford(info): wishes[f"near {missing[0]}" if missing else name] = 8
        for name, wish in dict(plant=2, stone=0.3, table=8, furnace=8).items():
            built = name in ("table", "furnace") and self.route(name)
            if afford(constants.place[name]): wishes[f"place_{name}"] = 0.1 if built else wish
        weights = np.array([wish * self.taste[name] for name, wish in wishes.items()])
        self.goal, self.patience = str(self.rng.choice(list(wishes), p=weights / weights.sum())), 25

    def pursue(self, p, world):
        goal = self.goal
        if goal in constants.make: return self.once(f"make_{goal}")
        if goal == "sleep": return self.once(goal)
        if goal.startswith("place_"): return self.place(p, world, goal)
        if goal.startswith("near "): return self.walk(goal[len("near "):], near=True)
        if goal == "eat": return self.walk(objects.Cow)
        return self.walk(self.GATHER[goal])

    def once(self, action):
        self.goal = None
        return action

    def place(self, p, world, goal):
        material, obj = world[p.pos + np.array(p.facing)]
        if material in constants.place[goal[len("place_"):]]["where"] and obj is None: return self.once(goal)
        return self.rng.choice(list(MOVES.values()))                # look for a cell where it can stand

    def beside(self, kind):
        p = self.env._player
        for side in MOVES:
            if isinstance(self.env._world[p.pos + np.array(side)][1], kind): return side
        return None

    def face(self, side):
        return None if tuple(self.env._player.facing) == side else MOVES[side]

    def walk(self, target, near=False):
        """The next action on the way to `target` (a material or a kind of creature): a move, a turn, or "do" in front of it."""
        route = self.route(target)
        if route is None: return None
        if len(route) > 1: return MOVES[route[0]]
        return self.once("noop") if near else self.face(route[0]) or "do"

    def route(self, target, reach=150):
        """Sides to take, breadth first, from the player to the nearest target; None where there is none within reach."""
        world, start = self.env._world, tuple(int(x) for x in self.env._player.pos)
        came, queue = {start: None}, deque([start])
        while queue and len(came) < reach:
            here = queue.popleft()
            for side in MOVES:
                cell = here[0] + side[0], here[1] + side[1]
                if cell in came: continue
                material, obj = world[cell]
                if material == target and obj is None or (isinstance(target, type) and isinstance(obj, target)):
                    return self.unwind(came, here) + [side]
                came[cell] = (here, side)
                if obj is None and material in constants.walkable: queue.append(cell)
        return None

    @staticmethod
    def unwind(came, cell):
        sides = []
        while came[cell]:
            cell, side = came[cell]
            sides.append(side)
        return sides[::-1]


def observe(env, before):
    """The observation (D,) uint8 of the present state; `before` is the inventory one step ago. Change is shifted by 9 into 0 .. 18."""
    world, p = env._world, env._player
    view = np.zeros((*VIEW, len(constants.materials) + 1 + len(CREATURES)), np.uint8)
    for x in range(VIEW[0]):
        for y in range(VIEW[1]):
            material, obj = world[p.pos + np.array([x, y]) - VIEW // 2]
            view[x, y, constants.materials.index(material) + 1 if material else 0] = 1
            if obj is not None: view[x, y, len(constants.materials) + 1 + CREATURES.index(type(obj))] = 1
    facing = [tuple(p.facing) == side for side in MOVES]
    have = np.array([p.inventory[name] for name in ITEMS])
    change = have - np.array([before[name] for name in ITEMS]) + 9
    return np.concatenate([view.ravel(), facing, [p.sleeping], have, change]).astype(np.uint8)


def events_to_captions(events):
    """(step, name) events -> captions; the same event again within MERGE steps extends the first."""
    captions, last = [], {}
    for step, name in events:
        if name in last and step - captions[last[name]].end < MERGE:
            captions[last[name]] = captions[last[name]]._replace(end=step + 1)
            continue
        last[name] = len(captions)
        captions.append(Caption(step, step + 1, name.replace("_", " ")))
    return captions


def play(seed, steps, area, pictures=False, begin=0, taste=2.0):
    """One episode: a world from `seed`, at most `steps` steps (fewer if the player dies), from `begin` + up to HEAD_START steps on."""
    env, rng = World(area=(area, area), seed=seed, length=0), np.random.default_rng(seed)
    env.reset()
    player = Player(env, rng, taste)
    for _ in range(begin + rng.integers(HEAD_START)):               # else every episode opens alike, and the clock alone tells captions
        if env._player.health > 4: env.step(constants.actions.index(player.act()))
    env._player.health = constants.items["health"]["max"]
    obs, frames, events = [], [], []
    for step in range(steps):
        before, counts = dict(env._player.inventory), dict(env._player.achievements)
        _, _, dead, _ = env.step(constants.actions.index(player.act()))
        obs.append(observe(env, before))
        if pictures: frames.append(env.render())
        events += [(step, name) for name, n in env._player.achievements.items() if n > counts[name]]
        if dead: break
    return Episode(f"world-{seed}", np.stack(obs), events_to_captions(events), "all", np.stack(frames) if pictures else None)


def make_shard(job):
    folder, split, index, seeds, steps, area, pictures, begin, taste = job
    write_shard(folder, split, index, [play(seed, steps, area, n < pictures, begin, taste) for n, seed in enumerate(seeds)])


def make(out, train=500, val=50, test=50, steps=200, area=36, first_seed=0, processes=None, begin=0, taste=2.0):
    """Makes what is missing of a data set; worlds are numbered first_seed .. in the order train, val, test."""
    settings = dict(train=train, val=val, test=test, steps=steps, area=area, first_seed=first_seed, begin=begin, taste=taste)
    plan = Path(out) / "plan.json"
    if plan.exists() and json.loads(plan.read_text()) != settings:
        sys.exit(f"{out} was made with {json.loads(plan.read_text())}, not {settings}: remove it, or choose another --out")
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(settings))
    jobs, seed = [], first_seed
    for split, count in dict(train=train, val=val, test=test).items():
        for index, a in enumerate(range(0, count, PER_SHARD)):
            seeds = range(seed + a, seed + min(a + PER_SHARD, count))
            pictures = 2 if split != "train" and index < 2 else 0
            if not shard_path(out, split, index).exists(): jobs.append((out, split, index, seeds, steps, area, pictures, begin, taste))
        seed += count
    with get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        list(tqdm(pool.imap_unordered(make_shard, jobs), total=len(jobs), desc=f"playing Crafter, {PER_SHARD} episodes each"))
    write_meta(out, obs_dim=len(play(first_seed, 1, area).obs[0]), dtype="uint8", steps_per_second=None, source="crafter, scripted player",
               licence="Crafter is MIT licensed (c) Danijar Hafner", splits=["train", "val", "test"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/crafter")
    parser.add_argument("--episodes", type=int, default=600, help="a twelfth of them, each, for val and test (default 600)")
    parser.add_argument("--steps", type=int, default=200, help="steps of an episode (default 200)")
    parser.add_argument("--area", type=int, default=36, help="side of the world in cells (default 36)")
    parser.add_argument("--first_seed", type=int, default=0, help="seed of the first world (default 0)")
    parser.add_argument("--processes", type=int, help="default: all cores")
    args = parser.parse_args()
    held_out = args.episodes // 12
    make(args.out, args.episodes - 2 * held_out, held_out, held_out, args.steps, args.area, args.first_seed, args.processes)

"""
Crafter without its pictures, and a scripted player of it, for crafter_play.py.

The player picks a goal by what it has and likes, walks to the nearest place where that can be
pursued, acts, and picks another.
"""

import functools
import sys
from collections import defaultdict, deque

import numpy as np

try:
    import crafter
    from crafter import constants, engine, objects, worldgen
except ImportError:
    sys.exit("the package crafter is missing: run `pip install -r requirements.txt`")
from domains import crafter_noise

# -----------------------------------------------------------------------------
# the game's slowest functions, replaced: every world and every step stays the same


def look(world, pos):
    """crafter.engine.World's world[pos]: the material and the creature in a cell, or None."""
    x, y = pos
    if not (0 <= x < world.area[0] and 0 <= y < world.area[1]):
        return None, None
    material, obj = world._mat_map.item(x, y), world._obj_map.item(x, y)
    return world._mat_names[material], world._objects[obj]


def distance(self, target):
    """crafter.objects.Object.distance: steps to a creature or a cell."""
    x, y = getattr(target, "pos", target)
    return abs(int(x - self.pos[0])) + abs(int(y - self.pos[1]))


worldgen.opensimplex = crafter_noise
engine.World.__getitem__ = look
engine.Textures = functools.cache(engine.Textures)
objects.Object.distance = distance

# -----------------------------------------------------------------------------
# the world, and who plays in it


class World(crafter.Env):
    """The game without its pictures, and with creatures in a fixed order.

    The original walks a set of creatures, which is ordered by memory address.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self._sem_view = self._obs  # a map of the whole world in each step, which nobody reads

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
            if self.can_afford(constants.place[name]):
                is_built = name in ("table", "furnace") and self.route(name)
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
        x, y = self.env._player.pos.tolist()
        for side in MOVES:
            if isinstance(self.env._world[x + side[0], y + side[1]][1], kind):
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
        start = tuple(self.env._player.pos.tolist())
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

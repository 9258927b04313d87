"""
A scripted player of NetHack, for nethack_play.py.

It fights what stands beside it, walks to what attracts it most among the cells it can reach, and
now and then eats, drinks, reads, wears, picks up, kicks and searches.
"""

import re
from collections import defaultdict, deque

import numpy as np

from domains.nethack_game import (
    DOOR,
    DUNGEON,
    KICK,
    MONSTER,
    STAIRS_DOWN,
    SYMBOL,
    THING,
    WALKABLE,
)

SIDES = dict(k=(-1, 0), j=(1, 0), h=(0, -1), l=(0, 1), y=(-1, -1), u=(-1, 1), b=(1, -1), n=(1, 1))
LIKES = "explore", "item", "stairs", "search", "kick", "e", "q", "r", "W", "w", "P", "z"
# key of a command, class of the things it is for, how often per step
USES = [
    ("e", 7, 0.004),  # eat
    ("q", 8, 0.006),  # drink
    ("r", 9, 0.006),  # read
    ("W", 3, 0.008),  # wear
    ("w", 2, 0.003),  # wield
    ("P", 4, 0.005),  # put on
    ("z", 11, 0.005),  # zap
]
REACH = 400  # cells that are searched for a target
BOULDERS = [ord("`"), ord("0")]


class Player:
    """Chooses keys from what the game shows. Likes are drawn once per game."""

    def __init__(self, game, rng):
        self.game, self.rng = game, rng
        self.like = {name: rng.gamma(2.0) for name in LIKES}
        self.visits = defaultdict(lambda: np.zeros(DUNGEON))  # of a level
        self.stairs = set()  # (level, cell) with stairs down
        self.blocked = set()  # (level, cell, neighbour) that did not work
        self.side = None  # where it last went
        self.toward = None  # the neighbour it walks to or fights in this step
        self.keys = None  # of this step

    def step(self):
        """One action. -> the game's messages."""
        level, here, self.toward = self.game.level(), self.game.position(), None
        self.visits[level][here] += 1
        for cell in np.argwhere(np.isin(SYMBOL[self.game.seen["glyphs"]], STAIRS_DOWN)).tolist():
            self.stairs.add((level, *cell))
        self.keys = self.choose()
        messages, questions = self.game.act(self.keys)
        fought = any("Really attack" in question for question in questions)
        stayed = here == self.game.position() and not self.fights
        if self.toward and (fought or (stayed and self.rng.random() < 0.8)):
            self.blocked.add((level, here, self.toward))
        return messages

    def choose(self):
        """The keys of an action."""
        enemy = self.enemy()
        self.fights = enemy is not None and self.rng.random() < 0.9
        if self.fights:
            return self.go(enemy)
        return self.use() or self.pick_up() or self.open() or self.try_luck() or self.walk()

    def go(self, side):
        (y, x), (dy, dx) = self.game.position(), SIDES[side]
        self.side, self.toward = side, (y + dy, x + dx)
        return side

    def neighbours(self, cell):
        """(side, cell) around a cell within the map, but for ways that did not work."""
        height, width = DUNGEON
        level = self.game.level()
        for side, (dy, dx) in SIDES.items():
            y, x = cell[0] + dy, cell[1] + dx
            if 0 <= y < height and 0 <= x < width and (level, cell, (y, x)) not in self.blocked:
                yield side, (y, x)

    def enemy(self):
        """The side on which a monster stands, or None. People may be peaceful."""
        seen = self.game.seen
        for side, cell in self.neighbours(self.game.position()):
            if MONSTER[seen["glyphs"][cell]] and seen["chars"][cell] != ord("@"):
                return side
        return None

    def use(self):
        seen = self.game.seen
        hungry = seen["blstats"][21] >= 2
        for key, kind, chance in USES:
            letters = seen["inv_letters"][seen["inv_oclasses"] == kind]
            chance = 0.3 if key == "e" and hungry else chance * self.like[key]
            if len(letters) and self.rng.random() < chance:
                return key + chr(self.rng.choice(letters))
        return None

    def pick_up(self):
        things_lie_here = re.search("You see here|several|objects here", self.game.message())
        if things_lie_here and self.rng.random() < 0.4 * min(self.like["item"], 2):
            return ",,"
        return None

    def open(self):
        """A kick against a door that was found locked."""
        if "is locked" in self.game.message() and self.side in tuple("hjkl"):
            return KICK + self.side
        return None

    def try_luck(self):
        if (self.game.level(), *self.game.position()) in self.stairs:
            if self.rng.random() < 0.15 * self.like["stairs"]:
                return ">"
        if self.rng.random() < 0.01 * self.like["search"]:
            return "s"
        if self.rng.random() < 0.003 * self.like["kick"]:
            return KICK + self.rng.choice(list("hjkl"))
        return None

    def walk(self):
        """A step towards the most attractive cell within reach, at times anywhere."""
        came_from = self.reachable()
        here, *cells = came_from
        if not cells or self.rng.random() < 0.02:
            return self.go(self.rng.choice(list(SIDES)))
        attraction = self.attraction()
        cell = max(cells, key=lambda cell: attraction[cell])
        while came_from[cell][1] != here:
            cell = came_from[cell][1]
        return self.go(came_from[cell][0])

    def reachable(self):
        """{cell: (side, cell before)} of the nearest cells, breadth first."""
        seen = self.game.seen
        boulders = np.isin(seen["chars"], BOULDERS) & (self.rng.random() < 0.9)
        walkable = (WALKABLE[seen["glyphs"]] & ~boulders).tolist()
        door = DOOR[seen["glyphs"]].tolist()
        here = self.game.position()
        came_from, queue = {here: None}, deque([here])
        while queue and len(came_from) < REACH:
            cell = queue.popleft()
            for side, (y, x) in self.neighbours(cell):
                if (y, x) in came_from or not walkable[y][x]:
                    continue
                is_diagonal = side in "yubn"
                if is_diagonal and (door[y][x] or door[cell[0]][cell[1]]):
                    continue
                came_from[y, x] = side, cell
                queue.append((y, x))
        return came_from

    def attraction(self):
        """Of each cell (21, 79)."""
        glyphs, dark = self.game.seen["glyphs"], self.game.seen["chars"] == ord(" ")
        height, width = DUNGEON
        dark = np.pad(dark.astype(int), 1)
        dark = sum(dark[y : y + height, x : x + width] for y in range(3) for x in range(3))
        y, x = self.game.position()
        rows, columns = np.indices(DUNGEON)
        distance = np.maximum(abs(rows - y), abs(columns - x))
        attraction = 0.4 * self.like["explore"] * np.minimum(dark, 4) - 0.2 * distance
        attraction += 2 * self.like["item"] * THING[glyphs] + 3 * MONSTER[glyphs]
        attraction += 3 * self.like["stairs"] * np.isin(SYMBOL[glyphs], STAIRS_DOWN)
        return attraction - self.visits[self.game.level()] + self.rng.random(DUNGEON)

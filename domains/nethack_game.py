"""
A game of NetHack through nle (Küttler et al. 2020, arXiv 2006.13760), and what its glyphs are.
"""

import sys

import numpy as np

try:
    from nle import nethack
except ImportError:
    sys.exit("the package nle is missing: run `pip install -r requirements-extra.txt`")

# -----------------------------------------------------------------------------
# the game

SEEN = "glyphs", "chars", "blstats", "message", "misc", "inv_glyphs", "inv_letters", "inv_oclasses"
ENTER, ESCAPE, KICK = chr(13), chr(27), chr(4)
DUNGEON = nethack.DUNGEON_SHAPE
MOST_KEYS = 12  # of an action, with the answers to what it asks


class Game:
    """A game from a seed. seen: glyphs and chars (21, 79), blstats (27,), message (256,) bytes,
    misc (3,) what is waited for, inv_glyphs, inv_letters and inv_oclasses (55,)."""

    def __init__(self, seed):
        # fix_moon_phase: the moon, Friday 13th and midnight from the seed, not from the clock
        fixed = dict(ttyrec=None, copy=True, fix_moon_phase=True)
        self.env = nethack.Nethack(SEEN, playername="Agent-@", **fixed)
        self.env.set_initial_seeds(seed, seed, False)
        self.seen, self.over = dict(zip(SEEN, self.env.reset(), strict=True)), False
        while self.seen["misc"][2]:  # the greeting has several pages
            self.press(ENTER)

    def press(self, key):
        seen, self.over = self.env.step(ord(key))
        if not self.over:  # what a game shows when it is over is no more of it
            self.seen = dict(zip(SEEN, seen, strict=True))

    def message(self):
        return bytes(self.seen["message"]).split(b"\0")[0].decode("latin-1").strip()

    def act(self, keys):
        """One action, the first of keys; the others are answers. -> (messages, questions)"""
        key, *answers = keys
        messages, questions = [], []
        self.press(key)
        for _ in range(MOST_KEYS):
            asks, asks_for_a_line, waits = self.seen["misc"]
            told = questions if asks or asks_for_a_line else messages
            if self.message() and told[-1:] != [self.message()]:
                told.append(self.message())
            if self.over or not (asks or asks_for_a_line or waits):
                break
            if asks:
                self.press(answer(self.message(), answers))
            elif answers == [","]:  # of a list of things to pick up, all
                self.press(answers.pop())
            else:
                self.press(ESCAPE if asks_for_a_line else ENTER)
        return messages, questions

    def position(self):
        """(y, x) of the player."""
        x, y = self.seen["blstats"][:2]
        return int(y), int(x)

    def level(self):
        """(dungeon, level of it)."""
        return tuple(self.seen["blstats"][23:25].tolist())


def answer(question, answers):
    if "eat it" in question:
        return "y"
    if answers:
        return answers.pop(0)
    return "n" if "[yn" in question else ESCAPE


# -----------------------------------------------------------------------------
# what a glyph is: tables (MAX_GLYPH,)


def table(of_glyph):
    return np.array([of_glyph(glyph) for glyph in range(nethack.MAX_GLYPH)])


def symbol(glyph):
    return glyph - nethack.GLYPH_CMAP_OFF if nethack.glyph_is_cmap(glyph) else -1


SYMBOL = table(symbol)  # the number of a piece of landscape (rm.h of NetHack); -1: none
DOORWAY, OPEN_DOOR, CLOSED_DOOR = [12], [13, 14], [15, 16]
FLOOR, CORRIDOR, STAIRS_UP, STAIRS_DOWN = [19, 20], [21, 22], [23], [24]
LADDERS_TO_FOUNTAIN, TRAPS = range(25, 32), range(42, 65)
PET = table(nethack.glyph_is_pet)
MONSTER = table(nethack.glyph_is_monster) & ~PET
THING = table(nethack.glyph_is_object) | table(nethack.glyph_is_body)
DOOR = np.isin(SYMBOL, [*OPEN_DOOR, *CLOSED_DOOR])
GROUND = [*DOORWAY, *OPEN_DOOR, *CLOSED_DOOR, *FLOOR, *CORRIDOR, *STAIRS_UP, *STAIRS_DOWN]
GROUND += [*LADDERS_TO_FOUNTAIN, *TRAPS]
WALKABLE = THING | PET | MONSTER | np.isin(SYMBOL, GROUND)

"""
Games of NetHack, told by the game's own messages.

    pip install -r requirements-extra.txt
    python -m domains.nethack_play --out=data/nethack --episodes=500

A scripted player explores, fights, picks up, eats and reads. Captions are what the game says
("The door opens."), each message one of its own. An observation is what stands in the 7x7 cells
around, who stands in the 3x3, the status line and the inventory, the change of both since the last
step, the key pressed, and what it was for: a thing, or the cell on that side, before and after. The
line of messages is no part of it.

Every game has a seed of its own: the same seed gives the same bytes on any number of processes,
and train, val and test never share one. A shard that is there is kept, so an interrupted run goes
on.
"""

from configurator import check_range, configure, run
import re
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from domains import nethack_game as glyphs
from domains.crafter_play import PER_SHARD, missing, write_plan
from domains.nethack_game import KICK, Game, nethack, table
from domains.nethack_player import SIDES, USES, Player
from runtime.dataset import Caption, Episode, write_shard
from runtime.files import alone
from runtime.program import workers
from runtime.shards import write_meta

out = "data/nethack"  # folder to write
episodes = 500  # games; of them a tenth for val, and a tenth for test
steps = 200  # of a game, fewer where it ends
first_seed = 0  # seed of the first game
processes = 0  # 0: all cores

# -----------------------------------------------------------------------------
# what is observed

NEAR, CLOSE = 3, 1  # cells on each side whose landscape, in which each species is seen
KINDS = [
    range(1, 12),  # walls
    [*glyphs.DOORWAY, *glyphs.OPEN_DOOR],
    glyphs.CLOSED_DOOR,
    glyphs.FLOOR,
    glyphs.CORRIDOR,
    glyphs.STAIRS_UP,
    glyphs.STAIRS_DOWN,
    [27],  # altar
    [31],  # fountain
    [0],  # nothing, or nothing seen so far
]
NONE = 2 * nethack.NUMMONS + nethack.NUM_OBJECTS  # monsters, corpses, objects
KEYS = [*SIDES, *(key for key, *_ in USES), *",>s", KICK]
STATUS = [*range(9, 23), 24]  # of blstats: score, health, depth, gold, .., hunger, load, level
CONDITIONS = 13  # bits of blstats: stoned, .., blind, deaf, stunned, confused, ..


def kind(glyph):
    """0: no landscape; 1: a rare piece of it; others as in KINDS."""
    symbol = glyphs.SYMBOL[glyph]
    kinds = [n for n, symbols in enumerate(KINDS, 2) if symbol in symbols]
    return kinds[0] if kinds else int(symbol >= 0)


def species(glyph):
    """The number of a kind of monster, of its corpse, or of object; NONE for all else."""
    if nethack.glyph_is_body(glyph):
        return nethack.NUMMONS + glyph - nethack.GLYPH_BODY_OFF
    if nethack.glyph_is_object(glyph):
        return 2 * nethack.NUMMONS + nethack.glyph_to_obj(glyph)
    return nethack.glyph_to_mon(glyph) if nethack.glyph_is_monster(glyph) else NONE


def object_class(glyph):
    if not nethack.glyph_is_object(glyph):
        return 0
    code = nethack.objclass(nethack.glyph_to_obj(glyph)).oc_class
    return ord(code) if isinstance(code, str) else int(code)


KIND, CLASS, SPECIES = table(kind), table(object_class), table(species)


def count(some):
    """How many of some glyphs are of each species, (NONE,)."""
    return np.bincount(SPECIES[some].ravel(), minlength=NONE + 1)[:NONE]


def cells(some):
    """Of some glyphs: landscape, and whether it is a monster, a pet, a thing, (.., 14)."""
    landscape = np.eye(len(KINDS) + 2)[KIND[some]][..., 1:]
    who = np.stack([each[some] for each in (glyphs.MONSTER, glyphs.PET, glyphs.THING)], -1)
    return np.concatenate([landscape, who], -1)


def around(seen, place, n):
    """Glyphs of the cells at most n from a place (y, x), (2n+1, 2n+1)."""
    y, x = place
    padded = np.pad(seen["glyphs"], n, constant_values=nethack.GLYPH_CMAP_OFF)
    return padded[y : y + 2 * n + 1, x : x + 2 * n + 1]


def view(seen):
    """The cells around, and who is near: (7 * 7 * 14 + NUMMONS,)."""
    here = seen["blstats"][[1, 0]]
    who = count(around(seen, here, CLOSE))[: nethack.NUMMONS]
    return np.concatenate([cells(around(seen, here, NEAR)).ravel(), who])


def held(seen):
    return seen["inv_glyphs"][seen["inv_glyphs"] < nethack.MAX_GLYPH]


def state(seen):
    """Status line, and classes of what is held: (15 + 13 + 18,)."""
    status = seen["blstats"]
    conditions = (status[25] >> np.arange(CONDITIONS)) & 1
    classes = np.bincount(CLASS[held(seen)], minlength=18)
    return np.concatenate([status[STATUS], conditions, classes])


def aim(keys, seen, before):
    """The key, the cell on its side before and after, and the species there, or of the thing that
    it is for: (19 + 2 * 14 + NONE,)."""
    key, *answers = keys
    side = answers[0] if key == KICK else key
    cell, species = np.zeros((2, 14)), np.zeros(NONE)
    if side in SIDES:
        here, (dy, dx) = before["blstats"][[1, 0]], SIDES[side]
        there = np.array([around(each, here, 1)[1 + dy, 1 + dx] for each in (before, seen)])
        cell, species = cells(there), count(there[:1])
    elif answers:
        species = count(before["inv_glyphs"][before["inv_letters"] == ord(answers[0])])
    return np.concatenate([np.equal(KEYS, key), cell.ravel(), species])


def observe(seen, before, keys):
    """The observation (D,) float16. before: what was seen a step ago; keys: pressed since."""
    change = state(seen) - state(before)
    moved = np.clip(seen["blstats"][:2] - before["blstats"][:2], -3, 3)
    stayed = not moved.any()
    stayed = [stayed, stayed and keys in SIDES]
    taken = (count(held(seen)) - count(held(before)))[2 * nethack.NUMMONS :]
    parts = view(seen), state(seen), change, moved, stayed, taken, aim(keys, seen, before)
    return np.clip(np.concatenate(parts), -1e4, 1e4).astype(np.float16)


# -----------------------------------------------------------------------------
# what is told

LONGEST = 200  # characters of a caption
BETWEEN = r'(?<=[.!?"])  +'  # messages on one line
ASKS = re.compile(  # what tells of the keys pressed, not of the game
    "What do you want|In what direction|You don't have anything|There are no|Really"
    "|Do you want|Never mind|You have a little trouble|Unknown command"
)


def tell(step, lines):
    """What the game said in a step, a list of lines -> captions."""
    lines = [re.sub(r"\s", " ", line).strip() for line in lines]  # a long one is broken in two
    messages = [message for line in lines for message in re.split(BETWEEN, line)]
    messages = [message for message in messages if message and not ASKS.match(message)]
    return [Caption(step, step + 1, message[:LONGEST].strip()) for message in messages]


# -----------------------------------------------------------------------------
# a game, and the data set

HEAD_START = 40  # steps; or else every episode would open alike


def play(seed, steps, begin=None):
    """A game from `seed`: at most `steps` steps from step `begin` on, fewer if it ends.

    begin None: drawn below HEAD_START, and 0 for a game that ends before.
    """
    drawn = int(np.random.default_rng(seed).integers(HEAD_START))
    first = drawn if begin is None else begin
    game = Game(seed)
    player = Player(game, np.random.default_rng(seed))
    obs, captions = [], []
    for step in range(-first, steps):
        before = game.seen
        lines = player.step()
        if step >= 0:
            obs.append(observe(game.seen, before, player.keys))
            captions += tell(step, lines)
        if game.over:
            break
    game.env.close()
    if not obs:
        return play(seed, steps, begin=0)
    return Episode(f"game-{seed}", np.stack(obs), captions)


def make_shard(job):
    folder, split, index, seeds, steps = job
    write_shard(folder, split, index, [play(seed, steps) for seed in seeds])
    return len(seeds)


def make(out, train=400, val=50, test=50, steps=200, first_seed=0, processes=0):
    """Makes what is missing of a data set. Seeds are first_seed .. in the order train, val, test.

    Raises ValueError where the folder was made with other settings.
    """
    counts = dict(train=train, val=val, test=test)
    with alone(out, wait=True):
        write_plan(Path(out), counts | dict(steps=steps, first_seed=first_seed))
        jobs, seed, began = [], first_seed, time.time()
        for split, count in counts.items():
            for index, seeds, _ in missing(out, split, seed, count):
                jobs.append((out, split, index, seeds, steps))
            seed += count
        with workers(processes) as pool:
            made = pool.imap_unordered(make_shard, jobs)
            title = f"playing NetHack, {PER_SHARD} games each"
            games = sum(tqdm(made, total=len(jobs), desc=title))
        if games:
            print(f"{games} games, {(time.time() - began) / games:.2f} seconds each")
        write_meta(
            out,
            obs_dim=len(play(first_seed, 1).obs[0]),
            dtype="float16",
            steps_per_second=None,
            source="NetHack (nle), scripted player",
            licence="NetHack General Public License",
            splits=list(counts),
        )


def main():
    configure(globals())
    check_range(globals(), 10, "episodes")
    check_range(globals(), 1, "steps")
    check_range(globals(), 0, "first_seed")
    check_range(globals(), 0, "processes", most=1000)
    held_out = episodes // 10
    make(out, episodes - 2 * held_out, held_out, held_out, steps, first_seed, processes)


if __name__ == "__main__":
    run(main)

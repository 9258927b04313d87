"""
Games of NetHack, told by the game's own messages.

    pip install -r requirements-extra.txt
    python -m domains.nethack_play --out=data/nethack --episodes=500

A scripted player explores, fights, picks up, eats and reads. Captions are what the game says
("The door opens."), each message one of its own. An observation is what stands in the 7x7 cells
around, who and what stands in the 3x3, the status line, the inventory, and the change of both
since the last step. The line of messages is no part of it.

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
from domains.nethack_game import Game, nethack, table
from domains.nethack_player import Player
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

NEAR, CLOSE = 3, 1  # cells on each side whose landscape, whose inhabitants are seen
WIDTH = 24  # random numbers that stand for a species or a thing
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
STATUS = [*range(9, 23), 24]  # of blstats: score, health, depth, gold, .., hunger, load, level
CONDITIONS = 13  # bits of blstats: stoned, .., blind, deaf, stunned, confused, ..


def kind(glyph):
    """0: no landscape; 1: a rare piece of it; others as in KINDS."""
    symbol = glyphs.SYMBOL[glyph]
    kinds = [n for n, symbols in enumerate(KINDS, 2) if symbol in symbols]
    return kinds[0] if kinds else int(symbol >= 0)


def species(glyph):
    """The glyph of a wild one of its kind for a pet, or else the glyph."""
    if nethack.glyph_is_pet(glyph):
        return nethack.glyph_to_mon(glyph) + nethack.GLYPH_MON_OFF
    return glyph


def object_class(glyph):
    if not nethack.glyph_is_object(glyph):
        return 0
    code = nethack.objclass(nethack.glyph_to_obj(glyph)).oc_class
    return ord(code) if isinstance(code, str) else int(code)


KIND, CLASS = table(kind), table(object_class)
VECTOR = np.random.default_rng(12345).normal(size=(nethack.MAX_GLYPH, WIDTH))[table(species)]


def view(seen):
    """Landscape and who is there, of the cells around: (7 * 7 * 14 + 3 * 3 * 48,)."""
    y, x = np.array(seen["blstats"][[1, 0]])
    size = 2 * NEAR + 1
    around = np.pad(seen["glyphs"], NEAR, constant_values=nethack.GLYPH_CMAP_OFF)
    around = around[y : y + size, x : x + size]
    landscape = np.eye(len(KINDS) + 2)[KIND[around]][..., 1:]
    monsters, pets, things = (each[around] for each in (glyphs.MONSTER, glyphs.PET, glyphs.THING))
    close = np.s_[NEAR - CLOSE : NEAR + CLOSE + 1, NEAR - CLOSE : NEAR + CLOSE + 1]
    vector = VECTOR[around[close]]
    who = vector * (monsters | pets)[close][..., None]
    what = vector * things[close][..., None]
    near = np.concatenate([landscape, np.stack([monsters, pets, things], -1)], -1)
    return np.concatenate([near.ravel(), who.ravel(), what.ravel()])


def state(seen):
    """Status line, and the inventory: (15 + 13 + 18 + 24,)."""
    status = seen["blstats"]
    conditions = (status[25] >> np.arange(CONDITIONS)) & 1
    held = seen["inv_glyphs"][seen["inv_glyphs"] < nethack.MAX_GLYPH]
    classes = np.bincount(CLASS[held], minlength=18)
    return np.concatenate([status[STATUS], conditions, classes, VECTOR[held].sum(0)])


def observe(seen, before):
    """The observation (D,) float16. before: what was seen a step ago."""
    change = state(seen) - state(before)
    moved = np.clip(seen["blstats"][:2] - before["blstats"][:2], -3, 3)
    observation = np.concatenate([view(seen), state(seen), change, moved])
    return np.clip(observation, -1e4, 1e4).astype(np.float16)


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
            obs.append(observe(game.seen, before))
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

"""
Episodes of Crafter, a small Minecraft-like world (Hafner 2021, arXiv 2109.06780).

    python -m domains.crafter_play --out=data/crafter --episodes=600
    python -m domains.crafter_play --out=data/crafter-details --details=counts

A player with changing goals walks, gathers, crafts, eats, drinks, sleeps and fights. Captions come
from the game's own achievement counters ("collect wood"), with details where the player faces and
what it has. An observation is the local 9x7 view one-hot (materials, objects), facing, sleeping,
the inventory, and its change since the last step.

Every episode has a world of its own, made from a seed of its own: the same seed gives the same
bytes on any number of processes, and train, val and test never share a world. A shard that is
there is kept, so an interrupted run goes on.
"""

from configurator import check_range, configure, run
from pathlib import Path

import numpy as np
from tqdm import tqdm

from domains.crafter_details import DETAILS, situation, tell
from domains.crafter_player import MOVES, Player, World, constants, objects
from runtime.dataset import Caption, Episode, write_shard, write_text
from runtime.files import alone, check_empty, read_json, write_json
from runtime.program import workers
from runtime.shards import shard_path, write_meta

out = "data/crafter"  # folder to write
episodes = 600  # of them a twelfth for val, and a twelfth for test
steps = 200  # of an episode
area = 36  # side of the world, in cells
details = ""  # or where: "collect wood north"; or counts: "collect wood north, 3 now"
text = 250  # more episodes, of which only the captions are kept
first_seed = 0  # seed of the first world
processes = 0  # 0: all cores

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
ONE_HOT = np.eye(len(constants.materials) + 1, dtype=np.uint8)  # 0: outside the world
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
    world, center = env._world, env._player.pos
    creatures = around(world._obj_map, center)
    cells = np.zeros((*VIEW, len(CREATURES)), np.uint8)
    for x, y in zip(*creatures.nonzero(), strict=True):
        cells[x, y, CREATURES.index(type(world._objects[creatures[x, y]]))] = 1
    return np.concatenate([ONE_HOT[around(world._mat_map, center)], cells], 2)


def around(cells, center):
    """The part of a map of the world (w, h) that is in view; 0 outside the world: (9, 7)."""
    x, y = (center - VIEW // 2).tolist()
    left, top = max(-x, 0), max(-y, 0)
    inside = cells[x + left : x + VIEW[0], y + top : y + VIEW[1]]
    seen = np.zeros(VIEW, cells.dtype)
    seen[left : left + inside.shape[0], top : top + inside.shape[1]] = inside
    return seen


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


def play(seed, steps, area, pictures=False, begin=0, taste=2.0, details=""):
    """An episode of a world from `seed`: at most `steps` steps, fewer if the player dies.

    It begins after `begin` + up to HEAD_START steps. A caption tells details of its first step.
    """
    env = World(area=(area, area), seed=seed, length=0)
    env.reset()
    rng = np.random.default_rng(seed)
    player = Player(env, rng, taste)
    play_unseen(env, player, begin + rng.integers(HEAD_START))
    obs, frames, events, situations = [], [], [], []
    for step in range(steps):
        inventory, counts = dict(env._player.inventory), dict(env._player.achievements)
        dead = env.act(player.act())
        obs.append(observe(env, inventory))
        situations.append(situation(env._player))
        if pictures:
            frames.append(env.render())
        now = env._player.achievements
        events += [(step, name) for name, count in now.items() if count > counts[name]]
        if dead:
            break
    captions = [
        Caption(start, end, tell(text, situations[start], details))
        for start, end, text in events_to_captions(events)
    ]
    frames = np.stack(frames) if pictures else None
    return Episode(f"world-{seed}", np.stack(obs), captions, "all", frames)


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
    return len(played)


def tell_of(job):
    """The captions of some worlds, a list a world."""
    seeds, options = job
    return [play(seed, **options).captions for seed in seeds]


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
    details="",
    text=0,
):
    """Makes what is missing of a data set. Worlds are first_seed .. in the order train, val, test,
    text.

    Raises ValueError where the folder was made with other settings.
    """
    counts = dict(train=train, val=val, test=test)
    options = dict(steps=steps, area=area, begin=begin, taste=taste)
    options |= dict(details=details) if details else {}  # a plan made without is still the same
    planned = counts | options | dict(first_seed=first_seed) | (dict(text=text) if text else {})
    with alone(out, wait=True):  # for whoever is making the same
        write_plan(Path(out), planned)
        make_missing(out, counts, first_seed, text, options, processes)
        write_meta(
            out,
            obs_dim=len(play(first_seed, 1, area).obs[0]),
            dtype="uint8",
            steps_per_second=None,
            source="crafter, scripted player",
            licence="Crafter is MIT licensed (c) Danijar Hafner",
            splits=list(counts),
        )


def make_missing(out, counts, seed, text, options, processes):
    """The shards that are not there, and the text."""
    jobs, told = [], []
    for split, count in counts.items():
        jobs += [(out, split, *shard, options) for shard in missing(out, split, seed, count)]
        seed += count
    worlds = range(seed, seed + text)
    some = [(worlds[n : n + PER_SHARD], options) for n in range(0, text, PER_SHARD)]
    total = sum(len(seeds) for _, _, _, seeds, *_ in jobs) + text
    title = f"making {total} episodes of Crafter in {out}, once"
    with (
        workers(processes) as pool,
        tqdm(desc=title, total=total) as bar,
    ):
        for made in pool.imap_unordered(make_shard, jobs):
            bar.update(made)
        for captions in pool.imap(tell_of, some):
            told += captions
            bar.update(len(captions))
    write_text(out, told)


def missing(out, split, seed, count):
    """(index, seeds, how many with pictures) of the shards that are not there."""
    for index, first in enumerate(range(0, count, PER_SHARD)):
        if not shard_path(out, split, index).exists():
            seeds = range(seed + first, seed + min(first + PER_SHARD, count))
            yield index, seeds, 2 if split != "train" and index < 2 else 0


def write_plan(folder, settings):
    plan = folder / "plan.json"
    if not plan.exists():
        check_empty(folder)  # or another's data set would be taken for a part of this one
    if plan.exists() and (before := read_json(plan)) != settings:
        choice = "remove it, or choose another --out"
        raise ValueError(f"{folder} was made with {before}, not {settings}: {choice}")
    write_json(settings, plan)


def main():
    configure(globals())
    check_range(globals(), 12, "episodes")
    check_range(globals(), 1, "steps")
    check_range(globals(), 0, "text", most=10**6)
    check_range(globals(), 9, "area", most=1000)
    check_range(globals(), 0, "processes", most=1000)
    if details not in DETAILS:
        raise ValueError(f"--details={details}: where, counts, or nothing")
    held_out = episodes // 12
    train = episodes - 2 * held_out
    make(
        out,
        train,
        held_out,
        held_out,
        steps,
        area,
        first_seed,
        processes,
        details=details,
        text=text,
    )


if __name__ == "__main__":
    run(main)

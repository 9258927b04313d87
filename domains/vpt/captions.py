"""
Captions from the counters of a contractor's recording: "mine three oak logs", "kill a cow".

    captions = annotate(lines, kinds=KINDS, lag=5.0)           # of recordings.read_lines; in lines
    captions = to_steps(captions, stride=4, steps=len(obs))    # in steps of the data set

`stats` counts since the world began, so a rise from one line to the next is an event, and the first
map is where counting starts. Names are OpenAI's (minecraft.mine_block:minecraft.oak_log).
"""

import re
from typing import NamedTuple

from domains.vpt.english import TOOL, phrase, rename, screen_name
from domains.vpt.recordings import FPS
from runtime.dataset import Caption

# kinds of captions, in the order in which those of one line are written
KINDS = "craft mine kill open place use eat pickup drop wear other".split()
MORE_KINDS = ["jump", "damage"]
# counters that rise with time or distance
CLOCK = r".*_one_cm|play_one_minute|.*_time|time_since_.*"
NEAR = 2 * FPS  # lines after a block broke in which a pickup is taken to be what it left
# "block item": what a mined block leaves, where that has another name
DROPS = (
    r"stone cobblestone|(grass_block|grass_path|farmland|podzol|mycelium) dirt"
    r"|(crimson|warped)_nylium netherrack|gravel flint|clay clay_ball|snow(_block)? snowball"
    r"|(?P<gem>coal|diamond|emerald|redstone)_ore (?P=gem)|lapis_ore lapis_lazuli"
    r"|nether_quartz_ore quartz|(nether_gold_ore|gilded_blackstone) gold_nugget"
    r"|glowstone glowstone_dust"
    r"|sea_lantern prismarine_(crystals|shard)|ender_chest obsidian|dead_bush stick"
    r"|(?P<wood>\w+)_leaves ((?P=wood)_sapling|stick|apple)"
    r"|((tall_)?grass|(large_)?fern|wheat) wheat_seeds|tall_seagrass seagrass"
    r"|(attached_)?(?P<crop>melon|pumpkin)_stem (?P=crop)_seeds|melon melon_slice"
    r"|carrots carrot|potatoes (poisonous_)?potato|beetroots beetroot(_seeds)?|cocoa cocoa_beans"
    r"|sweet_berry_bush sweet_berries|chorus_plant chorus_fruit|bamboo_sapling bamboo"
    r"|(?P<mushroom>\w+_mushroom)_block (?P=mushroom)|(cobweb|tripwire) string|bookshelf book"
    r"|campfire charcoal|soul_campfire soul_soil|potted_(?P<pot>\w+) (flower_pot|(?P=pot))"
)


class Event(NamedTuple):
    line: int
    type: str  # mine_block, craft_item, use_item, pickup, drop, break_item, kill_entity, custom, ..
    name: str
    count: int


def events(lines):
    """What the counters show, without clocks and distances.

    A map that falls is of another world, where counting starts anew.
    """
    rises, before = [], None
    for i, line in enumerate(lines):
        if not line or not line.stats:
            continue
        rise = {} if before is None else rise_of(line.stats, before)
        if any(count < 0 for count in rise.values()):
            rise, before = {}, {}
        rises += [Event(i, *type_and_name(key), count) for key, count in rise.items() if count > 0]
        before = (before or {}) | line.stats
    return [event for event in rises if event.name and not is_clock(event)]


def rise_of(stats, before):
    return {key: count - before.get(key, 0) for key, count in stats.items()}


def type_and_name(key):
    """minecraft.mine_block:minecraft.oak_log -> mine_block, oak_log."""
    kind, _, name = key.partition(":")
    return kind.split(".")[-1], re.split(r"[.:]", name)[-1]


def is_clock(event):
    return event.type == "custom" and re.fullmatch(CLOCK, event.name)


def screens(lines, rises):
    """[start, stop, name] of every open screen.

    The name is "inventory", what a counter says within -2 .. +3 lines of its opening, or None: a
    menu, or chat.
    """
    spans, was_open = [], False
    for i, line in enumerate(lines):
        is_open = line.gui if line else was_open  # a broken line: as before
        if is_open and not was_open:
            spans.append([i, len(lines), "inventory" if line.inventory else None])
        if was_open and not is_open:
            spans[-1][1] = i
        was_open = is_open
    for event in filter(screen_name, rises):
        for span in spans:
            if span[2] is None and -2 <= event.line - span[0] <= 3:
                span[2] = screen_name(event)
    return spans


def annotate(lines, kinds=KINDS, lag=5.0):
    """Captions in lines, in the order in which they are to be written.

    kinds: of KINDS and MORE_KINDS. The same event again within `lag` seconds of its first becomes
    one caption, placed at the last. It starts at the line that shows the event, and ends at the
    next line or, for a screen, where that closes.
    """
    rises = events(lines)
    named = [screen for screen in screens(lines, rises) if screen[2]]
    rises = [event for event in rises if not is_echo(event, rises) and not opens(event, named)]
    phrases = [(start, end, "open", f"open the {rename(name)}") for start, end, name in named]
    for event in merge(rises, lag * FPS):
        phrases.append((event.line, event.line + 1, *phrase(event)))
    order = {kind: i for i, kind in enumerate([*KINDS, *MORE_KINDS])}
    phrases = [(start, end, kind, text) for start, end, kind, text in phrases if kind in kinds]
    phrases.sort(key=lambda caption: (caption[0], order[caption[2]]))
    return [Caption(start, end, text) for start, end, _, text in phrases]


def opens(event, named):
    """Whether an event is the counter of a screen that is a caption already."""
    near = [name for start, _, name in named if -2 <= event.line - start <= 3]
    return screen_name(event) in near


def is_echo(event, rises):
    """Whether an event only repeats that a block was mined: the tool used, what the block left."""
    mined = [(event.line - other.line, other.name) for other in rises if other.type == "mine_block"]
    if event.type == "use_item" and re.fullmatch(TOOL, event.name):
        return any(-2 <= distance <= 2 for distance, _ in mined)
    if event.type == "pickup":
        return any(0 <= distance <= NEAR and leaves(block, event.name) for distance, block in mined)
    return False


def leaves(block, item):
    """Whether a mined block may leave this item."""
    return rename(block) == rename(item) or bool(re.fullmatch(DROPS, f"{block} {item}"))


def merge(rises, lag):
    """Events of one type and name within `lag` lines of the first -> one at the last's line."""
    groups, latest = [], {}
    for event in rises:
        key = event.type, event.name
        if key not in latest or event.line - latest[key][0].line > lag:
            latest[key] = []
            groups.append(latest[key])
        latest[key].append(event)
    return [group[-1]._replace(count=sum(event.count for event in group)) for group in groups]


def to_steps(captions, stride, steps):
    """Lines -> steps: a caption starts at the first step whose frame is not before its line.

    A caption after the last step starts there.
    """
    in_steps = []
    for start, end, text in captions:
        first = min(-(-start // stride), steps - 1)
        last = min(-(-end // stride), steps)
        in_steps.append(Caption(first, max(last, first + 1), text))
    return in_steps

"""
Captions from the counters of a contractor's recording: "mine three oak logs", "open the crafting table", "kill a cow".

    captions = annotate(lines, kinds=KINDS, lag=5)             # lines as vpt_recordings reads them; times in lines
    captions = to_steps(captions, stride=4, steps=len(obs))    # times in steps of the data set

`stats` counts since the world began, so a rise from one line to the next is an event; the first map is where counting starts. Names are
OpenAI's (minecraft.mine_block:minecraft.oak_log). They become English by the tables here: a verb, an article or number, a noun.
"""
import re
from typing import NamedTuple

KINDS = ("craft", "mine", "kill", "open", "place", "use", "eat", "pickup", "drop", "wear", "other")     # and, if wanted: jump, damage
MORE_KINDS = ("jump", "damage")
FPS = 20
NEAR = 2 * FPS                            # lines after a block broke in which a pickup is taken to be what it left
CLOCK = r".*_one_cm|play_one_minute|.*_time|time_since_.*"    # counters that rise with time or distance


class Event(NamedTuple):
    line: int
    type: str                             # mine_block, craft_item, use_item, pickup, drop, break_item, kill_entity, custom, ..
    name: str
    count: int


def events(lines):
    """Rises of the counters, clocks and distances left out. A map that falls is another world, where counting starts anew."""
    found, before = [], None
    for i, line in enumerate(lines):
        if not line or not line.stats: continue
        rise = {key: n - before.get(key, 0) for key, n in line.stats.items()} if before is not None else {}
        if any(n < 0 for n in rise.values()): rise, before = {}, {}
        found += [Event(i, *type_and_name(key), n) for key, n in rise.items() if n > 0]
        before = (before or {}) | line.stats
    return [event for event in found if event.name and not (event.type == "custom" and re.fullmatch(CLOCK, event.name))]


def type_and_name(key):
    """minecraft.mine_block:minecraft.oak_log -> mine_block, oak_log."""
    kind, _, name = key.partition(":")
    return kind.split(".")[-1], re.split(r"[.:]", name)[-1]


def screens(lines, found):
    """[start, stop, name] of every open screen: "inventory", what a counter near its opening says was opened, or None (a menu, chat)."""
    spans, was = [], False
    for i, line in enumerate(lines):
        is_open = line.gui if line else was                   # a broken line: as before
        if is_open and not was: spans.append([i, len(lines), "inventory" if line.inventory else None])
        if was and not is_open: spans[-1][1] = i
        was = is_open
    for event in found:
        for span in spans:
            if opened(event) and span[2] is None and -2 <= event.line - span[0] <= 3: span[2] = opened(event)
    return spans


def opened(event):
    """What an event of type custom opened: interact_with_crafting_table -> crafting_table; None if nothing."""
    match = re.fullmatch(r"(?:interact_with|open|inspect|trigger)_(?!campfire)(\w+)", event.name)
    return match[1] if match and event.type == "custom" else None


def annotate(lines, kinds=KINDS, lag=5.0):
    """Captions (start, end, text) in lines, in the order they are to be written.

    kinds: of KINDS and MORE_KINDS. The same event again within `lag` seconds of its first becomes one caption, placed at the last:
    its start is the line that shows the event, its end the next line or, for a screen, the line at which it closes.
    """
    found = events(lines)
    spans = screens(lines, found)
    written = [(start, end, "open", f"open the {rename(name)}") for start, end, name in spans if name]
    known = {(name, line) for start, _, name in spans for line in range(start - 2, start + 4)}
    mined = {event.line for event in found if event.type == "mine_block"}
    found = [event for event in found if (opened(event), event.line) not in known and not echo(event, mined)]
    for event in merge(found, lag * FPS):
        kind, text = phrase(event)
        if kind: written.append((event.line, event.line + 1, kind, text))
    order = [*KINDS, *MORE_KINDS].index
    return [(start, end, text) for start, end, kind, text in sorted(written, key=lambda w: (w[0], order(w[2]))) if kind in kinds]


def echo(event, mined):
    """Whether an event only repeats that a block was mined (at one of the lines `mined`): the tool used, the pickup of what it left."""
    tool = event.type == "use_item" and re.fullmatch(TOOL, event.name)
    near = range(event.line - 2, event.line + 3) if tool else range(event.line - NEAR, event.line + 1) if event.type == "pickup" else ()
    return any(line in mined for line in near)


def merge(found, lag):
    """Events of one type and name within `lag` lines of the first -> one, at the last one's line, the counts added."""
    groups, current = [], {}
    for event in found:
        group = current.get(event[1:3])
        if group and event.line - group[0].line <= lag: group.append(event)
        else:
            current[event[1:3]] = [event]
            groups.append(current[event[1:3]])
    return [group[-1]._replace(count=sum(event.count for event in group)) for group in groups]


def to_steps(captions, stride, steps):
    """Lines -> steps: the first step whose frame is not before the caption's line; the last step if the recording ends before."""
    starts = [min(-(-start // stride), steps - 1) for start, _, _ in captions]
    return [(start, max(min(-(-end // stride), steps), start + 1), text) for start, (_, end, text) in zip(starts, captions, strict=True)]


# ---- words ----

TOOL = r".*_(axe|pickaxe|shovel|hoe|sword)|shears"
USED = TOOL + r"|.*_(map|dye|book|helmet|chestplate|leggings|boots|horse_armor|rocket|charge|on_a_stick|meal)|(cross)?bow|shield|trident|" \
              r"flint_and_steel|book|compass|clock|lead|map|name_tag|saddle|elytra|totem_of_undying|fishing_rod|carrot|potato|sweet_berries"
FOOD = r"cooked_.*|.*apple|baked_potato|poisonous_potato|beef|beetroot|bread|chicken|chorus_fruit|cod|cookie|dried_kelp|golden_carrot|" \
       r"melon_slice|.*_stew|.*_soup|mutton|porkchop|pufferfish|pumpkin_pie|rabbit|rotten_flesh|salmon|spider_eye|tropical_fish"
SOIL = r"(coarse_)?dirt|grass_(block|path)|farmland|podzol|mycelium|(red_)?sand|gravel|clay|soul_(sand|soil)|snow(_block)?"
CROP = r"wheat|carrots|potatoes|beetroots|melon|pumpkin|sugar_cane|cocoa|nether_wart|kelp(_plant)?|bamboo|cactus|sweet_berry_bush"
FLOWER = r"allium|azure_bluet|blue_orchid|cornflower|dandelion|lilac|lily_of_the_valley|oxeye_daisy|peony|poppy|rose_bush|sunflower|" \
         r".*_tulip|wither_rose|(red|brown)_mushroom"
ROCK = r"(.*_)?(ore|(?!grind)\w*stone|log|wood|hyphae|planks|bricks|andesite|diorite|granite|netherrack|basalt|obsidian|debris|ice|" \
       r"concrete|powder|terracotta|prismarine|nylium|pillar|quartz_ore)|(stripped_)?(crimson|warped)_stem|" \
       r"(.*quartz|diamond|iron|gold|emerald|coal|lapis|redstone|bone|netherite|magma|purpur)_block"
THROWN = r"snowball|egg|ender_(pearl|eye)|(splash|lingering)_potion|experience_bottle"
FURNACE = r"cooked_.*|baked_potato|dried_kelp|stone|smooth_.*|cracked_.*|glass|(char)?coal|(nether_)?brick|.*terracotta|" \
          r".*_(ingot|scrap)|diamond|emerald|lapis_lazuli|redstone|quartz"
VERBS = {                                 # type: (kind of caption, verb, names it is for); the first that matches
    "craft_item": [("craft", "make", FURNACE), ("craft", "craft", r".*")],
    "mine_block": [("mine", "put out", r"(soul_)?fire"), ("mine", "dig up", SOIL), ("mine", "harvest", CROP), ("mine", "pick", FLOWER),
                   ("mine", "mine", ROCK), ("mine", "break", r".*")],
    "use_item": [("eat", "eat", FOOD), ("eat", "drink", r"potion|milk_bucket|honey_bottle"), ("use", "fill", r"bucket|glass_bottle"),
                 ("use", "empty", r".*_bucket"), ("use", "throw", THROWN),
                 ("use", "use", USED), ("place", "plant", r".*_(seeds|sapling|beans)|nether_wart"), ("place", "place", r".*")],
    "pickup": [("pickup", "pick up", r".*")],
    "drop": [("drop", "drop", r".*")],
    "break_item": [("wear", "wear out", r".*")],
    "kill_entity": [("kill", "kill", r".*")],
    "entity_killed_by": [("other", "get killed by", r".*")],
}
CUSTOM = {                                # counters that no other type repeats; screens are in opened()
    "jump": ("jump", "jump"), "damage_dealt": ("damage", "deal damage"), "damage_taken": ("damage", "take damage"),
    "damage_absorbed": ("damage", "absorb damage"), "damage_resisted": ("damage", "resist damage"),
    "damage_blocked_by_shield": ("damage", "block damage with a shield"), "eat_cake_slice": ("eat", "eat a slice of cake"),
} | {name: ("other", text) for name, text in {
    "animals_bred": "breed animals", "bell_ring": "ring a bell", "deaths": "die", "enchant_item": "enchant an item",
    "fill_cauldron": "fill a cauldron", "fish_caught": "catch a fish", "interact_with_campfire": "use a campfire",
    "play_noteblock": "play a note block", "pot_flower": "pot a flower", "raid_trigger": "trigger a raid", "raid_win": "win a raid",
    "sleep_in_bed": "sleep in a bed", "talked_to_villager": "talk to a villager", "target_hit": "hit a target",
    "traded_with_villager": "trade with a villager", "tune_noteblock": "tune a note block", "use_cauldron": "use a cauldron"}.items()}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NAMES = {"tnt": "TNT", "enderchest": "ender chest", "brewingstand": "brewing stand", "ender_eye": "eye of ender", "filled_map": "map",
         "experience_bottle": "bottle of enchanting", "jack_o_lantern": "jack o'lantern", "redstone_wire": "redstone", "kelp_plant": "kelp",
         "twisting_vines_plant": "twisting vines", "weeping_vines_plant": "weeping vines", "milk_bucket": "bucket of milk"}
PLURAL_ONLY = r"planks|bricks|stairs|leaves|roots|sprouts|vines|carrots|potatoes|beetroots|beans|seeds|berries|crystals|bars"
UNCOUNTED = [                             # the unit in which what has no plural is counted: last words
    ("pairs", r"shears|boots|leggings"),
    ("bowls", r"stew|soup"),
    ("blocks", r"(cobble|black|glow|sand)?stone|dirt|sand|gravel|clay|andesite|diorite|granite|netherrack|basalt|obsidian|prismarine|"
               r"terracotta|concrete|concrete powder|glass|wool|snow|ice|wood|soil|nylium|mycelium|podzol|farmland|debris|ore|TNT"),
    ("piles", r"redstone|gunpowder|sugar|dust|meal|powder|dye"),
    ("pieces", r"grass|seagrass|kelp|bamboo|wheat|coal|charcoal|leather|string|paper|flint|beef|chicken|mutton|bread|rabbit|flesh|hide|"
               r"quartz|lazuli|cocoa|wart|armor|steel|cane|cod|salmon|pufferfish|tropical fish|scrap|scaffolding|coral|porkchop"),
]
IRREGULAR = {"foot": "feet", "wolf": "wolves", "bookshelf": "bookshelves", "cactus": "cacti", "fungus": "fungi", "enderman": "endermen",
             "potato": "potatoes"} | {word: word for word in "elytra sheep squid drowned cod salmon pufferfish fish silverfish".split()}


def phrase(event):
    """Event -> (kind, text), or (None, "") for what is no caption of its own, e.g. drop counted a second time, or is not known."""
    kind, text = CUSTOM.get(event.name, (None, "")) if event.type == "custom" else (None, "")
    if opened(event): kind, text = "open", f"open the {rename(opened(event))}"
    if kind: return kind, text if kind == "damage" else text + times(event.count)
    for kind, verb, names in VERBS.get(event.type, []):
        if not re.fullmatch(names, event.name): continue
        if verb in ("use", "fill", "empty"): return kind, f"{verb} {noun(event.name, 1)}{times(event.count)}"   # one tool, many times
        return kind, f"{verb} {noun(event.name, event.count, creature='entity' in event.type)}"
    return None, ""


def times(count):
    return "" if count == 1 else " twice" if count == 2 else f" {number(count)} times"


def number(count):
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def rename(name):
    """An id in plain words: oak_wall_sign -> oak sign, music_disc_far -> music disc."""
    name = re.sub(r"(^|_)wall_(?=torch|sign|banner|head|fan|skull)", r"\1", NAMES.get(name, name))
    return re.sub(r"music_disc.*", "music disc", name).replace("_", " ").strip()


def noun(name, count, creature=False):
    """oak_log, 1 -> an oak log; oak_log, 3 -> three oak logs; stone, 1 -> stone; stone, 3 -> three blocks of stone."""
    name = rename(name)
    unit = next((unit for unit, words in UNCOUNTED if not creature and re.fullmatch(f"(.* )?({words})", name)), None)
    fixed = unit or re.fullmatch(f"(.* )?({PLURAL_ONLY})", name)
    if count == 1: return name if fixed else f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"
    return f"{number(count)} {f'{unit} of {name}' if unit else name if fixed else plural(name)}"


def plural(name):
    """creeper -> creepers, lily of the valley -> lilies of the valley."""
    head, link, rest = re.match(r"(.*?)( of | on |$)(.*)", name).groups()
    *before, last = head.split(" ")
    if last in IRREGULAR: last = IRREGULAR[last]
    elif re.search(r"(s|x|ch|sh)$", last): last += "es"
    else: last = re.sub(r"(?<=[^aeiou])y$", "ie", last) + "s"
    return " ".join([*before, last]) + link + rest

"""
Names of Minecraft in English: mine_block, oak_log, 3 -> "mine three oak logs".

An event becomes a verb, an article or a number, and a noun, by the tables here.
"""

import re

TOOL = r".*_(axe|pickaxe|shovel|hoe|sword)|shears"
# used, not placed
USED = (
    TOOL + r"|.*_(map|dye|book|helmet|chestplate|leggings|boots|horse_armor|rocket|charge|meal)"
    r"|.*_on_a_stick|(cross)?bow|shield|trident|flint_and_steel|book|compass|clock|lead|map"
    r"|name_tag|saddle|elytra|totem_of_undying|fishing_rod|carrot|potato|sweet_berries"
)
FOOD = (
    r"cooked_.*|.*apple|baked_potato|poisonous_potato|beef|beetroot|bread|chicken|chorus_fruit|cod"
    r"|cookie|dried_kelp|golden_carrot|melon_slice|.*_stew|.*_soup|mutton|porkchop|pufferfish"
    r"|pumpkin_pie|rabbit|rotten_flesh|salmon|spider_eye|tropical_fish"
)
SOIL = (
    r"(coarse_)?dirt|grass_(block|path)|farmland|podzol|mycelium|(red_)?sand|gravel|clay"
    r"|soul_(sand|soil)|snow(_block)?"
)
CROP = (
    r"wheat|carrots|potatoes|beetroots|melon|pumpkin|sugar_cane|cocoa|nether_wart|kelp(_plant)?"
    r"|bamboo|cactus|sweet_berry_bush"
)
FLOWER = (
    r"allium|azure_bluet|blue_orchid|cornflower|dandelion|lilac|lily_of_the_valley|oxeye_daisy"
    r"|peony|poppy|rose_bush|sunflower|.*_tulip|wither_rose|(red|brown)_mushroom"
)
ROCK = (
    r"(.*_)?(ore|(?!grind)\w*stone|log|wood|hyphae|planks|bricks|andesite|diorite|granite"
    r"|netherrack|basalt|obsidian|debris|ice|concrete|powder|terracotta|prismarine|nylium|pillar"
    r"|quartz_ore)|(stripped_)?(crimson|warped)_stem|(.*quartz|diamond|iron|gold|emerald|coal|lapis"
    r"|redstone|bone|netherite|magma|purpur)_block"
)
THROWN = r"snowball|egg|ender_(pearl|eye)|(splash|lingering)_potion|experience_bottle"
FURNACE = (
    r"cooked_.*|baked_potato|dried_kelp|stone|smooth_.*|cracked_.*|glass|(char)?coal"
    r"|(nether_)?brick|.*terracotta|.*_(ingot|scrap)|diamond|emerald|lapis_lazuli|redstone|quartz"
)
# type of an event: kind of caption, verb, the names it is for; the first that matches
VERBS = {
    "craft_item": [("craft", "make", FURNACE), ("craft", "craft", r".*")],
    "mine_block": [
        ("mine", "put out", r"(soul_)?fire"),
        ("mine", "dig up", SOIL),
        ("mine", "harvest", CROP),
        ("mine", "pick", FLOWER),
        ("mine", "mine", ROCK),
        ("mine", "break", r".*"),
    ],
    "use_item": [
        ("eat", "eat", FOOD),
        ("eat", "drink", r"potion|milk_bucket|honey_bottle"),
        ("use", "fill", r"bucket|glass_bottle"),
        ("use", "empty", r".*_bucket"),
        ("use", "throw", THROWN),
        ("use", "use", USED),
        ("place", "plant", r".*_(seeds|sapling|beans)|nether_wart"),
        ("place", "place", r".*"),
    ],
    "pickup": [("pickup", "pick up", r".*")],
    "drop": [("drop", "drop", r".*")],
    "break_item": [("wear", "wear out", r".*")],
    "kill_entity": [("kill", "kill", r".*")],
    "entity_killed_by": [("other", "get killed by", r".*")],
}
# counters of type custom that no other type repeats, and that open no screen
CUSTOM = {
    "jump": ("jump", "jump"),
    "damage_dealt": ("damage", "deal damage"),
    "damage_taken": ("damage", "take damage"),
    "damage_absorbed": ("damage", "absorb damage"),
    "damage_resisted": ("damage", "resist damage"),
    "damage_blocked_by_shield": ("damage", "block damage with a shield"),
    "eat_cake_slice": ("eat", "eat a slice of cake"),
    "animals_bred": ("other", "breed animals"),
    "bell_ring": ("other", "ring a bell"),
    "deaths": ("other", "die"),
    "enchant_item": ("other", "enchant an item"),
    "fill_cauldron": ("other", "fill a cauldron"),
    "fish_caught": ("other", "catch a fish"),
    "interact_with_campfire": ("other", "use a campfire"),
    "play_noteblock": ("other", "play a note block"),
    "pot_flower": ("other", "pot a flower"),
    "raid_trigger": ("other", "trigger a raid"),
    "raid_win": ("other", "win a raid"),
    "sleep_in_bed": ("other", "sleep in a bed"),
    "talked_to_villager": ("other", "talk to a villager"),
    "target_hit": ("other", "hit a target"),
    "traded_with_villager": ("other", "trade with a villager"),
    "tune_noteblock": ("other", "tune a note block"),
    "use_cauldron": ("other", "use a cauldron"),
}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NAMES = {
    "tnt": "TNT",
    "enderchest": "ender chest",
    "brewingstand": "brewing stand",
    "ender_eye": "eye of ender",
    "filled_map": "map",
    "experience_bottle": "bottle of enchanting",
    "jack_o_lantern": "jack o'lantern",
    "redstone_wire": "redstone",
    "kelp_plant": "kelp",
    "twisting_vines_plant": "twisting vines",
    "weeping_vines_plant": "weeping vines",
    "milk_bucket": "bucket of milk",
}
PLURAL_ONLY = (
    r"planks|bricks|stairs|leaves|roots|sprouts|vines|carrots|potatoes|beetroots|beans|seeds"
    r"|berries|crystals|bars"
)
# what has no plural is counted in a unit: the unit, last words
UNCOUNTED = {
    "pairs": r"shears|boots|leggings",
    "bowls": r"stew|soup",
    "blocks": (
        r"(cobble|black|glow|sand)?stone|dirt|sand|gravel|clay|andesite|diorite|granite|netherrack"
        r"|basalt|obsidian|prismarine|terracotta|concrete|concrete powder|glass|wool|snow|ice|wood"
        r"|soil|nylium|mycelium|podzol|farmland|debris|ore|TNT"
    ),
    "piles": r"redstone|gunpowder|sugar|dust|meal|powder|dye",
    "pieces": (
        r"grass|seagrass|kelp|bamboo|wheat|coal|charcoal|leather|string|paper|flint|beef|chicken"
        r"|mutton|bread|rabbit|flesh|hide|quartz|lazuli|cocoa|wart|armor|steel|cane|cod|salmon"
        r"|pufferfish|tropical fish|scrap|scaffolding|coral|porkchop"
    ),
}
IRREGULAR = {
    "foot": "feet",
    "wolf": "wolves",
    "bookshelf": "bookshelves",
    "cactus": "cacti",
    "fungus": "fungi",
    "enderman": "endermen",
    "potato": "potatoes",
}
UNCHANGED = "elytra sheep squid drowned cod salmon pufferfish fish silverfish".split()


def phrase(event):
    """(kind, text) of an event; (None, "") for what is no caption of its own, or not known."""
    screen = screen_name(event)
    if screen:
        return "open", f"open the {rename(screen)}{times(event.count)}"
    if event.type == "custom":
        kind, text = CUSTOM.get(event.name, (None, ""))
        return kind, text if kind in (None, "damage") else text + times(event.count)
    for kind, verb, names in VERBS.get(event.type, []):
        if re.fullmatch(names, event.name):
            return kind, f"{verb} {what(verb, event)}"
    return None, ""


def screen_name(event):
    """What an event opened: interact_with_crafting_table -> crafting_table. None if nothing."""
    pattern = r"(?:interact_with|open|inspect|trigger)_(?!campfire)(\w+)"
    match = re.fullmatch(pattern, event.name)
    return match[1] if match and event.type == "custom" else None


def what(verb, event):
    if verb in ("use", "fill", "empty"):  # one tool, many times
        return noun(event.name, 1) + times(event.count)
    return noun(event.name, event.count, creature="entity" in event.type)


def times(count):
    if count <= 2:
        return " twice" if count == 2 else ""
    return f" {number(count)} times"


def number(count):
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def rename(name):
    """A name in plain words: oak_wall_sign -> oak sign, music_disc_far -> music disc."""
    name = NAMES.get(name, name)
    name = re.sub(r"(^|_)wall_(?=torch|sign|banner|head|fan|skull)", r"\1", name)
    name = re.sub(r"music_disc.*", "music disc", name)
    return name.replace("_", " ").strip()


def noun(name, count, creature=False):
    """oak_log -> an oak log, three oak logs; stone -> stone, three blocks of stone."""
    name = rename(name)
    unit = None if creature else unit_of(name)
    fixed = unit or ends_in(name, PLURAL_ONLY)
    if count == 1:
        article = "an" if name[:1] in "aeiou" else "a"
        return name if fixed else f"{article} {name}"
    if unit:
        return f"{number(count)} {unit} of {name}"
    return f"{number(count)} {name if fixed else plural(name)}"


def unit_of(name):
    return next((unit for unit, words in UNCOUNTED.items() if ends_in(name, words)), None)


def ends_in(name, words):
    return re.fullmatch(f"(.* )?({words})", name)


def plural(name):
    """creeper -> creepers, lily of the valley -> lilies of the valley."""
    head, link, rest = re.match(r"(.*?)( of | on |$)(.*)", name).groups()
    *before, last = head.split(" ")
    return " ".join([*before, plural_word(last)]) + link + rest


def plural_word(word):
    if word in IRREGULAR or word in UNCHANGED:
        return IRREGULAR.get(word, word)
    if re.search(r"(s|x|ch|sh)$", word):
        return word + "es"
    return re.sub(r"(?<=[^aeiou])y$", "ie", word) + "s"

"""The game's counters become English, each event once, at the line that shows it."""

import json
import re

import pytest
from vpt_made import SAMPLES, SYNTHETIC, synthetic_truth, with_samples

from domains.vpt.captions import (
    KINDS,
    MORE_KINDS,
    Event,
    annotate,
    events,
    phrase,
    screens,
    to_steps,
)
from domains.vpt.recordings import Line, read_lines


def lines(*stats, **at):
    """A Line per map of counters {"mine_block:oak_log": 1}; None is a broken line."""
    return [
        None
        if s is None
        else Line(stats={"minecraft." + key.replace(":", ":minecraft."): n for key, n in s.items()})
        for s in stats
    ]


def say(key, count=1):
    return phrase(Event(0, *key.split(":"), count))[1]


def texts(found, **options):
    return [(start, text) for start, _, text in annotate(found, **options)]


# ---- events ----


def test_what_was_counted_before_the_recording_is_no_event():
    old = {"mine_block:stone": 900, "use_item:torch": 7}
    assert events(lines({}, {}, old, old)) == []
    assert events(lines({}, old, old | {"mine_block:dirt": 2})) == [
        Event(2, "mine_block", "dirt", 2)
    ]


def test_an_event_beside_broken_lines_and_empty_maps_is_counted_once():
    found = lines(
        {"mine_block:dirt": 1},
        None,
        {"mine_block:dirt": 3},
        {},
        {"mine_block:dirt": 3},
        None,
        None,
        {"mine_block:dirt": 4},
    )
    assert events(found) == [Event(2, "mine_block", "dirt", 2), Event(7, "mine_block", "dirt", 1)]


def test_a_counter_that_is_missing_for_a_while_is_no_event_when_it_comes_back():
    both = {"mine_block:dirt": 5, "jump:x": 1}
    assert events(lines(both, {"jump:x": 1}, both)) == []


def test_a_map_that_falls_is_a_new_world_and_starts_counting_anew():
    new = {"mine_block:dirt": 1, "pickup:stone": 8}
    found = lines({"mine_block:dirt": 5, "pickup:dirt": 5}, new, new | {"mine_block:dirt": 2})
    assert events(found) == [Event(2, "mine_block", "dirt", 1)]


def test_clocks_and_distances_are_no_events():
    clocks = [
        f"custom:{name}"
        for name in "play_one_minute time_since_rest sneak_time walk_one_cm boat_one_cm".split()
    ]
    assert events(lines(dict.fromkeys(clocks, 1), dict.fromkeys(clocks, 2))) == []


def test_keys_of_no_known_form_are_survived():
    odd = [
        "",
        ":",
        "a",
        "minecraft.custom:",
        "mine_block:",
        "x:y:z",
        "mod.thing:mod.block",
        "custom:?!",
        "mine_block:mod.new_block",
    ]
    found = [
        Line(stats={"minecraft.jump:x": 1}),
        Line(stats={"minecraft.jump:x": 1} | dict.fromkeys(odd, 3)),
    ]
    assert texts(found) == [(1, "break three new blocks")]


# ---- screens ----


def test_a_screen_is_named_by_the_inventory_flag_or_the_counter_near_its_opening():
    shut, menu = Line(stats={"a": 1}), Line(gui=True)
    seen = (
        [shut] * 10
        + [Line(gui=True, inventory=True)] * 5
        + [shut] * 5
        + [menu] * 5
        + [shut] * 5
        + [menu]
    )
    seen[22] = Line(gui=True, stats={"a": 1, "minecraft.custom:minecraft.open_chest": 1})
    assert screens(seen, events(seen)) == [[10, 15, "inventory"], [20, 25, "chest"], [30, 31, None]]
    assert annotate(seen) == [(10, 15, "open the inventory"), (20, 25, "open the chest")]


def test_a_counter_of_an_opening_whose_screen_is_not_seen_still_is_a_caption():
    assert texts(lines({"a:b": 1}, {"a:b": 1, "custom:interact_with_crafting_table": 1})) == [
        (1, "open the crafting table")
    ]


def test_a_screen_open_over_a_broken_line_is_one_screen():
    assert screens([Line(), Line(gui=True, inventory=True), None, Line(gui=True), Line()], []) == [
        [1, 4, "inventory"]
    ]


# ---- captions ----


def counted(*at, key="mine_block:oak_log", steps=300):
    return lines(
        {"a:b": 1},
        *(
            {"a:b": 1, key: n} if (n := sum(i <= line for i in at)) else {"a:b": 1}
            for line in range(1, steps)
        ),
    )


def test_repeats_within_the_lag_are_one_caption_at_the_last_of_them():
    assert texts(counted(10, 40, 100)) == [(100, "mine three oak logs")]
    assert texts(counted(10, 40, 100), lag=2) == [
        (40, "mine two oak logs"),
        (100, "mine an oak log"),
    ]
    assert texts(counted(10, 40, 100), lag=0) == [
        (10, "mine an oak log"),
        (40, "mine an oak log"),
        (100, "mine an oak log"),
    ]
    assert texts(counted(10, 111)) == [
        (10, "mine an oak log"),
        (111, "mine an oak log"),
    ]  # never later than the lag
    assert texts(counted(10, 90, 170)) == [(90, "mine two oak logs"), (170, "mine an oak log")]


def test_the_tool_and_the_pickup_that_come_with_mining_are_not_said():
    base = {"a:b": 1, "mine_block:stone": 1}
    found = lines(
        {"a:b": 1},
        base,
        base | {"use_item:iron_pickaxe": 1},
        base | {"use_item:iron_pickaxe": 1, "pickup:cobblestone": 1},
        base | {"use_item:iron_pickaxe": 1, "pickup:cobblestone": 1, "use_item:oak_planks": 1},
    )
    assert texts(found) == [(1, "mine stone"), (4, "place oak planks")]
    assert texts(counted(5, key="pickup:apple")) == [(5, "pick up an apple")]
    assert texts(counted(5, key="use_item:stone_sword")) == [(5, "use a stone sword")]


def test_a_pickup_is_left_out_only_after_a_block_that_leaves_it():
    mined = {"mine_block:stone": 1, "mine_block:oak_leaves": 1}
    items = dict.fromkeys(["pickup:cobblestone", "pickup:apple", "pickup:diamond"], 1)
    late = [mined | items] * 60
    assert texts(lines({"a:b": 1}, mined, mined | items)) == [
        (1, "mine stone"),
        (1, "break oak leaves"),
        (2, "pick up a diamond"),
    ]
    assert len(texts(lines({"a:b": 1}, *[mined] * 41, *late))) == 2 + 3


def test_an_event_beside_the_opening_of_a_menu_is_a_caption():
    cow = {"a": 1, "minecraft.kill_entity:minecraft.cow": 1}
    seen = [Line(stats={"a": 1}), Line(gui=True, stats={"a": 1}), Line(gui=True, stats=cow)]
    assert annotate(seen) == [(2, 3, "kill a cow")]


def test_captions_of_one_line_come_in_the_order_of_their_weight():
    keys = ["drop:stick", "use_item:torch", "pickup:egg", "kill_entity:cow", "craft_item:bowl"]
    found = lines({"a:b": 1}, {"a:b": 1} | dict.fromkeys(keys, 1))
    assert [text for _, text in texts(found)] == [
        "craft a bowl",
        "kill a cow",
        "place a torch",
        "pick up an egg",
        "drop a stick",
    ]


def test_kinds_choose_the_captions():
    keys = ["craft_item:bowl", "custom:jump", "custom:damage_taken", "kill_entity:cow"]
    found = lines({"a:b": 1}, {"a:b": 1} | dict.fromkeys(keys, 25))
    assert [text for _, text in texts(found, kinds=("kill",))] == ["kill 25 cows"]
    assert [text for _, text in texts(found)] == ["craft 25 bowls", "kill 25 cows"]
    assert {text for _, text in texts(found, kinds=MORE_KINDS)} == {"jump 25 times", "take damage"}


def test_a_caption_stands_at_the_first_step_whose_frame_is_not_before_its_line():
    assert to_steps(
        [(0, 1, "a"), (4, 5, "b"), (5, 6, "c"), (8, 17, "d"), (19, 20, "e")], stride=4, steps=5
    ) == [(0, 1, "a"), (1, 2, "b"), (2, 3, "c"), (2, 5, "d"), (4, 5, "e")]


# ---- English ----


@pytest.mark.parametrize(
    "key, one, three",
    [
        ("mine_block:oak_log", "mine an oak log", "mine three oak logs"),
        ("mine_block:stone", "mine stone", "mine three blocks of stone"),
        ("mine_block:iron_ore", "mine iron ore", "mine three blocks of iron ore"),
        ("mine_block:grass_block", "dig up a grass block", "dig up three grass blocks"),
        ("mine_block:grass", "break grass", "break three pieces of grass"),
        ("mine_block:oak_leaves", "break oak leaves", "break three oak leaves"),
        ("mine_block:wall_torch", "break a torch", "break three torches"),
        ("mine_block:oak_wall_sign", "break an oak sign", "break three oak signs"),
        (
            "mine_block:cobblestone_wall",
            "break a cobblestone wall",
            "break three cobblestone walls",
        ),
        (
            "mine_block:lily_of_the_valley",
            "pick a lily of the valley",
            "pick three lilies of the valley",
        ),
        ("mine_block:wheat", "harvest wheat", "harvest three pieces of wheat"),
        ("mine_block:fire", "put out a fire", "put out three fires"),
        ("mine_block:tnt", "break TNT", "break three blocks of TNT"),
        ("mine_block:bookshelf", "break a bookshelf", "break three bookshelves"),
        ("craft_item:wooden_pickaxe", "craft a wooden pickaxe", "craft three wooden pickaxes"),
        ("craft_item:oak_planks", "craft oak planks", "craft three oak planks"),
        ("craft_item:iron_boots", "craft iron boots", "craft three pairs of iron boots"),
        ("craft_item:iron_ingot", "make an iron ingot", "make three iron ingots"),
        ("craft_item:cooked_beef", "make cooked beef", "make three pieces of cooked beef"),
        ("craft_item:crafting_table", "craft a crafting table", "craft three crafting tables"),
        ("craft_item:mushroom_stew", "craft mushroom stew", "craft three bowls of mushroom stew"),
        ("use_item:apple", "eat an apple", "eat three apples"),
        ("use_item:potion", "drink a potion", "drink three potions"),
        ("use_item:bucket", "fill a bucket", "fill a bucket three times"),
        ("use_item:water_bucket", "empty a water bucket", "empty a water bucket three times"),
        ("use_item:stone_axe", "use a stone axe", "use a stone axe three times"),
        ("use_item:ender_eye", "throw an eye of ender", "throw three eyes of ender"),
        ("use_item:oak_sapling", "plant an oak sapling", "plant three oak saplings"),
        ("use_item:cobblestone", "place cobblestone", "place three blocks of cobblestone"),
        ("use_item:oak_boat", "place an oak boat", "place three oak boats"),
        ("use_item:end_rod", "place an end rod", "place three end rods"),
        ("pickup:music_disc_13", "pick up a music disc", "pick up three music discs"),
        ("pickup:rabbit_foot", "pick up a rabbit foot", "pick up three rabbit feet"),
        ("pickup:potato", "pick up a potato", "pick up three potatoes"),
        ("drop:redstone", "drop redstone", "drop three piles of redstone"),
        ("break_item:stone_axe", "wear out a stone axe", "wear out three stone axes"),
        ("kill_entity:cow", "kill a cow", "kill three cows"),
        ("kill_entity:enderman", "kill an enderman", "kill three endermen"),
        ("kill_entity:chicken", "kill a chicken", "kill three chickens"),
        ("kill_entity:sheep", "kill a sheep", "kill three sheep"),
        ("kill_entity:wolf", "kill a wolf", "kill three wolves"),
        ("entity_killed_by:witch", "get killed by a witch", "get killed by three witches"),
        (
            "custom:interact_with_brewingstand",
            "open the brewing stand",
            "open the brewing stand three times",
        ),
        (
            "custom:trigger_trapped_chest",
            "open the trapped chest",
            "open the trapped chest three times",
        ),
        ("custom:interact_with_campfire", "use a campfire", "use a campfire three times"),
        ("custom:raid_trigger", "trigger a raid", "trigger a raid three times"),
        ("custom:damage_dealt", "deal damage", "deal damage"),
        ("custom:mob_kills", "", ""),
        ("custom:walk_one_cm", "", ""),
    ],
)
def test_keys_read_as_english(key, one, three):
    assert (say(key), say(key, 3)) == (one, three)


def test_numbers_are_words_up_to_twelve():
    assert [say("custom:jump", n) for n in (1, 2, 12, 13)] == [
        "jump",
        "jump twice",
        "jump twelve times",
        "jump 13 times",
    ]
    assert say("pickup:stick", 64) == "pick up 64 sticks"


@with_samples
def test_every_key_of_the_known_vocabulary_reads_as_english():
    vocabulary = json.loads((SAMPLES / "samples/openha/event_description.json").read_text())
    silent = {
        "drop",
        "mob_kills",
        "play_one_minute",
        "sneak_time",
        "time_since_death",
        "time_since_rest",
    }
    for key in vocabulary:
        kind, one = phrase(Event(0, *key.split(":"), 1))
        three = say(key, 3)
        if key.startswith("custom:") and (key[7:] in silent or key.endswith("_one_cm")):
            assert one == three == ""
            continue
        assert kind in KINDS + MORE_KINDS
        for text in (one, three):
            assert re.fullmatch(r"[A-Za-z']+( [A-Za-z']+)*", text), (
                key,
                text,
            )  # words and single spaces, no id, no number
            assert not re.search(r"\b(minecraft|a a|an an|\w+sss|\w+ys? of of)\b", text), (
                key,
                text,
            )
            for article, word in re.findall(r"\b(an?) (\w)", text):
                assert (article == "an") == (word in "aeiou"), (key, text)
        assert kind == "damage" or one != three
        assert (
            kind == "damage"
            or re.search(r"\bthree\b", three)
            and not re.search(r"\bthree an? ", three)
        ), (key, three)


# ---- the synthetic recording ----


@with_samples
def test_the_synthetic_recording_gives_exactly_the_events_of_its_truth():
    truth = synthetic_truth()
    read = read_lines(SYNTHETIC / "rec.jsonl")
    found = {str(e.line): [f"minecraft.{e.type}:minecraft.{e.name}", e.count] for e in events(read)}
    first, last = truth["gui_lines"]
    assert found == truth["events"] and len(events(read)) == len(found)
    assert screens(read, events(read)) == [[first, last + 1, "inventory"]]
    assert annotate(read) == [
        (40, 41, "mine an oak log"),
        (80, 101, "open the inventory"),
        (85, 86, "craft four oak planks"),
        (130, 131, "place oak planks"),
        (150, 151, "kill a cow"),
        (160, 161, "open the crafting table"),
        (180, 181, "wear out a stone axe"),
    ]


@with_samples
def test_the_broken_recording_gives_the_events_before_its_end():
    folder = SAMPLES / "samples/synthetic"
    whole, broken = (
        events(read_lines(folder / "rec.jsonl")),
        events(read_lines(folder / "rec-broken.jsonl")),
    )
    assert broken == [event for event in whole if event.line < 149]

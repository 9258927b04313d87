"""Crafter's captions told with where and how many, from the game itself, for crafter_play.py."""

SIDES = {(-1, 0): "west", (1, 0): "east", (0, -1): "north", (0, 1): "south"}
DETAILS = "", "where", "counts"
NOWHERE = "wake", "make"  # what is done in no direction
USED = dict(table="wood", furnace="stone", stone="stone")  # to place a thing


def situation(player):
    """What a caption may tell of: which side the player faces, and what it has."""
    return SIDES[tuple(player.facing)], dict(player.inventory)


def tell(text, situation, details):
    """ "collect wood" -> "collect wood north" (where), "collect wood north, 3 now" (counts)."""
    side, have = situation
    verb, thing = text.split(" ", 1)
    if details and verb not in NOWHERE:
        text = f"{text} {side}"
    counted = count(verb, thing, have) if details == "counts" else ""
    return f"{text}, {counted}" if counted else text


def count(verb, thing, have):
    """What an event leaves the player with, in words; "" where it counts nothing."""
    if verb == "collect":
        return f"{have[thing]} now"
    if verb == "place":
        used = USED.get(thing)
        return f"{have[used]} {used} left" if used else ""
    if verb == "make":
        return f"{have['wood']} wood left"
    name = dict(eat="food", defeat="health", wake="energy")[verb]
    return f"{name} {have[name]}"

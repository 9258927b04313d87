"""What changes in Crafter, in words: what a language model is told of an observation."""

from domains.crafter_play import CREATURES, ITEMS, MERGE, VIEW
from domains.crafter_player import MOVES, constants

PAST = MERGE  # steps whose changes are told as well: within so many an event is not told again


def look_ahead(step):
    """(what stands before the player, facing, asleep) of an observation (D,) uint8."""
    names = ["the end", *constants.materials, *(kind.__name__.lower() for kind in CREATURES)]
    n_cells = VIEW.prod() * len(names)
    facing = list(MOVES)[step[n_cells : n_cells + 4].argmax()]
    x, y = VIEW // 2 + facing
    cell = step[:n_cells].reshape(*VIEW, len(names))[x, y]
    return names[cell.nonzero()[0][-1]], facing, step[n_cells + 4]  # a creature hides its ground


def what_changed(before, now):
    """Words for what changed from a step to the next, but for what ticks by itself."""
    words = []
    for item, change in zip(ITEMS, now[-len(ITEMS) :].astype(int) - 9, strict=True):
        ticks = item in ("health", "energy") or (item in ("food", "drink") and change < 0)
        if change and not ticks:
            words.append(f"{item.replace('_', ' ')} {change:+}")
    (was, faced, slept), (stands, faces, sleeps) = look_ahead(before), look_ahead(now)
    if slept and not sleeps:
        words.append("no longer asleep")
    if was in ("cow", "zombie", "skeleton") and faced == faces and was != stands:
        words.append(f"{was} gone")
    return words


def describe(obs):
    """obs (N, D) -> {step: (what changed and stands ahead, what changed shortly before)}."""
    obs = obs.numpy()
    changed = [[], *(what_changed(*pair) for pair in zip(obs[:-1], obs[1:], strict=True))]
    lines = {}
    for t, words in enumerate(changed):
        earlier = {word: 0 for some in changed[max(t - PAST, 0) : t] for word in some}
        if words:
            lines[t] = (*words, look_ahead(obs[t])[0] + " ahead"), tuple(earlier)
    return lines


def in_words(line):
    now, earlier = map(", ".join, line)
    return f"{now} (before: {earlier})" if earlier else now

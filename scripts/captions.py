"""
Reads files of captions for scripts.pack, which says what is in them. What is wrong with one is a
ValueError with its line.
"""

import csv
import difflib
import math
import sys
from collections import Counter
from pathlib import Path

from runtime.dataset import Caption, id_fault, is_empty
from runtime.files import parse_json, regular_file
from runtime.patterns import composed
from scripts.annotations import (
    BORIS,
    READERS,
    boris_rows,
    choose_episode,
    decoded,
    label_studio_rows,
    read_table,
    told,
)

ENOUGH = 10  # captions that would not all start in the first halves of their episodes by chance
LONGEST = 10**6  # steps of an episode of which there is only text


def of_table(path, steps):
    """(place, row) of a table, ours or one of BORIS."""
    columns, rows = read_table(path)
    if BORIS <= set(columns):
        yield from told(boris_rows(rows, steps))
        return
    missing = [name for name in ("start", "text") if name not in columns]
    if missing:
        names = ", ".join(missing) + " (in small letters)"
        raise ValueError(f"the columns are episode,start,end,text; missing: {names}")
    named = {} if "episode" in columns else dict(episode=choose_episode([path], steps))
    for place, row in rows:
        yield place, named | row


def json_rows(text):
    """(place, row) of JSON lines; {} for what is no JSON object."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line.encode())
            except ValueError:
                row = {}
            yield f"line {number}", row if isinstance(row, dict) else {}


def read_rows(path, steps, frame_rate):
    """(place, row) of a file, as its ending says."""
    ending = Path(path).suffix.lower()
    if ending in (".csv", ".tsv"):
        return of_table(path, steps)
    if ending == ".json" and decoded(path).lstrip().startswith("["):
        return told(label_studio_rows(path, steps, frame_rate))
    if ending in (".jsonl", ".json"):
        return json_rows(decoded(path))
    if ending not in READERS:
        endings = " ".join([".csv .tsv .jsonl .json", *READERS])
        raise ValueError(f"captions are read from {endings}")
    return told(READERS[ending](path, steps))


def read_caption(row, steps, fps):
    """A row -> its Caption, or None where it says that nothing happens. Raises ValueError.

    steps: how many the episode has. fps: with it times are seconds, but those of unit "steps".
    """
    text, start, end = row.get("text"), row.get("start"), row.get("end")
    if not isinstance(text, (str, type(None))):
        raise ValueError(f"text {text!r:.80}: not a string")
    text = composed(" ".join((text or "").split()))
    if text and is_empty(text):
        raise ValueError(f"text {ascii(text)}: nothing of it can be seen")
    unit = row.get("unit") or ""
    if unit not in ("", "seconds", "steps"):
        raise ValueError(f"unit {unit!r:.80}: it is 'seconds' or 'steps'")
    if start in (None, "") and not text:
        return None
    if not text and "by" not in row:  # a line of the page may say that nothing happens there
        raise ValueError("no text; leave the line out")
    if unit == "seconds" and not fps:
        raise ValueError("the times are seconds: --fps=.. says how many steps a second has")
    times = f"start {start!s:.80}, end {end!s:.80}"
    in_steps = not fps or unit == "steps"
    rate = 1 if in_steps else fps
    # seconds are often told to a millisecond, so half of one before a step is that step
    slack = 1e-6 if in_steps else 1e-6 + min(5e-4 * fps, 0.05)
    try:
        if bool in (type(start), type(end)):
            raise TypeError
        first = float(start) * rate
        last = first if end in (None, "") else float(end) * rate
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{times}: not numbers") from None
    if last < first:
        raise ValueError(f"{times}: it ends before it starts")
    if not 0 <= first < steps or not last < math.inf:
        hint = f"--fps={fps:g} makes times seconds" if fps else "--fps=.. makes times seconds"
        has = f"steps 0 .. {steps - 1}" if in_steps else f"{steps / fps:g} seconds"
        raise ValueError(f"{times}; episode {row['episode']} has {has}; {hint}")
    if in_steps and first % 1:
        raise ValueError(f"{times}: a step is a whole number; --fps=.. makes times seconds")
    first = min(int(first + slack), steps - 1)
    return Caption(first, min(max(math.ceil(last - slack), first + 1), steps), text)


def read_row(row, steps, fps):
    """A row -> the id of its episode, and a list of its caption if it has one."""
    if "episode" not in row or (len(row) > 1 and not {"start", "text"} <= row.keys()):
        raise ValueError("not a JSON object with episode, start and text")
    if None in row:
        raise ValueError('more fields than columns; a text with a comma wants "quotes"')
    name = composed(str(row["episode"]))
    if name not in steps:
        near = difflib.get_close_matches(name, steps, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the first is {next(iter(steps))!r}"
        raise ValueError(f"no episode {name!r:.80}; {hint}")
    caption = read_caption(row, steps[name], fps)
    if fault := id_fault(name) or (caption and caption.text and caption.fault(steps[name])):
        raise ValueError(fault)
    return name, [caption] if caption else []


def row_warnings(path, rows, steps, fps):
    """What is odd about a file's rows, {place: (row, id of its episode)}, a line each."""
    broken = [place for place, (row, _) in rows.items() if "\n" in str(row.get("text"))]
    if broken:
        problem = f"a caption of several lines ({len(broken)} in all): is a quote left open?"
        yield f"{broken[0]}: {problem}"
    timed = [x for x in rows.values() if x[0].get("start") not in (None, "")]
    starts = [(float(row["start"]), name) for row, name in timed if not row.get("unit")]
    if isinstance(steps, AnyEpisode):
        return
    # seconds are more than steps there, so one caption at least would start beyond
    if starts and 0 < fps <= 0.5 and all(start < steps[name] for start, name in starts):
        share = f"{100 * fps:.2g} % of their episodes"
        steps_hint = "times in steps want no --fps, or a column unit that says steps"
        rate_hint = f"steps of {fps:g} s want --fps={1 / fps:g}"
        problem = f"with --fps={fps:g} all captions start in the first {share}"
        yield f"{path}: {problem}; {steps_hint}; {rate_hint}"
    elif len(starts) >= ENOUGH and all(x * (fps or 1) < steps[name] / 2 for x, name in starts):
        hint = "are the times seconds?" if fps else "times in seconds want --fps=.."
        yield f"{path}: no caption starts in the second half of its episode: {hint}"


def double_warnings(path, texts):
    """A line where a caption of {episode: captions} comes twice, at the same step."""
    counts = {name: Counter(c for c in of if c.text) for name, of in texts.items()}
    double = [(name, c) for name, count in counts.items() for c, n in count.items() if n > 1]
    for name, caption in double[:1]:
        where = f"{caption.text!r:.80} of {name} at step {caption.start}"
        yield f"{path}: a caption comes twice, and is read once ({len(double)} in all): {where}"


def read_captions(path, steps, fps, annotated, frame_rate):
    """{episode id: captions} of a file, and whether an encoder wrote them.

    steps: {episode id: its length}; the others: settings of scripts.pack. Raises ValueError for all
    that a data set would refuse.
    """
    regular_file(path)
    texts, rows, place = {}, {}, path
    try:
        for where, row in read_rows(path, steps, frame_rate):
            place = f"{path}, {where}" if where else path
            name, in_episode = read_row(row, steps, fps)
            texts.setdefault(name, []).extend(in_episode)
            rows[place] = row, name
            place = path
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{place}: {error}") from None
    if not texts:
        raise ValueError(f"{path}: no captions in it")
    if annotated == "captions" and all(row.get("end") in (None, "") for row, _ in rows.values()):
        raise ValueError(f"{path}: --annotated=captions wants captions to end; no line has an end")
    for warning in [*row_warnings(path, rows, steps, fps), *double_warnings(path, texts)]:
        print(f"warning: {warning}", file=sys.stderr)
    written = any("sure" in row for row, _ in rows.values())
    return {name: sorted(set(in_episode)) for name, in_episode in texts.items()}, written


def read_all_captions(paths, steps, fps, annotated, frame_rate=0.0):
    """{episode id: captions} of all files, and the episodes whose captions a person made."""
    texts, by_person = {}, set()
    for path in paths:
        of_file, written = read_captions(path, steps, fps, annotated, frame_rate)
        texts |= of_file
        by_person = by_person - of_file.keys() if written else by_person | of_file.keys()
    return texts, by_person or set(texts)


class AnyEpisode(dict):
    """The steps of episodes of which there is only text: {any name: very many}."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return LONGEST


def read_text_file(path, fps, frame_rate=0.0):
    """A list of captions for each episode of the text."""
    captions, _ = read_captions(path, AnyEpisode(), fps, "all", frame_rate)
    return list(captions.values())

"""
Reads files of captions for scripts.pack, which says what is in them. What is wrong with one is a
ValueError with its line.
"""

import csv
import difflib
import io
import math
import sys
from pathlib import Path

from data import Caption, record_faults
from runtime.files import parse_json, regular_file
from runtime.patterns import composed

LONGEST = 10**6  # steps of an episode of which there is only text


def csv_rows(text):
    """(line number, dict) of a .csv file's rows; of several lines the last one's number."""
    csv.field_size_limit(2**31 - 1)  # a long field is told below, with its line
    reader = csv.DictReader(io.StringIO(text))
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    missing = sorted({"episode", "start", "text"} - set(reader.fieldnames))
    for name in ("episode", "start", "end", "text"):
        if reader.fieldnames.count(name) > 1:
            raise ValueError(f"two columns are called {name}")
    if missing:
        names = ", ".join(missing)
        raise ValueError(
            f"the columns are episode,start,end,text; missing, or no commas between: {names}"
        )
    for row in reader:
        yield reader.line_num, row


def json_rows(text):
    """(line number, dict) of a .jsonl file's rows; {} for what is no JSON object."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line.encode())
            except ValueError:
                row = {}
            yield number, row if isinstance(row, dict) else {}


def read_caption(row, steps, fps):
    """A row -> its Caption, or None where it says that nothing happens. Raises ValueError.

    steps: how many the episode has. fps: with it times are seconds, but those of unit "steps".
    """
    text, start, end = row.get("text"), row.get("start"), row.get("end")
    if not isinstance(text, (str, type(None))):
        raise ValueError(f"text {text!r:.80}: not a string")
    text = " ".join((text or "").split())
    if start in (None, "") and not text:
        return None
    if not text and "by" not in row:  # a line of the page may say that nothing happens there
        raise ValueError("no text; leave the line out")
    if row.get("unit") == "seconds" and not fps:
        raise ValueError("the times are seconds: --fps=.. says how many steps a second has")
    times = f"start {start!s:.80}, end {end!s:.80}"
    in_steps = not fps or row.get("unit") == "steps"
    rate = 1 if in_steps else fps
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
    first = int(first + 1e-6)
    return Caption(first, min(max(math.ceil(last - 1e-6), first + 1), steps), text)


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
    in_episode = [caption] if caption else []
    record = dict(id=name, annotated="all", captions=[c._asdict() for c in in_episode if c.text])
    for fault in record_faults(record, steps[name]):
        raise ValueError(fault)
    return name, in_episode


def row_warnings(path, rows, steps, fps):
    """What is odd about a file's rows, {place: (row, id of its episode)}, a line each."""
    broken = [place for place, (row, _) in rows.items() if "\n" in str(row.get("text"))]
    if broken:
        problem = f"a caption of several lines ({len(broken)} in all): is a quote left open?"
        yield f"{broken[0]}: {problem}"
    timed = [x for x in rows.values() if x[0].get("start") not in (None, "")]
    starts = [(float(row["start"]), name) for row, name in timed if not row.get("unit")]
    # seconds are more than steps there, so one caption at least would start beyond
    if starts and 0 < fps <= 0.5 and all(start < steps[name] for start, name in starts):
        share = f"{100 * fps:.2g} % of their episodes"
        steps_hint = "times in steps want no --fps, or a column unit that says steps"
        rate_hint = f"steps of {fps:g} s want --fps={1 / fps:g}"
        problem = f"with --fps={fps:g} all captions start in the first {share}"
        yield f"{path}: {problem}; {steps_hint}; {rate_hint}"


def read_captions(path, steps, fps, annotated):
    """{episode id: captions} of a file, and whether an encoder wrote them.

    steps: {episode id: its length}; fps, annotated: settings of scripts.pack. Raises ValueError for
    all that a data set would refuse.
    """
    regular_file(path)
    texts, rows, place = {}, {}, f"{path}, line 1"
    read_rows = csv_rows if path.endswith(".csv") else json_rows
    try:
        for number, row in read_rows(Path(path).read_text(encoding="utf-8-sig")):
            place = f"{path}, line {number}"
            name, in_episode = read_row(row, steps, fps)
            texts.setdefault(name, []).extend(in_episode)
            rows[place] = row, name
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{place}: {error}") from None
    if not texts:
        raise ValueError(f"{path}: no captions in it")
    if annotated == "captions" and all(row.get("end") in (None, "") for row, _ in rows.values()):
        raise ValueError(f"{path}: --annotated=captions wants captions to end; no line has an end")
    for warning in row_warnings(path, rows, steps, fps):
        print(f"warning: {warning}", file=sys.stderr)
    written = any("sure" in row for row, _ in rows.values())
    return {name: sorted(in_episode) for name, in_episode in texts.items()}, written


def read_all_captions(paths, steps, fps, annotated):
    """{episode id: captions} of all files, and the episodes whose captions a person made."""
    texts, by_person = {}, set()
    for path in paths:
        of_file, written = read_captions(path, steps, fps, annotated)
        texts |= of_file
        by_person = by_person - of_file.keys() if written else by_person | of_file.keys()
    return texts, by_person or set(texts)


class AnyEpisode(dict):
    """The steps of episodes of which there is only text: {any name: very many}."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return LONGEST


def read_text(path, fps):
    """A list of captions for each episode of the text."""
    captions, _ = read_captions(path, AnyEpisode(), fps, "all")
    return [sorted(set(in_episode)) for in_episode in captions.values()]

"""
Reads what annotation tools write, as the rows that scripts.captions takes: (place in the file,
dict(episode, start, end, text, unit)). A file is of the episode that has its name, or of the one
that it names. What is wrong with one is a ValueError.

    .eaf  .TextGrid   ELAN, Praat: a tier is a kind of caption, and its name the beginning, as in
                      "hand reaches"; but those called default or captions have the text alone
    .srt  .vtt        subtitles
    .txt              labels of Audacity
    .json             Label Studio's JSON or JSON-MIN: labels of a timeline or of time series
    .csv  .tsv        events of BORIS, tabular or aggregated: subject, behavior and modifiers
"""

import codecs
import csv
import html
import importlib
import io
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from runtime.files import parse_json, regular_file
from runtime.patterns import composed

TIMES = "start", "end", "Time", "Time offset (s)", "Start (s)", "Stop (s)"
WRITTEN = "written by an encoder"  # where a format has room, scripts.export says so
NEWLINE, UNUSED = b"\n", set(b"\x81\x8d\x8f\x90\x9d")  # of Windows-1252
ALONE = r"(default|captions)( \d+)?"  # tiers whose name is no part of what they say


def library(module, package):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{package} reads such files: pip install {package}") from None


def told(rows):
    """The rows; whatever a library raises for a garbled file becomes one line."""
    try:
        yield from rows
    except ValueError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"not what its ending says, or broken ({reason})") from None


def decoded(path):
    """The text of a file in UTF-8 or UTF-16, or else, with a warning, in Windows-1252."""
    content = regular_file(path).read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if marked else "utf-8-sig"
    if b"\0" in content[:2]:
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        problem = f"line {1 + content.count(NEWLINE, 0, error.start)}: not UTF-8"
        broken = not content.decode("utf-8", "ignore").isascii()  # it is UTF-8 elsewhere
        if encoding != "utf-8-sig" or broken or UNUSED & set(content):
            raise ValueError(f"{problem} ({error}); save it as UTF-8") from None
        sample = content[max(error.start - 20, 0) : error.end + 20].decode("cp1252").split("\n")[0]
    print(f"warning: {path}, {problem}, read as Windows-1252: {sample!r}", file=sys.stderr)
    return content.decode("cp1252")


def read_table(path):
    """The columns of a table, and (place, {column: field}) for each row that is not empty. Commas,
    semicolons or tabs part fields; with the latter two a number may have a decimal comma."""
    text = decoded(path)
    if '\\"' in text:
        line = 1 + text[: text.index('\\"')].count("\n")
        problem = 'a quote in a field is written "", not \\"; look at what was read'
        print(f"warning: {path}, line {line}: {problem}", file=sys.stderr)
    delimiter = max(",;\t", key=text.strip().partition("\n")[0].count)
    csv.field_size_limit(2**31 - 1)  # a long field is told by its line
    text = re.sub(r"^sep=.[\r\n]+", "", text.lstrip("\r\n"))  # which Excel writes, and hides
    reader = csv.DictReader(io.StringIO(text, newline=None), delimiter=delimiter)
    columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    for name in columns:
        if name and columns.count(name) > 1:
            raise ValueError(f"two columns are called {name}")
    return columns, table_rows(reader, () if delimiter == "," else TIMES)


def table_rows(reader, times):
    for row in reader:
        for name in times:
            if re.fullmatch(r"\s*-?\d*,\d+\s*", row.get(name) or ""):
                row[name] = row[name].replace(",", ".")
        if any(field for field in row.values() if not isinstance(field, str) or field.strip()):
            yield f"line {reader.line_num}", row


def choose_episode(names, episodes):
    """The first name, which may be a path or an address, that is an episode's; else the first."""
    names = [composed(unquote(str(name))) for name in names]
    paths = [Path(name.replace("\\", "/")) for name in names]
    called = [name for path in paths for name in (path.stem, f"{path.parent.name}/{path.stem}")]
    return next((name for name in called if name in episodes), called[0])


def nothing(episode):
    """The row that says that an episode is annotated, though nothing may happen in it."""
    return "", dict(episode=episode, start="", text="")


def in_tier(tier, text):
    return text if re.fullmatch(ALONE, tier) else f"{tier} {text}"


def aligned_times(tier, times):
    """{annotation: (start, end)} of a tier of ELAN in ms. A slot without a time lies evenly between
    those that have one, as ELAN shows it."""
    slots = list(dict.fromkeys(slot for first, last, *_ in tier.values() for slot in (first, last)))
    known = [i for i, slot in enumerate(slots) if times[slot] is not None]
    values = [times[slots[i]] for i in known]
    at = dict(zip(slots, np.interp(range(len(slots)), known, values) if known else [], strict=True))
    return {name: (at[first], at[last]) for name, (first, last, *_) in tier.items()}


def elan_rows(path, episodes):
    eaf = library("pympi", "pympi-ling").Eaf(path, suppress_version_warning=True)
    media = [file for file in eaf.media_descriptors if file.get("MEDIA_URL")]
    origin = int((media or [{}])[0].get("TIME_ORIGIN") or 0)
    episode = choose_episode([path, *(file["MEDIA_URL"] for file in media)], episodes)
    yield nothing(episode)
    parents, times = {}, {}
    for aligned, referring, *_ in eaf.tiers.values():
        parents |= {name: parent for name, (parent, *_) in referring.items()}
        times |= aligned_times(aligned, eaf.timeslots)
    for tier, (aligned, referring, about, _) in eaf.tiers.items():
        written = dict(sure="") if about.get("ANNOTATOR") == WRITTEN else {}
        texts = {name: x[2] for name, x in aligned.items()}
        texts |= {name: x[1] for name, x in referring.items()}
        for name, text in texts.items():
            own = name
            for _ in parents:  # one that has no times of its own
                own = parents.get(own, own)
            start, end = ((t + origin) / 1000 for t in times[own])
            row = dict(episode=episode, start=start, end=end, unit="seconds") | written
            yield f"tier {tier}, annotation {name}", row | dict(text=in_tier(tier, text))


def praat_rows(path, episodes):
    textgrid = library("praatio.textgrid", "praatio")
    settings = dict(reportingMode="silence", duplicateNamesMode="rename")
    grid = textgrid.openTextgrid(path, includeEmptyIntervals=False, **settings)
    episode = choose_episode([path], episodes)
    yield nothing(episode)
    for tier in grid.tiers:
        for start, *end, text in tier.entries:
            row = dict(episode=episode, start=start, end=end[0] if end else "", unit="seconds")
            yield f"tier {tier.name}, {start:g} s", row | dict(text=in_tier(tier.name, text))


SRT_TAG = r"</?(b|i|u|s|font)\b[^<>]*>|{\\an?\d+}"  # it has no others, nor a way to write a <


def in_seconds(clock):
    hours, minutes, seconds = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def subtitle_rows(path, episodes):
    webvtt, text = library("webvtt", "webvtt-py"), decoded(path)
    ending = Path(path).suffix[1:].lower()
    cues = len(re.findall(r"^.*-->", text, re.M))
    read = webvtt.from_buffer(io.StringIO(text), ending)
    if len(read) != cues:
        raise ValueError(f"{cues} lines with times, but {len(read)} subtitles could be read")
    place, row = nothing(choose_episode([path], episodes))
    row |= dict(sure="") if text.startswith(f"WEBVTT {WRITTEN}") else {}
    yield place, row
    for cue in read:
        start, end = in_seconds(cue.start), in_seconds(cue.end)
        said = html.unescape(cue.text) if ending == "vtt" else re.sub(SRT_TAG, "", cue.raw_text)
        about = dict(start=start, end=end, text=said, unit="seconds")
        yield f"at {cue.start}", row | about


def audacity_rows(path, episodes):
    episode = choose_episode([path], episodes)
    yield nothing(episode)
    for number, line in enumerate(decoded(path).splitlines(), 1):
        if line.strip() and not line.startswith("\\"):  # the frequencies of a selection
            label = re.fullmatch(r"([\d.,]+)\t([\d.,]+)\t(.*)", line)
            if not label:
                raise ValueError(f"line {number}: no label: start, end and text, tabs between")
            start, end = (time.replace(",", ".") for time in label.groups()[:2])
            row = dict(episode=episode, start=start, end=end, text=label[3], unit="seconds")
            yield f"line {number}", row


BORIS = {"Observation id", "Behavior"}  # columns that tell its tables


def boris_rows(rows, episodes):
    running, videos = {}, {}  # states that began; the video of an observation
    for place, row in rows:
        name, video = row["Observation id"] or "", row.get("Media file name") or ""
        episode = name
        if composed(name) not in episodes and video:
            episode = choose_episode([video], episodes)
            if videos.setdefault(name, video) != video:
                raise ValueError(f"{place}: {name} has several videos, and is no episode itself")
        modifiers = [x for key, x in row.items() if str(key).startswith("Modifier") and x != "None"]
        parts = [row.get("Subject"), row["Behavior"], *modifiers]
        text = " ".join(part for part in parts if part not in (None, "", "No focal subject"))
        kind = row.get("Behavior type") or row.get("Status")
        start, end = row.get("Start (s)") or row.get("Time"), row.get("Stop (s)")
        if kind == "START":
            running[name, text] = place, start
            continue
        if kind == "STOP":
            place, start, end = *running.pop((name, text), (place, None)), start
        times = (start, end) if end not in (None, "", "NA") else (start, start)
        try:
            start, end = (float(time) - float(row.get("Time offset (s)") or 0) for time in times)
        except (TypeError, ValueError):
            problem = "seconds are wanted, and a START for each STOP"
            raise ValueError(f"{place}: {text!r} at {times}: {problem}") from None
        yield place, dict(episode=episode, start=start, end=end, text=text, unit="seconds")
    for (name, text), (place, _) in running.items():
        raise ValueError(f"{place}: {text!r} of {name} starts, but never stops; mend it in BORIS")


def regions_of(task):
    """What a task of Label Studio is called, perhaps, and its regions; None if none annotated it.
    JSON-MIN has both beside each other."""
    called, regions = task.get("data", task), None
    if "annotations" not in task:
        regions = [x for part in task.values() if isinstance(part, list) for x in part]
    for annotation in task.get("annotations", ()):
        if not annotation.get("was_cancelled"):
            regions = [result["value"] for result in annotation["result"] if "value" in result]
            break  # others are of other annotators
    names = [x for x in called.values() if isinstance(x, str) and re.search(r"[./]", x)]
    names += [re.sub(r"(^|/)[0-9a-f]{8}-(?=[^/]*$)", r"\1", name) for name in names]
    return names or [f"task {task.get('id')}"], regions


def label_studio_rows(path, episodes, frame_rate):
    tasks = parse_json(regular_file(path).read_bytes())
    for number, (names, regions) in enumerate(map(regions_of, tasks), 1):
        if regions is not None:
            episode = choose_episode(names, episodes)
            yield nothing(episode)
        for region in regions or ():
            kinds = [x for x in ("timelinelabels", "timeserieslabels", "labels") if x in region]
            frames = "ranges" in region
            if frames and not frame_rate:
                hint = "--frame_rate=.. says how many frames a second has in Label Studio"
                raise ValueError(f"task {number}: its times are frames: {hint}")
            for part in region.get("ranges", [region]) if kinds else ():
                start, end = part["start"], part["end"]
                if frames:  # counted from one
                    start, end = (start - 1) / frame_rate, end / frame_rate
                for text in region[kinds[0]]:
                    row = dict(episode=episode, start=start, end=end, text=text)
                    yield f"task {number}", row | dict(unit="seconds" if frames else "")


READERS = {".eaf": elan_rows, ".textgrid": praat_rows, ".txt": audacity_rows}
READERS |= dict.fromkeys((".srt", ".vtt"), subtitle_rows)

r"""
Packs your observations and captions into a data set (runtime/dataset.py says what that is).

    python -m scripts.pack --obs='episodes/*.npy' --captions=captions.csv --out=data/mine
    python -m scripts.pack .. --fps=5      the captions' times are seconds, a second has 5 steps

Observations: .npy, .npz or .safetensors, an array (steps, dims) per episode. A file's only array
is the episode named like the file without its ending; several are the episodes file/array, but
with --array=embeddings only the one of that name is read. --stride=4 makes every fourth row a step.
An episode's pictures for the page are beside it: NAME-pictures.npy, (steps, h, w, 3) uint8.

Captions: .csv or .tsv with the columns episode,start,text and optionally end and unit (steps or
seconds), or .jsonl with the same keys, as `sample.py --json` writes. A line with an episode and
nothing else says that nothing happens in it; episodes that no line names are not annotated. Of
several files, as in --captions=captions.csv,corrected.jsonl, a later one replaces what earlier ones
say of an episode. What an encoder wrote (its lines have "sure") trains, corrected or not; val and
test are a person's.

Or files of annotation tools, as in --captions='labels/*.eaf' --fps=5: ELAN, Praat, BORIS, Audacity,
Label Studio, subtitles (scripts/annotations.py says how each is read). Such a file is of the
episode that has its name, and says that nothing happens where it has no caption.

A features.txt beside the observations names their features, a line each. --drop=3,speed leaves the
fourth out, and the one called speed.

With --group='(subject\d+)' episodes in whose names the same is found stay in one split. Without it
the arrays of a file do, where there are three files or more.

The same call again goes on where it was stopped, and packs again what is no longer as written.
Until all of that is whole, the old data set stays.

With --part=3/64 it packs the third of 64 parts of the shards, wherever the others are packed. Then
the same call without it joins them: it packs what is missing, and writes meta.json.
"""

from configurator import check_range, configure, run
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.dataset import TEXT, Episode, record_faults, write_shard, write_text
from runtime.distributed import note_of, portion
from runtime.files import alone, checksum, read_json, regular_file, replace, write_json
from runtime.patterns import composed, listed
from runtime.shards import (
    SPLITS,
    pictures_path,
    read_shard,
    shard_path,
    shard_paths,
    write_meta,
)
from scripts.captions import read_all_captions, read_text_file
from scripts.oddities import at_most, sameness, views
from scripts.recordings import (
    check_rate,
    find_recordings,
    load_observations,
    load_pictures,
    lost_in,
    picture_bytes,
    read_features,
)

obs = ""  # the observations' files, e.g. 'episodes/*.npy'
captions = ""  # files or patterns, with commas between; without it nothing is annotated
array = ""  # of files with several arrays, the only one that is read
stride = 1  # rows from one step to the next
text = ""  # the same of other episodes, of which there are no observations: what is said, and how
out = ""  # folder of the data set, e.g. data/mine
drop = ""  # features left out: names or numbers from 0 on, with commas between
fps = 0.0  # steps per second; with it the captions' times are seconds, else steps
frame_rate = 0.0  # of the videos in Label Studio, where its times are frames
annotated = "all"  # of an episode with captions: 'all' | 'captions', only where they are
group = ""  # regular expression: what it finds in an episode's name, one split has alone
val = 0.1  # share of the annotated episodes (or groups) that validate, at least one
test = 0.1  # share that test, at least one
source = ""  # where the observations come from, for meta.json
licence = ""  # what may be done with them, for meta.json
part = ""  # '3/64': the third of 64 parts alone; '': all, and what parts have packed

SHARD = 256 * 2**20  # bytes of observations in a shard
NEW = ".packing"  # folder in which a data set grows before it takes the old one's place
BESIDE = TEXT, "features.txt", "packed.json", "meta.json"  # and meta.json is the last


def groups_of(names, annotated):
    """{name of an episode: its group}: what --group finds in it; without that, its file, or itself
    where fewer than three files have annotations."""
    files = {name.partition("/")[0] for name in annotated}
    pattern = composed(group) or ("[^/]+" if len(files) > 2 else ".+")
    found = {name: re.search(pattern, name) for name in names}
    found = {name: of and of[min(of.re.groups, 1)] for name, of in found.items()}
    for name in [name for name in names if not found[name]]:
        raise ValueError(f"--group={group}: nothing found in the name {name!r}")
    if not group and len(files) < 3 <= len(annotated):
        hint = "--group=.. keeps those together that belong together"
        print(f"warning: arrays of one file are in train, val and test; {hint}", file=sys.stderr)
    return found


def held_out(by_person, annotated, groups):
    """{group: "val" or "test"}: shares of the annotated episodes' groups, at least one each.

    They are drawn from a hash of their names, so that more move few from split to split.
    """
    every = {groups[name] for name in annotated}
    drawn = every - {groups[name] for name in annotated - by_person} or every
    total, kind = len(every), "groups" if group else "episodes"
    if not total:
        return {}
    if total < 3:
        raise ValueError(
            f"only {total} {kind} to split: train, val and test take three; cut one up"
        )
    order = sorted(drawn, key=lambda name: hashlib.sha256(name.encode()).digest())
    n_val, n_test = (min(max(round(x * total), 1), len(order) // 2) for x in (val, test))
    if n_val + n_test >= total:
        raise ValueError(f"--val={val} --test={test}: nothing annotated is left for training")
    at_ends = order[:n_val], order[len(order) - n_test :]  # so one does not move the other
    return dict.fromkeys(at_ends[0], "val") | dict.fromkeys(at_ends[1], "test")


def plan(recordings, splits, room):
    """{(split, index of the shard): its recordings}, at most `room` steps in a shard.

    splits: {episode: its split}.
    """
    shards = {}
    for split in SPLITS:
        index = steps = 0
        for recording in recordings:
            if splits[recording.id] != split:
                continue
            if steps and steps + recording.steps > room:
                index, steps = index + 1, 0
            steps += recording.steps
            shards.setdefault((split, index), []).append(recording)
    return shards


def fingerprint(recordings, texts, dtype, kept):
    """Changes when what a shard's files hold, its captions or settings do."""
    about = [annotated, dtype] + [kept] * bool(drop) + [stride] * (stride > 1)
    for recording in recordings:
        about += [recording.id, os.path.abspath(recording.path), recording.name]
        about += [sum_of(recording.path), texts.get(recording.id)]
        if recording.pictures_path().exists():
            about.append(sum_of(recording.pictures_path()))
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@functools.lru_cache(1)  # arrays of a file come one after another
def sum_of(path):
    return os.path.getsize(path), checksum(regular_file(path))


def read_old(path):
    """The JSON of an earlier call, {} where there is none yet, or a broken one."""
    try:
        return read_json(path)
    except ValueError:
        return {}


def read_records(folder):
    """{name of a shard: its fingerprint}, as earlier calls and parts packed it; None where two of
    them packed it otherwise."""
    paths, packed = sorted(folder.glob("packed*.json")), {}
    if not all(map(Path.is_file, paths)) or not paths and any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: a data set that was not packed here; choose another --out")
    for path in paths:
        for name, key in read_old(path).items():
            packed[name] = key if packed.get(name, key) == key else None
    return packed


def check_folder(folder):
    """Raises ValueError where it is no place for a data set that is packed."""
    read_records(folder)
    for path in filter(Path.is_dir, folder.glob("*-?????.*")):
        raise ValueError(f"{path} is a folder: remove it")


def is_intact(path, meta):
    about = {name: meta[name] for name in ("obs_dim", "dtype")}
    return not read_shard(path, record_faults, about)[0]


def about_replaced(folder, old):
    """A line on what is replaced, a data set with this meta.json: runs may be trained on it."""
    paths = filter(Path.is_file, shard_paths(folder, "jsonl"))
    text = b"".join(path.read_bytes() for path in paths)
    episodes, texts = len(text.splitlines()), text.count(b'{"start": ')
    when = datetime.fromtimestamp((folder / "meta.json").stat().st_mtime)
    about = ", ".join(f"{key} {old.get(key)}" for key in ("obs_dim", "steps_per_second", "source"))
    size = f"{episodes} episodes with {texts} captions, made {when:%Y-%m-%d %H:%M}, {about}"
    hint = "runs trained on it do not fit the new one; another --out keeps both"
    return f"{folder}: replaces a data set ({size}); {hint}"


def make_episode(recording, texts, dtype, kept):
    in_episode = texts.get(recording.id, [])
    known = [[caption.start, caption.end] for caption in in_episode]
    in_episode = [caption for caption in in_episode if caption.text]
    if annotated == "all" and recording.id in texts:
        known = "all"
    obs, pictures = load_observations(recording, dtype, kept), load_pictures(recording)
    return Episode(recording.id, obs, in_episode, known, pictures)


def look_at(episode, recording, kept, seen, lost):
    """Notes by what an episode is known, and which of its numbers' changes are lost."""
    obs = torch.as_tensor(episode.obs)
    seen[episode.id] = views(lambda start, stop: obs[start:stop], len(obs))
    lost += lost_in(recording, obs, kept)


def pack(folder, shards, texts, meta, kept):
    """Makes the data set consist of these shards, and of what else is in its folder NEW. Those
    packed before and intact stay as they are. Until the others are whole so does the old data set.
    A part makes its own where they belong, and no data set.

    shards: {(split, index): its recordings}; texts: {episode id: captions}; meta: of meta.json;
    kept: numbers of the features that it has.
    """
    dtype, new = meta["dtype"], folder if part else folder / NEW
    there, record = read_records(folder), new / note_of("packed.json", part)
    begun = {} if part else read_old(record)  # by a call that was stopped
    staying, coming, seen, lost = {}, {}, {}, []
    for shard in tqdm(portion([*shards], part), desc="packing", unit="shard", disable=None):
        name = shard_path("", *shard).name
        key = fingerprint(shards[shard], texts, dtype, kept)
        if there.get(name) == key and is_intact(folder / name, meta):
            staying[name] = key
            continue
        if part and (folder / "meta.json").exists():
            raise ValueError(f"{folder}: no part replaces a data set; choose another --out")
        coming[name] = key
        if begun.get(name) == key and is_intact(new / name, meta):
            continue
        episodes = [make_episode(recording, texts, dtype, kept) for recording in shards[shard]]
        for episode, recording in zip(episodes, shards[shard], strict=True):
            look_at(episode, recording, kept, seen, lost)
        write_shard(new, *shard, episodes)
        begun[name] = key
        write_json(staying | begun if part else begun, record)
    for warning in [*at_most(lost), *sameness(seen)]:
        print(f"warning: {warning}", file=sys.stderr)
    if part:
        write_json(staying | begun, record)
    else:
        take_place(folder, staying, coming, meta)


def take_place(folder, staying, coming, meta):
    """Replaces a data set by a new one, which is whole on the disk: all that is left is to rename.

    staying, coming: {name: fingerprint} of its shards that are in the folder, and in folder/NEW.
    """
    old = read_old(folder / "meta.json")
    surplus = [path for path in shard_paths(folder) if path.name not in staying]
    paths = [*(folder / name for name in staying), *(folder / NEW / name for name in coming)]
    write_meta(folder / NEW, paths, **meta)
    write_json(staying | coming, folder / NEW / "packed.json")
    other = old and (coming or surplus or any(old.get(key) != meta[key] for key in meta))
    replaced = [about_replaced(folder, old)] if other else []
    write_json(staying, folder / "packed.json")
    if coming or surplus:  # a call that is stopped from here on leaves no data set, but its shards
        (folder / "meta.json").unlink(missing_ok=True)
    for path in [*folder.glob("packed-*.json"), *itertools.chain(*map(files_of, surplus))]:
        path.unlink(missing_ok=True)
    parts = itertools.chain(*(files_of(folder / NEW / name) for name in coming))
    for path in [*parts, *(folder / NEW / name for name in BESIDE)]:
        if path.exists():
            os.replace(path, folder / path.name)
    for line in replaced:
        print(line, file=sys.stderr)


def files_of(path):
    """The files of a shard."""
    return path, path.with_suffix(".jsonl"), pictures_path(path)


def check_settings():
    for name in ("obs", "out"):
        if not globals()[name]:
            raise ValueError(f"--{name} is needed; python -m scripts.pack --help")
    if annotated not in ("all", "captions"):
        raise ValueError(f"--annotated={annotated}: 'all' or 'captions'")
    check_range(globals(), 0, "fps frame_rate", most=1e6)
    check_range(globals(), 0, "val test", most=0.5)
    check_range(globals(), 1, "stride", most=1e6)
    try:
        re.compile(group)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--group={group}: {error}") from None


def make():
    """The data set that the settings describe."""
    check_settings()
    recordings, D, dtype = find_recordings(obs, array, stride)
    check_rate(recordings, fps)
    names, kept = read_features(recordings, D, drop)
    lengths = {r.id: r.steps for r in recordings}
    texts, by_person = read_all_captions(listed(captions), lengths, fps, annotated, frame_rate)
    room = SHARD // (len(kept) * getattr(torch, dtype).itemsize + picture_bytes(recordings))
    of_splits = texts.keys() or lengths.keys()  # where nobody annotated any, all are alike
    groups = groups_of(lengths, of_splits)
    splits = held_out(by_person, of_splits, groups) if texts or len(of_splits) > 2 else {}
    found = len(recordings)  # what nobody annotated neither scores nor gives its group away
    recordings = [r for r in recordings if r.id in of_splits or groups[r.id] not in splits]
    if len(recordings) < found:
        left = f"{found - len(recordings)} episodes without annotations"
        print(f"left out: {left}, in groups that validate or test", file=sys.stderr)
    shards = plan(recordings, {r: splits.get(groups[r], "train") for r in lengths}, room)
    meta = dict(obs_dim=len(kept), dtype=dtype, steps_per_second=fps or None)
    present = [split for split in SPLITS if (split, 0) in shards]
    meta |= dict(source=source, licence=licence, splits=present)
    said = [read_text_file(path, fps, frame_rate) for path in listed(text)]
    folder = Path(out)
    check_folder(folder)
    sum_of.cache_clear()
    if part:
        pack(folder, shards, texts, meta, kept)
        return print(f"{out}: part {part} is there; the same call without --part joins them")
    with alone(folder), alone(folder / NEW):
        write_text(folder / NEW, [of for in_file in said for of in in_file])
        if names:
            lines = "".join(f"{names[k]}\n" for k in kept)
            path = folder / NEW / "features.txt"
            replace(path, lambda beside: beside.write_text(lines, encoding="utf-8"))
        pack(folder, shards, texts, meta, kept)
        shutil.rmtree(folder / NEW)
    steps = sum(recording.steps for recording in recordings)
    count = sum(bool(caption.text) for of in texts.values() for caption in of)
    size = f"{len(recordings)} episodes, {steps:,} steps of {len(kept)} {dtype}"
    of_texts = f"{len(texts)} episodes annotated with {count} captions"
    others = sum(map(len, said))
    of_texts += f", the text of {others} others" if others else ""
    print(f"{out}: {size}, {of_texts}; look at it: python -m scripts.show {out}")


def main():
    configure(globals())
    make()


if __name__ == "__main__":
    run(main)

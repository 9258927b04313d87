r"""
Packs your observations and captions into a data set (data.py says what that is).

    python -m scripts.pack --obs='episodes/*.npy' --captions=captions.csv --out=data/mine
    python -m scripts.pack .. --fps=5      the captions' times are seconds, a second has 5 steps

Observations: .npy, .npz or .safetensors, an array (steps, dims) per episode. A file's only array
is the episode named like the file without its ending; several are the episodes file/array.
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

With --part=3/64 it packs the third of 64 parts of the shards, wherever the others are packed. Then
the same call without it joins them: it packs what is missing, and writes meta.json.
"""

from configurator import check_range, configure, run
import hashlib
import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from data import Episode, record_faults, write_shard, write_text
from runtime.distributed import note_of, portion
from runtime.files import read_json, replace, write_json
from runtime.patterns import listed
from runtime.shards import SPLITS, read_shard, shard_path, shard_paths, write_meta
from scripts.captions import read_all_captions, read_text
from scripts.oddities import alike, at_most, views
from scripts.recordings import (
    find_recordings,
    load,
    load_pictures,
    lost_in,
    picture_bytes,
    read_features,
)

obs = ""  # the observations' files, e.g. 'episodes/*.npy'
captions = ""  # files or patterns, with commas between; without it nothing is annotated
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


def groups_of(names, annotated):
    """{name of an episode: its group}: what --group finds in it; without that, its file, or itself
    where fewer than three files have annotations."""
    files = {name.partition("/")[0] for name in annotated}
    pattern = group or ("[^/]+" if len(files) > 2 else ".+")
    found = {name: re.search(pattern, name) for name in names}
    for name in [name for name in names if not found[name]]:
        raise ValueError(f"--group={group}: nothing found in the name {name!r}")
    if not group and len(files) < 3 <= len(annotated):
        hint = "--group=.. keeps those together that belong together"
        print(f"warning: arrays of one file are in train, val and test; {hint}", file=sys.stderr)
    return {name: of[min(of.re.groups, 1)] for name, of in found.items()}


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
    """Changes when a shard's files, captions or settings do."""
    about = [annotated, dtype] + [kept] * bool(drop)
    for recording in recordings:
        stat = os.stat(recording.path)
        about += [recording.id, os.path.abspath(recording.path), recording.name]
        about += [stat.st_size, stat.st_mtime_ns, texts.get(recording.id)]
        if recording.pictures().exists():
            stat = os.stat(recording.pictures())
            about += [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


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


def find_intact(folder, wanted, meta):
    """Of the wanted {path: fingerprint}, {name: fingerprint} of those packed before and intact."""
    packed = read_records(folder)
    return {
        path.name: key
        for path, key in tqdm(wanted.items(), desc="checking", leave=False, disable=None)
        if packed.get(path.name) == key
        and not read_shard(path, record_faults, meta["obs_dim"], meta["dtype"])[0]
    }


def tell_replaced(folder, old):
    """Says what is replaced, a data set with this meta.json: a run may have been trained on it."""
    text = b"".join(path.read_bytes() for path in shard_paths(folder, "jsonl"))
    episodes, texts = len(text.splitlines()), text.count(b'{"start": ')
    when = datetime.fromtimestamp((folder / "meta.json").stat().st_mtime)
    about = ", ".join(f"{key} {old.get(key)}" for key in ("obs_dim", "steps_per_second", "source"))
    size = f"{episodes} episodes with {texts} captions, made {when:%Y-%m-%d %H:%M}, {about}"
    hint = "runs trained on it do not fit the new one; another --out keeps both"
    print(f"{folder}: replaces a data set ({size}); {hint}", file=sys.stderr)


def make_episode(recording, texts, dtype, kept):
    in_episode = texts.get(recording.id, [])
    known = [[caption.start, caption.end] for caption in in_episode]
    in_episode = [caption for caption in in_episode if caption.text]
    if annotated == "all" and recording.id in texts:
        known = "all"
    pictures = load_pictures(recording)
    return Episode(recording.id, load(recording, dtype, kept), in_episode, known, pictures)


def look_at(episode, recording, kept, seen, lost):
    """Notes by what an episode is known, and which of its numbers' changes are lost."""
    obs = torch.as_tensor(episode.obs)
    seen[episode.id] = views(lambda start, stop: obs[start:stop], len(obs))
    lost += lost_in(recording, obs, kept)


def warn(seen, lost):
    """Says what is odd about the episodes that were packed."""
    _, shifted = alike(seen)
    pairs = [f"{a} and {b} are equal but for a step: leave one out" for a, b, *_ in shifted]
    for warning in [*at_most(lost), *at_most(pairs)]:
        print(f"warning: {warning}", file=sys.stderr)


def pack(folder, shards, texts, meta, kept):
    """Makes the data set consist of these shards. Those packed before and intact stay as they are.
    A part makes its own, and no data set.

    shards: {(split, index): its recordings}; texts: {episode id: captions}; meta: of meta.json;
    kept: numbers of the features that it has.
    """
    dtype = meta["dtype"]
    paths = {shard: shard_path(folder, *shard) for shard in portion([*shards], part)}
    wanted = {paths[shard]: fingerprint(shards[shard], texts, dtype, kept) for shard in paths}
    packed = find_intact(folder, wanted, meta)
    missing = [shard for shard, path in paths.items() if path.name not in packed]
    surplus = set() if part else set(shard_paths(folder)) - wanted.keys()
    record = folder / note_of("packed.json", part)

    # what cannot be packed raises here, while an old data set is still whole
    old = read_old(folder / "meta.json")
    if part and old and missing:
        raise ValueError(f"{folder}: no part replaces a data set; choose another --out")
    for path in filter(Path.is_dir, folder.glob("*-?????.*")):
        raise ValueError(f"{path} is a folder: remove it")
    for shard in tqdm(missing if old else [], "reading", leave=False, unit="shard", disable=None):
        for recording in shards[shard]:
            load(recording, dtype, kept)

    if old and (missing or surplus or any(old.get(key) != meta[key] for key in meta)):
        tell_replaced(folder, old)

    # from here on it is no data set, and an interrupted call does not trust the shards it replaces
    if missing or surplus:
        (folder / "meta.json").unlink(missing_ok=True)
    write_json(packed, record)
    for path in [] if part else folder.glob("packed-*.json"):
        path.unlink()
    seen, lost = {}, []
    for shard in tqdm(missing, desc="packing", unit="shard", disable=None):
        episodes = [make_episode(recording, texts, dtype, kept) for recording in shards[shard]]
        for episode, recording in zip(episodes, shards[shard], strict=True):
            look_at(episode, recording, kept, seen, lost)
        write_shard(folder, *shard, episodes)
        packed[paths[shard].name] = wanted[paths[shard]]
        write_json(packed, record)
    for path in surplus:
        path.unlink()
        for beside in path.with_suffix(".jsonl"), path.with_stem(f"{path.stem}-pictures"):
            beside.unlink(missing_ok=True)
    if not part:
        write_meta(folder, **meta)
    warn(seen, lost)


def check_settings():
    for name in ("obs", "out"):
        if not globals()[name]:
            raise ValueError(f"--{name} is needed; python -m scripts.pack --help")
    if annotated not in ("all", "captions"):
        raise ValueError(f"--annotated={annotated}: 'all' or 'captions'")
    check_range(globals(), 0, "fps frame_rate", most=1e6)
    check_range(globals(), 0, "val test", most=0.5)
    try:
        re.compile(group)
    except re.error as error:
        raise ValueError(f"--group={group}: {error}") from None


def make():
    """The data set that the settings describe."""
    check_settings()
    recordings, D, dtype = find_recordings(obs)
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
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if part:
        pack(folder, shards, texts, meta, kept)
        return print(f"{out}: part {part} is there; the same call without --part joins them")
    said = [read_text(path, fps, frame_rate) for path in listed(text)]
    write_text(folder, [of for in_file in said for of in in_file])
    pack(folder, shards, texts, meta, kept)
    if names:
        lines = "".join(f"{names[k]}\n" for k in kept)
        replace(folder / "features.txt", lambda beside: beside.write_text(lines, encoding="utf-8"))
    steps = sum(recording.steps for recording in recordings)
    count = sum(bool(caption.text) for of in texts.values() for caption in of)
    size = f"{len(recordings)} episodes, {steps:,} steps of {len(kept)} {dtype}"
    of_texts = f"{len(texts)} episodes annotated with {count} captions"
    print(f"{out}: {size}, {of_texts}; look at it: python -m scripts.show {out}")


def main():
    configure(globals())
    make()


if __name__ == "__main__":
    run(main)

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import shards
from runtime.dataset import Caption, Episode, Episodes, write_shard
from runtime.shards import write_meta
from scripts.check import check


def read_all(folder):
    """Everything a training run reads of the split train."""
    episodes = Episodes(folder, "train")
    return [(episode.obs, episode.captions) for episode in episodes]


def edit_line(folder, edit):
    """Changes the record of the third episode, as by hand: without crc."""
    path = folder / "train-00000.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[2])
    del record["crc"]
    edit(record)
    lines[2] = json.dumps(record).replace('"NEST"', "[" * 200_000)
    path.write_text("\n".join(lines) + "\n")


def edit_shard(folder, edit, metadata=None):
    path = folder / "train-00000.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def truncate(folder):
    (folder / "train-00000.safetensors").write_bytes(
        (folder / "train-00000.safetensors").read_bytes()[:-1000]
    )


def garble(folder):
    (folder / "train-00000.safetensors").write_bytes(b"no safetensors at all")


def two_lines(folder):
    path = folder / "train-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"\\n "'))


def no_text(folder):
    (folder / "train-00000.jsonl").unlink()


def no_meta(folder):
    (folder / "meta.json").unlink()


def broken_meta(folder):
    (folder / "meta.json").write_text("{")


def folder_for(name):
    def harm(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return harm


def pipe_for(name):
    def harm(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return harm


def dangling(name):
    def harm(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("nowhere")

    return harm


def other_format(folder):
    edit_shard(folder, lambda tensors: None, {"index": '{"format": 7}'})


def meta(**changes):
    return lambda folder: (folder / "meta.json").write_text(
        json.dumps(json.loads((folder / "meta.json").read_text()) | changes)
    )


def broken_json(folder):
    path = folder / "train-00000.jsonl"
    path.write_text(path.read_text().replace('{"id": "train-2"', '{"id": train-2"'))


def flipped_text(folder):
    path = folder / "train-00000.jsonl"
    path.write_text(path.read_text().replace("open", "omen", 1))


def line_missing(folder):
    path = folder / "train-00000.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")


def flipped_obs(folder):
    path = folder / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-12 * 40 * 6 * 4 // 2] ^= 1
    path.write_bytes(data)


def obs(value):
    def edit(tensors):
        tensors["obs"][85, 1] = value
        tensors["crc"] = shards.row_checksums(tensors["obs"]).to(torch.uint32)

    return lambda folder: edit_shard(folder, edit)


def offsets(edit):
    return lambda folder: edit_shard(folder, lambda tensors: edit(tensors["offsets"]))


def line(edit):
    return lambda folder: edit_line(folder, edit)


def caption(**changes):
    return line(lambda record: record["captions"][1].update(changes))


FAULTS = {
    "a truncated shard": (
        truncate,
        r"train-00000.safetensors: truncated or garbled .*; make it again",
    ),
    "a type of two lines": (two_lines, r"train-00000.safetensors: truncated or garbled"),
    "a garbled shard": (garble, r"train-00000.safetensors: truncated or garbled"),
    "a flipped bit in the observations": (
        flipped_obs,
        r"train-00000.safetensors, episode train-\d+, step \d+: obs is not as written",
    ),
    "NaN": (
        obs(float("nan")),
        r"train-00000.safetensors, episode train-2, step 5: obs is NaN or Inf",
    ),
    "Inf": (
        obs(float("-inf")),
        r"train-00000.safetensors, episode train-2, step 5: obs is NaN or Inf",
    ),
    "offsets that fall": (
        offsets(lambda x: x[3].fill_(0)),
        r"offsets must rise from 0 to 480",
    ),
    "offsets beyond the end": (offsets(lambda x: x[-1].fill_(999)), r"offsets must rise"),
    "an episode of length 0": (
        offsets(lambda x: x[3].copy_(x[2])),
        r"train-00000.jsonl, line 3: has no steps",
    ),
    "a shard of another format": (
        other_format,
        r"00000.safetensors: format 7, 1 is read here",
    ),
    "no text": (no_text, r"train-00000.jsonl is missing"),
    "a broken json line": (broken_json, r"train-00000.jsonl, line 3: is not JSON"),
    "changed text": (
        flipped_text,
        r'train-00000.jsonl, line \d+: does not match its crc: .* \(then remove "crc" from it\)',
    ),
    "a missing line": (
        line_missing,
        r"train-00000.jsonl: 11 lines for 12 episodes",
    ),
    "no meta.json": (
        no_meta,
        r"meta.json is missing",
    ),
    "a broken meta.json": (broken_meta, r"meta.json is not JSON"),
    "a data set of another format": (meta(format=7), r"meta.json: format is 7"),
    "another width than meta.json says": (
        meta(obs_dim=5),
        r"train-00000.safetensors: obs is \[480, 6\] float32, meta.json",
    ),
    "another type than meta.json says": (
        meta(dtype="uint8"),
        r"train-00000.safetensors: obs is \[480, 6\] float32, meta.json",
    ),
    "splits that are no list": (meta(splits=5), "meta.json: splits is 5"),
    "no splits": (meta(splits=None), "meta.json: splits is None"),
    "a split that is no name": (meta(splits=["train", []]), r"meta.json: splits is .'train', .."),
    "a rate that is no number": (meta(steps_per_second="5"), "steps_per_second is '5'"),
    "a rate beyond all floats": (meta(steps_per_second=10**400), "steps_per_second is 1000"),
    "a rate below zero": (meta(steps_per_second=-1), "steps_per_second is -1"),
    "a folder for meta.json": (folder_for("meta.json"), "meta.json is not a file"),
    "a folder for the text": (folder_for("train-00000.jsonl"), "train-00000.jsonl is not a file"),
    "a folder for a shard": (folder_for("train-00000.safetensors"), "safetensors is not a file"),
    "a pipe for a shard": (pipe_for("train-00000.safetensors"), "safetensors is not a file"),
    "a pipe for the text": (pipe_for("train-00000.jsonl"), "train-00000.jsonl is not a file"),
    "a pipe for meta.json": (pipe_for("meta.json"), "meta.json is not a file"),
    "a link to nowhere": (dangling("train-00000.jsonl"), "train-00000.jsonl is missing"),
    "deeply nested JSON": (
        lambda folder: (folder / "meta.json").write_text("[" * 200_000),
        r"meta.json is not JSON \(nested too deep\)",
    ),
    "a deeply nested line": (
        line(lambda record: record.update(id="NEST")),
        r"line 3: is not JSON \(nested too deep\)",
    ),
    "half a character": (caption(text="w\ud800lk"), r"line 3: is not JSON \(no Unicode: "),
    "half a character in an id": (
        line(lambda record: record.update(id="\ud800")),
        r"line 3: is not JSON \(no Unicode: ",
    ),
    "a width that is no number": (meta(obs_dim="6"), r"meta.json: obs_dim is '6'"),
    "a caption beyond the end": (
        caption(end=41),
        r"line 3: caption 1: 11 .. 41 is no span in 0 .. 40",
    ),
    "a caption before the start": (caption(start=-1), r"line 3: caption 1: -1 .. 12 is no span"),
    "a caption that ends before it starts": (
        caption(end=3),
        r"line 3: caption 1: 11 .. 3 is no span",
    ),
    "a caption at half a step": (caption(start=3.5), r"line 3: caption 1: 3.5 .. 12 is no span"),
    "an empty caption": (caption(text="  "), r"line 3: caption 1: '  ' is no text"),
    "an absurdly long caption": (
        caption(text="wood " * 999),
        r"line 3: caption 1: not one line of at most 1,000 characters",
    ),
    "a caption without text": (
        line(lambda record: record["captions"][0].pop("text")),
        r"line 3: caption 0: not just start, end",
    ),
    "an annotated span outside": (
        line(lambda record: record.update(annotated=[[30, 50]])),
        r"line 3: annotated \[\[30, 50\]\] is neither",
    ),
    "no id": (line(lambda record: record.pop("id")), r"line 3: id None is no text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is_read_and_named_by_check(toy, fault, capsys):
    harm, message = FAULTS[fault]
    harm(toy)
    with pytest.raises(ValueError, match=message) as found:
        read_all(toy)
    assert "\n" not in str(found.value) and str(toy) in str(found.value)
    assert check(toy) == 1
    said = capsys.readouterr().out
    where = str(found.value).split(": ")[0].split(", step")[0]  # the file and the line or episode
    assert where in said


def test_a_sound_data_set_passes(toy, capsys):
    assert len(read_all(toy)) == 12
    assert check(toy) == 0 and "no fault" in capsys.readouterr().out


def test_check_reports_all_faults_at_once(toy, capsys):
    caption(end=41)(toy)
    flipped_text(toy)
    (toy / "val-00000.safetensors").write_bytes(b"")
    (toy / "test-00000.safetensors").unlink()
    assert check(toy) == 1
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_line_edited_by_hand_counts_once_its_crc_is_removed(toy):
    caption(text="wave")(toy)
    assert Episodes(toy, "train")[2].captions[1].text == "wave"


def test_what_a_reader_would_refuse_is_not_written(tmp_path):
    late = Episode("late", np.zeros((4, 6), np.float32), [Caption(3, 9, "wave")])
    with pytest.raises(ValueError, match="episode late: caption 0: 3 .. 9"):
        write_shard(tmp_path, "train", 0, [late])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32"])
def test_every_type_of_observation_comes_back_and_is_guarded(tmp_path, dtype):
    obs = (torch.rand(9, 3) * 9).to(getattr(torch, dtype))
    write_shard(tmp_path, "train", 0, [Episode("a", obs, []), Episode("b", obs[:5], [])])
    write_meta(tmp_path, obs_dim=3, dtype=dtype, steps_per_second=None, splits=["train"])
    episodes = Episodes(tmp_path, "train")
    assert torch.equal(episodes[1].window(2, 4), obs[2:4])
    path = tmp_path / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    at = bytes(data).index(obs.view(torch.uint8).numpy().tobytes())
    data[at + obs.element_size() * 3 * 7] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match="episode a, step 7"):
        episodes[0].window(5, 9)
    assert episodes[0].window(0, 7).shape == (7, 3)  # what is read is checked, no more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
def test_which_rows_are_finite_is_told_as_torch_tells_it(dtype):
    rows = torch.zeros(6, 3)
    rows[:5, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, -1e-30, 60000])
    assert (
        shards.finite(rows[:, 1:].to(dtype)).tolist() == rows.to(dtype).isfinite().all(1).tolist()
    )


def test_a_shard_that_is_lost_is_told(toy):
    write_shard(toy, "train", 1, [Episode("late", np.zeros((4, 6), np.float32), [])])
    (toy / "train-00000.safetensors").rename(toy / "elsewhere")
    with pytest.raises(ValueError, match="train-00000.safetensors is missing"):
        Episodes(toy, "train")


def other_set(toy, folder):
    """The toy data set, but for one caption and one observation."""
    shutil.copytree(toy, folder)
    episodes = Episodes(toy, "test")
    obs = episodes[2].obs.clone()
    obs[3, 3] += 1
    last = Episode("test-2", obs, [Caption(4, 5, "walk")])
    same = [Episode(f"test-{n}", episodes[n].obs, episodes[n].captions) for n in range(2)]
    write_shard(folder, "test", 0, [*same, last])
    write_meta(folder, **shards.read_meta(folder))
    return folder


@pytest.mark.parametrize("ending", [".safetensors", ".jsonl", ".*"])
def test_a_part_of_another_data_set_is_told(toy, tmp_path, capsys, ending):
    other = other_set(toy, tmp_path / "other")
    assert check(other) == 0
    for path in other.glob(f"test-00000{ending}"):
        shutil.copy(path, toy)
    capsys.readouterr()
    assert check(toy) == 1 and "of another data set" in capsys.readouterr().out
    with pytest.raises(ValueError, match="of another data set"):
        Episodes(toy, "test")


@pytest.mark.parametrize("other", [{}, {"train-1": np.ones((40, 2, 2, 3), np.uint8)}])
def test_pictures_of_another_data_set_are_told(toy, other):
    path, pictures = toy / "train-00000.safetensors", {"train-0": np.zeros((40, 2, 2, 3), np.uint8)}
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    runs = [torch.as_tensor(episode.obs) for episode in Episodes(toy, "train")]
    shards.write_rows(path, runs, records, pictures)
    kept = shards.pictures_path(path).read_bytes()
    shards.write_rows(path, runs, records, other)
    shards.pictures_path(path).write_bytes(kept)
    with pytest.raises(ValueError, match="pictures.safetensors: .*pictures of another data set"):
        shards.Shard(path).pictures("train-0")


def test_a_last_shard_that_is_lost_or_one_too_many_is_told(toy, capsys):
    write_shard(toy, "train", 1, [Episode("late", np.zeros((4, 6), np.float32), [])])
    with pytest.raises(ValueError, match="train-00001.safetensors: of another data set"):
        Episodes(toy, "train")
    assert check(toy) == 1
    write_meta(toy, **shards.read_meta(toy))
    assert check(toy) == 0
    for path in toy.glob("train-00001.*"):
        path.unlink()
    with pytest.raises(ValueError, match="train-00001.safetensors is missing"):
        Episodes(toy, "train")
    assert check(toy) == 1


@pytest.mark.parametrize("name", ["../evil/x", "/x", "train/../x", "x", "train\x1b[2J", ["val"]])
def test_what_is_no_name_of_a_split_is_refused_where_meta_json_is_read(toy, name):
    meta(splits=["train", name])(toy)
    with pytest.raises(ValueError, match="meta.json: splits is"):
        shards.read_meta(toy)
    meta(splits=["train"], parts={f"{name}-00000.safetensors": 1})(toy)
    with pytest.raises(ValueError, match="meta.json: parts is"):
        shards.read_meta(toy)


@pytest.mark.parametrize("split", ["/x", "../toy/train", "**/train", "", "tra"])
def test_a_split_that_is_none_is_one_line(toy, split):
    with pytest.raises(ValueError, match="meta.json names train, val, test"):
        Episodes(toy, split)


def test_a_shard_cut_off_while_it_is_read_is_told_and_one_replaced_is_read_on(toy):
    episodes = Episodes(toy, "train")
    whole, path = episodes[11].obs.clone(), toy / "train-00000.safetensors"
    content = path.read_bytes()
    path.with_name("other").write_bytes(content[:4000])
    os.replace(path.with_name("other"), path)  # another file: what is mapped stays
    assert torch.equal(episodes[11].obs, whole)
    path.write_bytes(content)
    episodes = Episodes(toy, "train")
    os.truncate(path, 4000)
    with pytest.raises(ValueError, match="train-00000.safetensors: cut off since it was opened"):
        episodes[11].window()


def test_the_identity_changes_with_one_observation_and_with_nothing_else(toy, tmp_path):
    other = other_set(toy, tmp_path / "other")
    same = [Episodes(folder, "train").identity() for folder in (toy, other)]
    assert same[0] == same[1]
    path = other / "train-00000.jsonl"
    obs(3.5)(other)
    assert Episodes(other, "train").identity() != same[0]
    assert path.read_text() == (toy / "train-00000.jsonl").read_text()

import json
import os
import pickle
import re
import unicodedata

import numpy as np
import pytest
import torch
from conftest import program, toy_episode
from safetensors import SafetensorError
from safetensors.torch import save_file

from encoder import MOST
from runtime import shards
from runtime.dataset import Caption, Episodes, read_text, write_shard
from runtime.files import alone
from runtime.shards import write_meta
from scripts import check, pack, show
from scripts.captions import read_caption


@pytest.fixture
def folder(tmp_path):
    """What a user has: ten .npy files of 30 steps, and captions for six of them."""
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    for n in range(10):
        np.save(tmp_path / f"raw/ep{n}.npy", rng.random((30, 4), dtype=np.float32))
    lines = [f'ep{n},{n},{n + 2},"say {n}, twice"\n' for n in range(6)]
    (tmp_path / "captions.csv").write_text("episode,start,end,text\n" + "".join(lines))
    return tmp_path


@pytest.fixture
def packed(folder, monkeypatch):
    """Packs with the settings given. Returns {id: (split, obs, captions, annotated)}."""

    def call(**settings):
        about = (
            dict(
                obs=str(folder / "raw/*"),
                captions=str(folder / "captions.csv"),
                out=str(folder / "mine"),
            )
            | settings
        )
        for name, value in about.items():
            monkeypatch.setattr(pack, name, value)
        pack.make()
        meta = json.loads((folder / "mine/meta.json").read_text())
        found = {}
        for split in meta["splits"]:
            for episode in Episodes(folder / "mine", split):
                assert episode.id not in found
                found[episode.id] = split, episode.obs, episode.captions, episode.annotated
        return found

    return call


def refused(packed, **settings):
    with pytest.raises((ValueError, OSError)) as error:
        packed(**settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_episode_is_packed_with_its_observations_and_captions(folder, packed):
    found = packed()
    assert sorted(found) == [f"ep{n}" for n in range(10)]
    for n in range(10):
        split, obs, captions, annotated = found[f"ep{n}"]
        assert np.array_equal(obs.numpy(), np.load(folder / f"raw/ep{n}.npy"))
        assert captions == ([Caption(n, n + 2, f"say {n}, twice")] if n < 6 else [])
        assert annotated == ("all" if n < 6 else []) and (n < 6 or split == "train")
    assert [
        sum(found[f"ep{n}"][0] == split for n in range(6)) for split in ("train", "val", "test")
    ] == [4, 1, 1]


def test_only_where_captions_are_counts_as_annotated_if_asked(folder, packed):
    packed(annotated="captions")
    for split in ("train", "val", "test"):
        for episode in Episodes(folder / "mine", split):
            known = episode.known
            assert all(known[caption.start] for caption in episode.captions)
            assert known.sum() < 15


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_other_files_and_their_types(folder, packed, kind):
    for path in (folder / "raw").glob("*"):
        path.unlink()
    arrays = {
        f"part{n}": torch.randint(0, 9, (12, 3)).to(
            [torch.float16, torch.bfloat16][kind == "safetensors"]
        )
        for n in range(4)
    }
    if kind == "npz":
        np.savez_compressed(folder / "raw/many.npz", **{k: x.numpy() for k, x in arrays.items()})
    else:
        save_file(arrays, folder / "raw/many.safetensors")
    found = packed(captions="")
    assert sorted(found) == [f"many/part{n}" for n in range(4)]
    assert all(torch.equal(found[f"many/{k}"][1], x.float()) for k, x in arrays.items())
    assert json.loads((folder / "mine/meta.json").read_text())["dtype"] == (
        "float16" if kind == "npz" else "bfloat16"
    )


def test_every_fourth_row_of_one_array_of_a_file_is_a_step(folder, packed):
    """As latents of VPT are stored, one for each frame, beside what the player did."""
    rows = torch.from_numpy(np.random.default_rng(0).random((21, 8), np.float32))
    for path in (folder / "raw").glob("*"):
        path.unlink()
    np.savez(folder / "raw/a.npz", embeddings=rows, is_null_action=np.zeros(21))
    np.save(folder / "raw/a-pictures.npy", np.arange(21 * 12, dtype=np.uint8).reshape(21, 2, 2, 3))
    for name in "bc":
        np.save(folder / f"raw/{name}.npy", rows + 1)
    said = [f"{name},0.2,0.4,chop a tree\n" for name in "abc"]
    (folder / "captions.csv").write_text("episode,start,end,text\n" + "".join(said))
    about = dict(obs=str(folder / "raw/*.np?"), fps=5.0, annotated="captions")
    assert "is_null_action shape (21,)" in refused(packed, **about)
    assert "not observations (ValueError: no array 'x'" in refused(packed, array="x", **about)
    found = packed(**about, array="embeddings", stride=4)
    assert torch.equal(found["a"][1], rows[::4]) and torch.equal(found["b"][1], rows[::4] + 1)
    assert found["a"][2:] == ([Caption(1, 2, "chop a tree")], [[1, 2]])
    [a] = Episodes(folder / "mine", found["a"][0])
    assert a.pictures[:, 0, 0, 0].tolist() == [12 * 4 * n % 256 for n in range(6)]


def test_times_in_seconds(folder, packed):
    (folder / "captions.csv").write_text(
        "episode,start,end,text\nep0,0.5,1.3,a\nep1,2,,b\nep2,2.9,99,c\n"
    )
    found = packed(fps=10.0)
    assert [found[f"ep{n}"][2][0][:2] for n in range(3)] == [(5, 13), (20, 21), (29, 30)]
    assert json.loads((folder / "mine/meta.json").read_text())["steps_per_second"] == 10
    message = refused(packed, fps=20.0, captions=str(folder / "captions.csv"))
    assert "episode ep1 has 1.5 seconds" in message
    found = packed(fps=1.0)  # a fraction of a second is no fraction of a step
    assert [found[f"ep{n}"][2][0][:2] for n in range(2)] == [(0, 2), (2, 3)]


@pytest.mark.parametrize("rate", [0.1, 7, 29.97, 30, 44100 / 512])
def test_steps_told_in_seconds_are_the_same_steps_again(rate):
    for step in range(10_000):
        row = dict(episode="a", start=step / rate, end=(step + 1) / rate, text="x", unit="seconds")
        assert read_caption(row, 10_000, rate) == (step, step + 1, "x")


def test_what_sample_py_writes_is_accepted_as_captions(folder, packed):
    line = dict(start=7, end=9, text="walk", unit="steps", kind="hit", sure=0.9, expected="")
    lines = [json.dumps(dict(episode=f"ep{n}") | line) for n in range(3)]
    (folder / "said.jsonl").write_text("\n".join(lines) + "\n\n")
    found = packed(captions=str(folder / "said.jsonl"), fps=10.0)
    assert [found[f"ep{n}"][2] for n in range(3)] == [[Caption(7, 9, "walk")]] * 3


def test_the_page_may_say_that_nothing_happens_in_a_span(folder, packed):
    about = dict(unit="steps", by="person")
    rows = dict(start=7, end=9, text="walk"), dict(start=12, end=20, text="")
    lines = [json.dumps(about | row | dict(episode=f"ep{n}")) for n in range(3) for row in rows]
    (folder / "said.jsonl").write_text("\n".join(lines))
    found = packed(captions=str(folder / "said.jsonl"), annotated="captions")
    assert found["ep0"][2:] == ([Caption(7, 9, "walk")], [[7, 9], [12, 20]])


def test_corrected_captions_join_the_first_ones_for_training(folder, packed):
    before = packed()
    held = [name for name, (split, *_) in before.items() if split != "train"]
    line = dict(start=7, end=9, text="walk", unit="steps", kind="hit", sure=0.9, expected="")
    written = ["ep7", "ep8", held[0]]
    (folder / "said.jsonl").write_text(
        "".join(json.dumps(dict(episode=name) | line) + "\n" for name in written)
        + '{"episode": "ep9"}\n'
    )
    found = packed(captions=f"{folder / 'captions.csv'},{folder / 'said.jsonl'}")
    assert [found[name][2] for name in [*written, "ep9"]] == [[Caption(7, 9, "walk")]] * 3 + [[]]
    assert [found[name][0] for name in [*written, "ep9"]] == ["train"] * 4 and found["ep9"][
        3
    ] == "all"  # checked: nothing happens
    assert found[held[1]][0] == before[held[1]][0] and found[held[1]][2] == before[held[1]][2]
    assert (
        sum(split == "train" and annotated == "all" for split, _, _, annotated in found.values())
        == 7
    )


def test_a_csv_line_with_the_episode_alone_says_that_nothing_happens_in_it(folder, packed):
    with open(folder / "captions.csv", "a") as f:
        f.write("ep8,,,\n")
    assert packed()["ep8"][2:] == ([], "all") and packed()["ep9"][3] == []


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def test_a_file_that_cannot_be_packed_leaves_the_data_set_as_it_was(folder, packed, monkeypatch):
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4)  # one episode a shard
    packed()
    before = contents(folder / "mine")
    np.save(folder / "raw/ep0.npy", np.ones((30, 4), np.float32))  # its shard comes first
    np.save(folder / "raw/ep3.npy", np.full((30, 4), np.nan, np.float32))
    assert "ep3.npy, step 0: not a finite number" in refused(packed)
    assert contents(folder / "mine") == before


def test_captions_that_cannot_be_packed_leave_the_data_set_as_it_was(folder, packed):
    packed()
    before = contents(folder / "mine")
    with open(folder / "captions.csv", "a") as file:
        file.write("ep1,3,4," + "wood " * 300 + "\n")
    assert "line 8: not one line of at most 1,000" in refused(packed)
    assert contents(folder / "mine") == before


def test_a_folder_in_place_of_a_shard_leaves_the_rest_as_it_was(folder, packed):
    packed()
    shard = folder / "mine/train-00000.safetensors"
    shard.unlink()
    shard.mkdir()
    before = sorted((folder / "mine").iterdir())
    assert "train-00000.safetensors is a folder: remove it" in refused(packed)
    assert sorted((folder / "mine").iterdir()) == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-60] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove])
@pytest.mark.parametrize("suffix", [".safetensors", ".jsonl"])
def test_a_damaged_shard_is_packed_again(folder, packed, monkeypatch, damage, suffix):
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4 * 2)  # two episodes a shard
    packed()
    before = contents(folder / "mine")
    damage(folder / f"mine/train-00001{suffix}")
    assert check.check(folder / "mine") == 1
    write, written = pack.write_shard, []
    monkeypatch.setattr(pack, "write_shard", lambda *a: written.append(a[1:3]) or write(*a))
    packed()
    assert written == [("train", 1)] and check.check(folder / "mine") == 0
    after = contents(folder / "mine")
    assert json.loads(after.pop("packed.json")) == json.loads(before.pop("packed.json"))
    assert after == before


def test_a_stopped_call_goes_on_and_gives_the_same(folder, packed, monkeypatch):
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4 * 2)  # two episodes a shard
    packed()
    whole = {p.name: p.read_bytes() for p in (folder / "mine").glob("*")}
    for path in (folder / "mine").glob("*"):
        path.unlink()
    write, written = pack.write_shard, []

    def interrupted(*arguments):
        if len(written) >= 3:
            raise KeyboardInterrupt
        written.append(arguments[1:3])
        write(*arguments)

    monkeypatch.setattr(pack, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed()
    assert not (folder / "mine/meta.json").exists()  # not yet a data set
    monkeypatch.setattr(pack, "write_shard", lambda *a: written.append(a[1:3]) or write(*a))
    packed()
    assert (
        len(written) == len(set(written))
        and {p.name: p.read_bytes() for p in (folder / "mine").glob("*")} == whole
    )
    (folder / "captions.csv").write_text(
        (folder / "captions.csv").read_text().replace("say", "shout")
    )
    monkeypatch.setattr(pack, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed()
    assert check.check(folder / "mine") == 0  # still the old data set, whole
    assert contents(folder / "mine") == {x: y for x, y in whole.items() if x[0] != "."}


@pytest.fixture
def in_parts(folder, packed, monkeypatch):
    """Two episodes a shard: `packed` into "mine" at once, then part after part into "parts"."""
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4 * 2)
    packed()
    monkeypatch.setattr(pack, "out", str(folder / "parts"))

    def call(part):
        monkeypatch.setattr(pack, "part", part)
        pack.make()

    return call


def test_joined_parts_are_the_files_of_one_call(folder, in_parts, monkeypatch):
    write, written = pack.write_shard, []

    def dies(*arguments):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(arguments[1:3])
        write(*arguments)

    monkeypatch.setattr(pack, "write_shard", dies)
    in_parts("2/2")
    assert written and not (folder / "parts/meta.json").exists()  # not yet a data set
    with pytest.raises(KeyboardInterrupt):
        in_parts("1/2")
    monkeypatch.setattr(pack, "write_shard", lambda *a: written.append(a[1:3]) or write(*a))
    in_parts("1/2")
    assert len(written) == len(set(written)) == len(list(folder.glob("mine/*.safetensors")))
    monkeypatch.setattr(pack, "write_shard", None)  # to join them is to write none
    in_parts("")
    assert contents(folder / "parts") == contents(folder / "mine")


def test_what_a_part_lacks_or_packed_otherwise_is_packed_as_they_are_joined(folder, in_parts):
    in_parts("3/3")
    lines = (folder / "captions.csv").read_text()
    (folder / "captions.csv").write_text(lines.replace("say", "shout"))
    in_parts("1/3")
    (folder / "captions.csv").write_text(lines)
    in_parts("")
    of_both = contents(folder / "parts"), contents(folder / "mine")
    packed = [json.loads(of.pop("packed.json")) for of in of_both]
    assert packed[0] == packed[1] and of_both[0] == of_both[1]


def test_no_part_replaces_a_data_set(folder, in_parts, monkeypatch):
    in_parts("")
    in_parts("2/3")  # all is there
    np.save(folder / "raw/ep7.npy", np.ones((30, 4), np.float32))
    with pytest.raises(ValueError, match="parts: no part replaces a data set"):
        for n in "123":
            in_parts(f"{n}/3")
    for wrong in ("4/3", "0/3", "3", "a/b"):
        with pytest.raises(ValueError, match=f"--part={wrong}: as 3/64, the third of 64"):
            in_parts(wrong)


def test_changed_captions_repack_only_their_shard(folder, packed, monkeypatch):
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4)
    packed()
    text = (folder / "captions.csv").read_text().replace("say 3", "shout 3")
    (folder / "captions.csv").write_text(text)
    write, written = pack.write_shard, []
    monkeypatch.setattr(pack, "write_shard", lambda *a: written.append(a[3][0].id) or write(*a))
    assert packed()["ep3"][2][0].text == "shout 3, twice" and written == ["ep3"]


def test_fewer_files_leave_no_old_shards(folder, packed, monkeypatch):
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4)
    for n in range(10):
        np.save(folder / f"raw/ep{n}-pictures.npy", np.zeros((30, 1, 1, 3), np.uint8))
    packed()
    for n in range(6, 10):
        (folder / f"raw/ep{n}.npy").unlink()
        (folder / f"raw/ep{n}-pictures.npy").unlink()
    assert sorted(packed()) == [f"ep{n}" for n in range(6)]
    for path in (folder / "mine").glob("*-pictures.safetensors"):
        assert path.with_stem(path.stem.removesuffix("-pictures")).exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("epp3,1,2,walk", "line 8: no episode 'epp3'; did you mean 'ep3'?"),
        ("ep1,30,31,walk", "line 8: start 30, end 31; episode ep1 has steps 0 .. 29"),
        ("ep1,5,4,walk", "line 8: start 5, end 4: it ends before it starts"),
        ("ep1,x,4,walk", "not numbers"),
        ("ep1,1" + "0" * 400 + ",,walk", "0, end ; episode ep1 has steps 0 .. 29"),
        ("ep1,3,4," + "x" * 140_000, "line 8: not one line of at most 1,000"),
        ("ep1,3,4, ", "line 8: no text"),
        ("ep1,3,4,\u200b", "nothing of it can be seen"),
        ("ep1,nan,4,walk", "start nan"),
        ("ep1,-1,4,walk", "start -1"),
        ("ep1,4.8,,walk", "line 8: start 4.8, end : a step is a whole number"),
        ("ep1,3,,hello, world", "line 8: more fields than columns"),
    ],
)
def test_a_wrong_caption_is_one_line_that_names_it(folder, packed, line, message):
    with open(folder / "captions.csv", "a") as f:
        f.write(line + "\n")
    assert message in refused(packed)


@pytest.mark.parametrize(
    "content, settings, message",
    [
        (b"episode,start,text\n", {}, "no captions in it"),
        (
            b"episode|start|text\nep1|1|a\n",
            {},
            "the columns are episode,start,end,text; missing",
        ),
        (b"episode,start,text\nep1,1,caf\xe9 \xc3\xa9\n", {}, "line 2: not UTF-8"),
        (b"episode,start,text\nep1,1,a\n", dict(annotated="captions"), "no line has an end"),
        (b"episode,start,start,text\nep1,1,2,a\n", {}, "two columns are called start"),
    ],
)
def test_a_wrong_captions_file_is_one_line(folder, packed, content, settings, message):
    (folder / "captions.csv").write_bytes(content)
    assert message in refused(packed, **settings)


def test_numbers_of_the_other_byte_order_are_the_same_numbers(folder, packed):
    x = np.random.default_rng(0).random((30, 4), dtype=np.float32)
    np.save(folder / "raw/ep3.npy", x.astype(">f4"))
    assert np.array_equal(packed()["ep3"][1].numpy(), x)


def test_wrong_observations_are_one_line_that_names_them(folder, packed):
    assert "no such files" in refused(packed, obs="nowhere/*.npy")
    assert f"raw is a folder; its files are --obs='{folder}/raw/*'" in refused(
        packed, obs=f"{folder}/raw"
    )
    x = np.zeros((30, 4), np.float32)
    x[12, 2] = np.nan
    np.save(folder / "raw/ep3.npy", x)
    assert "ep3.npy, step 12: not a finite number" in refused(packed)
    np.save(folder / "raw/ep3.npy", np.zeros((30, 5), np.float32))
    assert "observations differ in dims: 4 in" in refused(packed)
    np.save(folder / "raw/ep3.npy", np.zeros((30, 2, 2), np.float32))
    assert "ep3.npy: shape (30, 2, 2); observations are (steps, dims)" in refused(packed)
    for wrong in (np.zeros((30, 4), np.complex64), np.full((30, 4), "a")):
        np.save(folder / "raw/ep3.npy", wrong)
        assert "observations are real numbers" in refused(packed)
    (folder / "a-file").touch()
    assert "a-file" in refused(
        packed, obs=str(folder / "raw/ep1.npy"), captions="", out=str(folder / "a-file")
    )
    for content in (b"no array", pickle.dumps([1])):
        (folder / "raw/ep3.npy").write_bytes(content)
        message = refused(packed)
        assert "ep3.npy: not observations" in message and "pickle" not in message


@pytest.mark.parametrize(
    "line, message",
    [
        ('"start": 1' + "0" * 400 + ', "text": "walk"', "line 1: start 1000.*: not numbers"),
        ('"start": true, "text": "walk"', "line 1: start True, end None: not numbers"),
        ('"start": 3, "text": ["walk"]', "line 1: text .'walk'.: not a string"),
        ('"start": 3, "text": "w\\ud800lk"', "line 1: not a JSON object"),
        ('"start": 3, "text": ' + "[" * 200_000, "line 1: not a JSON object"),
    ],
)
def test_a_wrong_line_of_json_is_one_line_that_names_it(folder, packed, line, message):
    path = folder / "captions.jsonl"
    path.write_text('{"episode": "ep1", ' + line + "}\n")
    assert re.search(message, refused(packed, captions=str(path)))


def test_a_quote_left_open_is_warned_of(folder, packed, capsys):
    with open(folder / "captions.csv", "a") as file:
        file.write('ep1,3,4,"walk\nep2,3,4,walk\nep3,3,4,walk\n')
    packed()
    warning = "captions.csv, line 10: a caption of several lines (1 in all): is a quote left open?"
    assert warning in capsys.readouterr().err


def test_times_that_would_fit_as_steps_are_warned_of_where_a_step_takes_seconds(
    folder, packed, capsys
):
    packed(fps=0.1)
    warning = "captions.csv: with --fps=0.1 all captions start in the first 10 % of their episodes"
    assert warning in capsys.readouterr().err
    text = (folder / "captions.csv").read_text()
    (folder / "captions.csv").write_text(text + "ep1,290,,walk\n")  # as steps there are only 30
    packed(fps=0.1)
    assert "all captions" not in capsys.readouterr().err
    in_steps = "episode,start,end,text,unit\n" + "".join(
        f"ep{n},{n},,walk,steps\n" for n in range(6)
    )
    (folder / "captions.csv").write_text(in_steps)
    assert packed(fps=0.1)["ep5"][2] == [Caption(5, 6, "walk")]
    assert "all captions" not in capsys.readouterr().err


def test_where_no_caption_starts_late_in_its_episode_the_unit_is_asked_for(folder, packed, capsys):
    head, rows = "episode,start,text\n", [f"ep{n},{t},walk\n" for n in range(5) for t in (1, 14)]
    (folder / "captions.csv").write_text(head + "".join(rows))
    packed()
    told = "no caption starts in the second half of its episode: times in seconds want --fps=..\n"
    assert capsys.readouterr().err.endswith(told)
    packed(fps=1.0)
    assert "of its episode: are the times seconds?" in capsys.readouterr().err
    packed(captions="", text=str(folder / "captions.csv"))
    (folder / "captions.csv").write_text(head + "".join(rows) + "ep5,15,walk\n")
    packed()
    assert "second half" not in capsys.readouterr().err


def test_episodes_of_a_video_keep_their_steps_a_second(folder, packed):
    (folder / "raw/frames.json").write_text(json.dumps(dict(fps=5.0, pictures=0, videos={})))
    files = dict(obs=str(folder / "raw/*.npy"))
    assert "--fps=10: scripts.frames made them with --fps=5.0" in refused(packed, fps=10.0, **files)
    assert len(packed(fps=5.0, **files)) == len(packed(**files)) == 10


def test_what_a_new_data_set_replaces_is_told_in_one_line(folder, packed, capsys):
    packed(fps=1.0)
    packed(fps=1.0)
    assert "replaces" not in capsys.readouterr().err
    replaced = f"{folder / 'mine'}: replaces a data set (10 episodes with 6 captions, made 20"
    packed(fps=5.0, captions="")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "replaces" in x]
    assert line.startswith(replaced) and "steps_per_second 1.0" in line
    packed(captions="", source="elsewhere")  # no shard changes
    assert "10 episodes with 0 captions" in capsys.readouterr().err


def test_unusual_observations_are_packed_or_refused_in_one_line(folder, packed):
    x = np.random.default_rng(0).random((30, 4))
    np.save(folder / "raw/ep3.npy", x.astype(np.longdouble))
    assert np.allclose(packed()["ep3"][1].numpy(), x)
    for name, tensor in dict(scalar=torch.tensor(1.0), complex=torch.ones(30, 4) * 1j).items():
        save_file({"x": tensor}, folder / f"{name}.safetensors")
        message = refused(packed, obs=str(folder / f"{name}.safetensors"))
        assert "observations are " in message
    for option in ("obs", "captions"):
        path = folder / f"{option}.npy"
        os.mkfifo(path)
        assert f"{path} is not a file" in refused(packed, **{option: str(path)})
    with open(folder / "two.npy", "wb") as file:
        np.save(file, x)
        np.save(file, x)
    assert "more in it than one array" in refused(packed, obs=str(folder / "two.npy"))
    (folder / "raw/ep3.npy").rename(folder / "ep3.npz")
    assert "ep3.npz: not observations (BadZipFile" in refused(packed, obs=str(folder / "*.npz"))
    (folder / "raw/ep4.npy").rename(folder / "raw/ep\n4.npy")
    assert "is no text; rename it" in refused(packed)


def test_a_broken_packed_json_packs_all_again(folder, packed):
    packed()
    before = contents(folder / "mine")
    for text in ("[", "[]", "{}"):
        (folder / "mine/packed.json").write_text(text)
        packed()
        assert contents(folder / "mine") == before
    (folder / "mine/packed.json").unlink()
    (folder / "mine/packed.json").mkdir()
    assert "was not packed here" in refused(packed)


def test_a_data_set_made_by_others_is_not_touched(toy, folder, packed):
    assert "was not packed here" in refused(packed, out=str(toy))
    assert len(Episodes(toy, "train")) == 12


def test_pack_and_show_at_the_prompt(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pack_it = "scripts/pack.py", "--obs=raw/*.npy", "--captions=captions.csv", "--out=mine"
    code, out, err = program(*pack_it)
    assert code == 0, err
    assert "10 episodes, 300 steps of 4 float32, 6 episodes annotated with 6 captions" in out
    assert "--annotated='all'" in program("scripts/pack.py", "--help")[1]
    assert "did you mean 'captions'" in program("scripts/pack.py", "--caption=x")[2]
    code, out, err = program("scripts/show.py", "mine")
    assert code == 0 and "train: 8 episodes of 30 to 30 steps" in out, err
    assert "no such folder" in program("scripts/show.py", "min")[2]


def test_show_warns_of_what_will_hurt(folder, packed, capsys):
    rng = np.random.default_rng(1)
    for n in range(10):
        x = rng.random((1300, 4), dtype=np.float32)
        x[:, 1], x[:, 2] = 7, x[:, 2] * 1e-4
        x[:, 3] = (n == 2) * (np.arange(1300) == 0) * 1e3
        np.save(folder / f"raw/ep{n}.npy", x)
    np.save(folder / "raw/ep3.npy", x)  # as ep9
    long = " ".join(["walk over to the door"] * 13)  # of 65 tokens
    spelt = "".join(f"ep{n},20,,{'Jump.' if n % 2 else 'jump'}\n" for n in range(6))
    rows = [f"ep{n},{t},,{text}\n" for n in range(6) for t, text in ((3, long), (9, f"door {n}"))]
    (folder / "captions.csv").write_text("episode,start,end,text\n" + "".join(rows) + spelt)
    packed()
    show.show(str(folder / "mine"))
    said = capsys.readouterr().out
    for warning in (
        "1 of 4 features (from 0 on: 1) never change",
        "1 of 4 features (from 0 on: 2) have a standard deviation below 0.01",
        "1 of 4 features (from 0 on: 3) have values more than 100 standard deviations",
        f"train: 4 steps have more than the {MOST} tokens written",
        "texts that no training episode has",
        "identical episodes: ",
        "1 texts are spelt in several ways, as 'Jump.', 'jump': two texts to F1",
    ):
        assert f"{warning}" in said, warning


def test_an_absurd_number_is_warned_of_and_spoils_no_statistic(folder, packed, capsys):
    packed()
    show.show(str(folder / "mine"))
    usual = capsys.readouterr().out
    x = np.load(folder / "raw/ep2.npy")
    x[12, 2] = 1e25
    np.save(folder / "raw/ep2.npy", x)
    packed()
    capsys.readouterr()
    show.show(str(folder / "mine"))
    said = capsys.readouterr().out
    assert check.check(folder / "mine") == 0
    warning = "episode ep2: 1e+25 at step 12, feature 2: over a million times what is usual"
    assert warning in said and warning in capsys.readouterr().out
    spread = "standard deviation of a feature (.*) to (.*), median (.*)"
    numbers = [[float(n) for n in re.search(spread, text).groups()] for text in (usual, said)]
    assert numbers[1] == pytest.approx(numbers[0], rel=0.05)
    rows = torch.full((30, 2), 1.7e9)  # large, but all of it is: seconds since 1970
    assert not shards.absurd(rows).any()


def test_show_measures_what_is_there(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        write_shard(tmp_path, split, 0, [toy_episode(f"{split}{n}", rng) for n in range(30)])
    write_meta(
        tmp_path,
        obs_dim=6,
        dtype="float32",
        steps_per_second=2,
        source="toy",
        licence="",
        splits=["train", "val", "test"],
    )
    splits = {split: Episodes(tmp_path, split) for split in ("train", "val", "test")}
    every = torch.cat([e[i].obs for e in splits.values() for i in range(30)])
    mean, std, least, most, *_ = show.observation_statistics(splits)
    torch.testing.assert_close(mean, every.double().mean(0))
    torch.testing.assert_close(std, every.double().std(0, correction=0))
    assert torch.equal(least.float(), every.amin(0)) and torch.equal(most.float(), every.amax(0))
    show.show(str(tmp_path))
    said = capsys.readouterr().out
    assert "30 episodes of 40 to 40 steps (20 to 20 s), 1,200 steps, 0.17 hours at 2" in said
    assert "warning: none" in said
    assert "120 captions, 3 different" in said


def test_pictures_beside_an_episode_are_packed_with_it(folder, packed):
    frames = np.random.default_rng(1).integers(0, 256, (2, 30, 4, 6, 3), dtype=np.uint8)
    for x in frames:  # the second time they have changed, nothing else
        np.save(folder / "raw/ep7-pictures.npy", x)
        assert sorted(packed()) == [f"ep{n}" for n in range(10)]
        episodes = Episodes(folder / "mine", "train")
        shown = {episode.id: episode.pictures for episode in episodes}
        assert np.array_equal(shown.pop("ep7"), x) and set(shown.values()) == {None}


@pytest.mark.parametrize("shape", [(29, 4, 6, 3), (30, 4, 6), (30, 0, 6, 3), (30, 4, 6, 4)])
def test_what_are_no_pictures_of_an_episode_is_told(folder, packed, shape):
    np.save(folder / "raw/ep7-pictures.npy", np.zeros(shape, np.uint8))
    assert "(30, h, w, 3) uint8" in refused(packed)


def test_a_shard_has_room_for_pictures(folder, packed, monkeypatch):
    for n in range(10):
        np.save(folder / f"raw/ep{n}-pictures.npy", np.zeros((30, 8, 8, 3), np.uint8))
    monkeypatch.setattr(pack, "SHARD", 70 * (8 * 8 * 3 + 4 * 4))  # of 70 steps
    packed()
    assert max(len(shards.Shard(p).records()) for p in shards.shard_paths(folder / "mine")) == 2


def test_what_nobody_annotated_can_be_trained_on_as_well(folder, packed):
    packed(captions="")
    for split in ("train", "val", "test"):
        episodes = Episodes(folder / "mine", split)
        assert len(episodes) and not any(episode.known.any() for episode in episodes)


def test_text_of_other_episodes_is_packed_beside(folder, packed):
    rows = "other1,3,,say twice\nother1,9,,never seen\nother2,1,,say twice\n"
    (folder / "text.csv").write_text("episode,start,end,text\n" + rows)
    packed(text=str(folder / "text.csv"))
    told = [[(c.start, c.text) for c in captions] for captions in read_text(folder / "mine")]
    assert told == [[(3, "say twice"), (9, "never seen")], [(1, "say twice")]]
    packed(text="")
    assert read_text(folder / "mine") == []


def test_a_caption_that_comes_twice_is_read_once_and_told(folder, packed, capsys):
    lines = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join([*lines, *lines[-2:], "ep5,5,6,go"]) + "\n")
    assert packed()["ep5"][2] == [Caption(5, 6, "go"), Caption(5, 7, "say 5, twice")]
    told = "read once (2 in all): 'say 4, twice' of ep4 at step 4\n"
    assert capsys.readouterr().err.endswith(told)


def test_dropped_features_are_left_out_and_the_others_keep_their_names(folder, packed):
    names = ["speed", "é", "always one", "z"]
    (folder / "raw/features.txt").write_text("\n".join(names), encoding="utf-8")
    for n in range(10):
        x = np.load(folder / f"raw/ep{n}.npy")
        x[:, 2] = np.nan  # of no use, so that it may be left out
        np.save(folder / f"raw/ep{n}.npy", x)
    assert "not a finite number" in refused(packed)
    found = packed(drop="2, e\u0301")
    for n in range(10):
        assert np.array_equal(
            found[f"ep{n}"][1].numpy(), np.load(folder / f"raw/ep{n}.npy")[:, [0, 3]]
        )
    lines = (folder / "mine/features.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["speed", "z"] and Episodes(folder / "mine", "train").meta["obs_dim"] == 2
    assert packed(drop="2")["ep0"][1].shape == (30, 3)
    assert "no feature 'speeed'; did you mean 'speed'?" in refused(packed, drop="speeed")
    assert "no feature is left" in refused(packed, drop="0,1,2,3")
    (folder / "raw/features.txt").write_text("speed\n2\nspeed\n0\n")
    for drop, left in {"speed": [1, 3], "2": [0, 1, 3]}.items():  # both; and a number is no name
        assert np.array_equal(packed(drop=drop)["ep0"][1], np.load(folder / "raw/ep0.npy")[:, left])
    (folder / "raw/features.txt").write_text("\n".join(names), encoding="latin-1")
    packed(drop="2")
    assert (folder / "mine/features.txt").read_text(encoding="utf-8") == "speed\né\nz\n"
    (folder / "raw/features.txt").write_bytes(b"\xff\xfe\x00\xd8")
    assert "raw/features.txt: line 1: not UTF-8" in refused(packed, drop="2")
    (folder / "more").mkdir()
    np.save(folder / "more/x.npy", np.ones((3, 4), np.float32))
    (folder / "raw/features.txt").write_text("a\nb\nc\nd\n")
    (folder / "more/features.txt").write_text("b\na\nc\nd\n")
    both = refused(packed, obs=str(folder / "*/*.npy"))
    assert "more/features.txt and " in both and "raw/features.txt differ" in both
    (folder / "raw/features.txt").write_text("speed\n")
    assert "features.txt: 1 lines; 4 features want a name each" in refused(packed)


def test_names_of_files_are_composed(folder, packed):
    names = {n: f"caf\u00e9{n}" for n in range(10)}
    for n, name in names.items():
        decomposed = unicodedata.normalize("NFD", name)
        (folder / f"raw/ep{n}.npy").rename(folder / f"raw/{decomposed}.npy")
    np.save(folder / f"raw/{decomposed}-pictures.npy", np.zeros((30, 2, 2, 3), np.uint8))
    text = (folder / "captions.csv").read_text().replace("\nep", "\ncaf\u00e9")
    (folder / "captions.csv").write_text(text, encoding="utf-8")
    found = packed()
    assert sorted(found) == sorted(names.values()) and found[names[5]][2]
    episodes = Episodes(folder / "mine", found[names[9]][0])
    [episode] = [episode for episode in episodes if episode.id == names[9]]
    assert episode.pictures.shape == (30, 2, 2, 3)


def test_captions_in_a_file_an_episode_are_packed_by_a_pattern(folder, packed):
    for n in range(4):
        label = f"0.{n}\t0.{n}\tbeep\n" * (n < 3)
        (folder / f"ep{n}.txt").write_text(label)
    rows = "".join(f'ep{n},0.{n},,"say {n}, twice"\n' for n in range(3, 6))
    (folder / "captions.csv").write_text("episode,start,end,text\n" + rows)
    found = packed(captions=f"{folder / 'captions.csv'},{folder}/ep?.txt", fps=10.0)
    said = [[c.text for c in found[f"ep{n}"][2]] for n in range(6)]
    assert said == [["beep"]] * 3 + [[], ["say 4, twice"], ["say 5, twice"]]
    assert found["ep3"][3] == "all"  # nothing happens in it
    assert "nowhere.eaf is missing" in refused(packed, captions="nowhere.eaf", fps=10.0)


def edit_captions(folder, old, new):
    path = folder / "captions.csv"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("renamed", [0, 2, 5])
def test_a_call_that_ends_while_it_renames_is_mended_by_the_next(
    folder, packed, monkeypatch, renamed
):
    monkeypatch.setattr(pack, "SHARD", 30 * 4 * 4 * 2)  # two episodes a shard
    packed()
    edit_captions(folder, "say", "shout")
    replace, done = os.replace, []

    def interrupted(source, target):
        if pack.NEW in str(source) and str(target).startswith(str(folder / "mine/t")):
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed()
    assert check.check(folder / "mine") == 1  # told, not half one and half the other
    found = packed()
    assert {c.text[:5] for _, _, captions, _ in found.values() for c in captions} == {"shout"}
    assert check.check(folder / "mine") == 0 and not (folder / "mine" / pack.NEW).exists()


def test_a_full_disk_leaves_the_old_data_set_and_text_and_is_one_line(folder, packed, monkeypatch):
    (folder / "other.csv").write_text("episode,start,text\nx,3,walk\n")
    packed(text=str(folder / "other.csv"))
    before = contents(folder / "mine")
    edit_captions(folder, "say", "shout")

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.save_file", full)
        assert "cannot be written: I/O error: No space left" in refused(packed, text="")
    assert contents(folder / "mine") == before and check.check(folder / "mine") == 0
    assert packed()["ep3"][2][0].text == "shout 3, twice"


def test_what_is_not_replaced_is_not_told_as_replaced(folder, packed, monkeypatch, capsys):
    packed()
    before, write = contents(folder / "mine"), pack.write_json
    edit_captions(folder, "say", "shout")

    def full(value, path):
        if path == folder / "mine/packed.json":
            raise OSError("No space left on device")
        write(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_json", full)
        assert refused(packed) == "No space left on device" and not capsys.readouterr().err
    assert contents(folder / "mine") == before
    packed()
    assert "replaces a data set" in capsys.readouterr().err


def test_files_of_the_same_size_and_time_but_other_content_are_packed_again(folder, packed):
    (folder / "raw/ep0-pictures.npy").write_bytes(b"")  # then of a size that stays the same
    np.save(folder / "raw/ep0-pictures.npy", np.zeros((30, 1, 1, 3), np.uint8))
    packed()
    for name, array in {
        "ep0-pictures": np.full((30, 1, 1, 3), 7, np.uint8),
        "ep9": np.full((30, 4), 5, np.float32),
    }.items():
        path = folder / f"raw/{name}.npy"
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        np.save(path, array)
        os.utime(path, ns=times)
    found = packed()
    assert (found["ep9"][1] == 5).all()
    episodes = Episodes(folder / "mine", found["ep0"][0])
    [episode] = [episode for episode in episodes if episode.id == "ep0"]
    assert (episode.pictures == 7).all()


def test_a_pipe_in_place_of_a_text_is_replaced(folder, packed):
    found = packed()
    (folder / "mine/train-00000.jsonl").unlink()
    os.mkfifo(folder / "mine/train-00000.jsonl")
    again = packed()
    assert {name: about[2] for name, about in again.items()} == {x: y[2] for x, y in found.items()}


def test_two_calls_never_write_into_one_folder(folder, packed):
    packed()
    before = contents(folder / "mine")
    edit_captions(folder, "say", "shout")
    with alone(folder / "mine"):
        assert "another run writes there" in refused(packed)
    assert contents(folder / "mine") == before
    packed()


def test_what_a_killed_call_left_is_removed_by_the_next(folder, packed):
    packed()
    before = sorted(path.name for path in (folder / "mine").iterdir())
    (folder / "mine" / pack.NEW).mkdir()
    for name in ".tmpAbC123", ".test-00000-pictures.safetensors.77.new", f"{pack.NEW}/.x.8.new":
        (folder / "mine" / name).touch()
    packed()
    assert sorted(path.name for path in (folder / "mine").iterdir()) == before


@pytest.mark.parametrize("group", ["(x)?", "x*", "a{99999999999}", "(" * 2000])
def test_a_group_that_finds_nothing_or_is_no_pattern_is_one_line(folder, packed, group):
    assert f"--group={group}: " in refused(packed, group=group)


def test_an_array_beyond_all_memory_is_one_line(folder, packed):
    huge = np.lib.format.open_memmap(folder / "raw/ep9.npy", "w+", np.float32, (25 * 10**9, 4))
    huge.flush()  # sparse: it takes no room
    assert "ep9.npy: as float32 has 400 GB, and memory is" in refused(packed)

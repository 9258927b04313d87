"""From recordings to episodes: nothing is lost, or done twice."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from vpt_made import (
    ROOT,
    SYNTHETIC,
    make_recording,
    relative,
    save_weights,
    small,
    tick,
    vpt,
    with_samples,
)

from domains.vpt import embed as command
from domains.vpt import episodes as writing
from domains.vpt import recordings
from domains.vpt.episodes import Writer, read_annotations, split_of
from domains.vpt.recordings import draw_arrow, pictures, read_lines
from runtime.dataset import Caption, Episodes
from scripts.check import check

pytest.importorskip("av")


def played(steps=40):
    """Logs mined at lines 9 and 15, the inventory open from 20 to 27, a cow killed at 30."""
    return [
        tick(
            {"custom:play_one_minute": 500 + i, "mine_block:dirt": 7}
            | ({"mine_block:oak_log": 1 + (i >= 15)} if i >= 9 else {})
            | ({"kill_entity:cow": 1} if i >= 30 else {}),
            gui=20 <= i < 28,
            inventory=20 <= i < 28,
        )
        for i in range(steps)
    ]


def embed(tmp_path, *args, out="data"):
    return vpt(
        "embed",
        f"--weights={tmp_path}/a.weights",
        f"--recordings={tmp_path}/rec",
        f"--out={tmp_path / out}",
        "--workers=2",
        "--device=cpu",
        *args,
    )


def episodes(folder):
    """{id: (obs (N, D), captions, annotated)} of all splits, each id once."""
    found = {}
    for split in json.loads((folder / "meta.json").read_text())["splits"]:
        for episode in Episodes(folder, split):
            assert episode.id not in found
            found[episode.id] = episode.obs, episode.captions, episode.annotated
    return found


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path / "a.weights")
    make_recording(tmp_path / "rec", "ann-0123456789ab-20220101-000000", played())
    return tmp_path


def test_an_episode_holds_the_latents_of_every_fourth_frame_and_the_captions(folder):
    status, out, err = embed(folder)
    assert status == 0, err
    ((stem, (obs, captions, annotated)),) = episodes(folder / "data").items()
    mp4 = folder / f"rec/{stem}.mp4"
    seen = np.stack(list(pictures(mp4, read_lines(mp4.with_suffix(".jsonl")), 32, draw_arrow())))
    latent, _ = small()(
        torch.from_numpy(seen)[None], torch.zeros(1, dtype=torch.bool)
    )  # all frames at once
    assert relative(obs, latent[0, ::4]) < 5e-3  # bfloat16
    assert annotated == "all" and captions == [
        Caption(4, 5, "mine two oak logs"),
        Caption(5, 7, "open the inventory"),
        Caption(8, 9, "kill a cow"),
    ]
    assert relative(command.embed_recording(mp4, small(), 4, draw_arrow()).float(), obs) < 5e-3
    meta = json.loads((folder / "data/meta.json").read_text())
    assert (meta["obs_dim"], meta["dtype"], meta["steps_per_second"]) == (32, "bfloat16", 5)
    assert "40 frames" in out and "limit" in out


@pytest.mark.parametrize("stride", [1, 3, 4, 7])
def test_steps_are_the_same_however_the_frames_are_chunked(folder, stride, monkeypatch):
    mp4 = next((folder / "rec").glob("*.mp4"))
    whole = command.embed_recording(mp4, small(), stride, draw_arrow()).float()
    monkeypatch.setattr(recordings, "CHUNK", 5)
    again = command.embed_recording(mp4, small(), stride, draw_arrow()).float()
    assert len(whole) == -(-40 // stride) and relative(again, whole) < 5e-3


def test_bad_recordings_are_skipped_counted_and_done_once_they_are_repaired(folder):
    rec = folder / "rec"
    make_recording(rec, "twelve-more", played(), extra=12)
    make_recording(rec, "all-broken", ["x"] * 20)
    make_recording(rec, "some-broken", [*played()[:10], "x", b"\xff", *played()[12:]])
    make_recording(rec, "empty", [""])
    make_recording(rec, "without", played()).with_suffix(".jsonl").unlink()
    (rec / "unreadable.mp4").write_bytes(b"hello")
    (rec / "unreadable.jsonl").write_text("{}")
    os.mkfifo(rec / "pipe.mp4")
    (rec / "pipe.jsonl").write_text("{}")
    make_recording(rec, "no-stats", [dict(mouse=None, keyboard=None)] * 8)
    status, out, err = embed(folder)
    found = episodes(folder / "data")
    assert status == 0 and found.keys() == {
        "ann-0123456789ab-20220101-000000",
        "some-broken",
        "no-stats",
    }, out + err
    assert found["no-stats"][1:] == ([], []) and len(found["some-broken"][0]) == 10
    assert (
        "6 skipped" in out
        and "2 broken lines" in out
        and "2 skipped: no line of the jsonl can be read" in out
    )
    skipped = dict(
        line.split("\t") for line in (folder / "data/skipped-0.txt").read_text().splitlines()
    )
    assert skipped["pipe"] == "unreadable video (no file)"
    assert skipped["unreadable"].startswith("unreadable video") and skipped["without"].startswith(
        "no jsonl"
    )
    make_recording(rec, "all-broken", played())
    before = found["some-broken"][0]
    status, out, err = embed(folder)
    found = episodes(folder / "data")
    assert (
        status == 0
        and "3 were there" in out
        and "all-broken" in found
        and torch.equal(found["some-broken"][0], before)
    )


class Deadly(command.Recordings):
    """A worker process that some video kills in its second chunk."""

    def read(self, mp4):
        recordings.CHUNK = 5
        for n, item in enumerate(super().read(mp4)):
            if "deadly" in mp4.name and n == 1:
                os.kill(os.getpid(), 9)
            yield item


def test_a_video_that_kills_the_process_that_decodes_it_is_skipped_and_the_others_are_whole(
    folder, monkeypatch
):
    rec, names = folder / "rec", ["a-1", "b-1", "deadly-1", "later-1"]
    for name in names:
        make_recording(rec, name, played())
    assert embed(folder, "--workers=2", out="safe")[0] == 0

    monkeypatch.setattr(command, "Recordings", Deadly)
    status, out, err = embed(folder, "--workers=2")
    assert status == 0, out + err
    found, expected = episodes(folder / "data"), episodes(folder / "safe")
    assert found.keys() == expected.keys() - {"deadly-1"}
    assert "1 skipped: the process that decoded it was killed" in out
    for name in found:
        assert relative(found[name][0], expected[name][0]) < 5e-3


def test_two_processes_share_the_work_without_doing_anything_twice(folder, monkeypatch):
    for i in range(4):
        make_recording(folder / "rec", f"ben-{i}-20220101-000000", played(12))
    shares = []
    for rank in (1, 0):  # in any order; neither sees the other's
        for module in (command, writing):
            monkeypatch.setattr(module, "RANK", rank)
            monkeypatch.setattr(module, "WORLD", 2)
        assert embed(folder, out=f"share{rank}")[0] == 0
        shares.append(set(episodes(folder / f"share{rank}")))
        assert embed(folder)[0] == 0
    monkeypatch.undo()
    assert (
        not shares[0] & shares[1]
        and shares[0] | shares[1] == set(episodes(folder / "data"))
        and len(shares[0]) == 2
    )
    make_recording(folder / "rec", "cat", played(12))
    status, out, _ = embed(folder)
    assert (
        status == 0 and "5 were there" in out and len(episodes(folder / "data")) == 6
    )  # and with another number of processes


def dies(*_):
    raise OSError("no space left")


def test_joined_parts_are_the_files_of_one_call(folder, monkeypatch):
    monkeypatch.setattr(writing, "SHARD", 2)
    for i in range(6):
        make_recording(folder / "rec", f"ben-{i}-20220101-000000", played(12))
    names = (f"aa-{i}-20220101-000000" for i in range(9))
    for name in [name for name in names if split_of(name) == "train"][:2]:  # a shard of nothing
        make_recording(folder / "rec", name, [""])
    assert embed(folder, "--workers=1")[0] == 0  # which reads them in order

    status, out, err = embed(folder, "--part=2/2", out="parts")
    assert status == 0 and "the same command without --part joins" in out, err
    assert not (folder / "parts/meta.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shard", dies)
        assert embed(folder, "--part=1/2", out="parts")[0] == 2
    assert embed(folder, "--part=1/2", out="parts")[0] == 0
    assert not (folder / "parts/train-00000.safetensors").exists()
    status, out, err = embed(folder, out="parts")
    assert status == 0 and "added to" in out and ": none; 7 were there" in out, out + err
    whole, joined = (
        {path.name: path.read_bytes() for path in (folder / name).glob("[!.]*")}
        for name in ("data", "parts")
    )
    assert joined == whole


def test_processes_that_write_at_once_never_take_the_same_number(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD", 1)
    obs = [torch.zeros(1, 4)]
    for world, start in [(2, 0), (3, 100)]:
        monkeypatch.setattr(writing, "WORLD", world)
        running = []
        for rank in range(world):  # all have looked at the folder before the first one writes
            monkeypatch.setattr(writing, "RANK", rank)
            running.append(Writer(tmp_path, {}))
        for i in range(4):
            for rank, shards in enumerate(running):
                shards.add(f"s{start + 10 * rank + i}", obs, [], "all")
    assert len(Writer(tmp_path, {}).ids) == 2 * 4 + 3 * 4


def test_shards_are_numbered_from_zero_in_every_split(tmp_path, capsys):
    stems = [f"player{i}-0a1b2c3d4e5f-20220101-000000" for i in range(60)]
    with Writer(tmp_path, {}) as writer:
        for stem in stems:
            writer.add(stem, [torch.zeros(1, 4, dtype=torch.bfloat16)], [], "all")
    writer.finish(steps_per_second=5, source="")
    assert {split_of(stem) for stem in stems} == {"train", "val", "test"}
    assert check(tmp_path) == 0, capsys.readouterr().out


def test_a_killed_run_leaves_no_process_behind(folder):
    """A process that lives on holds the pipe of the run's output open."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    library = f"wait, FFmpegError = open, OSError\ndef open(path): wait({str(pipe)!r})\n"
    (folder / "av.py").write_text(library)
    arguments = [f"--weights={folder}/a.weights", f"--recordings={folder}/rec", "--workers=1"]
    command = [sys.executable, "-m", "domains.vpt.embed", *arguments, f"--out={folder}/data"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    outputs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running = subprocess.Popen(command, cwd=ROOT, env=environment, **outputs)
    with open(pipe, "wb"):  # waits until a worker decodes a video
        running.kill()
        running.communicate(timeout=30)


def test_broken_notes_of_a_data_set_name_file_and_remedy(tmp_path):
    (tmp_path / "made-with.json").write_text("")
    with pytest.raises(ValueError, match="made-with.json is not JSON .* delete it if"):
        Writer(tmp_path, {})


def test_one_data_set_does_not_mix_settings(folder):
    assert embed(folder)[0] == 0
    status, _, err = embed(folder, "--stride=5")
    assert status != 0 and "other settings" in err and "Traceback" not in err


def test_an_interrupted_run_keeps_what_it_has_finished(tmp_path):
    shards = Writer(tmp_path, {})
    with pytest.raises(KeyboardInterrupt), shards:
        shards.add("a", [torch.zeros(3, 4, dtype=torch.bfloat16)], [], "all")
        raise KeyboardInterrupt
    assert Writer(tmp_path, {}).ids == {"a"}


def test_a_half_written_shard_counts_as_not_there(tmp_path):
    with Writer(tmp_path, {}) as shards:
        shards.add("a", [torch.zeros(3, 4)], [], "all")
    next(tmp_path.glob("*.safetensors")).unlink()
    assert Writer(tmp_path, {}).ids == set()


@pytest.mark.parametrize("suffix", [".safetensors", ".jsonl"])
def test_a_damaged_shard_is_made_again(folder, suffix):
    assert embed(folder)[0] == 0
    before = episodes(folder / "data")
    (path,) = (folder / "data").glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-9])
    status, out, err = embed(folder)
    assert status == 0 and f"{path.stem}" in err and "its recordings are read again" in err
    assert "1 train; 0 were there" in out and check(folder / "data") == 0
    ((obs, *text),), ((obs_before, *text_before),) = (
        x.values() for x in (episodes(folder / "data"), before)
    )
    assert torch.equal(obs, obs_before) and text == text_before


def test_captions_that_cannot_be_kept_skip_their_recording_alone(tmp_path):
    zeros, long = torch.zeros(3, 4, dtype=torch.bfloat16), "x" * 2000
    with Writer(tmp_path, {}) as writer:
        writer.add("a", [zeros], [], "all")
        for stem, text in {"b": long, "c": "w\ud800lk", "caf\udce9": "walk"}.items():
            writer.add(stem, [zeros], [Caption(0, 1, text)], "all")
    assert Writer(tmp_path, {}).ids == {"a"} and writer.skipped.keys() == {"b", "c", "caf\\udce9"}
    writer.finish(steps_per_second=5, source="")
    assert check(tmp_path) == 0


def test_no_call_adds_what_does_not_fit_or_touches_the_files_of_others(tmp_path):
    weights = tmp_path / "model-00001-of-00002.safetensors"
    weights.write_text("weights")
    for stem, obs in dict(a=torch.zeros(3, 4), b=torch.zeros(3, 5), c=torch.ones(3, 4) / 0).items():
        with Writer(tmp_path, {}) as writer:  # each in a call of its own
            writer.add(stem, [obs.bfloat16()], [], "all")
        writer.finish(steps_per_second=5, source="")
    assert Writer(tmp_path, {}).ids == {"a"} and weights.read_text() == "weights"
    assert writer.skipped == {"c": "not all numbers are finite"} and check(tmp_path) == 0


def test_the_pieces_of_a_session_go_to_one_split_and_the_splits_have_their_shares():
    assert (
        len(
            {
                split_of(f"cheeky-cornflower-setter-0a1b2c3d4e5f-20220101-{second:06d}")
                for second in range(50)
            }
        )
        == 1
    )
    splits = [split_of(f"player{i}-0a1b2c3d4e5f-20220101-000000") for i in range(4000)]
    assert (
        abs(splits.count("train") / 4000 - 0.90) < 0.02
        and abs(splits.count("val") / 4000 - 0.05) < 0.015
    )
    assert split_of("player1-0a1b2c3d4e5f-20220101-000000") == "train"  # and stay so


# ---- a person's annotations ----


def test_only_the_spans_a_person_marked_are_annotated(folder):
    make_recording(folder / "rec", "untouched", played())
    (folder / "person.csv").write_text(
        'recording,start,end,text\nann-0123456789ab-20220101-000000.mp4,0.2,1,"dig,  down"\n'
        "ann-0123456789ab-20220101-000000,1.0,1.5,\nelsewhere,0,1,x\n"
    )
    status, _, err = embed(folder, f"--annotations={folder}/person.csv")
    found = episodes(folder / "data")
    assert status == 0 and "1 recordings are not there, such as elsewhere" in err
    assert found["ann-0123456789ab-20220101-000000"][1:] == (
        [Caption(1, 5, "dig, down")],
        [[1, 5], [5, 8]],
    )
    assert found["untouched"][1:] == ([], [])


@pytest.mark.parametrize(
    "text, line",
    [
        ("recording,begin,end,text\na,1,2,x\n", 2),
        ("recording,start,end,text\na,1,2,x\na,2,1,x\n", 3),
        ("recording,start,end,text\na,one,2,x\n", 2),
        ("recording,start,end,text\na,nan,2,x\n", 2),
        ("recording,start,end,text\na\n", 2),
        ("recording,start,end,text\na,1,2\n", 2),
        ("recording,start,end,text\na,1,inf,x\n", 2),
        ("recording,start,end,text\na,1,1e308,x\n", 2),
        ("recording,start,end,text\na,1,2,dig, down\n", 2),
    ],
)
def test_a_table_of_another_form_is_one_clear_error(tmp_path, text, line):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=f"p.csv, line {line}: needs"):
        read_annotations(tmp_path / "p.csv", {})


def test_an_empty_table_is_refused_and_a_quote_left_open_warned_of(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("")
    with pytest.raises(ValueError, match="p.csv: no line in it"):
        read_annotations(tmp_path / "p.csv", {})
    (tmp_path / "p.csv").write_text('recording,start,end,text\na,1,2,"x\na,3,4,y\n')
    assert len(read_annotations(tmp_path / "p.csv", {})["a"]) == 1
    assert "p.csv, row 2: a text of several lines" in capsys.readouterr().err


# ---- mistakes of the user ----


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["embed"], "--weights"),
        (
            ["embed", "--weights=no.weights", "--recordings=.", "--out=x"],
            "no.weights is missing",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=nowhere", "--out=x"],
            "nowhere: no .mp4 file",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=rec", "--out=x", "--kinds=mine,sing"],
            "sing unknown; there are craft, mine",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=rec", "--out=x", "--stride=0"],
            "--stride=0: at least 1",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=rec", "--out=x", "--cursor=a.weights"],
            "a.weights: not a picture",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=rec", "--out=x", "--annotations=no.csv"],
            "no.csv is missing",
        ),
        (
            ["embed", "--weights=pipe", "--recordings=rec", "--out=x"],
            "pipe is not a file",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=rec", "--out=x", "--cursor=pipe"],
            "pipe is not a file",
        ),
        (
            ["embed", "--weights=a.weights", "--recordings=rec", "--out=x", "--annotations=pipe"],
            "pipe is not a file",
        ),
        (["download", "--index=pipe", "--hours=1", "--out=x"], "pipe is not a file"),
        (["embed", "--weights=a.weights", "--recordings=rec", "--out=a.weights"], "a.weights"),
        (["download", "--index=a.weights", "--hours=1", "--out=x"], "not of the form"),
        (
            ["download", "--index=a.weights", "--hours=-1", "--out=x"],
            "--hours=-1.0: at least 0.01",
        ),
        (["download", "--index=a.weights", "--hours=1e999", "--out=x"], "--hours=inf: at least"),
    ],
)
def test_a_mistake_is_answered_with_one_line_and_a_failure(folder, args, complaint, monkeypatch):
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    status, _, err = vpt(*args)
    assert status != 0 and complaint in err and "Traceback" not in err, err


# ---- real pictures ----


@with_samples
def test_the_synthetic_recording_and_its_broken_twin_become_episodes(tmp_path):
    (tmp_path / "rec").mkdir()
    for stem in ("rec", "rec-broken"):
        os.symlink(SYNTHETIC / "rec.mp4", tmp_path / f"rec/{stem}.mp4")
        os.symlink(SYNTHETIC / f"{stem}.jsonl", tmp_path / f"rec/{stem}.jsonl")
    save_weights(tmp_path / "a.weights")
    assert embed(tmp_path)[0] == 0
    found = episodes(tmp_path / "data")
    assert {stem: len(obs) for stem, (obs, _, _) in found.items()} == {"rec": 50, "rec-broken": 38}
    assert torch.equal(
        found["rec"][0][:22], found["rec-broken"][0][:22]
    )  # frame 90's line is broken, its screen taken as open
    assert [caption for caption in found["rec"][1] if caption.start < 37] == found["rec-broken"][1]

"""Files by pattern: what glob passes over in silence is found, or told."""
# ruff: noqa: F401, F811 (fixtures of another file)

import glob
import os

import numpy as np
import pytest
from test_pack import folder, packed

from domains.vpt.episodes import by_stem, read_annotations
from runtime.patterns import listed, matching
from scripts import frames

NFC, NFD = "caf\u00e9", "cafe\u0301"


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(root, pattern):
    return [os.path.relpath(path, root) for path in matching(f"{root}/{pattern}")]


def test_patterns_are_those_of_glob(tmp_path, monkeypatch):
    touch(*(tmp_path / x for x in ("a/1.npy", "a/b/2.npy", "a/.hidden/3.npy", "a/.4.npy", "5.npy")))
    for pattern in ("*", "*.npy", "*/*.npy", "a/[12].npy", "**/*.npy", "a/1.npy/*", "b/*", "a/.*"):
        found = matching(f"{tmp_path}/{pattern}")
        assert found == sorted(glob.glob(f"{tmp_path}/{pattern}", recursive=True))
    assert names(tmp_path, "a/**") == ["a/1.npy", "a/b/2.npy"] and matching("") == []
    monkeypatch.chdir(tmp_path / "a")
    assert matching("*.npy") == ["1.npy"] and matching("../5.npy") == ["../5.npy"]


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path, capsys):
    touch(tmp_path / "disk/1.npy", tmp_path / "disk/deep/2.npy", tmp_path / "here/3.npy")
    for name in ("one", "two"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "disk")
    (tmp_path / "disk/deep/back").symlink_to(tmp_path / "here")
    found = names(tmp_path, "here/**/*.npy")
    assert found == ["here/3.npy", "here/one/1.npy", "here/one/deep/2.npy"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "here/one/deep/back, a link back to" in told


def test_links_that_lead_nowhere_are_told_and_left_out(tmp_path, capsys):
    touch(tmp_path / "1.npy")
    (tmp_path / "2.npy").symlink_to("gone")
    (tmp_path / "3.npy").symlink_to("3.npy")
    assert names(tmp_path, "*.npy") == ["1.npy"]
    assert f"left out: 2 links that lead nowhere, such as {tmp_path}/2" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() == 0, reason="root may read all folders")
def test_a_folder_that_may_not_be_read_is_told(tmp_path, capsys):
    touch(tmp_path / "a/1.npy", tmp_path / "b/2.npy")
    (tmp_path / "a").chmod(0)
    assert names(tmp_path, "**/*.npy") == ["b/2.npy"]
    assert f"left out: {tmp_path}/a, Permission denied" in capsys.readouterr().err
    (tmp_path / "a").chmod(0o700)


def test_brackets_and_accents_of_a_name_are_found(tmp_path):
    touch(tmp_path / "[A]/1.npy", tmp_path / f"{NFD}/{NFC}-1.npy")
    assert names(tmp_path, "[A]/*.npy") == ["[A]/1.npy"]
    assert names(tmp_path, f"{NFC}/{NFD}*.npy") == [f"{NFD}/{NFC}-1.npy"]
    assert names(tmp_path, f"{NFC}/{NFD}-1.npy") == [f"{NFD}/{NFC}-1.npy"]


def test_a_comma_may_be_in_a_name(tmp_path):
    touch(tmp_path / "Smith, 2024/a.csv", tmp_path / "b.csv", tmp_path / f"{NFD}.csv")
    one, two = tmp_path / "Smith, 2024/a.csv", tmp_path / "b.csv"
    assert listed(f"{one}") == [str(one)]
    assert listed(f"{two},{one},{two}") == [str(two), str(one), str(two)]
    assert listed(f"{two},{tmp_path}/{NFC}.csv") == [str(two), f"{tmp_path}/{NFD}.csv"]
    assert listed(f"gone.csv,{two},") == ["gone.csv", str(two)] and listed("") == []


def test_names_that_differ_in_form_alone_are_the_same_episode(folder, packed):
    for n, form in enumerate((NFC, NFD)):
        (folder / f"raw/ep{n}.npy").rename(folder / f"raw/{form}{n}.npy")
        np.save(folder / f"raw/{form}{n}-pictures.npy", np.full((30, 2, 2, 3), n, np.uint8))
    text = (folder / "captions.csv").read_text()
    text = text.replace("ep0,", f"{NFD}0,").replace("ep1,", f"{NFC}1,")
    (folder / "captions.csv").write_text(text)
    found = packed()
    for n in (0, 1):
        assert found[f"{NFC}{n}"][2][0].text == f"say {n}, twice" and len(found) == 10
    packed(group=f"{NFD}|ep.")  # é composed, or nothing would be found
    (folder / "raw/ep2.npy").rename(folder / f"raw/{NFC}1.npy")
    with pytest.raises(ValueError, match="two episodes called"):
        packed()


def test_recordings_in_linked_folders_are_found_and_named_in_either_form(tmp_path):
    touch(tmp_path / f"disk/{NFD}-1.mp4")
    (tmp_path / "rec").mkdir()
    (tmp_path / "rec/more").symlink_to(tmp_path / "disk")
    stems = by_stem(tmp_path / "rec", [".mp4"])
    assert stems == {f"{NFD}-1": tmp_path / f"rec/more/{NFD}-1.mp4"}
    (tmp_path / "person.csv").write_text(f"recording,start,end,text\n{NFC}-1,0,1,walk\n")
    spans = read_annotations(tmp_path / "person.csv", stems)
    assert spans[f"{NFD}-1"] == [(0, 1, "second", "walk")]


def test_videos_are_found_likewise(tmp_path, monkeypatch, capsys):
    touch(tmp_path / f"disk/{NFD}.mp4")
    (tmp_path / "clips").symlink_to("disk")
    (tmp_path / "disk/gone.mp4").symlink_to("nowhere")
    monkeypatch.setattr(frames, "videos", f"{tmp_path}/**/*.mp4")
    assert frames.find_videos() == {NFC: f"{tmp_path}/clips/{NFD}.mp4"}
    assert "gone.mp4" in capsys.readouterr().err

"""What is odd about observations is told, and what belongs together stays together."""
# ruff: noqa: F401, F811 (fixtures of another file)

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_pack import folder, packed, refused

from scripts import oddities, show
from scripts.oddities import alike, at_most, views
from scripts.recordings import find_recordings


@pytest.fixture
def transitions(folder):
    """Six files as of reinforcement learning: observations, and the same a step later."""
    rng = np.random.default_rng(0)
    for n in range(6):
        (folder / f"raw/ep{n}.npy").unlink()
        x = rng.random((41, 4), np.float32)
        np.savez(folder / f"raw/run{n}.npz", observations=x[:-1], next_observations=x[1:])
    return folder


def test_arrays_of_one_file_stay_in_one_split(transitions, packed):
    found = packed(captions="", obs=f"{transitions}/raw/*.npz")
    splits = [{found[f"run{n}/{x}observations"][0] for x in ("", "next_")} for n in range(6)]
    assert all(len(split) == 1 for split in splits) and len(set.union(*splits)) == 3
    rows = "".join(f"run{n}/next_observations,{n},walk\n" for n in range(6))
    (transitions / "captions.csv").write_text("episode,start,text\n" + rows)
    found = packed(obs=f"{transitions}/raw/*.npz")
    assert {name for name in found if not name.endswith("next_observations")} == {
        f"run{n}/observations" for n in range(6) if found[f"run{n}/next_observations"][0] == "train"
    }


def test_arrays_that_are_equal_but_for_a_step_are_told(transitions, packed, capsys):
    packed(captions="", obs=f"{transitions}/raw/*.npz")
    told = "warning: run3/next_observations and run3/observations are equal but for a step"
    assert told in capsys.readouterr().err
    packed(captions="", obs=f"{transitions}/raw/*.npz", group=".+")
    show.show(transitions / "mine")
    warnings = capsys.readouterr().out
    assert warnings.count("equal but for a step: ") == 6 and "identical" not in warnings
    assert warnings.count("warning: leakage: equal but for a step: ") == 2  # of val, of test


def test_episodes_that_are_equal_are_told(folder, packed, capsys):
    (folder / "raw/ep7.npy").unlink()
    (folder / "raw/ep7.npy").symlink_to("ep3.npy")
    packed()
    assert "warning: ep3 and ep7 are equal: leave one out\n" in capsys.readouterr().err


def test_arrays_of_one_file_alone_are_split_which_is_told(folder, packed, capsys):
    arrays = {f"part{n}": np.random.default_rng(n).random((30, 4)) for n in range(6)}
    np.savez(folder / "all.npz", **arrays)
    found = packed(captions="", obs=f"{folder}/all.npz")
    assert {split for split, *_ in found.values()} == {"train", "val", "test"}
    assert "arrays of one file are in train, val and test; --group" in capsys.readouterr().err


def keys(x):
    x = torch.as_tensor(x)
    return views(lambda start, stop: x[start:stop], len(x))


def test_shifts_are_told_from_equals_and_from_what_stands_still():
    x = np.random.default_rng(0).random((100, 3), np.float32)
    episodes = dict(a=x[:80], b=x[1:81], c=x[:80].copy(), d=x[20:], still=np.ones((9, 3)))
    episodes |= dict(other=np.ones((10, 3)), short=x[:8], after=x[1:9])
    same, shifted = alike({name: keys(x) for name, x in episodes.items()})
    assert same == [["a", "c"]] and shifted == [["a", "b", "c"]]
    cut = dict(long=x[:40], less_first=x[1:40], less_last=x[:39])
    assert len(alike({name: keys(x) for name, x in cut.items()})[1]) == 3
    assert at_most("abcdefghij") == [*"abcdefgh", "2 more of this kind"]
    assert at_most("abcdefgh") == [*"abcdefgh"]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_changes_that_float32_loses_are_warned_of(folder, packed, capsys, monkeypatch, kind):
    walk = np.random.default_rng(0).normal(size=(6, 30, 4)).cumsum(1) * 0.01
    far = np.array([0, 0, 5e6, 0])
    jitter = np.array([0, 0.3, 0, 0]) * np.random.default_rng(1).choice([1, 1 + 1e-15], (6, 30, 1))

    monkeypatch.setattr(oddities, "CHUNK", 7)  # steps

    def told(rows, **settings):
        for n, x in enumerate(rows):
            (folder / f"raw/ep{n}.npy").unlink(missing_ok=True)
            if kind == "npy":
                np.save(folder / f"raw/ep{n}.npy", x)
            else:
                save_file({"x": torch.as_tensor(x)}, folder / f"raw/ep{n}.safetensors")
        packed(captions="", obs=f"{folder}/raw/ep[0-5].*", **settings)
        return [line for line in capsys.readouterr().err.splitlines() if "are lost" in line]

    assert told(walk) == []
    lines = told(walk + far)
    lost = "100% of the changes of feature 2 are lost in float32: subtract its mean first"
    assert len(lines) == 6 and sum(f"warning: episode ep0: {lost}" in line for line in lines) == 1
    assert "of feature 2 are" in told(walk + far, drop="1")[0]
    assert told(walk + far, drop="2") == []
    assert told(walk + far - (walk + far).mean((0, 1))) == []
    still = walk * np.array([1, 0, 1, 1])
    assert told(still + jitter) == []
    counter = 2**26 + np.arange(30)[:, None] * np.ones((6, 1, 4))
    assert len(told(counter.astype(np.int32))) == 6
    nanoseconds = (17 * 10**17 + 1000 * np.arange(30)[:, None] * np.ones((6, 1, 4))).astype(int)
    assert len(told(nanoseconds)) == 6
    assert told((walk * 100).astype(np.int16)) == []


def test_where_time_may_be_the_second_axis_it_is_asked(tmp_path, capsys):
    time = np.linspace(0, 6, 151)
    for n in range(3):
        x = np.sin(time[None] * np.arange(1, 14)[:, None] / 4 + n) + np.arange(13)[:, None] % 3
        np.save(tmp_path / f"{n}.npy", x)
    find_recordings(f"{tmp_path}/*.npy")
    assert "all (13, 151), a row a step: is time the second axis?" in capsys.readouterr().err
    for n in range(3):
        np.save(tmp_path / f"{n}.npy", np.load(tmp_path / f"{n}.npy").T)
    find_recordings(f"{tmp_path}/*.npy")
    for n in range(3):  # embeddings of more dims than steps
        x = np.random.default_rng(n).normal(size=(1, 151)) + 0.1 * np.load(tmp_path / f"{n}.npy").T
        np.save(tmp_path / f"{n}.npy", x)
    find_recordings(f"{tmp_path}/*.npy")
    assert capsys.readouterr().err == ""
    np.save(tmp_path / "0.npy", np.zeros((13, 140)))
    with pytest.raises(ValueError, match="differ in dims: 1.*; is time the second axis?"):
        find_recordings(f"{tmp_path}/*.npy")
    np.save(tmp_path / "0.npy", np.zeros((12, 140)))
    with pytest.raises(ValueError, match=r"1\d\d in .*npy$"):
        find_recordings(f"{tmp_path}/*.npy")


def as_ml_dtypes(x):
    """bfloat16 as ml_dtypes saves it: two bytes a number, of no type."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16).view("V2")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_bfloat16_of_ml_dtypes_is_read(folder, packed, kind):
    x = np.random.default_rng(0).integers(-99, 99, (30, 4)).astype(np.float32)
    for n in range(10):
        (folder / f"raw/ep{n}.npy").unlink()
        save = dict(npy=np.save, npz=np.savez)[kind]
        save(folder / f"raw/ep{n}.{kind}", as_ml_dtypes(x + n))
    found = packed()
    assert all(torch.equal(found[f"ep{n}"][1], torch.tensor(x + n).bfloat16()) for n in range(10))
    np.save(folder / "raw/ep3.npy", np.zeros((30, 4), [("a", "i1"), ("b", "i1")]))
    (folder / f"raw/ep4.{kind}").unlink()
    assert "ep3.npy: void16; observations are real" in refused(packed, obs=f"{folder}/raw/ep3.npy")


def test_arrays_of_other_kinds_in_one_file_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.zeros((99, 4)), actions=np.zeros((99, 2)))
    with pytest.raises(ValueError, match="dims: 4 in .*a.npz:observations, 2 in .*:actions$"):
        find_recordings(f"{tmp_path}/a.npz")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_of_many_arrays_is_opened_once(folder, packed, kind, monkeypatch):
    from scripts import recordings

    arrays = {f"part{n:03}": np.full((2, 3), n, np.float32) for n in range(60)}
    if kind == "npz":
        np.savez(folder / "many.npz", **arrays)
    else:
        save_file({k: torch.from_numpy(x) for k, x in arrays.items()}, folder / "many.safetensors")
    opened = []
    for owner, name in ((np.lib.npyio, "NpzFile"), (recordings, "load_file")):
        original = getattr(owner, name)
        count = lambda path, call=original: opened.append(path) or call(path)  # noqa: E731
        monkeypatch.setattr(owner, name, count)
    found = packed(captions="", obs=f"{folder}/many.*")
    assert len(opened) == 1
    assert all((found[f"many/{name}"][1].numpy() == x).all() for name, x in arrays.items())
    np.savez(folder / "many.npz", **{name: x + 1 for name, x in arrays.items()})
    found = packed(captions="", obs=f"{folder}/many.npz")
    assert all((found[f"many/{name}"][1].numpy() == x + 1).all() for name, x in arrays.items())


def test_a_step_of_many_numbers_tells_nothing_of_time(tmp_path, capsys, recwarn):
    np.save(tmp_path / "a.npy", np.ones((1, 5)))
    find_recordings(f"{tmp_path}/*.npy")
    assert capsys.readouterr().err == "" and not recwarn.list


def test_integers_beside_floats_are_asked_of(tmp_path, capsys):
    for name, kind in dict(a="f4", b="f8", c="u1", d="i8").items():
        np.save(tmp_path / f"{name}.npy", np.ones((9, 2), kind))
        find_recordings(f"{tmp_path}/*.npy")
        said = capsys.readouterr().err
        assert ("is their scale the same?" in said) == (name > "b")
    assert "float32 in " in said and f"uint8 in {tmp_path}/c.npy" in said

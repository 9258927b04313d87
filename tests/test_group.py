"""Episodes of one person or day: pack --group keeps them in a split, show warns where none does."""

from pathlib import Path

import numpy as np
import pytest

from runtime.dataset import Episodes
from scripts import pack, show


@pytest.fixture
def packed(tmp_path, monkeypatch, capsys):
    """Packs six persons' three episodes, two of them annotated; returns {split: names}."""
    (tmp_path / "raw").mkdir()
    names = [f"anna{n}-{part}" for n in range(6) for part in range(3)]
    for name in names:
        np.save(tmp_path / f"raw/{name}.npy", np.random.default_rng(0).random((9, 4)))
    lines = [f"{name},1,walk\n" for name in names if not name.endswith("2")]
    (tmp_path / "captions.csv").write_text("episode,start,text\n" + "".join(lines))
    settings = dict(obs="raw/*", captions="captions.csv", out="mine")
    monkeypatch.chdir(tmp_path)

    def call(**more):
        for name, value in (settings | more).items():
            monkeypatch.setattr(pack, name, value)
        pack.check_settings()
        pack.make()
        splits = {name: Episodes("mine", name) for name in ("train", "val", "test")}
        return {name: {episode.id for episode in split} for name, split in splits.items()}

    return call


@pytest.mark.parametrize("group", [r"(anna\d+)-", r"anna\d+"])
def test_a_group_is_in_one_split(packed, capsys, group):
    found = packed(group=group)
    persons = [{name.split("-")[0] for name in found[split]} for split in found]
    assert [len(of_split) for of_split in persons] == [4, 1, 1]
    assert len(set.union(*persons)) == 6
    assert all(len(names) == 2 for names in (found["val"], found["test"]))
    assert "left out: 2 episodes without annotations" in capsys.readouterr().err
    show.show("mine")
    assert "two splits" not in capsys.readouterr().out


def test_a_group_that_an_encoder_began_to_caption_trains(packed):
    name = min(packed(group=r"anna\d+")["test"])
    line = f'{{"episode": "{name}", "start": 2, "text": "walk", "sure": 0.5}}'
    Path("sure.jsonl").write_text(line)
    found = packed(group=r"anna\d+", captions="captions.csv,sure.jsonl")
    assert name in found["train"]


def test_show_warns_where_names_suggest_groups(packed, capsys):
    packed()
    show.show("mine")
    assert "episodes of 'anna" in capsys.readouterr().out


@pytest.mark.parametrize("group, problem", [("(", "unterminated"), ("berta", "nothing found in")])
def test_a_wrong_group_is_one_line(packed, group, problem):
    with pytest.raises(ValueError, match=problem):
        packed(group=group)

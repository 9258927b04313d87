"""What leaves a run: captions as other programs read them, and a checkpoint with its card."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import program, toy_episode

from data import SILENCE, Tokenizer, read_stream
from encoder import Encoder, Features, load, written_captions
from model import Config, GPTNeoX, find_checkpoint
from runtime import checkpoint
from runtime.dataset import Caption, Episodes, write_shard
from runtime.shards import write_meta
from scripts import export
from scripts.annotations import library
from scripts.captions import read_all_captions

PACKAGES = dict(vtt="webvtt", srt="webvtt", eaf="pympi")


STEPS = {f"test-{n}": 40 for n in range(3)}


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """The checkpoint of a run on three episodes, of the first chance weights that say something."""
    folder = tmp_path_factory.mktemp("handed")
    rng, tokenizer = np.random.default_rng(0), Tokenizer.from_captions(["walk", "open the door"])
    episodes = [toy_episode(name, rng) for name in STEPS]
    write_shard(folder / "toy", "test", 0, episodes)
    about = dict(source="toy", licence="", splits=["test"])
    write_meta(folder / "toy", obs_dim=6, dtype="float32", steps_per_second=1, **about)
    said, a_run = [], folder / "run/step-000001"
    while not said:
        encoder = Encoder(GPTNeoX(Config(tokenizer.vocab_size, 32, 1, 2)), Features(6), T=16)
        with torch.no_grad():
            encoder.lm.embed_out.weight[2:258] = 0
            encoder.lm.embed_out.weight *= 8
            encoder.lm.embed_out.weight[SILENCE] *= 4
        [said] = written_captions(encoder, [torch.from_numpy(episodes[0].obs)], tokenizer)
    encoder.save_pretrained(a_run / "encoder")
    tokenizer.save(a_run / "tokenizer.json")
    config = dict(data=str(folder / "toy"), predict_weight=0)
    (a_run / "config.json").write_text(json.dumps(config))
    (a_run / "checksums.json").write_text(json.dumps(checkpoint.checksums(a_run)))
    return a_run


def episodes_of(a_run):
    return Episodes(a_run.parent.parent / "toy", "test")


def exported(folder, captions, rate, **settings):
    """Writes captions of a made episode of 1,000 steps, and reads the file as scripts.pack does."""
    for name, value in settings.items():
        setattr(export, name, value)
    path = folder / f"ep.{export.format}"
    path.unlink(missing_ok=True)
    export.write_file(path, captions, 1000, rate)
    texts, by_person = read_all_captions([str(path)], {"ep": 1000}, rate, "all")
    assert by_person == {"ep"}  # for want of others
    return texts["ep"], path


@pytest.fixture(params=["vtt", "srt", "eaf"])
def ending(request, monkeypatch):
    pytest.importorskip(PACKAGES[request.param], reason="pip install -r requirements-extra.txt")
    for name in ("format", "hold"):
        monkeypatch.setattr(export, name, vars(export)[name])
    return request.param


TEXTS = "a < b & c > d", "größer", "two", "3"


@pytest.mark.parametrize("rate", [0.01, 1, 7, 29.97, 30, 44100 / 512, 500])
def test_what_is_written_is_read_at_the_same_steps(tmp_path, ending, rate):
    steps = sorted([*range(0, 999, 7), *range(0, 999, 11)])  # some of them twice
    said = [Caption(n, n + 1, TEXTS[i % 4]) for i, n in enumerate(steps)]
    got, _ = exported(tmp_path, sorted(said), rate, format=ending, hold=0.0)
    assert got == sorted(said)
    got, _ = exported(tmp_path, sorted(said), rate, format=ending, hold=2.0)
    assert [(c.start, c.text) for c in got] == [(c.start, c.text) for c in sorted(said)]


def test_subtitles_stay_until_the_next(tmp_path, ending):
    said = [Caption(5, 6, "a"), Caption(5, 6, "b"), Caption(9, 10, "c"), Caption(998, 999, "d")]
    got, _ = exported(tmp_path, [Caption(5, 6, "a --> b")], 10, format=ending)
    assert [caption.start for caption in got] == [5]
    got, path = exported(tmp_path, said, 10, format=ending, hold=2.0)
    ends = [6, 6, 10, 999] if ending == "eaf" else [9, 9, 29, 1000]
    assert [caption.end for caption in got] == ends
    if ending != "eaf":
        module = library("webvtt", "webvtt-py")
        cues = list(module.read(path) if ending == "vtt" else module.from_srt(path))
        assert [cue.text for cue in cues] == ["a", "b", "c", "d"]
        assert (cues[2].start, cues[2].end) == ("00:00:00.900", "00:00:02.900")


def test_a_file_of_elan_has_no_overlaps_in_a_tier_and_plays_the_video(tmp_path, monkeypatch):
    pympi = pytest.importorskip("pympi", reason="pip install pympi-ling")
    for name, value in dict(format="eaf", videos=str(tmp_path / "clips")).items():
        monkeypatch.setattr(export, name, value)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/ep.mp4").touch()
    said = [Caption(5, 6, "a"), Caption(5, 6, "b"), Caption(6, 7, "c")]
    _, path = exported(tmp_path, said, 25)
    eaf = pympi.Eaf(path)
    tiers = {name: eaf.get_annotation_data_for_tier(name) for name in eaf.get_tier_names()}
    assert tiers == {
        "captions": [(200, 240, "a"), (240, 280, "c")],
        "captions 2": [(200, 240, "b")],
    }
    [video] = eaf.get_linked_files()
    assert video["RELATIVE_MEDIA_URL"] == "clips/ep.mp4" and video["MIME_TYPE"] == "video/mp4"


def test_a_run_is_exported_and_packed_as_an_encoder_s(handed, tmp_path, ending):
    arguments = f"--format={ending}", f"--out={tmp_path / 'clips'}"
    code, out, err = program("scripts/export.py", handed.parent, *arguments)
    assert code == 0 and "3 files with" in out, err
    episodes, steps = episodes_of(handed), STEPS | {"x": 40}
    encoder, tokenizer, _, _ = load(handed.parent)
    (tmp_path / "x.csv").write_text("episode,start,text\nx,1,walk\n")
    paths = [*map(str, sorted((tmp_path / "clips").iterdir())), str(tmp_path / "x.csv")]
    texts, by_person = read_all_captions(paths, steps, 1.0, "all")
    assert by_person == ({"x"} if ending != "srt" else set(steps))
    for i in range(3):
        said = export.said_by(encoder, episodes, i, tokenizer)
        assert [(c.start, c.text) for c in texts[f"test-{i}"]] == [(c.start, c.text) for c in said]
        assert all(c.text == " ".join(c.text.split()) for c in said)
    assert sum(map(len, texts.values())) > 1
    before = Path(paths[0]).read_bytes()
    code, _, err = program("scripts/export.py", handed.parent, *arguments)
    assert code == 2 and "is there: remove it" in err and Path(paths[0]).read_bytes() == before


def test_what_cannot_be_exported_is_one_line(handed, tmp_path):
    for rate, hint in ((None, "pack it with --fps=.."), (501, "cannot be told apart")):
        other = shutil.copytree(handed.parent.parent / "toy", tmp_path / f"toy {rate}")
        meta = json.loads((other / "meta.json").read_text()) | dict(steps_per_second=rate)
        (other / "meta.json").write_text(json.dumps(meta))
        arguments = f"--data={other}", f"--out={tmp_path / 'clips'}"
        code, _, err = program("scripts/export.py", handed.parent, *arguments)
        assert code == 2 and err.count("\n") == 1 and hint in err
    for wrong in ("--format=mp4", "--format=vtt", "--hold=-1"):
        code, _, err = program("scripts/export.py", handed.parent, wrong)
        assert code == 2 and err.count("\n") == 1
    assert not (tmp_path / "clips").exists()


def test_a_name_does_not_lead_out_of_the_folder(handed, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "out", str(tmp_path / "clips"))
    episodes = episodes_of(handed)
    episodes[1].id = "../evil"
    with pytest.raises(ValueError, match="would not be in"):
        export.paths_for(episodes)


def test_sample_prints_every_episode_of_a_split(handed):
    code, out, err = program("sample.py", handed.parent, "--episode=all", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and {row["episode"] for row in rows} == set(STEPS), err
    one = program("sample.py", handed.parent, "--episode=test-1", "--json")[1]
    assert [row for row in rows if row["episode"] == "test-1"] == list(
        map(json.loads, one.splitlines())
    )
    tables = program("sample.py", handed.parent, "--episode=all")[1]
    assert re.findall("^episode (.*) of", tables, re.M) == list(STEPS)


# the card


def test_a_card_tells_what_a_checkpoint_is_and_how_to_load_it(handed, tmp_path):
    run = handed.parent
    row = dict(step=1, f1=0.5, f1_exact=0.25, word_f1=0.75, precision=0.1, recall=0.9)
    (run / "log.jsonl").write_text(json.dumps(row) + '\n{"step": 1')
    code, out, err = program("scripts/card.py", run)
    card = (handed / "README.md").read_text()
    assert code == 0 and str(handed / "README.md") in out and "bench.report" in err
    assert "| validation | 0.500 | 0.250 | 0.750 | 0.100 | 0.900 |" in card
    assert (
        "test: 3 episodes, 120 steps" in card
        and "source: toy" in card
        and "`predict_weight=0`" in card
    )
    arm = dict(row, texts={"a|b <c>": [0.25, 7]})
    (run / "results.json").write_text(json.dumps(dict(captions={"encoder": arm})))
    code, out, err = program("scripts/card.py", run)
    card = (handed / "README.md").read_text()
    assert "| test, encoder | 0.500" in card and "| a\\|b &lt;c> | 7 | 0.25 |" in card and not err
    checkpoint.verify(handed)  # a card is no damage
    (handed / "README.md").write_text(card.replace("Right:", "I saw it fail. Right:"))
    code, _, err = program("scripts/card.py", run)
    assert code == 2 and f"{handed / 'README.md'} was edited: move it" in err
    assert "I saw it fail" in (handed / "README.md").read_text()
    [code] = re.findall(r"```python\n(from.*?)```", card, re.S)
    names = dict(obs=episodes_of(handed)[0].obs[None])
    exec(code, names)
    assert len(code.splitlines()) == 5 and names["captions"][0]._fields == Caption._fields


def test_a_checkpoint_is_loaded_by_name_from_the_cache(handed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached = tmp_path / "hub/models--you--mine"
    for path in [path for path in handed.rglob("*") if path.is_file()]:  # as the hub keeps them
        blob = cached / "blobs" / path.relative_to(handed).as_posix().replace("/", "-")
        link = cached / "snapshots/abc123" / path.relative_to(handed)
        for made in (blob, link):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc123")
    obs = episodes_of(handed)[0].obs[None]
    tok, step, _ = Encoder.from_pretrained(handed / "encoder").annotate(obs)
    tokenizer = Tokenizer.from_file(find_checkpoint("you/mine") / "tokenizer.json")
    for name in ("you/mine", "you/mine@abc123", handed, cached / "snapshots/abc123/encoder"):
        said = Encoder.from_pretrained(name).annotate(obs)
        assert torch.equal(said[0], tok) and torch.equal(said[1], step)
    assert read_stream(tok[0], step[0], tokenizer)
    with pytest.raises(FileNotFoundError, match="hf download you/other"):
        Encoder.from_pretrained("you/other")

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, program

import sample
from data import SILENCE, read_stream
from encoder import Encoder, load, written_captions
from runtime import checkpoint
from runtime.dataset import Caption, Episode, Episodes, write_shard
from runtime.shards import write_meta
from scripts.captions import read_caption
from train import Predictor


@pytest.fixture
def printed(a_run, monkeypatch, capsys):
    """What sample.py prints with the settings given."""

    def call(**settings):
        settings = dict(out_dir=str(a_run.parent), device="cpu") | settings
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        for name in settings:
            monkeypatch.setattr(sample, name, getattr(sample, name))
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        sample.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def models(a_run):
    """Encoder and predictor of a run."""
    encoder = Encoder.from_pretrained(a_run / "encoder")
    return encoder, Predictor.from_pretrained(a_run / "predictor")


@pytest.fixture
def stream(models, toy):
    """Observations (1, N, D) and the slots that the encoder writes of them, tok, step (1, L)."""
    obs = Episodes(toy, "test")[0].obs[None]
    tok, step, _ = models[0].annotate(obs)
    return obs, tok, step


def test_a_forecast_knows_nothing_later(models, stream):
    """That of step t, made for all steps at once, is the one made of the observations up to t."""
    ids, probs = sample.forecasts(*models, *stream)
    assert ids.shape == probs.shape == (40, 4)
    obs, tok, step = stream
    for t in (0, 7, 15, 16, 30, 39):
        slots = (x[:, step[0] <= t] for x in (tok, step))
        early_ids, early = sample.forecasts(*models, obs[:, : t + 1], *slots)
        assert torch.equal(early_ids[t], ids[t])
        torch.testing.assert_close(early[t], probs[t])


def test_a_forecast_is_what_the_predictor_says_of_a_whole_block(models, stream):
    ids, probs = sample.forecasts(*models, *stream)
    (encoder, predictor), (obs, tok, step) = models, stream
    tok, step = (x[:, step[0] < 16] for x in (tok, step))  # the first window
    before = F.pad(tok, (1, 0), value=SILENCE)  # and a slot more, or the last begins no block
    hidden = F.pad(encoder(obs[:, :16], before[:, :-1], step), (0, 0, 0, 1))
    block = tok[..., None]
    for j in range(4):
        logits = predictor.lm.embed_out(predictor(before, hidden, block)[:, :, -1])
        prob, chosen = logits.softmax(-1).max(-1)
        torch.testing.assert_close(prob[tok == SILENCE], probs[:16, j])
        block = torch.cat((block, chosen[..., None]), -1)
    assert torch.equal(block[tok == SILENCE][:, 1:], ids[:16])


def test_captions_are_hits_missed_false_or_unknown(toy):
    episodes = Episodes(toy, "test")
    true = episodes[0].captions
    written = [
        (Caption(true[n].start + late, true[n].start + late + 1, true[n].text), 0.5)
        for n, late in enumerate((0, 3, 4))
    ]

    def kinds():
        rows = sample.judge(episodes[0], written)
        assert all(row["sure"] == (row["written"] and 0.5) for row in rows)
        return [(row["kind"], (row["written"] or row["true"])[0]) for row in rows]

    told = [("hit", 3), ("hit", 14), ("missed", 19), ("false", 23), ("missed", 27)]
    assert kinds() == told
    episodes[0].annotated = [[0, 22]]
    assert kinds() == [(kind if kind != "false" else "unknown", at) for kind, at in told]


def test_json_has_every_written_caption(a_run, toy, tokenizer, printed):
    lines = [json.loads(line) for line in printed(json=True, episode=1).splitlines()]
    obs = Episodes(toy, "test")[1].obs[None]
    tok, step, _ = Encoder.from_pretrained(a_run / "encoder").annotate(obs)
    captions = [(line["start"], line["end"], line["text"]) for line in lines]
    assert captions == read_stream(tok[0], step[0], tokenizer) and captions
    assert {line["episode"] for line in lines} == {"test-1"}


def test_a_run_an_episode_by_name_and_the_least_probability(a_run, printed, monkeypatch):
    lines = printed(json=True, episode=1)
    assert printed(json=True, episode="test-1") == lines
    sure = sorted(json.loads(line)["sure"] for line in lines.splitlines())
    kept = printed(json=True, episode=1, min_prob=sure[-1] - 0.0005)
    assert sure[-2] < sure[-1] - 0.0005 and len(kept.splitlines()) == 1
    hint = "not in the split test; it has 0 .. 2, or a name, as 'test-\\d'"
    for wrong in ("3", "test-9", "-1"):
        with pytest.raises(ValueError, match=f"--episode={wrong}: {hint}"):
            printed(episode=wrong)
    with pytest.raises(ValueError, match="or a name, as 'test-2'"):  # the nearest one
        printed(episode="test-2.npy")
    hint = "--episode=train-1: not in the split test; it is in --split=train"
    with pytest.raises(ValueError, match=hint):
        printed(episode="train-1")
    of = [types.SimpleNamespace(id=name) for name in ("cafe\u0301", "th\u00e9")]
    assert sample.number_of(of, "test", "caf\u00e9") == 0
    assert sample.number_of(of, "test", "the\u0301") == 1


def test_what_is_written_in_seconds_is_packed_at_the_same_steps(a_run, toy, printed):
    meta = json.loads((toy / "meta.json").read_text()) | dict(steps_per_second=30)
    (toy / "meta.json").write_text(json.dumps(meta))
    lines = printed(json=True).splitlines()
    rows = [json.loads(line) for line in lines]
    encoder, tokenizer, *_ = load(a_run.parent)
    [captions] = written_captions(encoder, [Episodes(toy, "test")[0].obs], tokenizer)
    assert [row["start"] for row in rows] == [c.start / 30 for c in captions]
    assert {row["unit"] for row in rows} == {"seconds"}
    shown = [line.split()[0] for line in printed(json=False).splitlines()[3:]]
    assert {f"{c.start / 30:g}" for c in captions} <= set(shown)
    packed = [read_caption(row, 40, fps=30.0) for row in rows]
    assert [c[:2] for c in packed] == [c[:2] for c in captions]
    with pytest.raises(ValueError, match="the times are seconds: --fps=.. says"):
        read_caption(rows[0], 40, fps=0.0)


def test_pages_and_an_index_are_written(a_run, tmp_path):
    pages = tmp_path / "pages"
    command = ["scripts/page.py", a_run.parent, f"--html={pages / 'index.html'}", "--episodes=1-2"]
    told = f"--html={pages / 'index.html'}: no folder {pages}; create it first\n"
    assert program(*command) == (2, "", told)
    pages.mkdir()
    code, _, err = program(*command)
    assert code == 0, err
    names = sorted(path.name for path in pages.iterdir())
    assert names == ["index-1.html", "index-2.html", "index.html"]
    assert "index-1.html" in (pages / "index.html").read_text()
    assert '"id":"test-2"' in (pages / "index-2.html").read_text()
    command[-1] = "--episodes=2-20"
    code, out, err = program(*command)
    assert code == 0 and len(out.splitlines()) == 2
    assert err == "--episodes=2-20: test has episodes 0 .. 2, so it ends there\n"
    command[-1] = "--episodes=3-20"
    assert program(*command) == (2, "", "--episodes=3-20: test has episodes 0 .. 2\n")
    for more, made in (["--episode=test-1"], ["test-1.html"]), ([], ["test.html", "test-2.html"]):
        assert program("scripts/page.py", a_run.parent, *more)[0] == 0
        assert {*made} <= {path.name for path in (a_run.parent / "pages").iterdir()}


def test_sample_imports_nothing_of_the_folder_it_is_run_in(a_run, tmp_path):
    path, here = tmp_path / "path", tmp_path / "here"
    path.mkdir()
    (path / "sitecustomize.py").write_text("print('on the path')")
    here.mkdir()
    if sys.version_info >= (3, 11):  # PYTHONSAFEPATH is new in it
        (here / "model.py").write_text("raise SystemExit('not the model')")
    command = [sys.executable, ROOT / "sample.py", a_run.parent]
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "episode test-0" in done.stdout
    assert done.stdout.count("on the path") == 1  # one process


def test_a_relative_data_set_is_found_from_anywhere(a_run, printed, toy, monkeypatch):
    # trained in toy's parent, which is the run's too
    settings = dict(data=toy.name, predict_weight=0.5)
    (a_run / "config.json").write_text(json.dumps(settings))
    (a_run / "checksums.json").write_text(json.dumps(checkpoint.checksums(a_run)))
    monkeypatch.chdir("/")
    assert "episode test-0" in printed()


def test_a_run_without_a_predictor_expects_nothing(a_run, printed, toy):
    (a_run / "config.json").write_text(json.dumps(dict(data=str(toy), predict_weight=0.0)))
    (a_run / "checksums.json").write_text(json.dumps(checkpoint.checksums(a_run)))
    assert all(json.loads(line)["expected"] == "" for line in printed(json=True).splitlines())
    assert "expected" not in printed(json=False)


def test_a_closed_pipe_is_quiet_and_no_success(a_run):
    command = f"{sys.executable} {ROOT / 'sample.py'} --out_dir={a_run.parent} | true"
    command += "; exit ${PIPESTATUS[0]}"
    shown = subprocess.run(["bash", "-c", command], cwd=a_run, capture_output=True, text=True)
    assert not shown.stderr and shown.returncode == 141  # as of other programs that it ends


def test_the_table_stands_in_columns(capsys):
    hit = dict(step=4, text="walk", true=(3, 4), written=(4, 6), sure=0.5, expected="+3 walk")
    missed = dict(step=9, text="open door", true=(9, 11), written=None, sure=None, expected="")

    def lines(rate):
        sample.as_text([hit, missed], rate)
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    assert lines(None) == [
        " step  true       written    sure  expected next",
        "    4  walk       walk       0.50  +3 walk",
        "    9  open door",
    ]
    assert [line.split()[0] for line in lines(5)] == ["seconds", "0.8", "1.8"]


def test_data_of_another_width_is_one_line(printed, tmp_path):
    other = tmp_path / "other"
    write_shard(other, "test", 0, [Episode("one", np.zeros((9, 5), np.float32), [])])
    write_meta(other, obs_dim=5, dtype="float32", steps_per_second=1, splits=["test"])
    with pytest.raises(ValueError, match="other: obs_dim is not the run's"):
        printed(data=str(other))

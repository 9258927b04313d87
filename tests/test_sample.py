import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import sample
from data import Caption, Episodes, read_stream
from encoder import Encoder
from runtime import checkpoint
from train import Predictor


@pytest.fixture
def printed(a_run, monkeypatch, capsys):
    """What sample.py prints with the settings given."""

    def call(**settings):
        settings = dict(out_dir=str(a_run.parent), device="cpu") | settings
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        for name in ("out_dir", "json", "html", "episode"):
            monkeypatch.setattr(sample, name, getattr(sample, name))
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        sample.main()
        return capsys.readouterr().out

    return call


def test_a_forecast_knows_nothing_later(a_run, toy):
    """That of step t, made for all steps at once, is the one made of the observations up to t."""
    encoder = Encoder.from_pretrained(a_run / "encoder")
    predictor = Predictor.from_pretrained(a_run / "predictor")
    obs = Episodes(toy, "test").obs(0)[None]
    tok, _ = encoder.annotate(obs)
    ids, probs = sample.forecasts(encoder, predictor, obs, tok)
    assert ids.shape == probs.shape == (40, 4)
    for t in (0, 7, 15, 16, 30, 39):
        early_ids, early = sample.forecasts(encoder, predictor, obs[:, : t + 1], tok[:, : t + 1])
        assert torch.equal(early_ids[t], ids[t])
        torch.testing.assert_close(early[t], probs[t])


def test_captions_are_hits_missed_false_or_unknown(toy):
    episodes = Episodes(toy, "test")
    true = episodes.captions(0)
    written = [
        Caption(true[n].start + late, true[n].start + late + 2, true[n].text)
        for n, late in enumerate((0, 3, 4))
    ]

    def kinds():
        rows = sample.judge(episodes, 0, written, torch.ones(40))
        return [(row["kind"], (row["written"] or row["true"])[0]) for row in rows]

    told = [("hit", 3), ("hit", 14), ("missed", 19), ("false", 23), ("missed", 27)]
    assert kinds() == told
    episodes.records[0]["annotated"] = [[0, 22]]
    assert kinds() == [(kind if kind != "false" else "unknown", at) for kind, at in told]


def test_json_has_every_written_caption(a_run, toy, tokenizer, printed):
    lines = [json.loads(line) for line in printed(json=True, episode=1).splitlines()]
    obs = Episodes(toy, "test").obs(1)[None]
    tok, _ = Encoder.from_pretrained(a_run / "encoder").annotate(obs)
    captions = [(line["start"], line["end"], line["text"]) for line in lines]
    assert captions == read_stream(tok[0], tokenizer) and captions
    assert {line["episode"] for line in lines} == {"test-1"}


def test_pages_and_an_index_are_written(a_run, monkeypatch):
    pages = a_run / "pages"
    command = [sys.executable, "-m", "scripts.page", f"--out_dir={a_run.parent}"]
    command += [f"--html={pages / 'index.html'}", "--episodes=1-2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in pages.iterdir())
    assert names == ["index-1.html", "index-2.html", "index.html"]
    assert "index-1.html" in (pages / "index.html").read_text()
    assert '"id":"test-2"' in (pages / "index-2.html").read_text()


def test_html_hands_over_to_the_page_from_any_folder(a_run):
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={a_run.parent}"]
    done = subprocess.run([*command, "--html=page.html"], cwd=a_run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"id":"test-0"' in (a_run / "page.html").read_text()


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


def test_a_closed_pipe_is_no_error(a_run):
    command = f"{sys.executable} {ROOT / 'sample.py'} --out_dir={a_run.parent} | true"
    shown = subprocess.run(["bash", "-c", command], cwd=a_run, capture_output=True, text=True)
    assert not shown.stderr


def test_the_table_fits_the_terminal(monkeypatch, capsys):
    rows = [
        dict(
            kind="hit",
            text="a rather long caption " * 3,
            true=[3, 4],
            written=[4, 6],
            sure=0.5,
            expected="+3 and so on " * 9,
        )
    ]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (40, 60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        sample.as_text(rows)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns and "0.50" in lines[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    sample.as_text(rows)
    assert rows[0]["expected"].strip() in capsys.readouterr().out

import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS

import checkpoint
import sample
from data import END, SILENCE, Caption, Episodes, Tokenizer, read_stream
from encoder import Encoder
from model import Config, GPTNeoX
from train import Predictor


@pytest.fixture
def run(toy, tokenizer, tmp_path):
    """A run's folder with models of chance weights, drawn until the encoder writes several captions."""
    shape, obs = Config(tokenizer.vocab_size, 32, 2, 2), Episodes(toy, "test").obs(0)[None]
    folder = tmp_path / "run/step-000001"
    for seed in range(100):
        torch.manual_seed(seed)
        encoder, predictor = Encoder(GPTNeoX(shape), 6, 16), Predictor(GPTNeoX(shape), 32, K=4)
        with torch.no_grad():
            encoder.projector.scale.fill_(3)
            encoder.lm.embed_out.weight[2:258] = 0             # words, hardly single bytes
            encoder.lm.embed_out.weight *= 8
        if len(read_stream(encoder.annotate(obs)[0][0], tokenizer)) > 3: break
    encoder.save_pretrained(folder / "encoder")
    predictor.save_pretrained(folder / "predictor")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(dict(data=str(toy))))
    (folder / "checksums.json").write_text(json.dumps(checkpoint.checksums(folder)))
    return folder


@pytest.fixture
def said(run, monkeypatch, capsys):
    """What sample.py prints with the settings given."""
    def call(**settings):
        for name, value in (dict(out_dir=str(run.parent), device="cpu") | settings).items(): monkeypatch.setattr(sample, name, value)
        sample.main()
        return capsys.readouterr().out
    return call


def test_a_forecast_knows_nothing_later(run, toy):
    """The forecast of step t, made for all steps in one go, is the one made of the observations up to t alone."""
    encoder, predictor = Encoder.from_pretrained(run / "encoder"), Predictor.from_pretrained(run / "predictor")
    obs = Episodes(toy, "test").obs(0)[None]
    tok, _ = encoder.annotate(obs)
    ids, probs = sample.forecasts(encoder, predictor, obs, tok)
    assert ids.shape == probs.shape == (40, 4)
    for t in (0, 7, 15, 16, 30, 39):
        early_ids, early = sample.forecasts(encoder, predictor, obs[:, :t + 1], tok[:, :t + 1])
        assert torch.equal(early_ids[t], ids[t])
        torch.testing.assert_close(early[t], probs[t])


def test_captions_of_a_stream_are_those_of_the_whole():
    tokenizer, rng = Tokenizer.from_captions(TEXTS), np.random.default_rng(0)
    for n in range(200):
        tok = rng.choice([END, SILENCE, 257, 258, 259], int(rng.integers(1, 15)))
        prob = rng.random(len(tok))
        found = list(sample.captions_of(zip(tok.tolist(), prob.tolist(), strict=True), tokenizer))
        expected = [(c.start, c.end, c.text, prob[c.start:c.end].min()) for c in read_stream(tok, tokenizer)]
        assert found == expected, (n, tok)


def test_captions_are_hits_missed_false_or_unknown(toy):
    episodes = Episodes(toy, "test")
    true = episodes.captions(0)
    written = [Caption(true[n].start + late, true[n].start + late + 2, true[n].text) for n, late in enumerate((0, 3, 4))]
    kinds = lambda: [(row["kind"], (row["written"] or row["true"])[0]) for row in sample.judge(episodes, 0, written, torch.ones(40))]
    told = [("hit", 3), ("hit", 14), ("missed", 19), ("false", 23), ("missed", 27)]
    assert kinds() == told
    episodes.records[0]["annotated"] = [[0, 22]]
    assert kinds() == [(kind if kind != "false" else "unknown", at) for kind, at in told]


@pytest.fixture
def follow(run, toy, monkeypatch, capsys):
    """Captions a raw stream on stdin within this process; returns stdout's lines and stderr."""
    def call(raw, dtype="float32"):
        monkeypatch.setattr(sample, "dtype", dtype)
        monkeypatch.setattr(sample, "json", True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        sample.follow_stdin(Encoder.from_pretrained(run / "encoder"), Tokenizer.from_file(run / "tokenizer.json"), "cpu")
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err
    return call


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_followed_stream_gives_the_captions_of_the_episode(run, toy, tokenizer, follow, dtype):
    raw = Episodes(toy, "test").obs(0).numpy().astype(dtype)
    tok, prob = Encoder.from_pretrained(run / "encoder").annotate(torch.from_numpy(raw).float()[None])
    expected = read_stream(tok[0], tokenizer)
    found, timing = follow(raw.tobytes(), dtype)
    assert [(c["start"], c["end"], c["text"]) for c in found] == expected and expected
    assert [c["sure"] for c in found] == pytest.approx([prob[0, c.start:c.end].min().item() for c in expected], abs=1e-3)
    assert "(p50)" in timing and "latest 40 steps" in timing


def test_a_stream_that_breaks_off_or_is_no_numbers_is_one_line(follow, capsys):
    wrong = {bytes(30): "stdin ended inside step 1: 6 of its 24 bytes", bytes(24) + b"\xff" * 24: "stdin, step 1: not a finite"}
    for raw, message in wrong.items():
        with pytest.raises(SystemExit): follow(raw)
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_follow_writes_a_caption_as_soon_as_it_is_complete(run, toy):
    """At the prompt, with a pipe that stays open."""
    raw = Episodes(toy, "test").obs(0).numpy()
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), f"--out_dir={run.parent}", "--follow"], cwd=run, env=buffered,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watch = threading.Timer(60, process.kill)
    watch.start()
    process.stdin.write(raw.tobytes())
    process.stdin.flush()
    line = process.stdout.readline()                           # printed though stdin has not ended
    assert line and int(line.split()[0]) < 40, process.stderr.read()
    process.stdin.close()
    assert b"(p99)" in process.stderr.read() and process.wait() == 0
    watch.cancel()


def test_json_has_every_written_caption(run, toy, tokenizer, said):
    found = [json.loads(line) for line in said(json=True, episodes="0-2").splitlines()]
    episodes, encoder = Episodes(toy, "test"), Encoder.from_pretrained(run / "encoder")
    for i in range(3):
        written = read_stream(encoder.annotate(episodes.obs(i)[None])[0][0], tokenizer)
        assert [(c["start"], c["end"], c["text"]) for c in found if c["episode"] == f"test-{i}"] == written


def test_pages_and_an_index_are_written(run, said):
    said(html=str(run / "pages/index.html"), episodes="1-2")
    assert sorted(p.name for p in (run / "pages").iterdir()) == ["index-1.html", "index-2.html", "index.html"]
    assert "index-1.html" in (run / "pages/index.html").read_text() and '"id":"test-2"' in (run / "pages/index-2.html").read_text()


def test_a_relative_data_set_is_found_from_anywhere(run, said, toy, monkeypatch):
    (run / "config.json").write_text(json.dumps(dict(data=toy.name)))                   # trained in toy's parent, which is the run's too
    (run / "checksums.json").write_text(json.dumps(checkpoint.checksums(run)))
    monkeypatch.chdir("/")
    assert "episode test-0" in said()


def test_a_run_without_a_predictor_expects_nothing(run, said, toy):
    (run / "config.json").write_text(json.dumps(dict(data=str(toy), predict_weight=0.0)))
    (run / "checksums.json").write_text(json.dumps(checkpoint.checksums(run)))
    assert all(json.loads(line)["expected"] == "" for line in said(json=True).splitlines())
    said(json=False, html=str(run / "page.html"))
    assert '"ahead":[[],' in (run / "page.html").read_text()


def test_a_closed_pipe_is_no_error(run):
    command = f"{sys.executable} {ROOT / 'sample.py'} --out_dir={run.parent} | true"
    shown = subprocess.run(["bash", "-c", command], cwd=run, capture_output=True, text=True)
    assert not shown.stderr


def test_the_table_fits_the_terminal(monkeypatch, capsys):
    rows = [dict(kind="hit", text="a rather long caption " * 3, true=[3, 4], written=[4, 6], sure=0.5, expected="+3 and so on " * 9)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (40, 60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        sample.as_text(rows)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns and "0.50" in lines[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    sample.as_text(rows)
    assert rows[0]["expected"].strip() in capsys.readouterr().out

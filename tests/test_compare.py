"""bench/compare.py, and the picture of bench/labels.py."""

import json

import numpy as np
import pytest

from bench import compare, labels
from bench.intervals import resampled
from runtime.dataset import Caption


def run_of(right):
    """Counts of a run that writes a caption an episode, right or not."""
    return np.array([(hit, 2) for hit in right])


def test_a_difference_is_surer_than_two_scores():
    """Of two that fail at the same episodes but ten, the difference has a share's error."""
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.5
    better = right.copy()
    better[np.flatnonzero(~right)[:10]] = True
    (f1, interval, none, _), (other, _, gain, (low, high)) = compare.rows(
        [run_of(right), run_of(better)]
    )
    assert f1 == right.mean() and other == better.mean() and none == 0
    assert gain == pytest.approx(10 / 400)
    error = (0.025 * 0.975 / 400) ** 0.5
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)
    assert low > 0 and interval[1] > better.mean()  # the scores alone do not tell them apart


def test_all_runs_are_drawn_alike():
    counts = run_of(np.arange(30) % 3 == 0)
    assert (resampled(counts) == resampled(counts)).all()


def test_settings_that_differ_are_told():
    configs = [dict(K=4, seed=0, out_dir="a"), dict(K=8, seed=0, out_dir="b"), dict(seed=0)]
    assert compare.differing(configs) == ["K=4", "K=8", ""]


def test_runs_are_compared_on_the_same_episodes(a_run, monkeypatch, capsys):
    run = str(a_run.parent)
    monkeypatch.setattr("sys.argv", ["compare", run, run])
    compare.main()
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(run) and "+0.000  +0.000 .. +0.000" in second
    scored = compare.scored
    other = [[Caption(0, 1, "walk")]]
    answers = iter([scored(run), (*scored(run)[:1], other, *scored(run)[2:])])
    monkeypatch.setattr(compare, "scored", lambda _: next(answers))
    with pytest.raises(ValueError, match="other test episodes than those of"):
        compare.main()


def test_a_picture_has_each_arm_that_was_scored(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
    rows = [
        dict(arm=arm, N=N, seed=seed, f1=f1 + seed / 10, word_f1=0.5)
        for arm, f1 in (("ours", 0.5), ("logistic regression", 0.2), ("ours, deciphered", 0.1))
        for N in (0, 2, 8)
        for seed in (0, 1)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "labels.svg"
    monkeypatch.setattr(labels, "out", str(tmp_path))
    monkeypatch.setattr(labels, "plot", str(path))
    labels.draw_plot()
    drawn = path.read_text()
    assert (
        ">encoder<" in drawn and ">L1 logistic regression<" in drawn and "deciphered" not in drawn
    )
    assert ">annotated episodes<" in drawn and ">2<" in drawn and ">8<" in drawn
    labels.draw_plot()
    assert path.read_text() == drawn  # the same again, for git

"""The baselines and controls of bench/report.py."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from bench import arms, intervals, report
from data import SILENCE, Batch, score, write_stream
from encoder import Encoder, Features, choose_reader
from model import Config, GPTNeoX
from runtime.dataset import Caption, Episodes, choose_annotated
from train import Grounding, Losses, Predictor, evaluate


class Parrot:
    """Says a caption wherever feature k is 1: what the controls must take from an encoder."""

    obs_dim = 6

    def __init__(self, tokenizer, texts):
        self.ids = [tokenizer.encode(text) + [0] for text in texts]

    def annotate(self, obs):
        rows = []
        for steps in (obs == 1).tolist():
            said = [[*(self.ids[k.index(True)] if any(k) else []), SILENCE] for k in steps]
            slots = [(token, t) for t, ids in enumerate(said) for token in ids]
            rows.append(torch.tensor(slots).T)  # (2, L)
        tok, step = (
            pad_sequence(x, batch_first=True, padding_value=99) for x in zip(*rows, strict=True)
        )
        return tok.where(step < 99, SILENCE), step, torch.ones(tok.shape)


def test_controls_and_baselines_on_the_toy_data(toy, tokenizer, tmp_path):
    train, test = Episodes(toy, "train"), Episodes(toy, "test")
    true = [episode.captions for episode in test]
    parrot = Parrot(tokenizer, ["open door", "walk", "close the door"])

    def f1(written):
        return score(true, written)["f1"]

    assert f1(arms.captions_of(parrot, test, tokenizer)) == 1
    assert f1(arms.captions_of(parrot, test, tokenizer, "shuffled")) < 0.6
    assert f1(arms.captions_of(parrot, test, tokenizer, "zeroed")) == 0
    annotated = choose_annotated(train, 8, 0)
    choose_reader(train, annotated, tokenizer, []).save_pretrained(tmp_path)
    assert f1(arms.reader_alone(test, tmp_path, tokenizer)) > 0.9
    written = arms.probes(test, train, annotated, 4)
    assert list(written) == ["probe, present step", "probe, 4 steps"]
    assert min(f1(captions) for captions in written.values()) > 0.9
    assert f1(arms.most_frequent(test, train, annotated)) < 0.5
    assert f1(arms.perfect_writer(test, tokenizer)) == 1


def test_training_evaluates_as_the_report_does(toy, tokenizer):
    test = Episodes(toy, "test")
    parrot = Parrot(tokenizer, ["open door", "walk", "walk"])  # one of three is wrong
    captions = arms.captions_of(parrot, test, tokenizer)
    expected = report.all_scores([episode.captions for episode in test], captions, set())
    found = evaluate(parrot, test, tokenizer, n=len(test))
    assert 0.2 < found["f1"] < 0.95
    for name in ("f1", "f1_exact", "word_f1", "precision", "recall"):
        assert found[name] == expected[name]


def test_a_probe_of_too_much_data_is_left_out_and_told(toy, monkeypatch, capsys):
    train, test = Episodes(toy, "train"), Episodes(toy, "test")
    monkeypatch.setattr(arms, "LARGE", 8 * 40 * 6 * 4)  # episodes, steps, features, texts + 1
    assert list(arms.probes(test, train, range(8), 4)) == ["probe, present step"]
    assert capsys.readouterr().err == "probe, 4 steps: left out, so much data takes it hours\n"


def test_runs_with_other_windows_stand_side_by_side(capsys):
    reports = [{"encoder": dict(f1=n / 10), f"probe, {n} steps": dict(f1=0.5)} for n in (8, 16)]
    report.show_many(reports)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["F1", "encoder"]


def test_losses_of_the_predictor_are_those_of_the_parallel_pass(toy, tokenizer):
    """The mean over all kinds and offsets, against what training makes of the same windows."""
    shape = Config(tokenizer.vocab_size, 16, 2, 2)
    encoder = Encoder(GPTNeoX(shape), Features(6), 8)
    predictor = Predictor(GPTNeoX(shape), 16, 3)
    torch.nn.init.normal_(predictor.condition.weight)
    test = Episodes(toy, "test")
    losses = arms.predictor_losses(encoder, predictor, test, tokenizer)
    assert losses.shape == (4, 3)

    rows = []
    for i in range(len(test)):
        tok, step = map(torch.from_numpy, write_stream(test[i].captions, 40, tokenizer))
        for start in range(0, 40, 8):
            inside = (step >= start) & (step < start + 8)
            rows.append((test[i].window(start, start + 8), tok[inside], step[inside] - start))
    obs, tok, step = zip(*rows, strict=True)
    told = pad_sequence([torch.ones_like(x).bool() for x in tok], batch_first=True)
    tok = pad_sequence(tok, batch_first=True, padding_value=SILENCE)
    step = pad_sequence(step, batch_first=True, padding_value=7)
    batch = Batch(torch.stack(obs), tok, step, told, told & False, told, None)
    model = Grounding(encoder, predictor)
    ahead = model.targets(batch).predict  # (B, S, K)
    _, parts = model(batch, Losses(*torch.ones(3)))
    targets, count = predictor.blocks(tok, -1)[..., 1:], torch.zeros(2, 3)
    for k, kind in enumerate((targets == SILENCE, targets != SILENCE)):
        count[k] = (kind & ahead).sum((0, 1))
    total = (losses[[0, 3]] * count).sum()  # silence, and all but silence
    torch.testing.assert_close(total, parts[1], rtol=1e-5, atol=0)


def test_the_interval_of_a_mean_is_students():
    # scipy.stats.t.interval(0.95, 2, 2, scipy.stats.sem([1, 2, 3])) is 2 +- 2.484
    assert abs(intervals.interval([1.0, 2.0, 3.0]) - 2.484) < 0.01


def test_the_bootstrap_interval_is_as_wide_as_the_standard_error_says():
    """One caption an episode, right or not: F1 is a share, its error that of a binomial."""
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    true = [[Caption(5, 6, "walk")] for _ in right]
    written = [[Caption(5, 6, "walk" if hit else "turn left")] for hit in right]
    low, high = intervals.bootstrap(true, written)
    share = right.mean()
    error = (share * (1 - share) / len(right)) ** 0.5
    assert abs((high - low) / (2 * 1.96 * error) - 1) < 0.1 and low < share < high


def test_texts_that_were_annotated_and_texts_that_never_were_are_told_apart():
    true = [[Caption(1, 2, "see red"), Caption(5, 6, "see blue"), Caption(9, 10, "take red")]]
    written = [[Caption(1, 2, "see red"), Caption(5, 6, "see red"), Caption(9, 10, "take red")]]
    found = report.all_scores(true, written, said={"see red"})
    assert found["annotated"] == (2 / 3, 1) and found["never"] == (2 / 3, 2)
    assert found["first_words"] == {"see": (0.5, 2), "take": (1.0, 1)}
    assert found["f1"] == 2 / 3

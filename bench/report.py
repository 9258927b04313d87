"""
How good the captions of runs are on their test episodes, with controls and baselines.

    python -m bench.report out/crafter       one run: captions, F1 by text, predictor's losses
    python -m bench.report out/seed-*        several: F1 of each, mean and 95 % interval

A written caption is right if a true one of the same text starts within 3 steps, one to one; exact:
at the same step; words: the share of words that pairs in order have in common (data.score). F1 is
told apart for texts that were annotated and texts that never were; by caption, or by first word
where there are more than 40. The controls give the encoder another episode's observations
(shuffled), or none (zeroed). The probes are logistic regressions of the annotated episodes, tuned
on val (bench/probe.py).
"""

from configurator import docstring, run
import sys
from pathlib import Path

import numpy as np

from bench.arms import (
    captions_of,
    most_frequent,
    perfect_writer,
    predictor_losses,
    probes,
    reader_alone,
)
from bench.intervals import bootstrap, interval
from data import f1, match, score
from encoder import load
from runtime.dataset import Episodes, choose_annotated
from runtime.distributed import pick_device
from runtime.files import write_json
from sample import predictor_of


def report(out_dir, split="test", device="auto"):
    """{arm: scores} of a run on a split, and {hidden states: losses of its predictor (4, K)}."""
    encoder, tokenizer, folder, config = load(out_dir, pick_device(device))
    predictor = predictor_of(folder, config, encoder.device)
    episodes, train = Episodes(config["data"], split), Episodes(config["data"], "train")
    annotated = choose_annotated(train, config["n_annotated"], config["seed"])
    arms = {
        "encoder": captions_of(encoder, episodes, tokenizer),
        "observations shuffled": captions_of(encoder, episodes, tokenizer, "shuffled"),
        "observations zeroed": captions_of(encoder, episodes, tokenizer, "zeroed"),
    }
    if annotated:
        if (folder / "reader").exists():
            arms["reader alone"] = reader_alone(episodes, folder / "reader", tokenizer)
        arms |= probes(episodes, train, annotated, encoder.T)
        arms["most frequent caption"] = most_frequent(episodes, train, annotated)
    arms["perfect writer"] = perfect_writer(episodes, tokenizer)
    true = [episode.captions for episode in episodes]
    said = {caption.text for i in annotated for caption in train[i].known_captions}
    scores = {arm: all_scores(true, captions, said) for arm, captions in arms.items()}
    losses = {}
    if predictor:
        predictor.stride = config["stride"]
        for name in ("true", "shuffled"):
            args = encoder, predictor, episodes, tokenizer, name == "shuffled"
            losses[name] = predictor_losses(*args).tolist()
    return scores, losses


def all_scores(true, written, said):
    """score(), its interval, and (F1, count) of captions whose text was annotated, is in `said`, of
    those whose text never was, and by first word."""
    firsts = sorted({caption.text.split()[0] for of in true for caption in of})
    by_first = {w: f1_of(true, written, lambda text, w=w: text.split()[:1] == [w]) for w in firsts}
    return score(true, written) | dict(
        bootstrap=bootstrap(true, written),
        annotated=f1_of(true, written, lambda text: text in said),
        never=f1_of(true, written, lambda text: text not in said),
        first_words=dict(sorted(by_first.items(), key=lambda item: -item[1][1])),
    )


def f1_of(true, written, kept):
    """F1 of captions whose text is `kept`, and how many true ones there are."""
    true, written = (
        [[caption for caption in of if kept(caption.text)] for of in side]
        for side in (true, written)
    )
    hits = sum(len(match(*pair)) for pair in zip(true, written, strict=True))
    n_true, n_written = (sum(map(len, side)) for side in (true, written))
    return f1(hits, n_written, n_true), n_true


def show(scores, losses):
    show_arms(scores)
    show_texts(scores)
    if losses:
        offsets = "".join(f"  j={j + 1:<3}" for j in range(len(losses["true"][0])))
        print(f"\n{'predictor, loss in nats':24} hidden    {offsets}")
    for k, kind in enumerate(("silence", "first of a caption", "the rest", "all but silence")):
        for name, rows in losses.items():
            print(f"{kind:24} {name:9} " + "".join(f" {x:6.3f}" for x in rows[k]))


def show_arms(scores):
    annotated, never = (scores["encoder"][key][1] for key in ("annotated", "never"))
    columns = "F1  exact  words  annotated  never  precision  recall  95 % of F1"
    print(f"{f'{annotated + never} captions of test':24}    {columns}")
    for arm, row in scores.items():
        of_never = f"{row['never'][0]:5.3f}" if never else "    -"
        cells = f"{row['f1']:5.3f}  {row['f1_exact']:5.3f}  {row['word_f1']:5.3f}"
        cells += f"  {row['annotated'][0]:9.3f}  {of_never}"
        cells += f"  {row['precision']:9.3f}  {row['recall']:6.3f}"
        print(f"{arm:24} {cells}  " + "{:.2f} .. {:.2f}".format(*row["bootstrap"]))
    texts = f"F1 of texts that were annotated, and of {never} captions whose text never was"
    print(f"annotated, never: {texts}")


def show_texts(scores):
    arms = [arm for arm in ("encoder", "reader alone", "perfect writer") if arm in scores]
    few = len(scores["encoder"]["texts"]) <= 40
    key = "texts" if few else "first_words"
    title = "F1 by caption" if few else "F1 by first word"
    print(f"\n{title:24} count" + "".join(f"  {arm:>14}" for arm in arms))
    for text, (_, count) in scores["encoder"][key].items():
        cells = [f"  {scores[arm][key][text][0]:14.2f}" for arm in arms]
        print(f"{text:24} {count:5}" + "".join(cells))


def show_many(reports):
    runs = "".join(f"  run {n:<3}" for n in range(len(reports)))
    print(f"{'F1 on test':24}{runs}  mean +- 95 %")
    for arm in reports[0]:
        if not all(arm in scores for scores in reports):
            continue  # of runs with another T, or without annotated episodes
        values = [scores[arm]["f1"] for scores in reports]
        cells = "".join(f"  {value:.3f}  " for value in values)
        print(f"{arm:24}{cells}  {np.mean(values):.3f} +- {interval(values):.3f}")


def main():
    if {"-h", "--help"} & {*sys.argv[1:]}:
        return print(docstring(__file__))
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        raise ValueError("python -m bench.report out/crafter [out/another ..]")
    reports = []
    for out_dir in sys.argv[1:]:
        scores, losses = report(out_dir)
        reports.append(scores)
        write_json(dict(captions=scores, losses=losses), Path(out_dir, "results.json"))
    if len(reports) > 1:
        show_many(reports)
    else:
        show(scores, losses)


if __name__ == "__main__":
    run(main)

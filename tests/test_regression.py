"""The L1 logistic regression of whole texts, and of each word slot."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.regression import regression
from data import score
from runtime.dataset import Caption

pytest.importorskip("sklearn")

VERBS, COLOURS = ("see", "take"), ("red", "blue", "green")


def an_episode(seed, told):
    """Features: which verb starts, which colour there is. What is told is one of these pairs."""
    rng, steps = np.random.default_rng(seed), 240
    obs, captions = torch.zeros(steps, 5), []
    for t in range(5, steps, 12):
        verb, colour = told[rng.integers(len(told))]
        obs[t, verb] = 1
        obs[t, 2 + colour] = 1
        captions.append(Caption(t, t + 1, f"{VERBS[verb]} {COLOURS[colour]}"))
    about = dict(obs=obs, steps=steps, known=np.ones(steps, bool))
    return SimpleNamespace(**about, captions=captions, known_captions=captions)


def test_word_slots_say_texts_that_were_never_annotated_and_whole_texts_do_not():
    every = [(verb, colour) for verb in range(2) for colour in range(3)]
    train = [an_episode(n, every[:-1]) for n in range(3)]
    val, test = ([an_episode(n, every)] for n in (8, 9))
    true = [test[0].captions]
    by_text, by_word = (
        score(true, regression(train, range(3), val, test, way))["texts"] for way in (False, True)
    )
    assert by_text["take green"][0] == 0 and by_text["see red"][0] == 1
    assert by_word["take green"][0] == 1 and by_word["see red"][0] == 1

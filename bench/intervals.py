"""
How sure a number is: 95 % intervals over episodes, and over seeds.
"""

import numpy as np

from data import match

T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t, 1 .. 9 degrees


def counts_of(true, written):
    """Of each episode, how many written captions are right, and how many there are (E, 2)."""
    pairs = zip(true, written, strict=True)
    return np.array([(len(match(t, w)), len(w) + len(t)) for t, w in pairs])


def f1_of(counts):
    """F1 of the sum of counts (.., E, 2)."""
    right, said = np.moveaxis(counts.sum(-2), -1, 0)
    return 2 * right / np.maximum(said, 1)


def resampled(counts, rounds=1000):
    """F1 of draws of as many episodes (Efron 1979), (rounds,): the same draws at every call."""
    drawn = np.random.default_rng(0).integers(len(counts), size=(rounds, len(counts)))
    return f1_of(counts[drawn])


def percentiles(values):
    return np.quantile(values, (0.025, 0.975)).tolist()


def bootstrap(true, written):
    """95 % interval of F1 over episodes."""
    return percentiles(resampled(counts_of(true, written)))


def interval(values):
    """Half of the 95 % interval of a mean, Student's t."""
    n = len(values)
    return T_95[n - 2] * np.std(values, ddof=1) / n**0.5 if 1 < n < 11 else float("nan")

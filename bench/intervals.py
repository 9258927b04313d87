"""
How sure a number is: 95 % intervals over episodes, and over seeds.
"""

import numpy as np

from data import match

T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t, 1 .. 9 degrees


def bootstrap(true, written, rounds=1000):
    """95 % interval of F1: percentiles over draws of as many episodes (Efron 1979)."""
    pairs = zip(true, written, strict=True)
    counts = np.array([(len(match(t, w)), len(w) + len(t)) for t, w in pairs])  # (E, 2)
    drawn = np.random.default_rng(0).integers(len(counts), size=(rounds, len(counts)))
    hits, said = counts[drawn].sum(1).T
    return np.quantile(2 * hits / np.maximum(said, 1), (0.025, 0.975)).tolist()


def interval(values):
    """Half of the 95 % interval of a mean, Student's t."""
    n = len(values)
    return T_95[n - 2] * np.std(values, ddof=1) / n**0.5 if 1 < n < 11 else float("nan")

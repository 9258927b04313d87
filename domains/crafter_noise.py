"""
The noise that Crafter's worlds are made of, all places of a world at once.

`opensimplex` sums a few points of a lattice for each place, in Python. Which points, and how much
each counts, is the same for every seed. So it is remembered for each place, and a world of another
seed has its noise there by a few operations on arrays: the same in the same order, bit by bit. The
noise is OpenSimplex by Kurt Spencer, as opensimplex 0.4 has it.
"""

from types import FunctionType

import numpy as np
import opensimplex
from opensimplex import internals
from opensimplex.constants import GRADIENTS3, NORM_CONSTANT3

POINTS = 8  # at most, that are summed in a place
MOST = 100_000  # places that are remembered: worlds of 88 x 88 cells, 80 MB

places = []  # (x, y, z) where a world of this process asked for noise
corners = np.zeros((POINTS, 3, MOST), np.int64)  # lattice points of each place
offsets = np.zeros((POINTS, 3, MOST))  # from there to the place


class OpenSimplex:
    """opensimplex.OpenSimplex for crafter.worldgen, which asks for noise3d first."""

    def __init__(self, seed):
        self.original = opensimplex.OpenSimplex(seed)
        noise = sum_points(self.original._perm, self.original._perm_grad_index3)
        self.noise = dict(zip(places, noise.tolist(), strict=True))

    def noise3d(self, x, y, z):
        noise = self.noise.get((x, y, z))
        if noise is None:
            noise = self.noise[x, y, z] = self.original.noise3(x, y, z)
            remember((x, y, z))
        return noise


def remember(place):
    n = len(places)
    if n < MOST:
        for slot, point in enumerate(points_of(place)):
            corners[slot, :, n] = [corner & 0xFF for corner in point[:3]]
            offsets[slot, :, n] = point[3:]
        places.append(place)


def points_of(place):
    """What opensimplex sums in a place, in order: (corner x, y, z, offset x, y, z) of each."""
    points = []

    def note(perm, gradients, *point):
        points.append(point)
        return 0.0

    summing = getattr(internals._noise3, "py_func", internals._noise3)  # numba may wrap it
    FunctionType(summing.__code__, vars(internals) | dict(_extrapolate3=note))(*place, None, None)
    return points


def sum_points(perm, gradients):
    """The noise in the places remembered (N,), by the tables that opensimplex has for a seed."""
    x, y, z = corners[:, :, : len(places)].swapaxes(0, 1)  # (POINTS, N) each
    dx, dy, dz = offsets[:, :, : len(places)].swapaxes(0, 1)
    gradient = gradients[(perm[(perm[x] + y) & 0xFF] + z) & 0xFF]
    gx, gy, gz = GRADIENTS3[gradient], GRADIENTS3[gradient + 1], GRADIENTS3[gradient + 2]
    slope = gx * dx + gy * dy + gz * dz
    near = 2 - dx * dx - dy * dy - dz * dz
    near *= near
    return sum(near * near * slope) / NORM_CONSTANT3

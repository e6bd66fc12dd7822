"""The target of the other examples: a bent density in four dimensions, of which everything is known exactly.

z ~ N(0, 1)^4,   x0 = 2 z0,   x1 = z1 + x0^2 / 4 - 1,   x2 = z2 + x1 / 2,   x3 = z3 + x2^2 / 4 - 1
"""

from __future__ import annotations

import numpy as np

DIM = 4
ENTROPY = 0.5 * DIM * np.log(2 * np.pi * np.e) + np.log(2)  # nats: only x0 = 2 z0 changes volumes


def sample(n: int, seed: int) -> np.ndarray:
    """(n, 4) exact draws."""
    z = np.random.default_rng(seed).normal(size=(n, DIM))
    x0 = 2 * z[:, 0]
    x1 = z[:, 1] + x0**2 / 4 - 1
    x2 = z[:, 2] + x1 / 2
    return np.stack([x0, x1, x2, z[:, 3] + x2**2 / 4 - 1], axis=1)


def log_prob(x: np.ndarray) -> np.ndarray:
    """x : (..., 4) -> (...) normalised log-density, nats."""
    x0, x1, x2, x3 = np.moveaxis(np.asarray(x), -1, 0)
    squares = (x0 / 2) ** 2 + (x1 - x0**2 / 4 + 1) ** 2 + (x2 - x1 / 2) ** 2 + (x3 - x2**2 / 4 + 1) ** 2
    return -0.5 * squares - 0.5 * DIM * np.log(2 * np.pi) - np.log(2)

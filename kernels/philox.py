"""Philox4x32-10 on the host, vectorised in NumPy: shuffling, splitting, and the reference for the devices' kernels.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """counter : (..., 4), key : (2,) 32-bit words -> (..., 4) uint32, ten rounds."""
    c = np.asarray(counter, np.uint64)
    c0, c1, c2, c3 = (c[..., i] & _LOW for i in range(4))
    k0, k1 = (int(word) for word in np.asarray(key, np.uint64))
    for _ in range(10):
        p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_words(seed: int, purpose: int, epoch: int, rows: ArrayLike, block: int = 0) -> NDArray[np.uint32]:
    """rows : (n,) int64 -> (n, 4) uint32, by the counter of the kernel contract (kernels/backend.py)."""
    row = np.asarray(rows, np.uint64)
    counter = np.empty((*row.shape, 4), np.uint64)
    counter[..., 0] = block
    counter[..., 1] = row & _LOW
    counter[..., 2] = epoch
    counter[..., 3] = np.uint64(purpose << 24) | (row >> _32)
    return philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def random_keys(seed: int, purpose: int, epoch: int, rows: ArrayLike) -> NDArray[np.uint64]:
    """rows : (n,) -> (n,) uint64 keys; a stable argsort of them is a random permutation."""
    words = random_words(seed, purpose, epoch, rows).astype(np.uint64)
    return (words[..., 0] << _32) | words[..., 1]

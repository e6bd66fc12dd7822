"""Orders of the columns: which are in part 0 and which in part 1 of what couplings change in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Purpose
from nicecp.kernels.philox import random_keys

PARTITIONS = ("odd-even", "halves", "permutation")
RANDOM = "random"  # a permutation that the seed draws

Order = NDArray[np.int64]


def partition_order(partition: str, n_features: int, order: tuple[int, ...] | None = None) -> Order:
    """(d,) the data columns of part 0, the first ceil(d / 2), and after them those of part 1.

    Raises ValueError for an unknown partition, and for an order that is not a permutation of the columns or given
    where the partition has one of its own.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"unknown partition {partition!r}: expected one of {', '.join(PARTITIONS)}")
    columns: Order = np.arange(n_features, dtype=np.int64)
    if partition != "permutation":
        if order is not None:
            raise ValueError(f"the partition {partition!r} has an order of its own: leave the order out")
        return columns if partition == "halves" else np.concatenate([columns[0::2], columns[1::2]])
    given = tuple(order or ())
    if len(given) != n_features:
        raise ValueError(f"a partition needs each of the {n_features} columns once, got {len(given)} numbers")
    for column in given:
        if not 0 <= column < n_features:
            raise ValueError(f"column {column} in the partition is outside 0..{n_features - 1}")
    found: Order = np.array(given, np.int64)
    counts = np.bincount(found, minlength=n_features)
    if counts.max() > 1:
        raise ValueError(f"column {int(np.argmax(counts))} is {int(counts.max())} times in the partition")
    return found


def random_order(n_features: int, seed: int, draw: int = 0) -> tuple[int, ...]:
    """A random permutation of the columns, by the seed and the draw's number alone: columns sorted by random keys."""
    keys = random_keys(seed, Purpose.PARTITION, draw, np.arange(n_features, dtype=np.int64))
    return tuple(np.argsort(keys, kind="stable").tolist())


def orders_after(order: Iterable[int], seed: int) -> Iterator[tuple[int, ...]]:
    """One random order after the other, from the seed's draw 1 on, that follow on ``order``.

    A draw that parts the columns as the order before it did is passed over (of two columns there is but one partition):
    of few columns many would.
    """
    before = list(order)
    d, draw = len(before), 0
    while True:
        draw += 1
        drawn = random_order(d, seed, draw)
        if d == 2 or not same_parts(before, drawn):
            yield drawn
            before = list(drawn)


def same_parts(one: Iterable[int], other: Iterable[int]) -> bool:
    """Whether two orders part the columns alike; which part is called 0 does not matter."""
    first, second = list(one), list(other)
    d0 = (len(first) + 1) // 2
    return set(first[:d0]) in (set(second[:d0]), set(second[d0:]))

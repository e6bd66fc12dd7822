"""The reference for the two parts of the columns, in plain NumPy: by an order, and from one order to another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.spec import ModelSpec


def parts_of(x: NDArray[Any], order: ArrayLike) -> list[NDArray[Any]]:
    """x : (n, d) -> its columns order[:d0], d0 = ceil(d / 2), and its columns order[d0:]."""
    d0 = (x.shape[1] + 1) // 2
    return [x[:, list(np.asarray(order)[:d0])], x[:, list(np.asarray(order)[d0:])]]


def whole_of(parts: list[NDArray[Any]], order: ArrayLike) -> NDArray[Any]:
    """The inverse of parts_of."""
    joined = np.concatenate(parts, axis=1)
    return joined[:, np.argsort(np.asarray(order))]


def order_of(spec: ModelSpec) -> list[int]:
    """Data columns of part 0 and then of part 1, by the partition's definition."""
    d = spec.n_features
    if spec.partition == "permutation":
        assert spec.order is not None
        return list(spec.order)
    return list(range(d)) if spec.partition == "halves" else [*range(0, d, 2), *range(1, d, 2)]


def regrouped(parts: list[NDArray[Any]], before: ArrayLike, after: ArrayLike) -> list[NDArray[Any]]:
    """Parts by one order -> the same columns in parts by another."""
    return parts_of(whole_of(parts, before), after)


def permute(x0: NDArray[Any], x1: NDArray[Any], index: ArrayLike) -> list[NDArray[Any]]:
    """Column c of the new halves side by side is column index[c] of x0 and x1."""
    joined = np.concatenate([x0, x1], axis=1)[:, list(np.asarray(index))]
    return [joined[:, : x0.shape[1]], joined[:, x0.shape[1] :]]


def orders_of(spec: ModelSpec) -> list[list[int]]:
    """For each coupling its order, which is that of the coupling before it where it has none of its own."""
    orders = [order_of(spec)]
    for coupling in spec.couplings:
        orders.append(orders[-1] if coupling.order is None else list(coupling.order))
    return orders[1:]

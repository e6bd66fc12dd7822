"""The context that a density is conditioned on: its scale, and the rows of it that go with rows of data.

Every coupling's network reads a context of k numbers beside its half of the features, so that the flow's density is
p(x | context). The bijection of x, for a fixed context, is as it was, and so are its Jacobian and log-determinant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Context:
    """The k numbers that a flow is conditioned on: networks see (c - mean) / std. Read-only float64 arrays (k,).

    Raises ValueError unless mean is finite and std finite and positive, of one length, and names are as many.
    """

    mean: Floats
    std: Floats
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            array = np.array(getattr(self, name), np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape or not len(self.mean):
            shapes = f"{self.mean.shape} and {self.std.shape}"
            raise ValueError(f"a context's mean and std must have one shape (k,), got {shapes}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError("a context's mean must be finite and its std finite and positive")
        if self.names is not None and len(self.names) != len(self.mean):
            raise ValueError(f"a context of {len(self.mean)} columns has {len(self.names)} names")

    @classmethod
    def unscaled(cls, k: int, names: Sequence[str] | None = None) -> Context:
        """Mean 0 and std 1: of a flow that has not met data."""
        return cls(np.zeros(k), np.ones(k), None if names is None else tuple(names))

    @property
    def fresh(self) -> bool:
        """Whether it is that of a flow that has not met data."""
        return not self.mean.any() and bool((self.std == 1).all())

    def __len__(self) -> int:
        return len(self.mean)

    def scaled(self, rows: Floats) -> Floats:
        """rows : (..., k) -> what networks see."""
        return (rows - self.mean) / self.std

    def describe(self) -> str:
        """'3 numbers (mass, spin, redshift)'."""
        k = len(self)
        return f"{k} number{'s' * (k > 1)}" + ("" if self.names is None else f" ({', '.join(self.names)})")


def context_of(given: ArrayLike | None, known: Context | None) -> Floats | None:
    """What a caller gives for a flow with this context -> (..., k) float64 as it is; None for a flow without one.

    Raises
    ------
    ValueError
        A context where there is none, none where there is one, or a last axis that is not k long (for k = 1 a plain
        number will do).
    TypeError
        No real numbers.
    """
    if known is None:
        if given is not None:
            raise ValueError("this flow has no context (n_context = 0): leave context out")
        return None
    k, wanted = len(known), f"context of shape ({len(known)},) or (..., {len(known)})"
    if given is None:
        raise ValueError(f"this flow is conditioned on {known.describe()}: pass a {wanted} (--context)")
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError("expected a plain array as context, got a masked one: fill or drop the masked values first")
    array = np.asarray(given)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"expected real numbers as context, got an array of dtype {array.dtype}")
    if array.ndim == 0 and k == 1:
        array = array[None]
    if array.ndim == 0 or array.shape[-1] != k:
        raise ValueError(f"this flow is conditioned on {known.describe()}: expected a {wanted}, got {array.shape}")
    return array.astype(np.float64, copy=False)


def paired(
    rows: NDArray[np.generic], shape: tuple[int, ...], context: Floats | None
) -> tuple[NDArray[np.generic], tuple[int, ...], Floats | None]:
    """Rows (n, d) of an array with leading ``shape`` and a context (..., k), broadcast against each other.

    -> rows : (m, d), their leading shape, context : (m, k), or (1, k) for all of them, or None. ValueError where the
    shapes do not go together.
    """
    if context is None:
        return rows, shape, None
    lead, k = context.shape[:-1], context.shape[-1]
    if int(np.prod(lead)) == 1 and len(lead) <= len(shape):
        return rows, shape, context.reshape(1, k)
    try:
        both = np.broadcast_shapes(shape, lead)
    except ValueError:
        problem = f"context of shape {context.shape} does not go with rows of shape {(*shape, rows.shape[-1])}"
        raise ValueError(f"{problem}: give one for all rows or one for each") from None
    context = np.broadcast_to(context, (*both, k)).reshape(-1, k)
    if both != shape:
        rows = np.broadcast_to(rows.reshape(*shape, -1), (*both, rows.shape[-1])).reshape(-1, rows.shape[-1])
    return rows, both, context


def seen(context: Floats | None, known: Context | None, dtype: DTypeLike) -> NDArray[Any] | None:
    """(n, k) as networks see it, in their dtype; NaN where it is not finite; None without a context."""
    if context is None or known is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        z = known.scaled(context).astype(dtype, copy=False)
    return np.where(np.isfinite(z), z, np.nan)


def rows_for(n: int, context: Floats | None) -> Floats | None:
    """A context (..., k) for n rows that are about to be drawn -> (n, k), or (1, k) for all of them.

    Raises ValueError where it is for another number of rows, or not finite.
    """
    if context is None:
        return None
    k = context.shape[-1]
    if context.shape[:-1] not in ((), (1,), (n,)):
        raise ValueError(f"context of shape {context.shape} for {n} samples: expected ({k},) or ({n}, {k})")
    rows = context.reshape(-1, k)
    if not np.isfinite(rows).all():
        row = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise ValueError(f"the context to sample at must be finite, row {row} is {rows[row].tolist()}")
    return rows

"""What comes from users at a flow's borders: rows of numbers, seeds, and results that are no numbers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.preprocessing import Dequantize, Step
from nicecp.spec import whole_number


def as_rows(
    x: ArrayLike, d: int, steps: Sequence[Step] = (), integers: bool = False
) -> tuple[NDArray[Any], tuple[int, ...]]:
    """x : (..., d) -> (n, d) rows as they are, and the leading shape.

    Raises TypeError for what is not real numbers, and, unless ``integers``, for bytes where a step dequantizes;
    ValueError for a last axis that is not d long.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("expected a plain array, got a masked one: fill or drop the masked values first")
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"expected real numbers, got an array of dtype {array.dtype}")
    if array.dtype.kind in "iu" and not integers and any(isinstance(step, Dequantize) for step in steps):
        raise TypeError(
            f"expected dequantized values, got {array.dtype}: this flow was trained on 8-bit data, "
            "pass low + (high - low) * (k + u) / 256 with u uniform in [0, 1)"
        )
    if array.ndim == 0 or array.shape[-1] != d:
        raise ValueError(f"expected an array of shape (..., {d}), got {array.shape}")
    return array.reshape(-1, d), array.shape[:-1]


def refuse_overflow(rows: NDArray[np.bool_], what: str) -> None:
    """FloatingPointError if any of rows : (n,) is set: one that is finite and has no finite result.

    Something is wrong there, which -inf would hide.
    """
    if rows.any():
        raise FloatingPointError(
            f"{what} of row {int(np.argmax(rows))} is not a finite number though the row is: the flow overflows there"
        )


def seed_of(rng: Any) -> int:
    """The Philox seed that an int is, that a Generator draws, or for None the operating system gives."""
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(0, 2**64, dtype=np.uint64, endpoint=False))
    seed = secrets.randbits(64) if rng is None else whole_number(rng, "rng (or a Generator)")
    if not 0 <= seed < 2**64:
        raise ValueError(f"rng must be a Generator or an int in 0..2**64 - 1, got {rng}")
    return seed

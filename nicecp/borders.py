"""What comes from users at a flow's borders: rows of numbers, seeds, and results that are no numbers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nicecp.preprocessing import Dequantize, Step, apply_steps
from nicecp.spec import whole_number

Floats = NDArray[np.float64]


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


def to_inputs(
    rows: Floats, steps: Sequence[Step], dtype: DTypeLike
) -> tuple[Floats, NDArray[np.bool_], float | Floats]:
    """Data rows (n, d) -> the network's inputs, which of them are not finite in ``dtype`` (zeroed), and the steps'
    log-determinants (0 for these)."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        z, log_det = apply_steps(steps, rows)
        bad = ~np.isfinite(z.astype(dtype, copy=False)).all(axis=1)
    if bad.any():
        z = np.where(bad[:, None], 0.0, z)
        log_det = np.where(bad, 0.0, log_det)
    return z, bad, log_det


def settle(out: Floats, rows: NDArray[Any], bad: NDArray[np.bool_], what: str, floor: float | None) -> None:
    """Log-densities of rows that are not finite, and of all no less than the floor, in place."""
    refuse_overflow(~np.isfinite(out) & ~bad, what)
    if bad.any():  # a context that is not finite made it NaN already
        out[bad] = np.where(np.isnan(rows[bad]).any(axis=1) | np.isnan(out[bad]), np.nan, -np.inf)
    if floor is not None:
        np.maximum(out, floor, out=out)


def with_log_det(rows: Floats, shape: tuple[int, ...], log_det: Floats) -> tuple[Floats, Any]:
    """rows : (n, d), log_det : (n,) in the shape in which rows came: (*shape, d), and a float for a single row."""
    rows = rows.reshape(*shape, rows.shape[-1])
    return rows, float(log_det[0]) if shape == () else log_det.reshape(shape)

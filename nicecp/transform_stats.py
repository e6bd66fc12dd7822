"""A look at one column of numbers: its shape, tails, repeated values and recorded step, and the transform that fits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.transform_spec import Chain, Transform

FloatArray = NDArray[np.float64]

ATOM_ROWS, ATOM_SHARE, ATOM_RATIO = 10, 1e-3, 10.0  # rows and share of one value, and times as many as its neighbours
COARSE = 0.9  # fewer different values than this share of the rows
SPARSE = 20.0  # sites of a grid for each value on it: the grid is not what the values were recorded on
TIE = 0.01  # nats a row that a quantile spline, which is the faster one of the two, may be behind Student's t
_NORMAL = 0.02  # distance of distribution functions beyond what chance gives
_HEAVY = 4.0  # tail index below which a kurtosis does not exist
_ANGLES = re.compile(r"phi|theta|angle|azimuth|phase|longitude|\b(ra|lon)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """What a column is like.

    rows: how many, of rows with weights Kish's effective number.
    tail: Hill's estimate of the index a of tails that fall as |x|^-a. step: the power of ten that all values are
    multiples of, 0 if there is none to be seen. atom: the value that fills atom_share of the rows where that is far
    more than its neighbours (else the share is 0). distance: of the distribution function to a normal one.
    """

    rows: int
    low: float
    high: float
    skewness: float
    kurtosis: float  # in excess of a normal distribution's
    tail: float
    different: float  # share of different values
    step: float
    atom: float
    atom_share: float
    distance: float
    sites: float  # multiples of the step for each different value, between the quartiles

    @property
    def repeats(self) -> bool:
        """One value, or most of them, in many rows: likelihoods of such a column say nothing."""
        return bool(self.atom_share) or self.different < COARSE

    @property
    def coarse(self) -> bool:
        """Recorded in steps so wide that values repeat."""
        return bool(self.step) and self.different < COARSE and self.sites <= SPARSE

    @property
    def few_digits(self) -> bool:
        """Recorded to so few significant digits that values repeat: small numbers in small steps, large in large."""
        return bool(self.step) and self.different < COARSE and self.sites > SPARSE

    def summary(self) -> str:
        """'skewness 1.9, excess kurtosis 16, tail index 3.1, 2 % of rows repeat a value, 4.26 to 269'."""
        repeated = f"{100 * (1 - self.different):.2g} % of rows repeat a value"
        return (
            f"skewness {self.skewness:.2g}, excess kurtosis {self.kurtosis:.2g}, tail index {self.tail:.2g}, "
            f"{repeated}, {self.low:.4g} to {self.high:.4g}"
        )


def look_at(values: FloatArray, dtype: DTypeLike, weights: FloatArray | None = None) -> Column:
    """values : (n,) finite, as read from numbers of ``dtype``; weights : (n,) positive, of any scale.

    With weights all but repeated values and the recorded step is of the weight, and rows are Kish's effective ones.
    """
    from scipy.special import ndtr

    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values, np.float64)[order]
    share = np.ones(len(ordered)) if weights is None else np.asarray(weights, np.float64)[order] / np.max(weights)
    share /= share.sum()
    place = np.cumsum(share) - 0.5 * share  # of each value in the distribution function
    n = 1.0 / float(share @ share)
    middle = float(share @ ordered)
    spread = math.sqrt(float(share @ np.square(ordered - middle)))
    z = (ordered - middle) / (spread or 1.0)
    different, counts = np.unique(ordered, return_counts=True)
    atom, atom_share = _atom(different, counts)
    step = recorded_step(different, dtype)
    distance = float(np.abs(ndtr(z) - place).max(initial=0.0))
    return Column(
        rows=round(n),
        low=float(ordered[0]),
        high=float(ordered[-1]),
        skewness=float(share @ z**3),
        kurtosis=float(share @ z**4) - 3.0,
        tail=_tail_index(ordered, share, place),
        different=len(different) / len(ordered),
        step=step,
        atom=atom,
        atom_share=atom_share,
        distance=max(0.0, distance - 1.4 / math.sqrt(n)),
        sites=_sites(ordered, different, step),
    )


def _sites(ordered: FloatArray, different: FloatArray, step: float) -> float:
    """Places of a grid between the quartiles, for each value that is there."""
    low, high = np.quantile(ordered, [0.25, 0.75])
    there = int(((different >= low) & (different <= high)).sum())
    return float((high - low) / step + 1.0) / max(1, there) if step else 0.0


def _tail_index(ordered: FloatArray, share: FloatArray, place: FloatArray) -> float:
    """Hill's estimate from as much of the weight as the square root of n rows have, those that lie farthest from the
    median; infinite for a constant."""
    distance = np.abs(ordered - np.interp(0.5, place, ordered))
    order = np.argsort(distance)[::-1]
    far, share = distance[order], share[order]
    n = 1.0 / float(share @ share)
    k = int(np.searchsorted(np.cumsum(share), max(2, int(math.sqrt(n))) / n * (1 - 1e-9))) + 1
    if len(far) <= k or not far[k] > 0:
        return math.inf
    mean = float(np.average(np.log(far[:k] / far[k]), weights=share[:k]))
    return 1.0 / mean if mean > 0 else math.inf


def _atom(different: FloatArray, counts: NDArray[np.int64]) -> tuple[float, float]:
    """The most frequent value and its share, if that is far beyond what the values around it have; else share 0."""
    top = int(np.argmax(counts))
    around = np.delete(counts[max(0, top - 25) : top + 26], min(top, 25))
    usual = float(np.mean(around)) if len(around) else 0.0
    n = int(counts.sum())
    if counts[top] >= max(ATOM_ROWS, ATOM_SHARE * n) and counts[top] >= ATOM_RATIO * usual:
        return float(different[top]), float(counts[top]) / n
    return float(different[top]), 0.0


def recorded_step(different: FloatArray, dtype: DTypeLike) -> float:
    """The largest power of ten that all values are multiples of, as far as ``dtype`` can tell; 0 if there is none.

    None is seen where steps are no wider than the rounding of the numbers themselves, or where a handful of rows could
    fit by chance.
    """
    rounding = np.abs(different) * float(np.finfo(np.dtype(dtype)).eps if np.dtype(dtype).kind == "f" else 0.0)
    largest = float(np.abs(different).max(initial=0.0))
    if len(different) < 3 or largest == 0:
        return 0.0
    for exponent in range(math.floor(math.log10(largest)), -16, -1):
        step = 10.0**exponent
        if step < 8.0 * float(rounding.max()):
            return 0.0
        off = np.abs(different - np.round(different / step) * step)
        if (off <= rounding + 1e-9 * step).all():
            return step
    return 0.0


def choose(column: Column, name: str, gain: float | None) -> tuple[Chain, str]:
    """What ``auto`` gives a column, and why, in words. A bound is never assumed: it has to be given.

    gain : mean log-density of held-out rows behind a quantile spline less that behind Student's t, nats; None where
        there are too few rows to tell, or values repeat. Neither lets a single row cost without bound, as
        standardisation alone would.
    """
    hint = ""
    span = column.high - column.low
    for period, text in ((2 * math.pi, "angle"), (360.0, "angle(360)")):
        if _ANGLES.search(name) and 0.9 * period < span <= period:
            hint = f" (if it is an angle, say {text})"
    if column.low == column.high:
        return (Transform("standardize"),), "since it is constant"
    reasons = []
    if column.tail < _HEAVY:
        reasons.append("its tails are heavy")
    if abs(column.skewness) > 0.5:
        reasons.append("it is skewed")
    shape = " and ".join(reasons) or f"it is {'close to' if column.distance < _NORMAL else 'not'} normal"
    if column.repeats:
        return (Transform("quantile"),), f"since values repeat and {shape}{hint}"
    if gain is None:
        return (Transform("student"),), f"since {column.rows} rows are few{hint}"
    if gain < -TIE:
        return (Transform("student"),), f"since {shape}; a spline is {-gain:.2g} nats worse on held-out rows{hint}"
    than = f"; Student's t is {gain:.2g} nats worse on held-out rows" if gain > TIE else ""
    return (Transform("quantile"),), f"since {shape}{than}{hint}"

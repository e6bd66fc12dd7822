"""Transforms of single columns as preprocessing steps: exact bijections whose log-determinant differs from row to row.

Each step changes the columns that it names and leaves the others as they are. Outside a transform's support, and for
infinite values, forward gives something that is not finite; NaN stays NaN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nicecp import spline
from nicecp.preprocessing import Scalar, Step

FloatArray = NDArray[np.float64]
_LOG_2PI = float(np.log(2.0 * np.pi))
_EDGE = 2.0**-53  # of a period: an angle on the seam counts as just beside it
_UNDERFLOW = 1e-280  # below this the tails of the t distribution are taken from their leading term

# Arrays of each kind beside ``columns``: m columns, so many numbers for each of them; "knots" is ragged.
SHAPES: dict[str, dict[str, str]] = {
    "recorded": {"width": "m"},
    "log": {"low": "m"},
    "logit": {"low": "m", "high": "m"},
    "student": {"freedom": "m", "location": "m", "scale": "m"},
    "quantile": {"counts": "m", "x": "knots", "z": "knots", "slope": "knots", "tails": "m2"},
    "angle": {"cut": "m", "period": "m"},
}
INTEGERS = ("columns", "counts")  # stored as int64; all other arrays are float64


class ColumnStep(Step):
    """What all of them share. columns : (m,) numbers of the columns, increasing."""

    affine: ClassVar[bool] = False
    columns: NDArray[np.int64]

    def _keep(self, *names: str) -> None:
        """Replace arrays by read-only copies of their dtype; ValueError for wrong lengths or numbers."""
        for name in ("columns", *names):
            dtype = np.int64 if name in INTEGERS else np.float64
            array = np.array(getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        m = len(self.columns)
        if self.columns.ndim != 1 or m == 0 or self.columns[0] < 0 or (np.diff(self.columns) <= 0).any():
            raise ValueError(f"{self.kind}: columns must be numbers from 0 on, increasing, at least one")
        for name in names:
            array, form = getattr(self, name), SHAPES[self.kind][name]
            if form != "knots" and array.shape != ((m,) if form == "m" else (m, 2)):
                raise ValueError(f"{self.kind}: {name} must have one entry for each of {m} columns, got {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{self.kind}: {name} must be finite")

    def _refuse_unless(self, good: Any, what: str) -> None:
        if not np.all(good):
            raise ValueError(f"{self.kind}: {what}")

    @abstractmethod
    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """x : (n, m) -> z, log dz/dx and d log(dz/dx) / dx, all (n, m)."""

    @abstractmethod
    def _undo(self, z: FloatArray) -> FloatArray:
        """z : (n, m) -> x : (n, m)."""

    @property
    def log_det(self) -> float:
        return 0.0

    def log_det_rows(self, x: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):
            return np.asarray(self._map(x[:, self.columns])[1].sum(axis=1))

    def forward(self, x: FloatArray) -> FloatArray:
        z = np.array(x, np.float64)
        with np.errstate(all="ignore"):
            z[:, self.columns] = self._map(z[:, self.columns])[0]
        return z

    def forward_with_log_det(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        z = np.array(x, np.float64)
        with np.errstate(all="ignore"):
            z[:, self.columns], log_slope, _ = self._map(z[:, self.columns])
        return z, np.asarray(log_slope.sum(axis=1))

    def inverse(self, z: FloatArray) -> FloatArray:
        x = np.array(z, np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x[:, self.columns] = self._undo(x[:, self.columns])
        return x

    def backward(self, dz: FloatArray, x: FloatArray) -> FloatArray:
        dx = np.array(dz, np.float64)
        with np.errstate(all="ignore"):
            _, log_slope, bend = self._map(x[:, self.columns])
            dx[:, self.columns] = dx[:, self.columns] * np.exp(log_slope) + bend
        return dx

    def attrs(self) -> dict[str, Scalar]:
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in ("columns", *SHAPES[self.kind])}


@dataclass(frozen=True, eq=False)
class Recorded(ColumnStep):
    """Values recorded in steps of ``width`` became x + width (u - 1/2), u uniform in [0, 1).

    The flow sees x as it is: on x the step is the identity. The noise is drawn when rows are read (nicecp.presented).
    """

    kind: ClassVar[str] = "recorded"
    affine: ClassVar[bool] = True
    columns: NDArray[np.int64]
    width: FloatArray

    def __post_init__(self) -> None:
        self._keep("width")
        self._refuse_unless(self.width > 0, "widths must be positive")

    @property
    def log_bin(self) -> float:
        """sum(log width): nats from a log-density of x to a bound of the log-probability of what was recorded."""
        return float(np.log(self.width).sum())

    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        return x, np.zeros_like(x), np.zeros_like(x)

    def _undo(self, z: FloatArray) -> FloatArray:
        return z

    def forward(self, x: FloatArray) -> FloatArray:
        return x

    def inverse(self, z: FloatArray) -> FloatArray:
        return z

    def backward(self, dz: FloatArray, x: FloatArray) -> FloatArray:
        return dz


@dataclass(frozen=True, eq=False)
class Log(ColumnStep):
    """z = log(x - low) on x > low."""

    kind: ClassVar[str] = "log"
    columns: NDArray[np.int64]
    low: FloatArray

    def __post_init__(self) -> None:
        self._keep("low")

    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        z = np.log(x - self.low)
        return z, -z, -1.0 / (x - self.low)

    def _undo(self, z: FloatArray) -> FloatArray:
        return np.asarray(self.low + np.exp(z))


def _logit(u: FloatArray, length: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of the place u in (0, 1) of an interval of this length."""
    z = np.log(u) - np.log1p(-u)
    return z, -np.log(u) - np.log1p(-u) - np.log(length), (1.0 / (1.0 - u) - 1.0 / u) / length


def _expit(z: FloatArray) -> FloatArray:
    e = np.exp(-np.abs(z))
    return np.where(z < 0, e, 1.0) / (1.0 + e)


@dataclass(frozen=True, eq=False)
class Logit(ColumnStep):
    """z = log((x - low) / (high - x)) on low < x < high."""

    kind: ClassVar[str] = "logit"
    columns: NDArray[np.int64]
    low: FloatArray
    high: FloatArray

    def __post_init__(self) -> None:
        self._keep("low", "high")
        self._refuse_unless(np.isfinite(self.high - self.low) & (self.low < self.high), "low must be below high")

    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        below, above, length = x - self.low, self.high - x, self.high - self.low
        z = np.log(below) - np.log(above)
        return z, np.log(length) - np.log(below) - np.log(above), 1.0 / above - 1.0 / below

    def _undo(self, z: FloatArray) -> FloatArray:
        # from the nearer end, so that values close to either bound stay inside
        part = (self.high - self.low) * _expit(-np.abs(z))
        return np.where(z < 0, self.low + part, self.high - part)


@dataclass(frozen=True, eq=False)
class Angle(ColumnStep):
    """An angle is wrapped to the period that begins at ``cut``, at the place u in (0, 1) of it: z = log(u / (1 - u)).

    x and x + period have one density, that of the period. Where the period begins and ends the density may jump: the
    flow does not know that the two ends meet, so the cut belongs where there are fewest rows. A sample lies in
    cut..cut + period.
    """

    kind: ClassVar[str] = "angle"
    columns: NDArray[np.int64]
    cut: FloatArray
    period: FloatArray

    def __post_init__(self) -> None:
        self._keep("cut", "period")
        self._refuse_unless(self.period > 0, "periods must be positive")

    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        turns = (x - self.cut) / self.period
        return _logit(np.clip(turns - np.floor(turns), _EDGE, 1.0 - _EDGE), self.period)

    def _undo(self, z: FloatArray) -> FloatArray:
        return np.asarray(self.cut + self.period * _expit(z))


@dataclass(frozen=True, eq=False)
class Student(ColumnStep):
    """z = Phi^-1(F((x - location) / scale)), F the distribution function of Student's t with ``freedom`` degrees.

    A power-law tail becomes a normal one: z grows as the square root of log x.
    """

    kind: ClassVar[str] = "student"
    columns: NDArray[np.int64]
    freedom: FloatArray
    location: FloatArray
    scale: FloatArray

    def __post_init__(self) -> None:
        self._keep("freedom", "location", "scale")
        self._refuse_unless((self.freedom > 0) & (self.scale > 0), "freedom and scale must be positive")

    @cached_property
    def log_norm(self) -> FloatArray:
        """log of the density's factor: f(t) = exp(log_norm) (1 + t^2 / nu)^(-(nu + 1) / 2)."""
        from scipy.special import gammaln

        nu = self.freedom
        return np.asarray(gammaln(0.5 * (nu + 1.0)) - gammaln(0.5 * nu) - 0.5 * np.log(np.pi * nu))

    @cached_property
    def log_tail(self) -> FloatArray:
        """F(-t) = exp(log_tail) t^-nu for large t."""
        nu = self.freedom
        return np.asarray(self.log_norm + 0.5 * (nu - 1.0) * np.log(nu))

    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        from scipy.special import ndtri, ndtri_exp, stdtr

        nu, t = self.freedom, (x - self.location) / self.scale
        size = np.abs(t)
        tail = stdtr(nu, -size)
        far = tail < _UNDERFLOW
        z = -ndtri(tail)
        if far.any():
            z = np.where(far, -ndtri_exp(np.minimum(self.log_tail - nu * np.log(size), 0.0)), z)
        z = np.copysign(z, t)
        log_density = self.log_norm - 0.5 * (nu + 1.0) * np.logaddexp(0.0, 2.0 * np.log(size) - np.log(nu))
        log_slope = log_density - np.log(self.scale) + 0.5 * (z * z + _LOG_2PI)
        bend = z * np.exp(log_slope) - (nu + 1.0) / (t + nu / t) / self.scale
        return z, log_slope, np.where(t == 0, 0.0, bend)

    def _undo(self, z: FloatArray) -> FloatArray:
        from scipy.special import log_ndtr, ndtr, stdtrit

        size = np.abs(z)
        tail = ndtr(-size)
        t = -stdtrit(self.freedom, np.maximum(tail, _UNDERFLOW))
        t = np.where(tail < _UNDERFLOW, np.exp((self.log_tail - log_ndtr(-size)) / self.freedom), t)
        return np.asarray(self.location + self.scale * np.copysign(np.where(size == 0, 0.0, t), z))


@dataclass(frozen=True, eq=False)
class Quantile(ColumnStep):
    """A monotone spline from a column's values to their normal scores, with logarithmic tails (nicecp.spline).

    counts : (m,) knots of each column; x, z, slope : the knots of all columns one after the other; tails : (m, 2).
    """

    kind: ClassVar[str] = "quantile"
    columns: NDArray[np.int64]
    counts: NDArray[np.int64]
    x: FloatArray
    z: FloatArray
    slope: FloatArray
    tails: FloatArray

    def __post_init__(self) -> None:
        self._keep("counts", "x", "z", "slope", "tails")
        total = int(self.counts.sum())
        lengths = {self.x.shape, self.z.shape, self.slope.shape}
        if (self.counts < 2).any() or lengths != {(total,)}:
            raise ValueError(f"{self.kind}: counts of at least 2 must add up to the number of knots")
        for knots in self.splines:
            spline.check_knots(knots.x, knots.z, knots.slope, knots.tail)

    @cached_property
    def splines(self) -> tuple[spline.Knots, ...]:
        ends = np.cumsum(self.counts)
        places = [slice(int(end - count), int(end)) for end, count in zip(ends, self.counts, strict=True)]
        each = zip(places, self.tails, strict=True)
        return tuple(spline.Knots(self.x[at], self.z[at], self.slope[at], tail) for at, tail in each)

    @classmethod
    def of(cls, columns: NDArray[np.int64], knots: list[spline.Knots]) -> Quantile:
        """The step of fitted splines, one for each column."""
        x, z, slope = (np.concatenate([getattr(k, name) for k in knots]) for name in ("x", "z", "slope"))
        counts = np.array([len(k.x) for k in knots], np.int64)
        return cls(columns, counts, x, z, slope, np.array([k.tail for k in knots]))

    def _map(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        out = np.empty((3, *x.shape))
        for j, knots in enumerate(self.splines):
            out[0, :, j], out[1, :, j], out[2, :, j] = spline.forward(x[:, j], knots)
        return out[0], out[1], out[2]

    def _undo(self, z: FloatArray) -> FloatArray:
        return np.stack([spline.inverse(z[:, j], knots) for j, knots in enumerate(self.splines)], axis=1)


COLUMN_KINDS: dict[str, type[ColumnStep]] = {
    step.kind: step for step in (Recorded, Log, Logit, Student, Quantile, Angle)
}


def column_step(kind: str, arrays: Mapping[str, NDArray[Any]]) -> ColumnStep:
    """The step of a kind with these arrays (columns and those of SHAPES); ValueError for wrong numbers."""
    make: Any = COLUMN_KINDS[kind]
    step: ColumnStep = make(**{name: arrays[name] for name in ("columns", *SHAPES[kind])})
    return step


def check_step_fits(step: Step, n_features: int) -> None:
    """ValueError unless a step of any kind is one for rows of so many features."""
    if isinstance(step, ColumnStep):
        if step.columns[-1] >= n_features:
            raise ValueError(f"preprocessing {step.kind}: column {step.columns[-1]} is not one of {n_features}")
        return
    for name, values in step.arrays().items():
        if values.shape[0] != n_features:
            raise ValueError(f"preprocessing {step.kind}: {name} has length {values.shape[0]}, the flow {n_features}")

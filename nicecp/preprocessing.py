"""Preprocessing as bijections with exact log-determinants, and dequantization.

A flow holds a list of steps; log-likelihoods are reported in the space before them (Dinh et al. 2015, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Scalar = int | float | str
_ORTHOGONAL = 1e-8  # eigh of 3072 dimensions is within 1e-13


class Step(Protocol):
    """One preprocessing step: z = forward(x), rows (n, d) of float64, and what a checkpoint stores.

    log_det is the part of log abs det dz/dx (nats) that all rows have in common. An affine step has no other; one that
    is not says so (``affine = False``) and gives each row's own part by log_det_rows.
    """

    kind: ClassVar[str]
    affine: ClassVar[bool] = True

    @property
    def log_det(self) -> float: ...
    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]: ...

    def log_det_rows(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """x : (n, d) as for forward -> (n,) what is each row's own, beside log_det."""
        return np.zeros(len(x))

    def forward_with_log_det(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], float | NDArray[np.float64]]:
        """forward(x), and all of log abs det dz/dx: (n,), or one number of an affine step."""
        return self.forward(x), self.log_det if self.affine else self.log_det + self.log_det_rows(x)

    def backward(self, dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        """dz : (n, d) gradient by z -> that by x : (n, d), the gradient of log_det_rows included.

        x : (n, d) as for forward; affine steps do not look at it.
        """
        ...

    def attrs(self) -> dict[str, Scalar]: ...
    def arrays(self) -> dict[str, NDArray[np.float64]]: ...


def apply_steps(
    steps: Sequence[Step], x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float | NDArray[np.float64]]:
    """x : (n, d) data -> z : (n, d) after all steps, and log abs det dz/dx: (n,), or one number if all are affine."""
    total: float | NDArray[np.float64] = 0.0
    for step in steps:
        x, log_det = step.forward_with_log_det(x)
        total = total + log_det
    return x, total


def undo_steps(
    steps: Sequence[Step], z: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float | NDArray[np.float64]]:
    """The inverse of apply_steps: z : (n, d) -> x : (n, d), and log abs det dx/dz: (n,), or one number."""
    total: float | NDArray[np.float64] = 0.0
    for step in reversed(steps):
        z = step.inverse(z)
        total = total - (step.log_det if step.affine else step.log_det + step.log_det_rows(z))
    return z, total


def steps_backward(steps: Sequence[Step], dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """dz : (n, d) gradient of a log-density by z -> that by x : (n, d), log-determinants of rows included.

    x : (n, d) data, as for apply_steps
    """
    inputs, looked_at = [x], max((k for k, step in enumerate(steps) if not step.affine), default=0)
    for step in steps[:looked_at]:
        inputs.append(step.forward(inputs[-1]))
    for k in range(len(steps) - 1, -1, -1):
        dz = steps[k].backward(dz, inputs[min(k, looked_at)])
    return dz


@dataclass(frozen=True)
class Dequantize(Step):
    """8-bit values k in 0..255 become x = low + (high - low) (k + u) / 256, u uniform in [0, 1).

    The flow sees x as it is: on x the step is the identity. The noise is drawn when rows are loaded.
    Source: Dinh et al. 2015, section 5.1.
    """

    kind: ClassVar[str] = "dequantize"
    low: float = 0.0
    high: float = 1.0
    levels: int = 256

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the range must be two finite numbers low < high, got {self.low}, {self.high}")
        if self.levels != 256:
            raise ValueError(f"only 256 levels can be dequantized, got {self.levels}")

    @property
    def log_det(self) -> float:
        return 0.0

    @property
    def log_bin(self) -> float:
        """log(256 / (high - low)): nats per dimension between log-density of x and log-probability of k."""
        return math.log(self.levels / (self.high - self.low))

    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x

    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        return z

    def backward(self, dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        return dz

    def to_bytes(self, x: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """x : (..., d) in data space -> the nearest lower level, clipped to 0..255."""
        level = np.floor((np.asarray(x, np.float64) - self.low) * (self.levels / (self.high - self.low)))
        return np.clip(level, 0, self.levels - 1).astype(np.uint8)

    def middle(self, level: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Levels k (or means of them) -> the middle of their bins in data space."""
        return np.asarray(self.low + (self.high - self.low) * (np.asarray(level, np.float64) + 0.5) / self.levels)

    def attrs(self) -> dict[str, Scalar]:
        return {"low": self.low, "high": self.high, "levels": self.levels}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {}


def _kept(step: object, name: str) -> NDArray[np.float64]:
    """Replace an array of a frozen step by a read-only float64 copy of it, and return that."""
    array = np.array(getattr(step, name), np.float64)
    array.setflags(write=False)
    object.__setattr__(step, name, array)
    return array


@dataclass(frozen=True, eq=False)
class Standardize(Step):
    """z = (x - mean) / std per column, log abs det = -sum(log std)."""

    kind: ClassVar[str] = "standardize"
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def __post_init__(self) -> None:
        mean, std = _kept(self, "mean"), _kept(self, "std")
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"mean and std must have one shape (d,), got {mean.shape} and {std.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError("mean must be finite and std finite and positive")

    @property
    def log_det(self) -> float:
        return -float(np.log(self.std).sum())

    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - self.mean) / self.std

    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        return z * self.std + self.mean

    def backward(self, dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        return dz / self.std

    def attrs(self) -> dict[str, Scalar]:
        return {}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {"mean": self.mean, "std": self.std}


@dataclass(frozen=True, eq=False)
class Zca(Step):
    """ZCA whitening z = V diag(1 / sqrt(e + r)) V^T (x - mean), log abs det = -sum(log(e + r)) / 2.

    mean : (d,) and e : (d,) eigenvalues, V : (d, d) with the eigenvectors of the covariance of x in its columns;
    r >= 0 : regularization, in units of x squared. Source: Dinh et al. 2015, section 5.1; Krizhevsky 2009, appendix A.
    """

    kind: ClassVar[str] = "zca"
    mean: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.float64]
    regularization: float = 0.0

    def __post_init__(self) -> None:
        mean, values, vectors = (_kept(self, name) for name in ("mean", "eigenvalues", "eigenvectors"))
        d = len(mean)
        if mean.shape != (d,) or values.shape != (d,) or vectors.shape != (d, d):
            shapes = f"{mean.shape}, {values.shape} and {vectors.shape}"
            raise ValueError(f"mean, eigenvalues and eigenvectors must be (d,), (d,) and (d, d), got {shapes}")
        if not (np.isfinite(mean).all() and np.isfinite(values).all() and np.isfinite(vectors).all()):
            raise ValueError("mean, eigenvalues and eigenvectors must be finite")
        if not 0 <= self.regularization < math.inf or not (values + self.regularization > 0).all():
            raise ValueError("the regularization must be at least 0, and all eigenvalues positive with it")
        # The log-determinant and the inverse below are those of orthogonal vectors.
        if np.abs(vectors.T @ vectors - np.eye(d)).max(initial=0.0) > _ORTHOGONAL:
            raise ValueError("the eigenvectors must be orthogonal and of length 1")

    @cached_property
    def _matrix(self) -> NDArray[np.float64]:
        return np.asarray((self.eigenvectors / np.sqrt(self.eigenvalues + self.regularization)) @ self.eigenvectors.T)

    @cached_property
    def _inverse(self) -> NDArray[np.float64]:
        return np.asarray((self.eigenvectors * np.sqrt(self.eigenvalues + self.regularization)) @ self.eigenvectors.T)

    @property
    def log_det(self) -> float:
        return -0.5 * float(np.log(self.eigenvalues + self.regularization).sum())

    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((x - self.mean) @ self._matrix)

    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(z @ self._inverse + self.mean)

    def backward(self, dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(dz @ self._matrix)  # symmetric

    def attrs(self) -> dict[str, Scalar]:
        return {"regularization": self.regularization}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {"mean": self.mean, "eigenvalues": self.eigenvalues, "eigenvectors": self.eigenvectors}


@dataclass(frozen=True, eq=False)
class Triangular(Step):
    """z = L x + b with L lower triangular, log abs det = sum(log abs L_ii): a Gaussian as a linear flow.

    lower : (d, d), bias : (d,). Source: Dinh et al. 2015, appendix B (approximate whitening).
    """

    kind: ClassVar[str] = "triangular"
    lower: NDArray[np.float64]
    bias: NDArray[np.float64]

    def __post_init__(self) -> None:
        lower, bias = _kept(self, "lower"), _kept(self, "bias")
        d = len(bias)
        if bias.shape != (d,) or lower.shape != (d, d):
            raise ValueError(f"lower and bias must be (d, d) and (d,), got {lower.shape} and {bias.shape}")
        if not (np.isfinite(lower).all() and np.isfinite(bias).all()):
            raise ValueError("lower and bias must be finite")
        if np.triu(lower, 1).any() or not np.diagonal(lower).all():
            raise ValueError("lower must be zero above its diagonal and nowhere zero on it")

    @property
    def log_det(self) -> float:
        return float(np.log(np.abs(np.diagonal(self.lower))).sum())

    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(x @ self.lower.T + self.bias)

    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.linalg import solve_triangular

        flat = (z - self.bias).reshape(-1, len(self.bias))
        solved = solve_triangular(self.lower, flat.T, lower=True, check_finite=False)
        return np.ascontiguousarray(solved.T).reshape(z.shape)

    def backward(self, dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(dz @ self.lower)

    def attrs(self) -> dict[str, Scalar]:
        return {}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {"lower": self.lower, "bias": self.bias}


@dataclass(frozen=True, eq=False)
class MarginLogit(Step):
    """z = log(p / (1 - p)), p = margin + (1 - 2 margin) (x - low) / (high - low), per column.

    low, high : (d,); 0 <= margin < 1/2. Data between low and high go to the whole line, with a margin above 0 to a
    bounded part of it, so that low and high themselves may occur. The margin's price: the inverse goes beyond low and
    high, by margin / (1 - 2 margin) of their distance at most. Log abs det of a row: sum over columns of
    log((1 - 2 margin) / (high - low)) - log p - log(1 - p). Values outside have no image (NaN), and density 0.
    """

    kind: ClassVar[str] = "margin-logit"
    affine: ClassVar[bool] = False
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    margin: float = 0.0

    def __post_init__(self) -> None:
        low, high = _kept(self, "low"), _kept(self, "high")
        if low.ndim != 1 or low.shape != high.shape:
            raise ValueError(f"low and high must have one shape (d,), got {low.shape} and {high.shape}")
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError("low and high must be finite, and low below high in every column")
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"the margin must be at least 0 and below 1/2, got {self.margin}")

    @property
    def _slope(self) -> NDArray[np.float64]:
        """(d,) dp / dx."""
        return np.asarray((1 - 2 * self.margin) / (self.high - self.low))

    def _p(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        # As Backend.logit_forward has it, so that both say the same of values at the very edge.
        return np.asarray(self.margin + (1 - 2 * self.margin) * ((x - self.low) * (1 / (self.high - self.low))))

    @property
    def log_det(self) -> float:
        return float(np.log(self._slope).sum())

    def log_det_rows(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        p = self._p(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(-(np.log(p) + np.log1p(-p)).sum(axis=-1))

    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        p = self._p(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log(p) - np.log1p(-p))

    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.special import expit

        p = expit(np.asarray(z, np.float64))
        return np.asarray(self.low + (self.high - self.low) * ((p - self.margin) / (1 - 2 * self.margin)))

    def backward(self, dz: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        p = self._p(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self._slope * (dz + 2 * p - 1) / (p * (1 - p)))

    def attrs(self) -> dict[str, Scalar]:
        return {"margin": self.margin}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {"low": self.low, "high": self.high}


def step_from(kind: str, attrs: Mapping[str, Scalar], arrays: Mapping[str, NDArray[np.float64]]) -> Step:
    """The step that a checkpoint describes; ValueError for an unknown kind or wrong numbers."""
    if kind == Dequantize.kind:
        return Dequantize(float(attrs["low"]), float(attrs["high"]), int(attrs["levels"]))
    if kind == Standardize.kind:
        return Standardize(arrays["mean"], arrays["std"])
    if kind == Zca.kind:
        return Zca(arrays["mean"], arrays["eigenvalues"], arrays["eigenvectors"], float(attrs["regularization"]))
    if kind == Triangular.kind:
        return Triangular(arrays["lower"], arrays["bias"])
    if kind == MarginLogit.kind:
        return MarginLogit(arrays["low"], arrays["high"], float(attrs["margin"]))
    raise ValueError(f"unknown preprocessing step {kind!r}")

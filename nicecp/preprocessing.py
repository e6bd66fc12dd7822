"""Preprocessing as bijections with exact log-determinants, and dequantization.

A flow holds a list of steps; log-likelihoods are reported in the space before them (Dinh et al. 2015, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Scalar = int | float | str


class Step(Protocol):
    """One preprocessing step: z = forward(x), a fixed log abs det per row (nats), and what a checkpoint stores."""

    kind: ClassVar[str]

    @property
    def log_det(self) -> float: ...
    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def backward(self, dz: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def attrs(self) -> dict[str, Scalar]: ...
    def arrays(self) -> dict[str, NDArray[np.float64]]: ...


@dataclass(frozen=True)
class Dequantize:
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

    def backward(self, dz: NDArray[np.float64]) -> NDArray[np.float64]:
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


@dataclass(frozen=True, eq=False)
class Standardize:
    """z = (x - mean) / std per column, log abs det = -sum(log std)."""

    kind: ClassVar[str] = "standardize"
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def __post_init__(self) -> None:
        mean, std = np.array(self.mean, np.float64), np.array(self.std, np.float64)
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"mean and std must have one shape (d,), got {mean.shape} and {std.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError("mean must be finite and std finite and positive")
        mean.setflags(write=False)
        std.setflags(write=False)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def log_det(self) -> float:
        return -float(np.log(self.std).sum())

    def forward(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - self.mean) / self.std

    def inverse(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        return z * self.std + self.mean

    def backward(self, dz: NDArray[np.float64]) -> NDArray[np.float64]:
        return dz / self.std

    def attrs(self) -> dict[str, Scalar]:
        return {}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {"mean": self.mean, "std": self.std}


def step_from(kind: str, attrs: Mapping[str, Scalar], arrays: Mapping[str, NDArray[np.float64]]) -> Step:
    """The step that a checkpoint describes; ValueError for an unknown kind or wrong numbers."""
    if kind == Dequantize.kind:
        return Dequantize(float(attrs["low"]), float(attrs["high"]), int(attrs["levels"]))
    if kind == Standardize.kind:
        return Standardize(arrays["mean"], arrays["std"])
    raise ValueError(f"unknown preprocessing step {kind!r}")

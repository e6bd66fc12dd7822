"""What a gradient check compares: directions in the space of parameters or of the data, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GradientReport:
    """What check_gradients compared."""

    rows: int
    directions: int  # differences taken: parameters, inputs and random directions, at both sets of parameters
    left_out: int  # (row, direction) pairs beside a ReLU's kink at every step, not compared
    worst: str  # the parameter (or "x") with the largest error
    error: float  # that error as a fraction of what is allowed; at most 1
    log_det_error: float  # |log_det - slogdet of the numerical Jacobian| in nats


@dataclass(frozen=True)
class Direction:
    """A unit vector in the space of one array: one entry of it (flat index), or all of them at once.

    For the data it is one of the flow's input space, ``unit`` : (d,), and ``along`` is how it looks in data space:
    (d,), or (n, d) where it looks different in every row.
    """

    name: str
    label: str
    along: int | Floats
    unit: Floats | None = None

    def moved(self, value: Floats, h: float) -> Floats:
        """value + h * this direction; an array of rows moves in every row."""
        out = value.copy()
        if isinstance(self.along, int):
            out.reshape(-1)[self.along] += h
        else:
            out += h * self.along
        return out

    def dot(self, gradient: Floats, row: int = 0) -> float:
        """The gradient's component along this direction; for the data that of one row."""
        if self.unit is not None and not isinstance(self.along, int) and self.along.ndim == 2:
            return float(np.vdot(gradient, self.along[row]))
        if isinstance(self.along, int):
            return float(gradient.reshape(-1)[self.along])
        return float(np.vdot(gradient, self.along))


@dataclass
class Check:
    """How to check, and what was found."""

    step: float
    rtol: float
    max_checks: int
    rng: np.random.Generator
    directions: int = 0
    left_out: int = 0
    worst: str = ""
    error: float = 0.0

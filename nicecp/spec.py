"""What a flow is made of, without its numbers: plain values that a checkpoint stores and a flow is built from."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from nicecp.kernels import PRECISIONS
from nicecp.kernels.backend import PRIORS

DTYPES = ("float32", "float64")
LAWS = {"additive": 1, "multiplicative": 1, "affine": 2}  # network outputs for each feature that is changed
PARTITIONS = ("odd-even",)


def whole_number(value: Any, name: str) -> int:
    """A Python int of an integer of any kind; TypeError that names the argument for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def layer_sizes(hidden: Iterable[Any]) -> tuple[int, ...]:
    """Sizes of hidden layers; TypeError for a single number or for sizes that are not whole."""
    if isinstance(hidden, str) or not isinstance(hidden, Iterable):
        raise TypeError(f"hidden must be a sequence of layer sizes such as (1000, 1000), got {hidden!r}")
    return tuple(whole_number(size, "a hidden size") for size in hidden)


def dtype_name(dtype: DTypeLike) -> str:
    """'float32' of "float32", np.float32 or np.dtype("float32"); TypeError for what is no dtype, None too."""
    try:
        if dtype is None:
            raise TypeError
        return np.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype must be 'auto', 'float32' or 'float64', got {dtype!r}") from None


@dataclass(frozen=True)
class CouplingSpec:
    """One coupling: its law, the part its network reads, the part it changes, and the network's hidden sizes.

    Part 0 is the even features (0-based), part 1 the odd ones.
    """

    law: str
    conditions_on: int
    transforms: int
    hidden: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"unknown coupling law {self.law!r}: expected one of {', '.join(LAWS)}")
        if {self.conditions_on, self.transforms} != {0, 1}:
            raise ValueError("a coupling conditions on one part (0 or 1) and transforms the other")
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden sizes must be at least 1, got {self.hidden}")


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a flow: everything that its parameters' shapes follow from."""

    n_features: int
    couplings: tuple[CouplingSpec, ...]
    prior: str = "logistic"
    dtype: str = "float64"
    n_context: int = 0
    precision: str = "full"
    partition: str = "odd-even"

    def __post_init__(self) -> None:
        if self.n_features < 2:
            raise ValueError(f"n_features must be at least 2 (a coupling needs two parts), got {self.n_features}")
        if not self.couplings:
            raise ValueError("a flow needs at least one coupling")
        if self.prior not in PRIORS:
            raise ValueError(f"unknown prior {self.prior!r}: expected one of {', '.join(sorted(PRIORS))}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if self.precision == "tf32" and self.dtype != "float32":
            raise ValueError(f"precision tf32 is for float32 flows, this one is {self.dtype}")
        if self.partition not in PARTITIONS:
            raise ValueError(f"unknown partition {self.partition!r}: expected one of {', '.join(PARTITIONS)}")
        if self.n_context != 0:
            raise ValueError("flows with a context are not available in this version: n_context must be 0")

    @property
    def part_sizes(self) -> tuple[int, int]:
        """Number of features in part 0 (even indices) and part 1 (odd indices)."""
        return (self.n_features + 1) // 2, self.n_features // 2

    def layer_sizes(self, coupling: int) -> tuple[int, ...]:
        """Sizes of a coupling network's layers: (fan_in, *hidden, fan_out)."""
        spec = self.couplings[coupling]
        fan_out = LAWS[spec.law] * self.part_sizes[spec.transforms]
        return (self.part_sizes[spec.conditions_on] + self.n_context, *spec.hidden, fan_out)

    @property
    def volume_preserving(self) -> bool:
        """Whether the couplings are: log abs det is then sum(log_scale) for every row."""
        return all(coupling.law == "additive" for coupling in self.couplings)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every parameter as users and checkpoints see them, in storage order.

        couplings/K/layers/J/weight (fan_in, fan_out), couplings/K/layers/J/bias (fan_out,), scaling/log_scale (d,).
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for k in range(len(self.couplings)):
            sizes = self.layer_sizes(k)
            for j, (fan_in, fan_out) in enumerate(pairwise(sizes)):
                shapes[f"couplings/{k}/layers/{j}/weight"] = (fan_in, fan_out)
                shapes[f"couplings/{k}/layers/{j}/bias"] = (fan_out,)
        shapes["scaling/log_scale"] = (self.n_features,)
        return shapes

    @property
    def n_parameters(self) -> int:
        total = 0
        for shape in self.parameter_shapes().values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total


def alternating(
    hidden: tuple[int, ...], n_couplings: int, law: str | tuple[str, ...] = "additive"
) -> tuple[CouplingSpec, ...]:
    """Couplings that alternate which half they change, the first changing the odd features (section 5.1).

    law : of all couplings, or a tuple that is gone through again and again.
    """
    laws = (law,) if isinstance(law, str) else law
    return tuple(CouplingSpec(laws[k % len(laws)], k % 2, 1 - k % 2, tuple(hidden)) for k in range(n_couplings))

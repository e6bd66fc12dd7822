"""Optimisers as plain settings; the arithmetic is the kernels' ``update`` (kernels/backend.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Slot

MAX_RATE = 1e6  # nothing learns at such rates, and a checkpoint holds no more than 2^53


@dataclass(frozen=True)
class AdaM:
    """AdaM as Dinh et al. 2015 use it (Kingma & Ba 2014, first version), in that version's parametrisation.

    Moving averages there are m <- beta g + (1 - beta) m, so beta2 = 0.01 is a decay of 0.99: today's
    Adam(betas=(momentum, 1 - beta2), eps=epsilon). lam decays the first-moment coefficient over time; 1 leaves it.
    The rate is divided by rate_decay after every update, down to rate_floor.
    """

    kind: ClassVar[str] = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    beta2: float = 0.01
    lam: float = 1.0
    epsilon: float = 1e-4
    rate_decay: float = 1.0
    rate_floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self, positive=("rate", "epsilon"), at_least_one=("rate_decay",), not_negative=("rate_floor",))
        if not (0 <= self.momentum < 1 and 0 < self.beta2 <= 1 and 0 < self.lam <= 1):
            raise ValueError(
                "AdaM needs 0 <= momentum < 1, 0 < beta2 <= 1 and 0 < lam <= 1, "
                f"got {self.momentum}, {self.beta2}, {self.lam}"
            )

    def write(self, state: NDArray[np.float64]) -> None:
        """The settings into the kernels' state array (host)."""
        state[Slot.RATE], state[Slot.RATE_DECAY], state[Slot.RATE_FLOOR] = self.rate, self.rate_decay, self.rate_floor
        state[Slot.MOMENTUM], state[Slot.SQUARE_DECAY] = self.momentum, 1.0 - self.beta2
        state[Slot.LAMBDA], state[Slot.EPSILON] = self.lam, self.epsilon

    def momentum_at(self, epoch: int) -> float:
        """Of an epoch, from 1."""
        return self.momentum


@dataclass(frozen=True)
class RMSProp:
    """RMSProp with momentum as in the published code of Dinh et al.: v <- average v + (1 - average) g^2, the root mean
    square floored, momentum_start for the first momentum_epoch epochs and momentum_end after, the rate divided by
    rate_decay after every update, down to rate_floor."""

    kind: ClassVar[str] = "rmsprop"
    rate: float = 1e-3
    average: float = 0.95
    floor: float = 0.01
    momentum_start: float = 0.0
    momentum_end: float = 0.5
    momentum_epoch: int = 5
    rate_decay: float = 1.0005
    rate_floor: float = 1e-4

    def __post_init__(self) -> None:
        _check(self, positive=("rate", "floor"), at_least_one=("rate_decay",), not_negative=("rate_floor",))
        if not (0 <= self.average < 1 and 0 <= self.momentum_start < 1 and 0 <= self.momentum_end < 1):
            raise ValueError(
                "RMSProp needs average and momenta in 0 <= value < 1, "
                f"got {self.average}, {self.momentum_start}, {self.momentum_end}"
            )
        if self.momentum_epoch < 0:
            raise ValueError(f"momentum_epoch must be at least 0, got {self.momentum_epoch}")

    def write(self, state: NDArray[np.float64]) -> None:
        """The settings into the kernels' state array (host)."""
        state[Slot.RATE], state[Slot.RATE_DECAY], state[Slot.RATE_FLOOR] = self.rate, self.rate_decay, self.rate_floor
        state[Slot.MOMENTUM], state[Slot.SQUARE_DECAY] = self.momentum_start, self.average
        state[Slot.LAMBDA], state[Slot.EPSILON] = 1.0, self.floor

    def momentum_at(self, epoch: int) -> float:
        """Of an epoch, from 1."""
        return self.momentum_start if epoch <= self.momentum_epoch else self.momentum_end


Optimizer = AdaM | RMSProp


def optimizer_from(kind: str, settings: Mapping[str, float]) -> Optimizer:
    """The optimiser of a kind with these settings; ValueError for an unknown kind or setting."""
    classes: dict[str, type[AdaM] | type[RMSProp]] = {AdaM.kind: AdaM, RMSProp.kind: RMSProp}
    if kind not in classes:
        raise ValueError(f"unknown optimizer {kind!r}: expected one of {', '.join(classes)}")
    known = {key: type(value)(settings[key]) for key, value in asdict(classes[kind]()).items() if key in settings}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"optimizer {kind} has no setting {', '.join(unknown)}")
    return classes[kind](**known)


def _check(
    settings: Optimizer, positive: tuple[str, ...], at_least_one: tuple[str, ...], not_negative: tuple[str, ...]
) -> None:
    for name, value in asdict(settings).items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if name in positive and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if name in at_least_one and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if name in not_negative and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        if name in ("rate", "rate_floor") and value > MAX_RATE:
            raise ValueError(f"{name} must be at most {MAX_RATE:g}, got {value:g}")

"""What becomes smaller while a flow is trained: the learning rate over the epochs, and the networks' weights."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Array, Backend, Slot
from nicecp.params import Layout

SCHEDULES = ("constant", "cosine")


def rate_factor(schedule: str, epoch: int, epochs: int) -> float:
    """What the learning rate of an epoch (from 1) is multiplied by: 1, or half a cosine that ends near 0.

    Source of the cosine: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017.
    """
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(epoch - 1, epochs - 1) / epochs))


def change_epochs(state: NDArray[np.float64], schedule: str, before: int, after: int, completed: int) -> None:
    """The rate in a state array of a run of ``before`` epochs, ``completed`` of them, as in a run of ``after`` epochs.

    As a ratio, since the rate may have been lowered for other reasons.
    """
    epoch = completed + (state[Slot.CURSOR] > 0 or completed == 0)  # the one whose rate the state holds
    state[Slot.RATE] *= rate_factor(schedule, epoch, after) / rate_factor(schedule, epoch, before)


def check_decay(schedule: str, weight_decay: float) -> None:
    """ValueError for settings that are out of bounds."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")


class WeightDecay:
    """After every step the weights of the couplings' networks are multiplied by 1 - strength * factor; nothing else is,
    nor are the parameters of registered networks.

    strength : the optimiser's rate at the beginning of a run, times the decay; factor : the epoch's rate_factor. So
    what happens in an epoch follows from its number alone.
    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    def __init__(self, backend: Backend, layout: Layout, dtype: str, p: Array, strength: float) -> None:
        self._backend, self._p, self._strength = backend, p, strength
        self._host = np.ones(layout.size, dtype)
        self._factors: Array = backend.alloc(layout.size, dtype)
        self._weights = [weight for layers in layout.views(self._host).couplings for weight, _ in layers]

    def begin(self, factor: float) -> None:
        """Steps of an epoch with this factor follow."""
        for weight in self._weights:
            weight[...] = max(0.0, 1.0 - self._strength * factor)
        self._backend.copy_in(self._factors, self._host)

    def after_step(self) -> None:
        with self._backend.arithmetic():
            self._p *= self._factors

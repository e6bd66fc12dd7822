"""Averages of a run's parameters over its epochs: what hovers around an optimum lies, on average, nearer to it.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992.
Parameters are taken at the ends of epochs, so that steps cost nothing more.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nicecp.kernels.backend import Array, Backend
from nicecp.params import Layout
from nicecp.records import Parameters

NONE = "none"


@dataclass(frozen=True)
class AverageKind:
    """tail : the mean over the last so many epochs of a run; else decay : of a moving average, per epoch."""

    tail: int = 0
    decay: float = 0.0

    def weight(self, count: int, epoch: int, epochs: int) -> float:
        """Of an epoch's parameters, ``count`` being in the average already: 1 begins anew, 0 leaves them out."""
        if self.tail:
            return 1.0 / (count + 1) if epoch > epochs - self.tail else 0.0
        # The first ones are a plain mean, else the parameters that training began with would weigh too much.
        return max(1.0 - self.decay, 1.0 / (count + 1))


def average_kind(text: str) -> AverageKind | None:
    """'tail:100' or 'ema:0.99' as an AverageKind, 'none' as None; ValueError for anything else."""
    if text == NONE:
        return None
    found = re.fullmatch(r"tail:(\d{1,9})|ema:(0?\.\d{1,17})", text)
    if found is not None and found[1] and int(found[1]) > 1:
        return AverageKind(tail=int(found[1]))
    if found is not None and found[2] and 0.0 < float(found[2]) < 1.0:
        return AverageKind(decay=float(found[2]))
    raise ValueError(
        f"weight_average must be none, tail:EPOCHS with at least 2, or ema:DECAY between 0 and 1, got {text!r}"
    )


class Average:
    """Of the parameters ``p``; ``count`` epochs are in it."""

    def __init__(self, backend: Backend, layout: Layout, dtype: str, kind: AverageKind) -> None:
        self._backend, self._layout, self._kind = backend, layout, kind
        self.flat: Array = backend.alloc(layout.size, dtype)
        self.views = layout.views(self.flat)
        self.count = 0

    @property
    def ready(self) -> bool:
        """There is an average, and it is not the last epoch's parameters."""
        return self.count > 1

    def after_epoch(self, p: Array, epoch: int, epochs: int) -> None:
        """Take the parameters at the end of an epoch, from 1, of so many that the run is to have."""
        weight = self._kind.weight(self.count, epoch, epochs)
        if weight == 0.0:
            self.count = 0
        elif self.count == 0:
            self._backend.assign(self.flat, p)
            self.count = 1
        else:
            with self._backend.arithmetic():  # in place: no memory beside it
                self.flat -= p
                self.flat *= 1.0 - weight
                self.flat += p
            self.count += 1

    def state(self) -> tuple[Parameters, int]:
        """What ``restore`` needs; no parameters while there is no average."""
        return (self._layout.to_host(self._backend, self.flat) if self.count else {}), self.count

    def restore(self, parameters: Parameters, count: int) -> None:
        self.count = count if parameters else 0
        if parameters:
            self._layout.from_host(self._backend, self.flat, parameters)


def better(one: float, other: float) -> bool:
    """Whether a finite log-likelihood is above another, which may be NaN."""
    return math.isfinite(one) and not one <= other

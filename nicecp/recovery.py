"""What training does about bad numbers: steps without a finite loss, parameters out of bounds.

A step whose loss is not finite changes nothing (kernels/backend.py). Where many follow one another the parameters
themselves are bad: then training goes back to the best model, with a lower rate, and after some times gives up. What is
done depends on the numbers alone, never on the time, so that a resumed run does the same.
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from nicecp.errors import TrainingError
from nicecp.flow import NICE
from nicecp.kernels.backend import Array, Backend, Slot
from nicecp.params import Views
from nicecp.records import Event, RunRecord
from nicecp.sources import column_label
from nicecp.split import EpochReader, Split

logger = logging.getLogger("nicecp")

IN_A_ROW = Slot.RING_SIZE  # bad steps, or all of an epoch if it has fewer; the ring holds the losses of so many
TIMES = 5
LOWER = 0.25  # what the rate is multiplied by: a thousandth after five times
WENT_BACK = "went back"
_LISTED = 8  # columns named in a message


def log_scale_bound(dtype: np.dtype[np.floating]) -> float:
    """-log(eps) of the flow's dtype, in nats: a column stretched by more shows the rounding errors of its values."""
    return -float(np.log(np.finfo(dtype).eps))


class Recoverable(Protocol):
    """What a Recovery knows of a Trainer."""

    flow: NICE
    backend: Backend
    record: RunRecord
    train_split: Split
    p: Array
    m: Array
    v: Array
    best: Array
    state: Array
    views: Views
    position: int

    @property
    def reader(self) -> EpochReader: ...


class Recovery:
    """Watches a trainer's losses and parameters; ``bad_steps`` is the number of bad steps at the end of what it saw."""

    def __init__(self, trainer: Recoverable) -> None:
        self._trainer = trainer
        self.bad_steps = 0
        self._seen = 0  # steps of the running window of rows
        self._at_bound: set[int] = set()  # columns that were reported

    def window_opened(self) -> None:
        """Its cursor begins at 0."""
        self._seen = 0

    def restored(self, bad_steps: int) -> None:
        """The trainer goes on from a state that was saved with so many bad steps at its end."""
        self.bad_steps = bad_steps
        self._seen = int(self._trainer.backend.copy_out(self._trainer.state)[Slot.CURSOR])
        self._at_bound = set(self._out_of_bounds(clip=False))

    def count(self) -> int:
        """Bad steps at the end of all steps so far."""
        state = self._trainer.backend.copy_out(self._trainer.state)
        cursor = int(state[Slot.CURSOR])
        new = min(cursor - self._seen, Slot.RING_SIZE)
        ring = state[Slot.LOSS_RING : Slot.LOSS_RING + Slot.RING_SIZE]
        losses = ring[(cursor - 1 - np.arange(new)) % Slot.RING_SIZE]  # the last one first
        finite = np.flatnonzero(np.isfinite(losses))
        return int(finite[0]) if len(finite) else self.bad_steps + new

    def after_step(self, last_of_window: bool) -> None:
        """Look at the losses, every IN_A_ROW steps and at the end of a window: the host stays out of the other steps.

        Raises TrainingError after TIMES returns.
        """
        trainer = self._trainer
        if not last_of_window and trainer.position % IN_A_ROW:
            return
        self.bad_steps = self.count()
        self._seen = int(trainer.backend.copy_out(trainer.state)[Slot.CURSOR])
        if self.bad_steps >= min(IN_A_ROW, trainer.reader.n_batches):
            self._go_back(f"the loss was not finite in {self.bad_steps} steps in a row")

    def before_validation(self) -> None:
        """At the end of an epoch: nothing that is not finite is validated or kept; log-scales are bounded."""
        trainer = self._trainer
        for name, flat in (("parameter", trainer.p), ("mean gradient", trainer.m), ("mean square", trainer.v)):
            if not trainer.backend.is_finite(flat):
                self._go_back(f"a {name} is not finite")
                break
        found = self._out_of_bounds(clip=True)
        if not set(found) <= self._at_bound:
            self._at_bound.update(found)
            mixed = any(step.kind in ("zca", "triangular") for step in trainer.flow.preprocessing)
            columns = None if mixed else trainer.train_split.source.info.columns
            labels = [column_label(column, columns) for column in found[:_LISTED]]
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            bound, where = log_scale_bound(trainer.flow.dtype), "whitened columns" if mixed else "columns"
            self._note("log-scale", f"the log-scale is at its bound of {bound:.1f} nats in {where} {', '.join(labels)}"
                       f"{more}: they may be constant, discrete or copies of others")  # fmt: skip

    def _go_back(self, why: str) -> None:
        """The best model (at first the one that training began with), moments 0, a lower rate."""
        trainer, backend = self._trainer, self._trainer.backend
        backend.assign(trainer.p, trainer.best)
        for moment in (trainer.m, trainer.v):
            backend.copy_in(moment, np.zeros(moment.shape, moment.dtype))
        self.bad_steps = 0
        if sum(event.kind == WENT_BACK for event in trainer.record.events) >= TIMES:
            problem = f"epoch {trainer.record.epoch + 1}: {why}, after going back to the best model {TIMES} times"
            raise TrainingError(f"{problem}; lower the learning rate (--lr) or look at the data")
        state = backend.copy_out(trainer.state)
        state[Slot.RATE] *= LOWER
        backend.copy_in(trainer.state, state)
        best = trainer.record.best_epoch
        where = f"the model of epoch {best}" if best else "the model it began with"
        self._note(WENT_BACK, f"{why}: went back to {where}, with the learning rate lowered to {state[Slot.RATE]:.3g}")

    def _out_of_bounds(self, clip: bool) -> list[int]:
        """Columns whose log-scale has reached the bound, and bound it if ``clip``."""
        trainer, backend = self._trainer, self._trainer.backend
        bound = log_scale_bound(trainer.flow.dtype)
        columns: list[int] = []
        every = np.arange(trainer.flow.n_features)
        for own, log_scale in zip(trainer.flow.spec.latent_columns, trainer.views.scaling, strict=True):
            values = backend.copy_out(log_scale)
            beyond = np.flatnonzero(np.abs(values) >= bound)
            columns += every[own][beyond].tolist()
            if clip and len(beyond):
                backend.copy_in(log_scale, np.clip(values, -bound, bound))
        return sorted(columns)

    def _note(self, kind: str, message: str) -> None:
        trainer = self._trainer
        epoch = trainer.record.epoch + 1
        logger.warning("epoch %d: %s", epoch, message)
        step = int(trainer.backend.copy_out(trainer.state)[Slot.STEP])
        trainer.record.events.append(Event(epoch, step, kind, message))

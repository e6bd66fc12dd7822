"""When a run is saved, and which of its files are kept."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from nicecp.checkpoint import state_path
from nicecp.errors import CheckpointError, OutputError
from nicecp.files import reporting
from nicecp.kernels.backend import Slot
from nicecp.records import EpochRecord, Event
from nicecp.spec import whole_number
from nicecp.train import Callback, Trainer

logger = logging.getLogger("nicecp")

CHECKPOINT_EVERY = 300.0  # seconds
MAX_KEPT = 1000


@dataclass(frozen=True)
class Saving:
    """A run is saved every so many seconds and, if ``epochs`` is given, after every so many epochs.

    keep : state files that are kept: the newest and keep - 1 older ones (``older_state``)
    """

    seconds: float = CHECKPOINT_EVERY
    epochs: int | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"the time between checkpoints must be positive, got {self.seconds}")
        for name, value, high in (("checkpoint_epochs", self.epochs, math.inf), ("keep", self.keep, MAX_KEPT)):
            if value is not None:
                whole_number(value, name)
                if not 1 <= value <= high:
                    raise ValueError(f"{name} must be at least 1" + f" and at most {high}" * (high < math.inf))


def older_state(state: str, number: int) -> str:
    """Where the state before the last ``number`` ones is kept: run.state.h5 -> run.state.1.h5 for the last but one."""
    stem, suffix = os.path.splitext(state)
    return f"{stem}.{number}{suffix}"


def files_of(out: str | os.PathLike[str], keep: int) -> list[str]:
    """All files that a run writes which keeps so many state files."""
    state = state_path(out)
    return [os.fspath(out), state, *(older_state(state, number) for number in range(1, keep))]


class Savable(Protocol):
    """What a Keeper knows of a run."""

    stopped_by: int | None
    begun: bool
    complete: bool

    @property
    def rows_done(self) -> int: ...
    def save(self) -> None: ...


@contextlib.contextmanager
def older_kept(state: str, keep: int) -> Iterator[None]:
    """Keep the state file that the block replaces as run.state.1.h5, the one before as run.state.2.h5, ...

    Nothing is renamed before the new file is in its place; if the block fails, all are as they were.
    """
    state = os.path.realpath(state)
    if keep < 2 or not os.path.isfile(state):
        yield
        return
    with reporting(state):
        # Named as a temporary file of nicecp.files: if we are killed here the next writer removes it.
        held = os.path.join(os.path.dirname(state), f".nicecp-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            os.link(state, held)
        except OSError:  # a file system without hard links
            shutil.copyfile(state, held)
        try:
            yield
            for number in range(keep - 1, 1, -1):
                if os.path.lexists(older_state(state, number - 1)):
                    os.replace(older_state(state, number - 1), older_state(state, number))
            os.replace(held, older_state(state, 1))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(held)
            raise


class Keeper(Callback):
    """Saves when it is time, and at the end, before the best parameters replace the last ones."""

    def __init__(self, run: Savable, saving: Saving, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self.saving, self._clock = run, saving, clock
        self.due = math.inf
        self._first: tuple[float, int] | None = None

    def begin(self) -> None:
        """The time to the first checkpoint begins."""
        self.due = self._clock() + self.saving.seconds

    def on_step(self, trainer: Trainer) -> None:
        if self._run.stopped_by is not None:  # a signal that came before the loop began
            trainer.request_stop(self._run.stopped_by)
        self._run.begun = True
        now = self._clock()
        if self._first is None:
            self._first = now, self._run.rows_done
        if now >= self.due:
            self._save_on_the_way(trainer)

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        if trainer.finished:
            self._run.save()
            self._run.complete = True
        elif self.saving.epochs is not None and record.epoch % self.saving.epochs == 0:
            self._save_on_the_way(trainer)

    def _save_on_the_way(self, trainer: Trainer) -> None:
        try:
            self._run.save()
        except (OutputError, CheckpointError) as error:
            logger.warning("%s (training goes on; the next checkpoint may succeed)", error)
            step = int(trainer.backend.copy_out(trainer.state)[Slot.STEP])
            trainer.record.events.append(Event(trainer.record.epoch, step, "not saved", str(error)))
        self.begin()

    def rows_per_second(self) -> float:
        """Since the first step was over (it may have compiled), validation and checkpoints included."""
        if self._first is None:
            return math.nan
        begin, rows = self._first
        return (self._run.rows_done - rows) / max(self._clock() - begin, 1e-9)

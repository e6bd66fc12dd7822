"""What training leaves behind, as plain values: the data's description, the run's history, and what resuming needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("nicecp")

Parameters = dict[str, NDArray[Any]]  # names and shapes of ModelSpec.parameter_shapes


@dataclass(frozen=True)
class DataInfo:
    """The data that a flow was trained on: enough to draw its samples and to recognise the file again."""

    image_shape: tuple[int, ...] | None = None  # e.g. (28, 28) or (32, 32, 3): rows, columns[, channels]
    columns: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None
    fingerprint: str = ""  # 64 hex digits, or empty if unknown


@dataclass(frozen=True)
class EpochRecord:
    """One row of the history; log-likelihoods are means in nats per row, NaN where there is no validation set."""

    epoch: int
    train_log_likelihood: float
    valid_log_likelihood: float
    learning_rate: float
    seconds: float
    average_log_likelihood: float | None = None  # of the averaged parameters on the validation set, if there are any


@dataclass(frozen=True)
class Event:
    """Something worth knowing that happened during training, such as a skipped step."""

    epoch: int
    step: int
    kind: str
    message: str


@dataclass
class RunRecord:
    """The run so far, as /training in both files. ``config`` must be JSON-serialisable."""

    seed: int = 0
    threads: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    epoch: int = 0  # completed epochs
    best_epoch: int = 0
    best_valid_log_likelihood: float = float("nan")
    best_average: int = 0  # epochs whose parameters the best ones are the average of; 0: an epoch's own
    history: list[EpochRecord] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


@dataclass
class ResumeState:
    """What the state file holds beside the run: a run resumed from it ends bit-identical to one never interrupted."""

    parameters: Parameters
    first_moment: Parameters
    second_moment: Parameters
    best_parameters: Parameters
    optimizer: str  # "adam" | "rmsprop"
    hyper: dict[str, float]
    state: NDArray[np.float64]  # the kernels' state array (kernels/backend.py, Slot)
    stale_epochs: int  # epochs since the best one: the patience counter
    epoch_seconds: float  # time spent so far in the unfinished epoch
    bad_steps: int = 0  # steps without a finite loss, one after the other, up to now
    average: Parameters = field(default_factory=dict)  # averaged parameters (nicecp.averaging), if there are any
    average_epochs: int = 0


def note_differences(record: RunRecord, now: RunRecord, step: int) -> None:
    """A warning and an event where a run is resumed with other threads or versions than it had."""
    parts = [
        f"{key} {record.versions[key]} -> {text}"
        for key, text in now.versions.items()
        if record.versions.get(key, text) != text
    ]
    if record.threads != now.threads:
        parts.insert(0, f"threads {record.threads} -> {now.threads}")
    if parts:
        message = f"resumed with {', '.join(parts)}: the result may differ in its last bits"
        logger.warning("%s", message)
        record.events.append(Event(record.epoch, step, "resumed", message))

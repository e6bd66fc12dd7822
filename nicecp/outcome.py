"""Where a training run is, and what came of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from nicecp.data import Splits
from nicecp.evaluate import Evaluation, evaluate
from nicecp.kernels.backend import Slot
from nicecp.records import RunRecord
from nicecp.scoring import example_context, example_rows, round_trip_error
from nicecp.train import Trainer

ROUND_TRIP_ROWS = 256


@dataclass(frozen=True)
class Progress:
    """Where a run is. Log-likelihoods in nats per row: the running epoch's so far, and the last validation's."""

    epoch: int  # the running one, from 1
    epochs: int
    fraction: float  # of the whole run
    train_log_likelihood: float
    valid_log_likelihood: float
    rows_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Outcome:
    """What came of Run.execute. Evaluations are of the best model and None where there are no rows, or after a stop."""

    finished: bool
    stopped_by: int | None  # the signal, if one came
    record: RunRecord
    train: Evaluation | None
    valid: Evaluation | None
    test: Evaluation | None
    round_trip: float  # max |x - f^-1(f(x))| over round_trip_rows rows
    round_trip_rows: int
    seconds: float  # of this process


def progress_of(trainer: Trainer, rows_done: int, rows_per_second: float) -> Progress:
    """See Run.progress."""
    state = trainer.backend.copy_out(trainer.state)
    weight = float(state[Slot.WEIGHT_SUM])
    last = trainer.record.history[-1] if trainer.record.history else None
    train = float(state[Slot.LOG_PROB_SUM]) / weight + trainer.offset if weight else math.nan
    epochs = trainer.config.epochs
    total = epochs * trainer.reader.n_batches * trainer.config.batch_size
    left = max(total - rows_done, 0)
    return Progress(
        epoch=min(trainer.record.epoch + (trainer.position > 0), epochs),
        epochs=epochs,
        fraction=min(1.0, rows_done / total),
        train_log_likelihood=train,
        valid_log_likelihood=math.nan if last is None else last.valid_log_likelihood,
        rows_per_second=rows_per_second,
        seconds_left=left / rows_per_second if rows_per_second > 0 else math.nan if left else 0.0,
    )


def outcome_of(trainer: Trainer, splits: Splits, stopped_by: int | None, began: float) -> Outcome:
    """Of a run that has ended: its best model is put in place and scored. began : time.monotonic() then, seconds."""
    record = trainer.record
    if not trainer.finished:
        return Outcome(False, stopped_by, record, None, None, None, math.nan, 0, time.monotonic() - began)
    # The best model; a run that was finished before it was resumed has not put it in place itself.
    flow, seed = trainer.flow, trainer.config.seed
    flow.set_parameters(trainer.resume_state().best_parameters)
    how = trainer.communicator, trainer.config.read_rows
    train = evaluate(flow, splits.train, seed, 0, *how)
    valid = None if splits.valid is None else evaluate(flow, splits.valid, seed, record.best_epoch, *how)
    test = None if splits.test is None else evaluate(flow, splits.test, seed, 0, *how)
    shown = splits.valid or splits.train
    rows = example_rows(flow, shown, ROUND_TRIP_ROWS)
    error = round_trip_error(flow, rows, example_context(shown, ROUND_TRIP_ROWS))
    return Outcome(True, None, record, train, valid, test, error, len(rows), time.monotonic() - began)

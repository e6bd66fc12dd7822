"""Where a run is, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from nicecp.evaluate import Evaluation
from nicecp.records import RunRecord


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

"""How a training run is shown: a bar on a terminal, a line per epoch in a pipe, or JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from nicecp.cli.console import Output, around_line, clock
from nicecp.describe import plain
from nicecp.records import EpochRecord
from nicecp.run import Progress, Run
from nicecp.train import Callback, Trainer

REFRESH = 0.3  # seconds
_STEPS = 1000  # of the bar


class Display(Callback):
    """Shows a run while it is carried out. Losing the terminal or the pipe never stops a run."""

    def __init__(self, run: Run, output: Output, as_json: bool) -> None:
        self._run, self._output, self._json = run, output, as_json
        self._next = 0.0
        self._bar: Any = None
        if _is_terminal(sys.stderr) and (as_json or _is_terminal(sys.stdout)):
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # its thread would repaint a bar that we repaint ourselves
            # Our own figures, since tqdm's know neither validation nor what an earlier process did; they stand where
            # the unit would, because tqdm puts a comma before a postfix.
            form = "{desc} |{bar}| {unit}"
            size = {"dynamic_ncols": True} if _has_size(sys.stderr) else {"ncols": 80, "nrows": 24}
            self._bar = tqdm(total=_STEPS, bar_format=form, file=sys.stderr, leave=False, **size)
            self._bar.set_description_str(f"epoch {min(run.trainer.record.epoch + 1, run.settings.epochs)}", False)
            self._show("starting")
            around_line.append(self._above)

    def on_step(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if self._bar is None or now < self._next:
            return
        self._next = now + REFRESH
        self._paint(self._run.progress())

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        progress = self._run.progress()
        if self._bar is not None:
            self._paint(progress)
        rows = trainer.reader.n_batches * trainer.config.batch_size
        rate = rows / record.seconds if record.seconds > 0 else math.nan
        if self._json:
            self._output.line(json.dumps(epoch_json(record, rate, progress.seconds_left)))
        elif self._bar is None:
            best = " *" if trainer.record.best_epoch == record.epoch and self._run.splits.valid is not None else ""
            self._output.line(
                f"epoch {record.epoch}/{progress.epochs}  train {record.train_log_likelihood:.2f}  "
                f"valid {_nats(record.valid_log_likelihood)} nats{best}  {_count(rate)} rows/s  "
                f"{clock(progress.seconds_left)} left"
            )

    def _paint(self, progress: Progress) -> None:
        bar = self._bar
        bar.set_description_str(f"epoch {progress.epoch}/{progress.epochs}", False)
        bar.n = round(progress.fraction * _STEPS)
        text = (
            f"train {_nats(progress.train_log_likelihood)} valid {_nats(progress.valid_log_likelihood)} nats, "
            f"{_count(progress.rows_per_second)} rows/s, {clock(progress.seconds_left)} left"
        )
        self._show(text)

    def _show(self, text: str) -> None:
        self._bar.unit = text
        with contextlib.suppress(OSError, ValueError):
            self._bar.refresh()

    def _above(self, write: Callable[[], None]) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._bar.clear()
        write()
        with contextlib.suppress(OSError, ValueError):
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            around_line.remove(self._above)
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None


def epoch_json(record: EpochRecord, rows_per_second: float, seconds_left: float) -> dict[str, Any]:
    return {
        "event": "epoch",
        "epoch": record.epoch,
        "train_log_likelihood": plain(record.train_log_likelihood),
        "valid_log_likelihood": plain(record.valid_log_likelihood),
        "learning_rate": plain(record.learning_rate),
        "seconds": plain(record.seconds),
        "rows_per_second": plain(rows_per_second),
        "seconds_left": plain(seconds_left),
    }


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _has_size(stream: Any) -> bool:
    """Whether the terminal knows its size; tqdm would show nothing on one of 0 rows or columns."""
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}" if abs(value) < 1e9 else f"{value:.6g}"


def _count(rate: float) -> str:
    return "?" if math.isnan(rate) else f"{rate:,.0f}"

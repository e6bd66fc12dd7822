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
from nicecp.outcome import Progress
from nicecp.records import EpochRecord
from nicecp.run import Run
from nicecp.train import Callback, Trainer

REFRESH = 0.3  # seconds
LINES = 20  # epochs that stay on a terminal above the bar, beside the last one
_STEPS = 1000  # of the bar
_BAR = 8  # columns: shorter ones show nothing


class Display(Callback):
    """Shows a run while it is carried out. Losing the terminal or the pipe never stops a run."""

    def __init__(self, run: Run, output: Output, as_json: bool) -> None:
        self._run, self._output, self._json = run, output, as_json
        self._next = 0.0
        self._bar: Any = None
        self._every = -(-run.settings.epochs // LINES)
        self._unshown = ""  # the line of the last epoch, as long as it is not on the screen
        if is_terminal(sys.stderr) and (as_json or is_terminal(sys.stdout)):
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
        rows = trainer.reader.n_batches * trainer.config.batch_size
        rate = rows / record.seconds if record.seconds > 0 else math.nan
        if self._json:
            self._line(json.dumps(epoch_json(record, rate, progress.seconds_left)))
        else:
            averaged = record.average_log_likelihood
            beside = "" if averaged is None else f" (averaged {_nats(averaged)})"
            best = " *" if trainer.record.best_epoch == record.epoch and self._run.splits.valid is not None else ""
            self._unshown = (
                f"epoch {record.epoch}/{progress.epochs}  train {_nats(record.train_log_likelihood)}  "
                f"valid {_nats(record.valid_log_likelihood)} nats{beside}{best}  {_count(rate)} rows/s"
                + ("" if math.isnan(progress.seconds_left) else f"  {clock(progress.seconds_left)} left")
            )
            if self._bar is None or record.epoch % self._every == 0:
                self._line(self._unshown)
                self._unshown = ""
        if self._bar is not None:
            self._paint(progress)

    def _line(self, text: str) -> None:
        if self._bar is None:
            self._output.line(text)
        else:
            self._above(lambda: self._output.line(text))

    def _paint(self, progress: Progress) -> None:
        bar = self._bar
        bar.n = round(progress.fraction * _STEPS)
        head, with_bar, text = layout(progress, _columns(sys.stderr))
        bar.set_description_str(head, False)
        bar.bar_format = "{desc} |{bar}| {unit}" if with_bar else "{desc}  {unit}"
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
            if self._unshown:
                self._output.line(self._unshown)


def layout(progress: Progress, columns: int) -> tuple[str, bool, str]:
    """What fits into a line: what stands before the bar, whether there is a bar, what stands after it.

    The narrower the line the less of it; the speed and the time left go last.
    """
    head = f"epoch {progress.epoch}/{progress.epochs}"
    valid = f"valid {_nats(progress.valid_log_likelihood)} nats"
    pace = f"{_count(progress.rows_per_second)} rows/s"
    if not math.isnan(progress.seconds_left):
        pace += f", {clock(progress.seconds_left)} left"
    choices = (
        (head, True, f"train {_nats(progress.train_log_likelihood)} {valid}, {pace}"),
        (head, True, f"{valid}, {pace}"),
        (head, False, f"{valid}, {pace}"),
        (head, False, pace),
        (str(progress.epoch), False, pace),
    )
    for before, bar, after in choices:
        if len(before) + len(after) + (4 + _BAR if bar else 2) < columns:
            return before, bar, after
    return choices[-1]


def epoch_json(record: EpochRecord, rows_per_second: float, seconds_left: float) -> dict[str, Any]:
    return {
        "event": "epoch",
        "epoch": record.epoch,
        "train_log_likelihood": plain(record.train_log_likelihood),
        "valid_log_likelihood": plain(record.valid_log_likelihood),
        "average_log_likelihood": plain(record.average_log_likelihood),
        "learning_rate": plain(record.learning_rate),
        "seconds": plain(record.seconds),
        "rows_per_second": plain(rows_per_second),
        "seconds_left": plain(seconds_left),
    }


def is_terminal(stream: Any) -> bool:
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


def _columns(stream: Any) -> int:
    return os.get_terminal_size(stream.fileno()).columns if _has_size(stream) else 80


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}" if abs(value) < 1e9 else f"{value:.6g}"


def _count(rate: float) -> str:
    return "?" if math.isnan(rate) else f"{rate:,.0f}"

"""Messages: the library's warnings as single lines on standard error, and output whose reader may go away."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import click

from nicecp.errors import printable

# A progress bar, while there is one, registers how to get out of the way of a line.
around_line: list[Callable[[Callable[[], None]], None]] = []
_quiet = False  # errors alone are shown


def silence() -> None:
    """From here on this process, one of several, leaves it to rank 0 to show things but its own errors."""
    global _quiet
    if not _quiet:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lasts)
    _quiet = True


def is_silent() -> bool:
    return _quiet


class _OneLine(logging.Handler):
    """'nicecp: warning: ...' on standard error, the same line only once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(f"nicecp: {record.levelname.lower()}: {' '.join(record.getMessage().split())}")
        if record.levelno >= logging.WARNING and line in self._seen:
            return
        self._seen.add(line)
        note(line)


def note(line: str, error: bool = False) -> None:
    """A line on standard error, above the progress bar if there is one; a terminal that has gone does not matter."""
    if _quiet and not error:
        return

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):
            click.echo(line, err=True)

    if around_line:
        around_line[-1](write)
    else:
        write()


@contextlib.contextmanager
def messages(debug: bool) -> Iterator[None]:
    """The library's log and Python's warnings as lines on standard error, for as long as the context lasts."""
    logger, handler = logging.getLogger("nicecp"), _OneLine()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        logger.warning("%s", message)

    before: Any = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        logger.removeHandler(handler)
        logger.setLevel(level)


class Output:
    """Standard output for work that must go on when it cannot be written any more.

    ``failure`` is what went wrong; None too where the reader just went (a closed pipe, a terminal gone).
    """

    def __init__(self) -> None:
        self._open = True
        self.failure: OSError | None = None

    def line(self, text: str) -> None:
        if not self._open:
            return
        try:
            click.echo(text)
            sys.stdout.flush()
        except OSError as error:
            self._open = False
            if not isinstance(error, BrokenPipeError) and error.errno != errno.EIO:
                self.failure = error
            abandon(sys.stdout)


def abandon(stream: TextIO) -> None:
    """Send what is still buffered nowhere: Python flushes once more at exit, and would complain."""
    with contextlib.suppress(OSError, ValueError):  # there may be no real file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(printable(f"  {name.ljust(width)}  {value}") for name, value in rows)


def plural(count: int, what: str) -> str:
    """'1 epoch', '2,000 epochs'."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """'42 s', '3 min 05 s', '2 h 10 min', '3 d 4 h'; '?' if unknown."""
    if not 0 <= seconds < 1e10:
        return "?"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"

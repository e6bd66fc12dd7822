"""Every error that nicecp raises on purpose, and the bottom of the import order.

An error says what is wrong, where, and what to do about it in one line; the command line prints that line and
exits with code 2.
"""

from __future__ import annotations

import os


class NicecpError(Exception):
    """Base of the errors that come from the user's files, options or machine."""


class DataError(NicecpError, ValueError):
    """A data file that cannot be used: names the file, the problem and the remedy."""


class CheckpointError(NicecpError, ValueError):
    """A checkpoint that cannot be read, does not fit, or holds numbers that could not be read again."""


class OutputError(NicecpError, ValueError):
    """A file that cannot be written: the name, the folder, the disk, or another run at work on it."""


class DeviceError(NicecpError, RuntimeError):
    """A device that was asked for and cannot be used, with the reason."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The device has too little memory: says how much was wanted and what to lower."""


class TrainingError(NicecpError, RuntimeError):
    """Training cannot start or cannot go on (settings, non-finite numbers)."""


class ParallelError(NicecpError, RuntimeError):
    """Several processes that cannot work together: names the reason and what to install or change."""


class MissingExtra(NicecpError, ImportError):
    """Something optional that is not installed: names the command that installs it."""


_LONGEST = 600  # characters of a problem or remedy: names in a file may have 60,000


def about_file(path: str | os.PathLike[str], problem: str, remedy: str) -> str:
    """One line: 'PATH': problem; remedy.  Odd characters, of the path or of a file's content, cannot break the line."""
    problem, remedy = (text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..." for text in (problem, remedy))
    return printable(f"{os.fspath(path)!r}: {problem}; {remedy}")


def printable(text: str) -> str:
    """One line that a terminal shows as it is: line breaks, control characters and the like as Python writes them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

"""A partition that is read from a text file."""

from __future__ import annotations

import os
import re
import stat

from nicecp.errors import DataError, about_file
from nicecp.files import reason

MAX_COLUMNS = 100_000  # of an order among a run's settings, whose JSON is limited in a checkpoint
_MAX_BYTES = 16 * MAX_COLUMNS


def order_from_file(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The permutation in a text file: 0-based column numbers, each once, between spaces, commas or line ends.

    The first half of them (rounded up) is part 0. Text after a # is a comment. Raises DataError.
    """
    remedy = "give the 0-based numbers of all columns, each once, as text"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for a writer
            raise DataError(about_file(path, "not a regular file", remedy))
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(about_file(path, f"cannot be read ({reason(error)})", remedy)) from None
    if len(raw) > _MAX_BYTES:
        raise DataError(about_file(path, f"has more than {_MAX_BYTES:,} bytes", remedy))
    text = re.sub(r"#[^\n]*", "", raw.decode("utf-8", "replace"))
    words = text.replace(",", " ").split()
    odd = next((word for word in words if not re.fullmatch(r"[0-9]{1,9}", word)), None)
    if odd is not None:
        raise DataError(about_file(path, f"{odd[:20]!r} is no column number", remedy))
    order = tuple(int(word) for word in words)
    if not 2 <= len(order) <= MAX_COLUMNS:
        raise DataError(about_file(path, f"holds {len(order):,} numbers, expected 2 to {MAX_COLUMNS:,}", remedy))
    missing = sorted(set(range(len(order))) - set(order))
    if missing:
        problem = f"holds {len(order)} numbers, but column {missing[0]} is not among them"
        raise DataError(about_file(path, problem, remedy))
    return order

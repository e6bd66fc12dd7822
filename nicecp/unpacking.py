"""What a packed file may unpack to: a file of a few kilobytes must not cost gigabytes."""

from __future__ import annotations

import os

from nicecp.errors import DataError, about_file

FREE, RATIO = 8 * 2**20, 200  # bytes that any file may unpack to, and how many times its own size beyond that


def unpacked_limit(path: str) -> int:
    """Bytes. Pictures and tables of numbers pack to a half or a tenth; gzip's own limit is a thousandth."""
    return FREE + RATIO * os.path.getsize(path)


def check_unpacked(path: str, size: int) -> None:
    """DataError if this many bytes are more than the packed file may unpack to."""
    limit = unpacked_limit(path)
    if size > limit:
        problem = f"it unpacks to more than {limit >> 20} MiB, {RATIO} times its size and more"
        raise DataError(about_file(path, problem, "unpack it yourself if you trust it"))

"""How many rows are kept in memory where a limit is given for the whole process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from dataclasses import dataclass, replace

from nicecp.data import Splits
from nicecp.evaluate import BATCH, READ_ROWS
from nicecp.flow import NICE
from nicecp.kernels.cuda_pinned import STAGED
from nicecp.machine import as_bytes
from nicecp.plan import Cost, cost_of_run
from nicecp.presets import Settings
from nicecp.reconstruction import workspace_bytes
from nicecp.sources import Source
from nicecp.split import BLOCK, SHUFFLE_WINDOW, Split

# Beside what is counted: compiled code and BLAS's buffers (measured: 60 MiB), the pieces in which a file is read, some
# of 8 MiB, and small arrays. To compile, with an empty cache, takes 100 MiB more.
RESERVE = 2**27
SAVING = 12  # times the parameters: what a checkpoint holds, as arrays, as a file in memory and as its bytes
_WINDOW_ROW, _SCORED_ROW = 170, 64  # bytes of indices for every row of a window while it is being read


_MMAP_THRESHOLD = -3  # the C library's M_MMAP_THRESHOLD


@dataclass(frozen=True)
class Rows:
    """window: rows shuffled together, of which two windows are in memory; scored: rows read at a time for scoring."""

    window: int = SHUFFLE_WINDOW
    scored: int = READ_ROWS


def resident_bytes() -> int:
    """What this process has in memory now; its peak where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def give_back_at_once() -> None:
    """Have arrays of 1 MiB and more returned to the system when they are freed, where the C library has a say in it.

    glibc would keep those of up to 32 MiB for later, in a place of its own for every thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def rows_within(limit: int, resident: int, cost: Cost, batch_size: int, row_bytes: int) -> Rows:
    """The rows that training may keep.

    limit : bytes of the process; resident : bytes that it has already. Raises ValueError where not one batch fits.
    """
    fixed = (
        resident
        + cost.pinned_bytes
        + RESERVE
        + cost.parameter_bytes
        + SAVING * cost.parameter_bytes // 5
        + cost.buffer_bytes
    )
    window_row, scored_row = 2 * row_bytes + _WINDOW_ROW, 3 * row_bytes + _SCORED_ROW
    least = max(batch_size, BLOCK)
    needed = fixed + (least + 4 * batch_size) * window_row + (BATCH + BLOCK) * scored_row
    if limit < needed:
        pinned = cost.pinned_bytes
        what = f" and {as_bytes(pinned)} of page-locked memory (--device-memory-limit)" if pinned > STAGED else ""
        raise ValueError(_too_small(limit, needed, f"this model and a batch of {batch_size} rows{what}"))
    free = limit - fixed
    scored = min(READ_ROWS, max(BATCH, int(free / 4 / scored_row) - BLOCK))
    window = int((free - (scored + BLOCK) * scored_row) / window_row) - 4 * batch_size
    return Rows(min(SHUFFLE_WINDOW, max(least, window)), scored)


def within(
    limit: int | None, settings: Settings, splits: Splits, device: str = "cpu", resumed: bool = False
) -> tuple[Settings, int]:
    """Settings with a window, and the rows to read at a time for scoring, for a process of ``limit`` bytes.

    device : of a Backend; on a GPU the page-locked memory through which data stream counts as well.

    The window is that of one rank, so that it does not depend on their number: of several each keeps a part of it.

    Raises ValueError where the limit is too small for a batch, or for the windows of a run that goes on.
    """
    if limit is None:
        return settings, READ_ROWS
    give_back_at_once()
    source, resident = splits.train.source, resident_bytes()
    row_bytes = source.n_features * source.dtype.itemsize
    rows = rows_within(limit, resident, cost_of_run(settings, splits, device), settings.batch_size, row_bytes)
    if device != "cpu" and not resumed and rows.window < len(splits.train):  # then they stream
        cost = cost_of_run(replace(settings, window=rows.window), splits, device)
        rows = rows_within(limit, resident, cost, settings.batch_size, row_bytes)
    if not resumed:
        return replace(settings, window=rows.window), rows.scored
    if min(settings.window, len(splits.train)) > rows.window:
        needed = limit + (settings.window - rows.window) * (2 * row_bytes + _WINDOW_ROW)
        raise ValueError(_too_small(limit, needed, f"the run's windows of {settings.window} rows"))
    return settings, rows.scored


def scored_within(limit: int | None, flow: NICE, split: Split) -> int:
    """Rows to read at a time for scoring alone, for a process of ``limit`` bytes; ValueError as ``within``."""
    if limit is None:
        return READ_ROWS
    give_back_at_once()
    item = flow.dtype.itemsize
    row = 3 * split.source.n_features * split.source.dtype.itemsize + _SCORED_ROW
    fixed = resident_bytes() + RESERVE + flow.n_parameters * item + workspace_bytes(flow.spec, BATCH, False)
    fixed += 8 * len(split)
    needed = fixed + (BATCH + BLOCK) * row
    if limit < needed:
        raise ValueError(_too_small(limit, needed, f"this flow and {BATCH} rows at a time"))
    return max(BATCH, min(READ_ROWS, (limit - fixed) // row - BLOCK))


def block_within(limit: int | None, flow: NICE, source: Source) -> int:
    """Rows of a block that is read and scored as a whole, for a process of ``limit`` bytes; raises as ``within``."""
    if limit is None:
        return sys.maxsize
    give_back_at_once()
    row = 8 * 5 * source.n_features  # what is read, with its noise, in float64, as inputs, and a copy on the way
    fixed = (
        resident_bytes() + RESERVE + flow.n_parameters * flow.dtype.itemsize + workspace_bytes(flow.spec, BATCH, False)
    )
    if limit < fixed + BATCH * row:
        raise ValueError(_too_small(limit, fixed + BATCH * row, f"this flow and {BATCH} rows at a time"))
    return (limit - fixed) // row


def _too_small(limit: int, needed: int, what: str) -> str:
    return f"memory_limit must be at least {as_bytes(needed)} for {what}, got {as_bytes(limit)}"

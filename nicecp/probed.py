"""The child process of nicecp.probe: does with a file what its parent is about to do, and ends."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import Any

from nicecp import probe
from nicecp.errors import NicecpError


def main() -> None:
    """Arguments after the path list: the file and, perhaps, the dataset, both as hexadecimal digits. Never returns."""
    path, *dataset = (os.fsdecode(bytes.fromhex(text)) for text in sys.argv[2:])
    probe.switch_off()
    import nicecp.datasets  # noqa: F401  before the limits: what an interpreter needs is not the file's doing
    from nicecp.hdf5_data import UnreadableAttribute

    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, probe.MEMORY_BYTES)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, probe.CPU_SECONDS)  # RLIMIT_CPU knows whole seconds only
    code = 0
    try:
        look(path, dataset[0] if dataset else None)
    except UnreadableAttribute:  # there it might be read after all, with more memory than is left here
        code = probe.UNREADABLE
    except MemoryError:
        code = probe.TOO_MUCH_MEMORY
    except Exception:  # anything that raises ends, here as there
        code = 0
    os._exit(code)  # HDF5's own clean-up may hang as well


def look(path: str, dataset: str | None) -> None:
    """Of a checkpoint, all but its numbers. Of data: list the datasets; open those that would be used, with their names
    and chunks; read their first and last row.
    """
    from nicecp.store import go_through, is_checkpoint

    if is_checkpoint(path):
        go_through(path)
        return
    from nicecp.datasets import candidates, locate
    from nicecp.hdf5_data import HDF5Source, UnreadableAttribute
    from nicecp.table_files import CompoundSource, columns_below

    found = [] if dataset is None else [dataset]
    try:
        roles, test = locate(path, dataset)
        found = [*roles.values(), test]
        searched = False
    except NicecpError:
        searched = dataset is None  # the whole file, for want of the usual names
    if not searched:
        with contextlib.suppress(NicecpError):
            candidates(path)
    columns = [column for place in found or ["/"] for column in columns_below(path, place)]
    for name in dict.fromkeys([*found, *columns]):
        with (
            contextlib.suppress(NicecpError),
            contextlib.closing(CompoundSource(path, name, numbers_only=True)) as table,
        ):
            _read_ends(table)
            continue
        try:
            with contextlib.closing(HDF5Source(path, name, beside=True)) as source:
                _read_ends(source)
        except UnreadableAttribute:
            raise
        except NicecpError:
            pass


def _read_ends(source: Any) -> None:
    """The first and the last row."""
    source.read(0, 1)
    source.read(source.n_rows - 1, source.n_rows)


def _limit(kind: int, value: int) -> None:
    """As low as asked, but never above what the parent was given."""
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(OSError, ValueError):  # macOS has no limit on memory
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

"""Somebody else's HDF5 file is gone through in a child process first, with limits on time and memory.

HDF5 trusts its files: after a single flipped bit it can loop for ever or crash the process. So before this process
parses a file, another one does all that will be done with it: lists the datasets, opens the chosen ones, reads their
names, the index of their chunks, the first and the last row. What ends there in time ends here. (Of a checkpoint, whose
digest shows all damage but not what was made on purpose, it goes through the groups, attributes and datasets.)

The child is a bare interpreter (no site, no environment, no host program's state; not a fork, which would hang where
other threads hold locks). It costs about a tenth of a second, in which this process can import h5py; a file that has
passed is not tried again while its size and time stay the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from nicecp.errors import DataError, about_file

logger = logging.getLogger("nicecp")

CPU_SECONDS = 1.5  # of computing: a slow disk or a busy machine does not count
WALL_SECONDS = 60.0
MEMORY_BYTES = 2**31

_CODE = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from nicecp.probed import main; main()"
UNREADABLE, TOO_MUCH_MEMORY, NOT_STARTED = (
    6,
    5,
    1,
)  # exit codes; 1 is what Python says of an exception, here in an import
_LISTED = 10_000  # files that are remembered

_Identity = tuple[int, int, int, int]
_passed: set[tuple[_Identity, str | None]] = set()
_enabled = [True]


def switch_off() -> None:
    """In the child, which must not have children."""
    _enabled[0] = False


def check(path: str, dataset: str | None) -> None:
    """Let a child go through a regular file, unless it did so before; DataError where that did not end well.

    dataset : what will be opened, as in FILE.h5:/DATASET; None for the usual names
    """
    identity = _identity(path)
    if not _enabled[0] or identity is None or (identity, _plain(dataset)) in _passed:
        return
    child = _start(path, dataset)
    if child is not None:
        with child:
            try:
                import h5py  # noqa: F401  both processes need it: side by side they wait for it only once

                code = child.wait(WALL_SECONDS)
            except subprocess.TimeoutExpired:
                code = -signal.SIGPROF
            finally:
                child.kill()
        _judge(path, code)
    remember(path, [dataset])


def passes(path: str) -> bool:
    """Whether a checkpoint can be gone through in a child in time, or was before."""
    try:
        check(path, None)
    except DataError:
        return False
    return True


def remember(path: str, datasets: Iterable[str | None]) -> None:
    """These datasets of the file have been gone through."""
    identity = _identity(path)
    if identity is not None:
        if len(_passed) > _LISTED:
            _passed.clear()
        _passed.update((identity, _plain(dataset)) for dataset in datasets)


def _plain(dataset: str | None) -> str | None:
    return None if dataset is None else dataset.strip("/")


def _identity(path: str) -> _Identity | None:
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _start(path: str, dataset: str | None) -> subprocess.Popen[bytes] | None:
    """The child; None where this program is no Python interpreter that could be started once more."""
    if "python" not in os.path.basename(sys.executable or "").lower():
        logger.warning("%r is read without a look at it in another process: %r is no Python", path, sys.executable)
        return None
    # Where this package and h5py were found, and nothing from the environment.
    places = [str(Path(__file__).resolve().parents[1]), *(place for place in sys.path if place)]
    names = [os.fsencode(text).hex() for text in (path, *([] if dataset is None else [dataset]))]
    # One thread of BLAS is enough to import it; "::" is HDF5's word for no plugins.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    command = [sys.executable, "-I", "-S", "-B", "-c", _CODE, json.dumps(places), *names]
    nothing = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, env=environment, process_group=0
        )
    except OSError as error:
        logger.warning("%r is read without a look at it in another process (%s)", path, error.strerror)
        return None


def _judge(path: str, code: int) -> None:
    """What the child's end says about the file. An error that it met comes again, in words, in this process."""
    remedy = "copy or download it again; if it is whole, h5repack may help"
    if code in (-signal.SIGPROF, -signal.SIGKILL):
        problem = (
            f"the file is damaged or made to hang its reader (HDF5 was at work on it for more than {CPU_SECONDS} s)"
        )
    elif code < 0:
        problem = f"the file is damaged (opening it crashed HDF5: {signal.Signals(-code).name})"
    elif code == TOO_MUCH_MEMORY:
        problem = f"opening it takes more than {MEMORY_BYTES >> 30} GiB"
    elif code == UNREADABLE:
        problem = "the file is damaged (an attribute of its data cannot be read)"
    elif code == NOT_STARTED:
        logger.warning("%r is read without a look at it in another process: that could not be started", path)
        return
    else:
        return
    raise DataError(about_file(path, problem, remedy))

"""One writer per output: a second run on the same files is refused, instead of both replacing each other's work."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Sequence

from nicecp.errors import OutputError, about_file
from nicecp.files import lock, reporting
from nicecp.outputs import check_output

logger = logging.getLogger("nicecp")

StrPath = str | os.PathLike[str]
_TRIES = 100


def claim(
    held: contextlib.ExitStack,
    out: StrPath,
    files: Sequence[str] = (),
    overwrite: bool = False,
    inputs: Sequence[StrPath] = (),
) -> None:
    """Look whether these files could be written (nicecp.outputs), then hold the output's lock until ``held`` ends."""
    for path in files:
        check_output(path, overwrite, *inputs)
    held.callback(OutputLock(out).release)


class OutputLock:
    """Holds the side file ``.NAME.lock`` beside an output from its making until ``release``.

    The lock is the system's (flock): it ends with the process, however that ends, so a side file that a killed run left
    behind is in nobody's way. ``release`` removes the file. Where a file system has no locks there is a warning.

    Raises OutputError if another run holds it, or the folder cannot be written.
    """

    def __init__(self, output: StrPath) -> None:
        target = os.path.realpath(output)
        self.path = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.lock")
        self._fd: int | None = None
        with reporting(output):
            for _ in range(_TRIES):
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                try:
                    if self._take(fd, output):
                        self._fd, fd = fd, -1
                        return
                finally:
                    if fd >= 0:
                        os.close(fd)
        problem = f"its lock {self.path!r} is taken and released again and again"
        raise OutputError(about_file(output, problem, "choose another name"))

    def _take(self, fd: int, output: StrPath) -> bool:
        """Lock it -> False if it was removed meanwhile by whoever held it: then the next one is to be tried."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OutputError(about_file(output, f"its lock {self.path!r} is not a regular file", "remove it"))
        held = lock(fd)
        if held is False:
            owner = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            who = f"process {owner}" if owner.isdigit() else "another process"
            problem = f"another run ({who}) is writing it"
            raise OutputError(about_file(output, problem, "wait until it ends, or choose another name"))
        if held is None:
            logger.warning("%r: its file system has no locks; a second run on it would not be noticed", str(output))
            return True
        try:
            if not os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(fd)):
                return False
        except FileNotFoundError:
            return False
        with contextlib.suppress(OSError):  # a full disk: the number is for messages only
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        return True

    def release(self) -> None:
        """Remove the side file and let go of it; a second call does nothing."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            # Not by closing alone: a forked child would go on holding it.
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

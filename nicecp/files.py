"""Files: only regular ones are read, and what is written appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence

from nicecp import probe
from nicecp.errors import CheckpointError, OutputError, about_file

StrPath = str | os.PathLike[str]

_CHUNK = 1 << 24  # bytes written by one call
_TEMPORARY = re.compile(r"\.nicecp-(\d{1,10})-[0-9a-f]{8}\.tmp")
# A disk that is full, a quota, a limit on the size of files (ulimit -f).
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def reason(error: BaseException) -> str:
    """Why, in one line of at most 200 characters (HDF5's messages have line breaks)."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def opened(path: StrPath) -> Iterator[int]:
    """A descriptor of a regular file. Opening a FIFO without O_NONBLOCK would wait for a writer for ever."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(about_file(path, "not a regular file", "expected a checkpoint"))
        yield fd
    finally:
        os.close(fd)


def write_bytes(path: StrPath, data: bytes | Sequence[bytes], overwrite: bool = False) -> None:
    """Write bytes, or parts one after the other, as one file that appears whole or not at all.

    A temporary file in the same folder, fsync, os.replace, fsync of the folder: whatever interrupts it, the path holds
    the old file or the new one. Without ``overwrite`` an existing file is an error. Temporary files of writers that
    were killed are removed on the way.

    Raises OutputError, in one line; the old file is then as it was and the temporary one is gone (but for a failing
    fsync of the folder, where the new file is in place and may not survive a loss of power).
    """
    with reporting(path):
        target, mode = find_target(path, overwrite)
        name = os.path.dirname(target)
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_stale(name)
            _replace(target, mode, [data] if isinstance(data, bytes) else data, lambda: find_target(path, overwrite))
            try:
                os.fsync(folder)
            except OSError as failure:
                if failure.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do it for folders
                    raise
        finally:
            os.close(folder)
        probe.remember(target, [None])  # what we have written ourselves needs no look in a child


@contextlib.contextmanager
def reporting(path: StrPath) -> Iterator[None]:
    """What the system refuses, as one line about the file."""
    try:
        yield
    except (OSError, MemoryError) as failure:
        full = isinstance(failure, OSError) and failure.errno in _NO_SPACE
        remedy = "free some space" if full else "check the folder or choose another name"
        raise OutputError(about_file(path, f"cannot be written ({reason(failure)})", remedy)) from failure


def find_target(path: StrPath, overwrite: bool) -> tuple[str, int | None]:
    """Where to write (symbolic links followed, so that a linked output stays a link) and the old file's mode."""
    if "\0" in os.fspath(path):
        raise OutputError(about_file(path, "a zero byte in the name", "choose another name"))
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target, None
    if not stat.S_ISREG(mode):
        raise OutputError(about_file(path, "not a regular file", "choose another name"))
    if not overwrite:
        problem, remedy = "already exists", "allow it (--overwrite, overwrite=True) or choose another name"
        raise OutputError(about_file(path, problem, remedy))
    return target, stat.S_IMODE(mode)


def _replace(target: str, mode: int | None, parts: Sequence[bytes], check: Callable[[], object]) -> None:
    """A temporary file, renamed; none stays behind on failure. It is locked while its writer lives."""
    temporary = os.path.join(os.path.dirname(target), f".nicecp-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else mode)
    try:
        try:
            lock(fd)
            if mode is not None:
                with contextlib.suppress(OSError):  # some file systems have no modes; it was opened with no wider one
                    os.fchmod(fd, mode)
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(fd, left[:_CHUNK]) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        check()  # the path may have come into being while we wrote
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            os.unlink(temporary)
        raise


def lock(fd: int) -> bool | None:
    """Lock an open file for as long as it is open, without waiting: False if another process holds it, None where the
    file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as failure:
        if failure.errno in _NO_LOCKS:
            return None
        raise
    return True


def remove_stale(folder: str) -> int:
    """Remove temporary files that writers left when they were killed -> how many.

    A writer is dead if its process is not there and nobody holds the file's lock: the process alone may run on another
    machine, the lock alone is taken a moment after the file is made.
    """
    removed = 0
    try:
        names = os.listdir(folder)
    except OSError:  # a folder that may be written to but not listed
        return 0
    for name in names:
        found = _TEMPORARY.fullmatch(name)
        if found is None or _alive(int(found[1])):
            continue
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode) and lock(fd) is not False:
                    os.unlink(path)
                    removed += 1
            finally:
                os.close(fd)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is there, and somebody else's
        return True
    return pid > 0

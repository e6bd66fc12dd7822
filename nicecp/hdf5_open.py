"""Opening HDF5 files that somebody else made: regular files only, read-only, no plugins, after a look in a child."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

import h5py
from h5py._objects import phil

from nicecp import probe
from nicecp.errors import DataError, about_file

SIGNATURE = b"\x89HDF\r\n\x1a\n"
HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)

_paths: list[bytes] = []
_users = 0


@contextlib.contextmanager
def plugins_off() -> Iterator[None]:
    """HDF5 loads no plugins meanwhile; its path of plugins, the host program's affair, is put back afterwards.

    For a filter that it does not know HDF5 would load every shared object in the folders on that path. phil is the lock
    that h5py holds during calls of HDF5, which threads must not make at once; around those of h5py.h5pl it does not.
    """
    global _users
    with phil:
        if _users == 0:
            _paths[:] = [h5py.h5pl.get(i) for i in range(h5py.h5pl.size())]
            while h5py.h5pl.size():
                h5py.h5pl.remove(0)
        _users += 1
    try:
        yield
    finally:
        with phil:
            _users -= 1
            if _users == 0:
                for path in _paths:
                    h5py.h5pl.append(path)


def one_line(error: BaseException) -> str:
    """The message of an exception as one line of at most 200 characters; HDF5's span several."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def damage_reported(name: str) -> Iterator[None]:
    """What HDF5 and h5py raise for damaged files, as a DataError."""
    try:
        with plugins_off():
            yield
    except DataError:
        raise
    except HDF5_ERRORS as error:
        problem = f"the file is damaged ({one_line(error)})"
        raise DataError(about_file(name, problem, "copy or download it again")) from None


def check_regular(path: str) -> None:
    """DataError unless the path is a regular file that can be read. Never waits, not even for a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(about_file(path, "no such file", _missing_remedy(path))) from None
    except PermissionError:
        raise DataError(about_file(path, "it may not be read", "check the file's permissions")) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(about_file(path, f"it cannot be opened ({reason})", "check the path")) from None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise DataError(about_file(path, f"it is {kind}", "give the path of an HDF5 file"))
    if status.st_size == 0:
        raise DataError(about_file(path, "it is empty (0 bytes)", "copy or create it again"))


def _missing_remedy(path: str) -> str:
    if "://" in path:
        return "only local files are read: download it first"
    head, colon, tail = path.rpartition(":")
    if colon and tail and os.path.exists(head):
        return f"to choose a dataset write {head + ':/' + tail!r}"
    return "check the path"


def open_hdf5(path: str, dataset: str | None = None) -> h5py.File:
    """A regular HDF5 file, opened read-only; DataError says what is wrong otherwise.

    dataset : what will be opened in it, for nicecp.probe; None for datasets of the usual names
    """
    check_regular(path)
    if not _has_signature(path):
        remedy = "convert it first: nicecp data csv (text tables), nicecp data idx (MNIST's files), or h5py"
        raise DataError(about_file(path, "it is not an HDF5 file", remedy))
    probe.check(path, dataset)
    try:
        with plugins_off():
            return h5py.File(path, "r", locking="best-effort")
    except HDF5_ERRORS as error:
        text = one_line(error)
        if "truncated" in text:
            raise DataError(about_file(path, "the file is truncated", "copy or download it again")) from None
        if re.search(r"\block", text):  # not of the superblock
            problem, remedy = "another program is writing it", "wait until it is closed"
            raise DataError(about_file(path, problem, remedy)) from None
        raise DataError(about_file(path, f"the file is damaged ({text})", "copy or download it again")) from None


def _has_signature(path: str) -> bool:
    """HDF5 looks for its signature at 0, 512, 1024, 2048, ..."""
    size, offset = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while offset + len(SIGNATURE) <= size:
            file.seek(offset)
            if file.read(len(SIGNATURE)) == SIGNATURE:
                return True
            offset = max(512, 2 * offset)
    return False

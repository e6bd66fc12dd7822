"""Refuse an output that cannot be written before the work for it begins."""

from __future__ import annotations

import os
import stat
import tempfile
from typing import Any

from nicecp.errors import OutputError, about_file

StrPath = str | os.PathLike[str]


def check_output(path: StrPath, overwrite: bool, *inputs: Any) -> None:
    """Nothing happens if a file could be written there now; the path is not touched.

    inputs : files that are read, which the output must not replace ('FILE.h5:/DATASET' and what is no file are allowed)

    Raises
    ------
    OutputError
        The path exists (unless overwrite), is not a regular file, is one of the inputs, or its folder is missing or
        cannot be written.
    """
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise OutputError(about_file(path, "not a usable file name", "choose another name"))
    folder = os.path.dirname(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise OutputError(about_file(path, problem, "choose another name")) from None
    else:
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise OutputError(about_file(path, f"it is {kind}", "choose another name"))
        if any(same_file(path, other) for other in inputs):
            raise OutputError(about_file(path, "it is one of the inputs", "choose another name"))
        if not overwrite:
            raise OutputError(
                about_file(path, "already exists", "allow it (--overwrite, overwrite=True) or choose another name")
            )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "make the folder or choose another name" if not os.path.isdir(folder) else "choose another name"
        raise OutputError(about_file(path, f"its folder cannot be written ({reason})", remedy)) from None


def same_file(path: StrPath, other: Any) -> bool:
    """Whether ``other``, a file or 'FILE.h5:/DATASET', is the file at this path; False for what is no file."""
    if not isinstance(other, (str, os.PathLike)):
        return False
    name = os.fspath(other)
    candidates = [name, name.rpartition(":")[0]] if isinstance(name, str) else [name]
    for candidate in candidates:
        try:
            if candidate and os.path.samefile(path, candidate):
                return True
        except (OSError, ValueError):
            continue
    return False

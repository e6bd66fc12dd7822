"""Data files made by tests, and the form that refusals of them take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.data import open_source
from nicecp.errors import DataError

TABLE = np.random.default_rng(1).normal(size=(60, 3)).astype(np.float32)
IMAGES = np.random.default_rng(2).integers(0, 256, (60, 12), np.uint8)
LABELS = np.arange(60, dtype=np.int64)


def maker(folder: Path) -> Callable[..., str]:
    """Writes datasets, a__b for a/b, into one HDF5 file of the folder -> its path."""

    def create(**datasets: Any) -> str:
        path = str(folder / "x.h5")
        with h5py.File(path, "w") as file:
            for name, value in datasets.items():
                file[name.replace("__", "/")] = value
        return path

    return create


def refused(spec: Any, *parts: str, role: str = "train") -> str:
    """The DataError of opening and reading ``spec``: one short line that has all the parts."""

    def use() -> None:
        source = open_source(spec, role)
        try:
            source.read(0, source.n_rows)
        finally:
            source.close()

    with pytest.raises(DataError) as caught:
        use()
    message = str(caught.value)
    assert message.isprintable()  # one line, whatever the file's names contain
    assert len(message) < 900
    for part in parts:
        assert part in message
    assert ";" in message  # problem; remedy
    return message

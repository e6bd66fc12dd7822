"""Small data and small runs for the tests of runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nicecp.run import Run
from nicecp.train import Callback, Trainer

SMALL: dict[str, Any] = {"hidden": (6,), "couplings": 3, "batch_size": 32, "threads": 1, "seed": 4}
LONG = [  # a run of the command that takes a while
    *("train", "--data", "table.h5", "--patience", "1000000"),
    *("--hidden", "2x64", "--batch-size", "50", "--threads", "1"),
]
TABLE_STEPS = 500 // 32  # of an epoch: 600 rows less a sixth


def write_table(path: Path, seed: int = 0, rows: int = 600) -> str:
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["train"] = rng.normal(size=(rows, 5)) * [1, 2, 3, 4, 5]
        file["test"] = rng.normal(size=(50, 5))
    return str(path)


def write_images(path: Path) -> str:
    with h5py.File(path, "w") as file:
        file["train"] = np.random.default_rng(1).integers(0, 256, (300, 4, 3), dtype=np.uint8)
    return str(path)


class StopAt(Callback):
    """Does something after so many steps (1 is the first)."""

    def __init__(self, step: int, action: Callable[[Trainer], object]) -> None:
        self.left, self.action = step, action

    def on_step(self, trainer: Trainer) -> None:
        self.left -= 1
        if self.left == 0:
            self.action(trainer)


def model_bytes(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every dataset under /model, by plain h5py."""
    found: dict[str, bytes] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(path, "r") as file:
        file["model"].visititems(collect)
    assert "scaling/log_scale" in found
    assert "couplings/0/layers/0/weight" in found
    return found


def train(data: Any, out: Path, callbacks: list[Callback] | None = None, **given: Any) -> Any:
    with Run.start(data, out, **{**SMALL, "epochs": 3, **given}) as run:
        return run.execute(callbacks or [])


def go_on(out: Path, callbacks: list[Callback] | None = None, **given: Any) -> Any:
    with Run.resume(out, **given) as run:
        return run.execute(callbacks or [])

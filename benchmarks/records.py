"""The one form of all results: JSON lines, each a contestant's values of one quantity in one comparison.

    {"part": "steps", "group": "MNIST model, ...", "who": "PyTorch eager, fused Adam", "what": "ms a step",
     "values": [...]}

``values`` are those of the rounds in order, so that ratios can be taken round by round; ``base`` marks the contestant
that ratios are taken to. A line with ``absent`` instead of ``what`` says why a contestant was left out, one with
``machine`` what the part was measured on. benchmarks/report.py makes docs/benchmarks.md of a folder of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.machine import describe

Row = dict[str, Any]


class Records:
    """Rows of one part, appended to a file as they come; path None: nowhere."""

    def __init__(self, path: Path | None, part: str, append: bool = False) -> None:
        self.path, self.part = path, part
        if path is not None and not append:
            path.write_text("")
            self._write({"machine": describe()})

    def values(self, group: str, who: str, what: str, values: Iterable[float], **more: Any) -> None:
        """what: the quantity with its unit; a contestant may have several."""
        self._write({"group": group, "who": who, "what": what, "values": list(values), **more})

    def absent(self, group: str, who: str, why: str = "not installed") -> None:
        self._write({"group": group, "who": who, "absent": why})

    def note(self, group: str, text: str) -> None:
        """A line below the group's table."""
        self._write({"group": group, "note": text})

    def _write(self, row: Row) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"part": self.part, **row}) + "\n")


def read(folder: Path) -> list[Row]:
    """All rows of a folder's files, by name of the file."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return {"median": middle, "low": low, "high": high}


def middle(values: list[float]) -> float:
    return median(values)

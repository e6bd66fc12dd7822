"""Text tables of numbers, block by block: separators and column names found out, bad cells named by line and column."""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file

DELIMITERS = ("\t", ";", ",", " ")  # ' ' is any white space
MAX_LINE = 2**23  # bytes: a row of a million numbers takes seconds
_SAMPLE = 20  # lines that are looked at


def text_blocks(name: str, stream: BinaryIO, size: int) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, from 1; lines without their ends) of about ``size`` bytes each; UTF-8 only."""
    rest, line = b"", 1
    while True:
        data = stream.read(size)
        if b"\0" in data:
            raise DataError(about_file(name, "it is not a text table (it holds zero bytes)", "export it as UTF-8 text"))
        whole, newline, rest = (rest + data).rpartition(b"\n") if data else (rest, b"\n", b"")
        if newline:
            try:
                text = whole.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = line + whole[: error.start].count(b"\n")
                raise DataError(about_file(name, f"line {where} is not UTF-8 text", "save it as UTF-8")) from None
            lines = text.replace("\r\n", "\n").removesuffix("\r").replace("\r", "\n").split("\n")
            yield line, lines
            line += len(lines)
        if len(rest) > MAX_LINE:
            problem = f"line {line} is longer than {MAX_LINE >> 20} MiB"
            raise DataError(about_file(name, problem, "write one row per line"))
        if not data:
            return


def _number(cell: str) -> float | None:
    """The value of a cell, or None; Python's 1_000 is not a number in a table."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _blank(line: str) -> bool:
    return not line or line.isspace() or line.lstrip().startswith("#")


class Table:
    """Parses the blocks of one table; the first block decides on separator and names."""

    def __init__(self, name: str, delimiter: str | None = None, header: bool | None = None) -> None:
        if delimiter is not None and delimiter not in DELIMITERS:
            raise ValueError(f"the delimiter must be ',', ';', tab or ' ', got {delimiter!r}")
        self._name, self._delimiter, self._header = name, delimiter, header
        self._width = 0
        self.columns: tuple[str, ...] | None = None

    def parse(self, lines: Sequence[str], first_line: int) -> NDArray[np.float64]:
        """Lines from number ``first_line`` on -> (rows, d) float64; DataError for the first bad cell."""
        numbers = [i for i, line in enumerate(lines) if not _blank(line)]
        if not self._width and numbers:
            self._start(lines, numbers)
        rows = [lines[i] for i in numbers]
        if not rows:
            return np.empty((0, self._width))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                block: NDArray[np.float64] = np.loadtxt(
                    rows,
                    np.float64,
                    comments=None,
                    delimiter=None if self._delimiter == " " else self._delimiter,
                    ndmin=2,
                    quotechar='"',
                )
            if block.shape == (len(rows), self._width) and np.isfinite(block).all():
                return block
        except (ValueError, UserWarning):
            pass
        # only now cell by cell, to find the bad one
        return np.array([self._row(lines[i], first_line + i) for i in numbers], np.float64)

    def _cells(self, line: str, delimiter: str) -> list[str]:
        if delimiter == " ":
            return [cell.strip('"') for cell in line.split()]
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:  # a field too long, or a stray line end
            return [line]
        return [cell.strip() for cell in cells]

    def _row(self, line: str, number: int) -> list[float]:
        assert self._delimiter is not None
        cells = self._cells(line, self._delimiter)
        values: list[float] = []
        for i, cell in enumerate(cells[: self._width]):
            value = _number(cell)
            if value is None or not math.isfinite(value):
                self._bad_cell(number, i, cell, value)
            values.append(value)
        if len(cells) != self._width:
            problem = f"line {number} has {len(cells)} cells where {self._width} are expected"
            raise DataError(about_file(self._name, problem, "give every row as many cells"))
        return values

    def _bad_cell(self, number: int, column: int, cell: str, value: float | None) -> NoReturn:
        label = f"{column + 1}" + (f" ({self.columns[column]!r})" if self.columns is not None else "")
        shown = cell if len(cell) <= 40 else cell[:37] + "..."
        what = "empty" if not cell else repr(shown) + (", not a number" if value is None else ", not finite")
        remedy = "remove the row or fill the cell in"
        if re.fullmatch(r"[+-]?\d*,\d+", cell):
            remedy = "write decimal points instead of commas"
        elif value is None and number == 1 and self._header is None:
            remedy = "correct the cell, or say that this line is the header"
        elif cell and value is None:
            remedy = "correct the cell or leave the column out"
        raise DataError(about_file(self._name, f"line {number}, column {label} is {what}", remedy))

    def _start(self, lines: Sequence[str], numbers: list[int]) -> None:
        """Decide on separator, width and names from the first lines; drops a header from ``numbers``."""
        sample = [lines[i] for i in numbers[:_SAMPLE]]
        if self._delimiter is None:
            self._delimiter = self._sniff(sample)
        first = self._cells(sample[0], self._delimiter)
        self._width = len(first)
        comments = [line for line in lines[: numbers[0]] if line.lstrip().startswith("#")]
        header = self._header
        if header is None:
            header = all(_number(cell) is None for cell in first)
        if header:
            self.columns = tuple(first)
            del numbers[0]
        elif comments:
            named = self._cells(comments[-1].lstrip().lstrip("#").strip(), self._delimiter)
            if len(named) == self._width and all(_number(cell) is None for cell in named):
                self.columns = tuple(named)

    def _sniff(self, sample: Sequence[str]) -> str:
        """The separator that makes most lines rows of two or more numbers, else the first that separates at all."""

        def score(delimiter: str) -> int:
            rows = [self._cells(line, delimiter) for line in sample]
            return sum(len(row) > 1 and all(_number(cell) is not None for cell in row) for row in rows)

        best = max(DELIMITERS, key=score)
        if score(best):
            return best
        separating = [d for d in DELIMITERS if all(len(self._cells(line, d)) > 1 for line in sample)]
        return separating[0] if separating else ","

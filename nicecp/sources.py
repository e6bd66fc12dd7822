"""Tables of numbers that can be read by rows: the protocol, arrays in memory, and the checks that all sources share."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file
from nicecp.records import DataInfo

FINGERPRINT_BYTES = 2**26  # data up to this size are hashed completely, larger ones by as many bytes of samples
FINGERPRINT_BLOCKS = 64
MAX_FEATURES = 2**24
_CHECK_ELEMENTS = 2**18  # finite checks go through a block in pieces that stay in cache


class Source(Protocol):
    """n_rows rows of n_features numbers. Rows are counted from 0; ``read`` may be called in any order."""

    @property
    def name(self) -> str:
        """What messages call it, e.g. 'mnist.h5:/train'."""

    @property
    def n_rows(self) -> int: ...
    @property
    def n_features(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8, float32 or float64."""

    @property
    def info(self) -> DataInfo:
        """Image shape, column names and units; its fingerprint is empty, because that costs a pass over the data."""

    @property
    def is_image8(self) -> bool:
        """True for 8-bit values, which are dequantized; False for floats, which are standardised."""

    @property
    def context(self) -> NDArray[np.float64] | None:
        """(n_rows, k) float64, finite: what each row's density is conditioned on (nicecp.beside); None without one."""

    @property
    def context_names(self) -> tuple[str, ...] | None:
        """(k,) names of the context's columns, where they have any."""

    @property
    def weight(self) -> NDArray[np.float64] | None:
        """(n_rows,) float64, mean 1 over the rows that are not 0 (nicecp.beside.relative_weights); None: all are 1."""

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 : (stop - start, n_features) C-contiguous, of ``dtype``, finite (else DataError)."""

    def fingerprint(self) -> str:
        """64 hex digits by which the same data are recognised again, whatever the file is called."""

    def close(self) -> None: ...


def column_label(column: int, columns: Sequence[str] | None) -> str:
    """'3' or "3 ('pt1')": a column's number, counted from 0, and its name where there is one."""
    return f"{column} ({columns[column]!r})" if columns is not None else str(column)


_finite_only: ContextVar[bool] = ContextVar("finite_only", default=True)


@contextlib.contextmanager
def as_they_are() -> Iterator[None]:
    """Within it sources hand on NaN and infinity, which they otherwise refuse: for those who know what they mean."""
    token = _finite_only.set(False)
    try:
        yield
    finally:
        _finite_only.reset(token)


def check_finite(block: NDArray[Any], first_row: int, name: str, columns: Sequence[str] | None) -> None:
    """block : (n, d) floats; DataError with the first row and column that hold NaN or infinity."""
    if not _finite_only.get():
        return
    step = max(1, _CHECK_ELEMENTS // max(1, block.shape[1]))
    for start in range(0, len(block), step):
        finite = np.isfinite(block[start : start + step])
        if not finite.all():
            row, column = (int(i) for i in np.unravel_index(int(np.argmin(finite)), finite.shape))
            where = f"row {first_row + start + row}, column {column_label(column, columns)}"
            problem = f"{where} is {block[start + row, column]} (counted from 0)"
            raise DataError(about_file(name, problem, "remove such rows or fill them in"))


def check_range(start: int, stop: int, n_rows: int) -> None:
    """ValueError unless 0 <= start <= stop <= n_rows."""
    if not 0 <= start <= stop <= n_rows:
        raise ValueError(f"rows {start} to {stop} are not within the {n_rows} rows of the data")


def fingerprint(read: Callable[[int, int], NDArray[Any]], n_rows: int, n_features: int, dtype: np.dtype[Any]) -> str:
    """SHA-256 over the text 'nicecp data 1 ROWS COLUMNS DTYPE\\n' and rows as little-endian bytes.

    All rows when they take at most FINGERPRINT_BYTES; otherwise FINGERPRINT_BLOCKS blocks of FINGERPRINT_BYTES in
    total (a block is at least one row), the first at the start, the last at the end, the others evenly spaced.
    """
    digest = hashlib.sha256(f"nicecp data 1 {n_rows} {n_features} {dtype.name}\n".encode())
    row_bytes = n_features * dtype.itemsize
    size = max(1, FINGERPRINT_BYTES // FINGERPRINT_BLOCKS // row_bytes)
    if n_rows * row_bytes <= FINGERPRINT_BYTES or n_rows <= size * FINGERPRINT_BLOCKS:
        starts = list(range(0, n_rows, size))
    else:
        starts = [i * (n_rows - size) // (FINGERPRINT_BLOCKS - 1) for i in range(FINGERPRINT_BLOCKS)]
    for start in starts:
        block = read(start, min(start + size, n_rows))
        digest.update(np.ascontiguousarray(block, dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def as_image_shape(shape: Sequence[int], n_features: int) -> tuple[int, ...] | None:
    """(h, w), (h, w, c) or (h, w, 1), which becomes (h, w), if its product is n_features; None for anything else."""
    sizes = tuple(int(size) for size in shape)
    product = 1
    for size in sizes:
        product *= size
    if len(sizes) < 2 or len(sizes) > 8 or min(sizes) < 1 or product != n_features:
        return None
    return sizes[:2] if len(sizes) == 3 and sizes[2] == 1 else sizes


class ArraySource:
    """An array in memory as a source; see ``Source``.

    Parameters
    ----------
    array : (n, d), or (n, h, w[, c]), which is flattened
        uint8, float32 and float64 are used as they are, without a copy where the array is C-contiguous; int8 becomes
        uint8 by adding 128; other integers and floats become float64.

    Raises TypeError for other types and DataError for zero rows, fewer than two columns or a shape that does not fit.
    """

    context: NDArray[np.float64] | None = None
    context_names: tuple[str, ...] | None = None
    weight: NDArray[np.float64] | None = None

    def __init__(
        self,
        array: Any,
        name: str = "array",
        image_shape: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected a plain array, got a masked one: fill or drop the masked values first")
        values = np.asarray(array)
        if values.dtype.kind not in "iuf":
            raise TypeError(f"{name}: expected integers or floats, got an array of {values.dtype}")
        if values.ndim < 2:
            raise DataError(about_file(name, f"expected rows of columns, got shape {values.shape}", "pass (n, d)"))
        n = len(values)
        shape = as_image_shape(values.shape[1:], int(np.prod(values.shape[1:]))) if values.ndim > 2 else None
        values = values.reshape(n, -1) if n else values.reshape(0, int(np.prod(values.shape[1:])))
        check_size(name, n, values.shape[1])
        if values.dtype == np.int8:
            values = (values.astype(np.int16) + 128).astype(np.uint8)
        elif values.dtype not in (np.uint8, np.float32, np.float64) or not values.dtype.isnative:
            kept = values.dtype.newbyteorder("=") in (np.float32, np.float64)
            values = values.astype(values.dtype.newbyteorder("=") if kept else np.float64)
        self._values: NDArray[Any] = np.ascontiguousarray(values)
        if image_shape is not None:
            shape = as_image_shape(image_shape, self.n_features)
            if shape is None:
                raise DataError(about_file(name, f"image_shape {tuple(image_shape)} is not {self.n_features} values",
                                           "pass the shape of one row"))  # fmt: skip
        if columns is not None and len(columns) != self.n_features:
            problem = f"{len(columns)} column names for {self.n_features} columns"
            raise DataError(about_file(name, problem, "pass one name per column"))
        self.name = name
        self.info = DataInfo(image_shape=shape, columns=None if columns is None else tuple(columns))

    @property
    def n_rows(self) -> int:
        return int(self._values.shape[0])

    @property
    def n_features(self) -> int:
        return int(self._values.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._values.dtype

    @property
    def is_image8(self) -> bool:
        return self.dtype == np.uint8

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 as a view of the array."""
        check_range(start, stop, self.n_rows)
        block = self._values[start:stop]
        if not self.is_image8:
            check_finite(block, start, self.name, self.info.columns)
        return block

    def fingerprint(self) -> str:
        return fingerprint(self.read, self.n_rows, self.n_features, self.dtype)

    def close(self) -> None:
        """Nothing to close."""


def check_size(name: str, n_rows: int, n_features: int, least: int = 2) -> None:
    """DataError for zero rows, fewer than two columns (``least``), or more columns than are handled."""
    if n_rows < 1:
        raise DataError(about_file(name, "it has no rows", "give data with at least one row"))
    if n_features < least:
        count = "one column" if n_features == 1 else "no columns"
        raise DataError(about_file(name, f"it has {count}", "a flow needs at least two: add columns"))
    if n_features > MAX_FEATURES:
        problem = f"it has {n_features} columns, more than {MAX_FEATURES}"
        raise DataError(about_file(name, problem, "store one sample per row"))

"""The data a flow is trained and tested on: which dataset plays which part, splits, and statistics of columns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import DataSpec, beside, plain_data
from nicecp.datasets import TEST_NAMES, TRAIN_NAMES, VALID_NAMES, candidates, locate, split_spec
from nicecp.errors import DataError, about_file
from nicecp.kernels.backend import Purpose
from nicecp.sources import ArraySource, Source, column_label
from nicecp.split import Split, as_fraction, held_by_weight

DEMO = "demo"
DEMO_TRAIN, DEMO_TEST = 12_000, 2_000  # rows
VALID_FRACTION = Fraction(1, 6)  # of the training rows, where a file has no valid dataset
ROLES = ("train", "valid", "test")
_LISTED = 8  # columns named in a message

__all__ = [
    "TEST_NAMES",
    "ArraySource",
    "ColumnStats",
    "DataSpec",
    "Source",
    "Splits",
    "candidates",
    "check_constant",
    "check_finite",
    "column_stats",
    "open_source",
    "open_splits",
    "split_spec",
]


# --- sources and splits ---------------------------------------------------------------------------------


def _demo(role: str) -> ArraySource:
    from nicecp.digits import draw_digits

    first, count = (DEMO_TRAIN, DEMO_TEST) if role == "test" else (0, DEMO_TRAIN)
    images, _ = draw_digits(count, first=first)
    return ArraySource(images, f"{DEMO}:/{'test' if role == 'test' else 'train'}", image_shape=(28, 28))


def open_source(spec: Any, role: str = "train") -> Source:
    """Open data by name: 'FILE.h5', 'FILE.h5:/DATASET', a path object, 'demo' (drawn digits), or an array.

    A DataSpec says where context and weights of the rows come from (nicecp.beside).

    For role 'train' a file's dataset is ``train``, ``x_train``, ``images`` or ``data``, else its only numeric dataset
    of rank 2 or more, groups included; for 'valid' it is ``valid`` or ``x_valid`` in the same group; for 'test'
    ``test`` or ``x_test``, else the training dataset. A dataset that the spec names has every role; so has an array.

    Raises DataError (file, problem, remedy) for whatever cannot be used.
    """
    if role not in ROLES:
        raise ValueError(f"the role must be one of {', '.join(ROLES)}, got {role!r}")
    return beside(_open_plain(plain_data(spec), role), spec)


def _open_plain(spec: Any, role: str) -> Source:
    if not isinstance(spec, (str, os.PathLike)):
        return spec if hasattr(spec, "fingerprint") else ArraySource(spec)
    if spec == DEMO:
        if role == "valid":
            raise DataError(about_file(DEMO, "it has no valid dataset", "use its train or test rows"))
        return _demo(role)
    from nicecp.hdf5_data import HDF5Source

    path, dataset = split_spec(spec)
    roles, test = locate(path, dataset)
    named = dataset is not None and roles.get("train") == dataset
    chosen = roles.get("train") if named else test if role == "test" else roles.get(role)
    if chosen is None:
        names = " or ".join(repr(n) for n in (VALID_NAMES if role == "valid" else TRAIN_NAMES))
        raise DataError(about_file(path, f"it has no {role} dataset", f"store one as {names}, or write FILE.h5:/NAME"))
    return HDF5Source(path, chosen)


@dataclass
class Splits:
    """The rows to train on, to validate on, and to test on. Closing it closes the files; also a context manager."""

    train: Split
    valid: Split | None
    test: Split | None

    def close(self) -> None:
        for split in (self.train, self.valid, self.test):
            if split is not None:
                split.source.close()

    def __enter__(self) -> Splits:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_splits(spec: Any, valid_fraction: float | Fraction = VALID_FRACTION, seed: int = 0) -> Splits:
    """Open data for training; ``spec`` as in ``open_source``.

    The validation rows are the ``valid`` dataset of the file; without one, the last ``valid_fraction`` (rounded down)
    of an 8-bit image dataset's rows, or as many rows of a table, chosen by the seed (Split.keyed); None if no row is.
    Of rows with weights it is that fraction of their total weight, to within half a row's (Split.weighted).
    A named valid dataset is used even with valid_fraction = 0. Raises DataError, and ValueError for the fraction.
    """
    fraction, whole = as_fraction(valid_fraction), spec
    spec = plain_data(spec)
    sources: dict[str, Source] = {}
    try:
        if isinstance(spec, (str, os.PathLike)) and spec != DEMO:
            from nicecp.hdf5_data import HDF5Source

            path, dataset = split_spec(spec)
            roles, _ = locate(path, dataset)
            if "train" not in roles:
                open_source(spec)
            for role, name in roles.items():
                sources[role] = beside(HDF5Source(path, name), whole)
        else:
            sources["train"] = open_source(whole)
            if isinstance(spec, str):
                sources["test"] = open_source(whole, "test")
        for role in ("valid", "test"):
            if role in sources:
                _check_alike(sources["train"], sources[role])
        return _split(sources, fraction, seed)
    except BaseException:
        for source in sources.values():
            source.close()
        raise


def _split(sources: dict[str, Source], fraction: Fraction, seed: int) -> Splits:
    source = sources["train"]
    n = source.n_rows
    held = 0 if "valid" in sources else n * fraction.numerator // fraction.denominator
    if held and source.weight is not None and source.is_image8:
        held = held_by_weight(source.weight[::-1], fraction)
    valid: Split | None = None
    if held and not source.is_image8 and source.weight is not None:
        train = Split.weighted(source, fraction, seed, False, Purpose.TRAIN_NOISE)
        valid = Split.weighted(source, fraction, seed, True, Purpose.VALID_NOISE)
    elif held and not source.is_image8:
        train = Split.keyed(source, fraction, seed, False, Purpose.TRAIN_NOISE)
        valid = Split.keyed(source, fraction, seed, True, Purpose.VALID_NOISE)
    else:
        train = Split.contiguous(source, 0, n - held, Purpose.TRAIN_NOISE)
        if held:
            valid = Split.contiguous(source, n - held, n, Purpose.VALID_NOISE)
        elif "valid" in sources:
            valid = Split.contiguous(sources["valid"], 0, sources["valid"].n_rows, Purpose.VALID_NOISE)
    valid = valid if valid is not None and len(valid) else None
    test = sources.get("test")
    return Splits(train, valid, None if test is None else Split.contiguous(test, 0, test.n_rows, Purpose.TEST_NOISE))


def _check_alike(train: Source, other: Source) -> None:
    if other.n_features != train.n_features:
        problem = f"it has {other.n_features} columns and {train.name!r} has {train.n_features}"
        raise DataError(about_file(other.name, problem, "store both with the same columns"))
    columns = [0 if source.context is None else source.context.shape[1] for source in (train, other)]
    if columns[0] != columns[1]:
        problem = f"its context has {columns[1]} columns, that of {train.name!r} {columns[0]}"
        raise DataError(about_file(other.name, problem, "store both with the same columns"))
    if other.is_image8 != train.is_image8:
        problem = f"it holds {other.dtype} and {train.name!r} holds {train.dtype}"
        raise DataError(about_file(other.name, problem, "store both as 8-bit integers or both as floats"))


# --- statistics -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnStats:
    """mean, std (population), low, high : (d,) float64 over ``count`` rows; std is exactly 0 where low == high."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: int

    @property
    def constant(self) -> NDArray[np.bool_]:
        """(d,) True where all rows hold one value."""
        return np.asarray(self.low == self.high)


def column_stats(split: Split) -> ColumnStats:
    """One pass over a split in blocks, float64, merged in file order; rows count by their weights, if they have any.

    Raises DataError for NaN, infinity, no rows, or a spread that float64 cannot hold.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    source, d = split.source, split.source.n_features
    if not len(split):
        raise DataError(about_file(source.name, "no rows are left to train on", "use a smaller --valid-fraction"))
    count, total = 0, 0.0
    mean, square = np.zeros(d), np.zeros(d)
    low, high = np.full(d, np.inf), np.full(d, -np.inf)
    step = max(1, 2**19 // (1024 * d))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for first in range(0, split.n_blocks, step):
            data, rows = split.load_blocks(np.arange(first, min(first + step, split.n_blocks)))
            n = len(data)
            if n == 0:
                continue
            x = data.astype(np.float64)
            low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
            w = None if source.weight is None else source.weight[rows]
            size = n if w is None else float(w.sum())
            part = x.mean(0) if w is None else w @ x / size
            x -= part
            np.square(x, out=x)
            delta = part - mean
            before, total, count = total, total + size, count + n
            square += (x.sum(0) if w is None else w @ x) + delta * delta * (before * size / total)
            mean += delta * (size / total)
        std = np.where(low == high, 0.0, np.sqrt(square / total))
    mean = np.where(low == high, low, mean)
    bad = np.flatnonzero(~(np.isfinite(std) & np.isfinite(mean)) | ((std == 0) & (low < high)))
    if len(bad):
        problem = f"column {column_label(int(bad[0]), source.info.columns)} spans {low[bad[0]]:g} to {high[bad[0]]:g}"
        raise DataError(about_file(source.name, problem + ", beyond float64's precision", "rescale this column"))
    return ColumnStats(mean, std, low, high, count)


def check_finite(splits: Splits) -> None:
    """One pass over the validation and test rows of floats: DataError names the first value that is not finite.

    Their columns' statistics are not needed, but a NaN found only after training would have cost the training.
    """
    for split in (splits.valid, splits.test):
        # Blocks of the training dataset are read, and checked, whole.
        if split is None or split.source.is_image8 or split.source is splits.train.source:
            continue
        step = max(1, 2**19 // (1024 * split.source.n_features))
        for first in range(0, split.n_blocks, step):
            split.load_blocks(np.arange(first, min(first + step, split.n_blocks)))


def check_constant(stats: ColumnStats, split: Split, allow: bool = False) -> tuple[int, ...]:
    """The numbers of the constant columns of a split with these stats; DataError that names them unless ``allow``."""
    if stats.count == 1 and not allow:
        raise DataError(about_file(split.source.name, "one row is not enough to train on", "give at least two"))
    constant = tuple(int(i) for i in np.flatnonzero(stats.constant))
    if constant and not allow:
        labels = [column_label(i, split.source.info.columns) for i in constant[:_LISTED]]
        more = f" and {len(constant) - _LISTED} more" if len(constant) > _LISTED else ""
        problem = f"constant columns make the likelihood unbounded: {', '.join(labels)}{more}"
        remedy = "leave them out, or allow them (--allow-constant, allow_constant=True)"
        raise DataError(about_file(split.source.name, problem, remedy))
    return constant

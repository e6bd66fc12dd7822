"""The data a flow is trained and tested on: which dataset plays which part, splits, and statistics of columns."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file
from nicecp.kernels.backend import Purpose
from nicecp.sources import ArraySource, Source, column_label
from nicecp.split import Split, as_fraction

if TYPE_CHECKING:
    import h5py

    from nicecp.hdf5_data import Entry

DEMO = "demo"
DEMO_TRAIN, DEMO_TEST = 12_000, 2_000  # rows
VALID_FRACTION = Fraction(1, 6)  # of the training rows, where a file has no valid dataset
ROLES = ("train", "valid", "test")
TRAIN_NAMES = ("train", "x_train", "images", "data")
VALID_NAMES = ("valid", "x_valid")
TEST_NAMES = ("test", "x_test")
_LISTED = 8  # datasets or columns named in a message

__all__ = [
    "ArraySource",
    "ColumnStats",
    "Source",
    "Splits",
    "candidates",
    "check_constant",
    "check_finite",
    "column_stats",
    "open_source",
    "open_splits",
]


# --- which dataset --------------------------------------------------------------------------------------


def split_spec(spec: str | os.PathLike[str]) -> tuple[str, str | None]:
    """'FILE.h5' -> (FILE.h5, None); 'FILE.h5:/NAME' -> (FILE.h5, /NAME). A path object is always a file."""
    if not isinstance(spec, str):
        return os.fspath(spec), None
    if "://" in spec or os.path.lexists(spec):
        return spec, None
    path, colon, name = spec.rpartition(":/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return (path, "/" + "/".join(parts)) if colon and path else (spec, None)


def _listing(entries: Sequence[Entry]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return "; ".join(str(e) for e in entries[:_LISTED]) + more


def _named(group: h5py.Group, where: str, names: Sequence[str], path: str) -> str | None:
    """The first of the names that is a dataset of rank >= 2 in the group; rank 1 is for labels."""
    import h5py

    from nicecp.hdf5_data import Unusable, entry, member

    for name in names:
        try:
            found = member(group, name)
        except Unusable as error:
            raise DataError(about_file(f"{path}:{where}{name}", *error.args)) from None
        if isinstance(found, h5py.Dataset):
            label = entry(where + name, found)
            if label.rank >= 2:
                return where + name
    return None


def _choose_train(group: h5py.Group, where: str, path: str) -> str:
    """The training dataset below a group by the rules of ``open_source``; DataError if there is none or no only one."""
    from nicecp.hdf5_data import search

    named = _named(group, where, TRAIN_NAMES, path)
    if named is not None:
        return named
    entries = list(search(group, where))
    usable = [e for e in entries if not e.problem]
    others = [e for e in usable if e.path.rpartition("/")[2] not in VALID_NAMES + TEST_NAMES]
    usable = others or usable
    if len(usable) == 1:
        return usable[0].path
    if usable:
        problem = f"several datasets could be the training data: {_listing(usable)}"
        raise DataError(about_file(path, problem, f"choose one: {path + ':' + usable[0].path!r}"))
    if len(entries) == 1 and entries[0].rank != 1:
        return entries[0].path  # whoever opens it says what is wrong with it
    found = f"it holds {_listing(entries)}" if entries else "it holds no datasets"
    problem = f"no usable dataset (numbers of rank 2 or more): {found}"
    raise DataError(about_file(path, problem, "store one sample per row in a dataset 'train'"))


def _walk(file: h5py.File, dataset: str, path: str) -> h5py.Group | h5py.Dataset:
    """What FILE.h5:/DATASET names; DataError with the candidates if there is no such thing."""
    import h5py

    from nicecp.hdf5_data import Unusable, member, search

    found: h5py.Group | h5py.Dataset | None = file
    for part in (part for part in dataset.split("/") if part not in ("", ".")):
        try:
            found = member(found, part) if isinstance(found, h5py.Group) else None
        except Unusable as error:
            raise DataError(about_file(f"{path}:{dataset}", *error.args)) from None
        if found is None:
            entries = [e for e in search(file, "/") if not e.problem]
            close = difflib.get_close_matches(dataset, [e.path for e in entries], 1)
            listing = f"the file has {_listing(entries)}" if entries else "the file has no usable dataset"
            remedy = f"did you mean {path + ':' + close[0]!r}?" if close else listing
            problem = f"no dataset {dataset!r}" + (f" ({listing})" if close else "")
            raise DataError(about_file(path, problem, remedy if close else "choose one: " + listing))
    return found


def _locate(path: str, dataset: str | None) -> tuple[dict[str, str], str]:
    """Roles -> dataset paths of a file, and where the test rows of an evaluation are ('' if nowhere)."""
    import h5py

    from nicecp.hdf5_data import damage_reported, open_hdf5
    from nicecp.store import is_checkpoint

    if is_checkpoint(path):
        raise DataError(
            about_file(
                path, "it is a nicecp checkpoint, not data", "give the data; to go on with its training: --resume"
            )
        )
    with open_hdf5(path) as file, damage_reported(path):
        where = "/"
        group = file
        if dataset is not None:
            found = _walk(file, dataset, path)
            if isinstance(found, h5py.Dataset):
                roles = {"train": dataset}
                where, _, name = dataset.rpartition("/")
                if name in TRAIN_NAMES:
                    roles |= _beside(_walk(file, where, path), where + "/", path)
                return roles, dataset
            group, where = found, dataset.rstrip("/") + "/"
        test = _named(group, where, TEST_NAMES, path)
        try:
            train = _choose_train(group, where, path)
        except DataError:
            if test is None:
                raise
            return {"test": test}, test
        parent = train.rpartition("/")[0]
        beside = _beside(_walk(file, parent, path), parent + "/", path)
        # The only dataset of a file is trained on whatever its name: it cannot be the validation or test set as well.
        roles = {"train": train} | {role: name for role, name in beside.items() if name != train}
        return roles, test or roles.get("test") or train


def _beside(group: h5py.Group | h5py.Dataset, where: str, path: str) -> dict[str, str]:
    """The valid and test datasets in the group of the training dataset."""
    found = {"valid": _named(group, where, VALID_NAMES, path), "test": _named(group, where, TEST_NAMES, path)}
    return {role: name for role, name in found.items() if name is not None}


# --- sources and splits ---------------------------------------------------------------------------------


def _demo(role: str) -> ArraySource:
    from nicecp.digits import draw_digits

    first, count = (DEMO_TRAIN, DEMO_TEST) if role == "test" else (0, DEMO_TRAIN)
    images, _ = draw_digits(count, first=first)
    return ArraySource(images, f"{DEMO}:/{'test' if role == 'test' else 'train'}", image_shape=(28, 28))


def open_source(spec: Any, role: str = "train") -> Source:
    """Open data by name: 'FILE.h5', 'FILE.h5:/DATASET', a path object, 'demo' (drawn digits), or an array.

    For role 'train' a file's dataset is ``train``, ``x_train``, ``images`` or ``data``, else its only numeric dataset
    of rank 2 or more, groups included; for 'valid' it is ``valid`` or ``x_valid`` in the same group; for 'test'
    ``test`` or ``x_test``, else the training dataset. A dataset that the spec names has every role; so has an array.

    Raises DataError (file, problem, remedy) for whatever cannot be used.
    """
    if role not in ROLES:
        raise ValueError(f"the role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(spec, (str, os.PathLike)):
        return spec if hasattr(spec, "fingerprint") else ArraySource(spec)
    if spec == DEMO:
        if role == "valid":
            raise DataError(about_file(DEMO, "it has no valid dataset", "use its train or test rows"))
        return _demo(role)
    from nicecp.hdf5_data import HDF5Source

    path, dataset = split_spec(spec)
    roles, test = _locate(path, dataset)
    named = dataset is not None and roles.get("train") == dataset
    chosen = roles.get("train") if named else test if role == "test" else roles.get(role)
    if chosen is None:
        names = " or ".join(repr(n) for n in (VALID_NAMES if role == "valid" else TRAIN_NAMES))
        raise DataError(about_file(path, f"it has no {role} dataset", f"store one as {names}, or write FILE.h5:/NAME"))
    return HDF5Source(path, chosen)


def candidates(spec: str | os.PathLike[str]) -> str:
    """The usable datasets of a file with their shapes, for a message that asks the user to choose one."""
    from nicecp.hdf5_data import damage_reported, open_hdf5, search

    path = split_spec(spec)[0]
    with open_hdf5(path) as file, damage_reported(path):
        return _listing([found for found in search(file, "/") if not found.problem])


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
    A named valid dataset is used even with valid_fraction = 0. Raises DataError, and ValueError for the fraction.
    """
    fraction = as_fraction(valid_fraction)
    sources: dict[str, Source] = {}
    try:
        if isinstance(spec, (str, os.PathLike)) and spec != DEMO:
            from nicecp.hdf5_data import HDF5Source

            path, dataset = split_spec(spec)
            roles, _ = _locate(path, dataset)
            if "train" not in roles:
                open_source(spec)
            for role, name in roles.items():
                sources[role] = HDF5Source(path, name)
        else:
            sources["train"] = open_source(spec)
            if isinstance(spec, str):
                sources["test"] = open_source(spec, "test")
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
    valid: Split | None = None
    if held and not source.is_image8:
        train = Split.keyed(source, fraction, seed, False, Purpose.TRAIN_NOISE)
        valid = Split.keyed(source, fraction, seed, True, Purpose.VALID_NOISE)
    else:
        train = Split.contiguous(source, 0, n - held, Purpose.TRAIN_NOISE)
        if held:
            valid = Split.contiguous(source, n - held, n, Purpose.VALID_NOISE)
        elif "valid" in sources:
            valid = Split.contiguous(sources["valid"], 0, sources["valid"].n_rows, Purpose.VALID_NOISE)
    test = sources.get("test")
    return Splits(train, valid, None if test is None else Split.contiguous(test, 0, test.n_rows, Purpose.TEST_NOISE))


def _check_alike(train: Source, other: Source) -> None:
    if other.n_features != train.n_features:
        problem = f"it has {other.n_features} columns and {train.name!r} has {train.n_features}"
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
    """One pass over a split in blocks, float64, merged in file order.

    Raises DataError for NaN, infinity, no rows, or a spread that float64 cannot hold.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    source, d = split.source, split.source.n_features
    if not len(split):
        raise DataError(about_file(source.name, "no rows are left to train on", "use a smaller --valid-fraction"))
    count = 0
    mean, square = np.zeros(d), np.zeros(d)
    low, high = np.full(d, np.inf), np.full(d, -np.inf)
    step = max(1, 2**19 // (1024 * d))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for first in range(0, split.n_blocks, step):
            data, _ = split.load_blocks(np.arange(first, min(first + step, split.n_blocks)))
            n = len(data)
            if n == 0:
                continue
            x = data.astype(np.float64)
            low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
            part = x.mean(0)
            x -= part
            np.square(x, out=x)
            delta = part - mean
            total = count + n
            square += x.sum(0) + delta * delta * (count * n / total)
            mean += delta * (n / total)
            count = total
        std = np.where(low == high, 0.0, np.sqrt(square / count))
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

"""What belongs to rows of data beside their features: the context that a density is conditioned on, and weights.

A source has them as ``context`` (n_rows, k) and ``weight`` (n_rows,), float64 and in memory, however large the data are
(nicecp.sources.Source). Whoever makes a source of its own passes what it read through ``checked_context`` and
``relative_weights``, or wraps the source: ``Beside(source, context, weight)``. Users say where both come from by a
``DataSpec``, which all that opens data takes in place of a plain name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.errors import DataError, about_file
from nicecp.records import DataInfo
from nicecp.sources import Source, check_finite, check_size

Floats = NDArray[np.float64]

MAX_CONTEXT = 2**20  # columns
_READ = 2**22  # numbers that are read at a time


@dataclass(frozen=True)
class DataSpec:
    """Data, and what belongs to their rows beside the features.

    Parameters
    ----------
    data : as nicecp.data.open_source
    context, weights : None, an array (n, k) or (n,), or text
        'a,b' or '0,3': columns of the data by name or number, which are then no features; 'FILE.h5:/NAME', or '/NAME'
        in the data's own file: a dataset with as many rows. That belongs to the training rows; of the file's ``valid``
        and ``test`` datasets it is '/NAME_valid' and '/NAME_test'. 'none' is None where a run's record says otherwise.
    """

    data: Any
    context: Any = None
    weights: Any = None


NONE = "none"  # as text: no context or weights, though a run had them
RECORDED = ("context", "weights")  # names in a run's record (its config), beside "data"


def plain_data(spec: Any) -> Any:
    """The data alone of a DataSpec, or of what is none."""
    return spec.data if isinstance(spec, DataSpec) else spec


def to_record(spec: Any) -> dict[str, str]:
    """What a run's record says of context and weights: as text, '' for an array, and nothing where there are none.

    A dataset in the data's own file is '/NAME', so that it is found when the file has been moved.
    """
    from nicecp.datasets import split_spec

    record: dict[str, str] = {}
    for name in RECORDED if isinstance(spec, DataSpec) else ():
        given = getattr(spec, name)
        if given is None:
            continue
        record[name] = given if isinstance(given, str) else ""
        if isinstance(given, str) and is_dataset(given) and ":/" in given:
            path, dataset = split_spec(given)
            data = split_spec(spec.data)[0] if isinstance(spec.data, (str, os.PathLike)) else ""
            own = os.path.abspath(path) == os.path.abspath(data) if data else False
            record[name] = str(dataset) if own else f"{os.path.abspath(path)}:{dataset or ''}"
    return record


def from_record(spec: Any, config: Mapping[str, Any]) -> Any:
    """Data with the context and weights that a run's record says it had, where the data do not say it themselves.

    Raises DataError where the run was given an array.
    """
    whole = spec if isinstance(spec, DataSpec) else DataSpec(spec)
    found: dict[str, Any] = {}
    for name in RECORDED:
        given, recorded = getattr(whole, name), config.get(name)
        if given is None and recorded == "":
            problem = f"the run was given its {name} as an array, which is not recorded"
            raise DataError(about_file(name, problem, f"pass them anew (--{name}, DataSpec), or 'none'"))
        found[name] = given if given is not None else recorded if isinstance(recorded, str) else None
    if isinstance(spec, DataSpec) or any(found.values()):
        return DataSpec(whole.data, **found)
    return spec


# --- checks -----------------------------------------------------------------------------------------------------------


def checked_context(
    values: ArrayLike, n_rows: int, name: str, columns: Sequence[str] | None = None, rows_of: str = "the data"
) -> Floats:
    """(n_rows,) or (n_rows, k) finite numbers -> (n_rows, k) float64, C-contiguous.

    Raises DataError, TypeError
        Another number of rows than ``rows_of``, which is called ``name`` in messages; no columns; NaN or infinity, with
        its row and column; no real numbers.
    """
    array = _numbers(values, name)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or not 1 <= array.shape[1] <= MAX_CONTEXT:
        problem = f"a context is rows of one or more columns, got shape {array.shape}"
        raise DataError(about_file(name, problem, "store one row of context for each row of data"))
    _check_length(len(array), n_rows, name, "context", rows_of)
    context: Floats = np.ascontiguousarray(array, np.float64)
    check_finite(context, 0, name, columns)
    return context


def relative_weights(values: ArrayLike, n_rows: int, name: str, rows_of: str = "the data") -> Floats:
    """(n_rows,) or (n_rows, 1) weights -> (n_rows,) float64 with mean 1 over the rows whose weight is not 0.

    So weights of any scale, also beyond single precision, do the same. A row of weight 0 is as good as not there.

    Raises DataError, TypeError
        Another number of rows; a weight that is negative, NaN or infinite, with its row; all are 0; no real numbers.
    """
    array = _numbers(values, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        problem = f"weights are one number for each row, got shape {array.shape}"
        raise DataError(about_file(name, problem, "store them as one column"))
    _check_length(len(array), n_rows, name, "weights", rows_of)
    weight: Floats = np.array(array, np.float64)
    bad = ~((weight >= 0) & (weight < np.inf))
    if bad.any():
        row = int(np.argmax(bad))
        problem = f"the weight of row {row} is {weight[row]:g} (rows are counted from 0)"
        raise DataError(about_file(name, problem, "weights must be finite and at least 0"))
    largest = float(weight.max(initial=0.0))
    if largest == 0.0:
        problem = f"the weights of all {n_rows:,} rows are 0, the first is row 0"
        raise DataError(about_file(name, problem, "at least one row must have a weight"))
    weight /= largest  # their sum could overflow
    weight /= weight[weight > 0].mean()
    return weight


def has_weights(spec: Any) -> bool:
    """Whether data are given with weights."""
    weights = spec.weights if isinstance(spec, DataSpec) else None
    return weights is not None and not (isinstance(weights, str) and weights == NONE)


def n_context_of(source: Source) -> int:
    """Length of the context of a source's rows, 0 without one."""
    return 0 if source.context is None else source.context.shape[1]


def effective_rows(weight: Floats) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 of weights : (n,), at most n; 0 without any.

    Source: Kish, Survey Sampling, 1965.
    """
    square = float(weight @ weight)
    return float(weight.sum()) ** 2 / square if square else 0.0


def _numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked one: fill or drop the masked values first")
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected integers or floats, got an array of {array.dtype}")
    return array


def _check_length(length: int, n_rows: int, name: str, what: str, rows_of: str) -> None:
    if length != n_rows:
        problem = f"{what} of {length:,} rows for {n_rows:,} rows of {rows_of}"
        raise DataError(about_file(name, problem, "give one for each row"))


# --- sources ----------------------------------------------------------------------------------------------------------


class Beside:
    """A source with a context, weights, or both, and less the columns that they were.

    Parameters
    ----------
    source : closed with this one
    context : (n_rows, k), weight : (n_rows,), checked here; None leaves the source's own
    context_names : (k,) names of the context's columns, if they have any
    columns : (d,) column numbers of the source that are features, ascending; None for all
    names : what messages call the context and the weights
    """

    def __init__(
        self,
        source: Source,
        context: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        context_names: Sequence[str] | None = None,
        columns: NDArray[np.int64] | None = None,
        names: tuple[str, str] = ("context", "weights"),
    ) -> None:
        self._source, self._columns, n = source, columns, source.n_rows
        self.name, self.n_rows, self.dtype, self.is_image8 = source.name, n, source.dtype, source.is_image8
        self.n_features, self.info = source.n_features, source.info
        if columns is not None:
            self.n_features = len(columns)
            check_size(self.name, n, self.n_features)
            kept = [None if texts is None else tuple(texts[i] for i in columns.tolist())
                    for texts in (source.info.columns, source.info.units)]  # fmt: skip
            self.info = DataInfo(None, kept[0], kept[1])
        self.context, self.context_names, self.weight = source.context, source.context_names, source.weight
        if context is not None:
            self.context = checked_context(context, n, names[0], context_names, repr(source.name))
            self.context_names = None if context_names is None else tuple(context_names)
            if self.context_names is not None and len(self.context_names) != self.context.shape[1]:
                problem = f"{len(self.context_names)} names for {self.context.shape[1]} columns of context"
                raise DataError(about_file(names[0], problem, "give one name for each"))
        if weight is not None:
            self.weight = relative_weights(weight, n, names[1], repr(source.name))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 : (stop - start, n_features)."""
        block = self._source.read(start, stop)
        return block if self._columns is None else np.ascontiguousarray(block[:, self._columns])

    def fingerprint(self) -> str:
        """Of the data, the choice of columns, the context and the weights; scaled weights are the same."""
        digest = hashlib.sha256(f"nicecp beside 1 {self._source.fingerprint()}\n".encode())
        for array in (self._columns, self.context):
            digest.update(repr(None if array is None else array.shape).encode())
            if array is not None:
                digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        if self.weight is not None:
            digest.update(b"weights" + self.weight.astype("<f8").tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        self._source.close()


def beside(source: Source, spec: Any) -> Source:
    """A source with what a DataSpec says of its context and weights; the source itself where it says nothing.

    Raises DataError; the source is then closed.
    """
    if not isinstance(spec, DataSpec):
        return source
    context, weights = (None if isinstance(x, str) and x == NONE else x for x in (spec.context, spec.weights))
    if context is None and weights is None:
        return source
    try:
        return _attached(source, DataSpec(spec.data, context, weights))
    except BaseException:
        source.close()
        raise


def _attached(source: Source, spec: DataSpec) -> Source:
    taken: dict[str, list[int]] = {}
    for what, given in (("context", spec.context), ("weights", spec.weights)):
        if isinstance(given, str) and not is_dataset(given):
            taken[what] = columns_named(given, source, what)
    if len(taken.get("weights", [0])) != 1:
        problem = f"--weights names {len(taken['weights'])} columns: {spec.weights!r}"
        raise DataError(about_file(source.name, problem, "name one column"))
    both = set(taken.get("context", [])) & set(taken.get("weights", []))
    if both:
        problem = f"column {_label(min(both), source)} cannot be context and weights at once"
        raise DataError(about_file(source.name, problem, "name different columns"))
    used = [column for columns in taken.values() for column in columns]
    values = _read_columns(source, used)
    read: dict[str, Any] = {}
    labels: dict[str, str] = {}
    context_names = None
    for what, given in (("context", spec.context), ("weights", spec.weights)):
        labels[what] = what
        if what in taken:
            read[what] = values[:, [used.index(column) for column in taken[what]]]
            labels[what] = f"{source.name} ({what})"
        elif isinstance(given, str):
            read[what], names, labels[what] = _read_dataset(given, spec.data, source)
            context_names = names if what == "context" else context_names
        else:
            read[what] = given
    if "context" in taken and source.info.columns is not None:
        context_names = tuple(source.info.columns[column] for column in taken["context"])
    features = None
    if used:
        features = np.setdiff1d(np.arange(source.n_features), used).astype(np.int64)
    return Beside(source, read["context"], read["weights"], context_names, features,
                  (labels["context"], labels["weights"]))  # fmt: skip


def is_dataset(text: str) -> bool:
    """Whether a text names a dataset ('FILE.h5:/NAME', '/NAME') and not columns."""
    return text.startswith("/") or ":/" in text


def columns_named(text: str, source: Source, what: str) -> list[int]:
    """Column numbers of 'a,b' or '0,3'; a name counts before a number. DataError for one that is not there or twice."""
    names = source.info.columns
    found: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if names is not None and part in names:
            column = names.index(part)
        elif re.fullmatch(r"\d{1,9}", part) and int(part) < source.n_features:
            column = int(part)
        else:
            known = (
                f"its columns are {', '.join(names[:20])}" if names else f"it has columns 0 to {source.n_features - 1}"
            )
            raise DataError(about_file(source.name, f"no column {part!r} for --{what}", f"{known}; or name a dataset"))
        if column in found:
            raise DataError(about_file(source.name, f"column {part!r} is named twice for --{what}", "name it once"))
        found.append(column)
    return found


def _label(column: int, source: Source) -> str:
    names = source.info.columns
    return str(column) if names is None else repr(names[column])


def _read_columns(source: Source, columns: list[int]) -> Floats:
    """(n_rows, len(columns)) float64, in the order asked for."""
    out = np.empty((source.n_rows, len(columns)), np.float64)
    step = max(1, _READ // source.n_features)
    for start in range(0, source.n_rows, step) if columns else ():
        stop = min(start + step, source.n_rows)
        out[start:stop] = source.read(start, stop)[:, columns]
    return out


def _read_dataset(text: str, data: Any, source: Source) -> tuple[NDArray[Any], tuple[str, ...] | None, str]:
    """The dataset that a text names, for the rows of a source -> its rows, its columns' names and its own name."""
    from nicecp.datasets import companion, split_spec
    from nicecp.hdf5_data import HDF5Source

    path, dataset = split_spec(text)
    if dataset is None:
        if not text.startswith("/") or not isinstance(data, (str, os.PathLike)):
            raise DataError(about_file(text, "no dataset of a file is named", "write FILE.h5:/NAME"))
        path, dataset = split_spec(data)[0], text
    role = source.name.rpartition("/")[2].removeprefix("x_")
    name = companion(path, dataset, role) if role in ("valid", "test") else dataset
    with HDF5Source(path, name, beside=True) as found:
        if found.n_rows != source.n_rows and name == dataset and role in ("valid", "test"):
            problem = f"{found.n_rows:,} rows for {source.n_rows:,} rows of {source.name!r}"
            remedy = f"store what belongs to these as {dataset + '_' + role!r}"
            raise DataError(about_file(found.name, problem, remedy))
        return found.read(0, found.n_rows), found.info.columns, found.name


def read_context(text: str) -> Floats:
    """The rows of a dataset 'FILE.h5:/NAME' as a context : (n, k) float64. Raises DataError."""
    from nicecp.datasets import split_spec
    from nicecp.hdf5_data import HDF5Source

    path, dataset = split_spec(text)
    if dataset is None:
        raise DataError(about_file(text, "no dataset of a file is named", "write FILE.h5:/NAME"))
    with HDF5Source(path, dataset, beside=True) as found:
        return found.read(0, found.n_rows).astype(np.float64, copy=False)

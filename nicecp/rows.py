"""Which rows and columns of data are used: chosen columns, a range of rows, and the steps of a chain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import beside
from nicecp.data_spec import NONE, DataSpec, is_dataset
from nicecp.errors import DataError, about_file
from nicecp.records import DataInfo
from nicecp.sources import Source, check_range, check_size, fingerprint


def row_range(text: str) -> tuple[int, int | None]:
    """'100:5000', ':5000', '100:' -> (100, 5000 or None); ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{0,15})\s*:\s*(\d{0,15})\s*", text)
    start, stop = (int(found[1] or 0), int(found[2]) if found[2] else None) if found else (0, 0)
    if stop is not None and stop <= start:
        raise ValueError(f"{text!r} is not a range of rows A:B such as 1000:5000, :5000 or 1000:")
    return start, stop


def open_rows(path: str, name: str, spec: Any, training: bool) -> Source:
    """What ``name`` is in a file, as a source, less what a DataSpec leaves out, with its context and weights.

    training : whether these are the rows that ``select``, ``burn`` and ``thin`` are about: the training rows, or those
        that were named; the columns are of all. Raises DataError.
    """
    from nicecp.table_files import open_table

    return chosen(open_table(path, name, _wanted(spec)), spec, training)


def _wanted(spec: Any) -> tuple[str, ...] | None:
    """Names of the features, and of columns that are context or weights, which need not be named twice."""
    if not isinstance(spec, DataSpec) or _given(spec.columns) is None:
        return None
    wanted = named_columns(spec.columns)
    others = [_given(given) for given in (spec.context, spec.weights) if isinstance(given, str)]
    more = [column for given in others if given and not is_dataset(given) for column in named_columns(given)]
    return (*wanted, *dict.fromkeys(column for column in more if column not in wanted))


def _given(text: str | None) -> str | None:
    return None if text == NONE else text


def chosen(source: Source, spec: Any, training: bool = True) -> Source:
    """A source less what a DataSpec leaves out of it, with its context and weights; see open_rows."""
    if not isinstance(spec, DataSpec):
        return source
    wanted, burn, thin, select = _wanted(spec), *(_given(given) for given in (spec.burn, spec.thin, spec.select))
    try:
        if training and (burn or thin):
            shape = getattr(source, "shape", (source.n_rows, source.n_features))
            source = Chain(source, shape, int(burn or 0), int(thin or 1))
        if wanted is not None and source.info.columns != wanted:
            source = Chosen(source, numbers_of(wanted, source), names=wanted)
    except BaseException:
        source.close()
        raise
    source = beside(source, spec)  # closes the source if it raises
    if not training or select is None:
        return source
    try:
        return Chosen(source, None, *row_range(select))
    except BaseException:
        source.close()
        raise


class Chosen:
    """Some columns of a source, in any order, and a range of its rows.

    columns : (d,) column numbers of the source; None for all. start, stop : rows of the source. names : of the columns
        where the source has no names for them.
    """

    def __init__(
        self,
        source: Source,
        columns: Sequence[int] | None,
        start: int = 0,
        stop: int | None = None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self._source, self._start = source, start
        self.name, self.dtype, self.is_image8 = source.name, source.dtype, source.is_image8
        last = source.n_rows if stop is None else stop
        if not start < last <= source.n_rows:
            problem = f"rows {start}:{last} are not within its {source.n_rows:,} rows"
            raise DataError(about_file(self.name, problem, "choose others (--select)"))
        self.n_rows, self.n_features, self.info = last - start, source.n_features, source.info
        self._columns = None if columns is None else np.array(columns, np.int64)
        if self._columns is not None:
            self.n_features = len(self._columns)
            texts = [None if t is None else tuple(t[i] for i in self._columns.tolist())
                     for t in (source.info.columns, source.info.units)]  # fmt: skip
            self.info = DataInfo(None, texts[0] or names, texts[1])
            check_size(self.name, self.n_rows, self.n_features)
        self.context = None if source.context is None else source.context[start:last]
        self.weight = None if source.weight is None else source.weight[start:last]
        self.context_names = source.context_names

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 : (stop - start, d)."""
        check_range(start, stop, self.n_rows)
        block = self._source.read(self._start + start, self._start + stop)
        return block if self._columns is None else np.ascontiguousarray(block[:, self._columns])

    def fingerprint(self) -> str:
        return fingerprint(self.read, self.n_rows, self.n_features, self.dtype)

    def close(self) -> None:
        self._source.close()


class Chain:
    """The steps of Markov chains as rows: of a dataset (steps, walkers, d), or (steps, d) of a single chain.

    The first ``burn`` steps are left out, and of the others every ``thin``-th is kept, beginning with the first. A row
    is one walker at one step; walkers of a step follow one another.
    """

    context: NDArray[np.float64] | None = None
    context_names: tuple[str, ...] | None = None
    weight: NDArray[np.float64] | None = None
    is_image8 = False

    def __init__(self, source: Source, shape: tuple[int, ...], burn: int = 0, thin: int = 1) -> None:
        """shape : of the dataset. source : its steps as rows of walkers * d numbers, closed with this one."""
        self._source, self._burn, self._thin = source, burn, thin
        self.name, self.dtype = source.name, source.dtype
        if len(shape) not in (2, 3) or source.is_image8:
            found = f"{source.dtype} of shape {shape}"
            problem = f"a chain is numbers (steps, walkers, columns) or (steps, columns), this is {found}"
            raise DataError(about_file(self.name, problem, "leave --burn and --thin out"))
        self._walkers = shape[1] if len(shape) == 3 else 1
        self.n_features = shape[-1]
        steps = -(-(source.n_rows - burn) // thin)
        if steps < 1:
            problem = f"nothing is left of its {source.n_rows:,} steps without the first {burn:,}"
            raise DataError(about_file(self.name, problem, "use a smaller --burn"))
        self.n_rows = steps * self._walkers
        check_size(self.name, self.n_rows, self.n_features)
        flat = source.info.columns if len(shape) == 2 else None
        self.info = DataInfo(None, flat, source.info.units if len(shape) == 2 else None)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 : (stop - start, d)."""
        check_range(start, stop, self.n_rows)
        if start == stop:
            return np.empty((0, self.n_features), self.dtype)
        first, last = start // self._walkers, -(-stop // self._walkers)
        end = self._burn + (last - 1) * self._thin + 1
        steps = self._source.read(self._burn + first * self._thin, end)[:: self._thin]
        rows = steps.reshape(-1, self.n_features)
        offset = first * self._walkers
        return np.ascontiguousarray(rows[start - offset : stop - offset])

    def fingerprint(self) -> str:
        return fingerprint(self.read, self.n_rows, self.n_features, self.dtype)

    def close(self) -> None:
        self._source.close()


def named_columns(text: str | Sequence[str]) -> tuple[str, ...]:
    """'a,b' -> (a, b); DataError is for later, when the data are known. ValueError for an empty name."""
    names = tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else tuple(text)
    if not names or not all(names):
        raise ValueError(f"{text!r} is not a list of columns such as mass,phi or 0,3")
    return names


def numbers_of(names: Sequence[str], source: Source) -> list[int]:
    """Column numbers of names, or of numbers counted from 0 where no column has such a name; DataError otherwise."""
    known, found = source.info.columns, []
    for name in names:
        if known is not None and name in known:
            number = known.index(name)
        elif re.fullmatch(r"\d{1,9}", name) and int(name) < source.n_features:
            number = int(name)
        else:
            shown = f"its columns are {', '.join(known[:20])}" if known else f"they are 0 to {source.n_features - 1}"
            raise DataError(about_file(source.name, f"no column {name!r}", shown))
        if number in found:
            raise DataError(about_file(source.name, f"column {name!r} is named twice", "name it once"))
        found.append(number)
    return found


def matched(source: Source, wanted: tuple[str, ...] | None) -> Source:
    """A source with the columns that a flow was trained on, in its order, found by name; as it is without names.

    Closes the source and raises DataError where a column is missing.
    """
    known = source.info.columns
    if wanted is None or known is None or known == wanted or len(set(wanted)) < len(wanted):
        return source
    missing = [name for name in wanted if known.count(name) != 1]
    if missing:
        source.close()
        shown = ", ".join(repr(name) for name in missing[:8])
        problem = f"the flow was trained on columns that are not there once: {shown}"
        raise DataError(about_file(source.name, problem, f"it has {', '.join(known[:20])}"))
    return Chosen(source, [known.index(name) for name in wanted])

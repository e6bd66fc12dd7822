"""Which data a run is about, as its caller says it: rows, columns, context, weights; and as a run's record keeps it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nicecp.errors import DataError, about_file

NONE = "none"  # as text: not this, though a run had it


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
    columns, select, burn, thin : text, or None for all
        Which of the data are used (nicecp.rows): 'a,b', columns in this order; '1000:5000', rows; for the steps of
        Markov chains how many first ones are left out, and that every so manieth is kept.
    """

    data: Any
    context: Any = None
    weights: Any = None
    columns: Any = None
    select: str | None = None
    burn: str | None = None
    thin: str | None = None
    recorded: tuple[str, ...] = ()  # which of these are a run's, as its record says, and were not given

    def __post_init__(self) -> None:
        for name in ("burn", "thin"):
            text, least = getattr(self, name), int(name == "thin")
            if text is None or text == NONE:
                continue
            if not re.fullmatch(r"\d{1,15}", str(text)) or int(text) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {text!r}")
            object.__setattr__(self, name, str(text))
        if self.columns is not None and not isinstance(self.columns, str):
            object.__setattr__(self, "columns", ",".join(str(column) for column in self.columns))


RECORDED = (
    "context",
    "weights",
    "columns",
    "select",
    "burn",
    "thin",
)  # in a run's record (its config), beside data


def plain_data(spec: Any) -> Any:
    """The data alone of a DataSpec, or of what is none."""
    return spec.data if isinstance(spec, DataSpec) else spec


def files_in(spec: Any) -> list[str]:
    """Names of the files that data, context and weights are read from, as given: outputs must not replace them."""
    parts = (spec.data, spec.context, spec.weights) if isinstance(spec, DataSpec) else (spec,)
    return [os.fspath(part) for part in parts if isinstance(part, (str, os.PathLike))]


def to_record(spec: Any) -> dict[str, str]:
    """What a run's record says of the rows it used, of context and weights: as text, '' for an array, and nothing where
    there is nothing to say.

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
    """Data with all that a run's record says of them (RECORDED), where the data do not say it themselves.

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
        recorded = tuple(name for name in RECORDED if getattr(whole, name) is None and found[name] is not None)
        return DataSpec(whole.data, **found, recorded=recorded)
    return spec


def spec_of(data: Any, **given: Any) -> Any:
    """A DataSpec of data and what is given for them; the data alone where nothing is."""
    return data if all(value is None for value in given.values()) else DataSpec(data, **given)


# --- checks -----------------------------------------------------------------------------------------------------------


def has_weights(spec: Any) -> bool:
    """Whether data are given with weights."""
    weights = spec.weights if isinstance(spec, DataSpec) else None
    return weights is not None and not (isinstance(weights, str) and weights == NONE)


def is_dataset(text: str) -> bool:
    """Whether a text names a dataset ('FILE.h5:/NAME', '/NAME') and not columns."""
    return text.startswith("/") or ":/" in text

"""Score a checkpoint on data: which rows are meant, their mean log-likelihood, the error of going there and back."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.checkpoint import load_run
from nicecp.columns import check_representable
from nicecp.data import DEMO, TEST_NAMES, Source, Splits, candidates, open_source, open_splits, split_spec
from nicecp.data_spec import DataSpec, from_record, plain_data
from nicecp.errors import DataError, about_file
from nicecp.evaluate import Evaluation, check_fits, evaluate
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.memory import scored_within
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize
from nicecp.presets import Settings
from nicecp.rank_devices import open_for
from nicecp.records import Event, RunRecord
from nicecp.rows import matched
from nicecp.split import Split
from nicecp.transforms import Angle

logger = logging.getLogger("nicecp")

PARTS = ("auto", "train", "valid", "test")
_NOISE = {"train": Purpose.TRAIN_NOISE, "valid": Purpose.VALID_NOISE, "test": Purpose.TEST_NOISE}


@dataclass(frozen=True)
class Score:
    """An evaluation, the rows that it was made on in words, their dataset, and the seed of the dequantization noise."""

    evaluation: Evaluation
    rows: str
    dataset: str
    seed: int


def recorded_settings(record: RunRecord | None) -> Settings | None:
    """The settings in a run's record, or None where there are none (a flow saved from Python, another writer)."""
    try:
        return None if record is None else Settings.from_json(record.config["settings"])
    except (KeyError, TypeError, ValueError):
        return None


def score(
    checkpoint: str | os.PathLike[str],
    data: Any,
    part: str = "auto",
    seed: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    communicator: Communicator = ALONE,
    memory_limit: int | None = None,
) -> Score:
    """Mean log-likelihood of a checkpoint's flow on data (nats per row, in the data's space).

    Parameters
    ----------
    data : as nicecp.data.open_source
        Context and weights come from where the run had them, unless a DataSpec says otherwise.
    part : "auto", "train", "valid" or "test"
        train and valid are the run's own rows where the data are those that the run was trained on, else the dataset of
        that name. auto: the dataset that ``data`` names, else the test dataset, else the run's own validation rows,
        else all rows. test: the test dataset, or the one that ``data`` names, but never what the flow was trained on.
    seed : int, optional
        Of the dequantization noise; the run's own by default, so that the numbers printed after training come again.
    precision : "full" or "tf32"
        In place of the flow's own, on a GPU.
    communicator : of the ranks that share the rows, all of which make the same call and have the result
    memory_limit : bytes that the process may have in memory (nicecp.memory)

    Raises
    ------
    DataError, CheckpointError
        A file cannot be used, or the data do not fit the flow.
    """
    if part not in PARTS:
        raise ValueError(f"the part must be one of {', '.join(PARTS)}, got {part!r}")
    backend = open_for(communicator, device, threads)
    flow, record = load_run(checkpoint, backend=backend, precision=precision)
    seed = seed if seed is not None else record.seed if record is not None else 0
    split = choose_rows(flow, record, as_recorded(data, record), part)
    try:
        # As the run did it: each epoch's validation has noise of its own, and the best epoch's numbers were reported.
        epoch = record.best_epoch if record is not None and split.purpose == Purpose.VALID_NOISE else 0
        read_rows = scored_within(memory_limit, flow, split)
        return Score(
            evaluate(flow, split, seed, epoch, communicator, read_rows), describe_rows(split), split.source.name, seed
        )
    finally:
        split.source.close()


def as_recorded(data: Any, record: RunRecord | None) -> Any:
    """Data with the context and weights of the run's record, where they do not name their own."""
    return data if record is None else from_record(data, record.config)


def choose_rows(flow: NICE, record: RunRecord | None, data: Any, part: str) -> Split:
    """The rows that ``score`` means; the caller closes the split's source. DataError where they do not fit the flow."""
    if part in ("train", "valid"):
        return _own_rows(flow, record, data, part) or _all_rows(flow, open_matched(flow, data, part), part)
    source = open_matched(flow, data, "test")
    if part == "test":
        _refuse_training_rows(flow, data, source)
    whole = _all_rows(flow, source, "test")
    if part == "auto" and not _is_named(data, whole.source) and _plays_train(data, whole.source):
        own = _own_rows(flow, record, data, "valid")
        if own is not None:
            whole.source.close()
            return own
    return whole


def open_matched(flow: NICE, data: Any, part: str) -> Source:
    """Data, as nicecp.data.open_source opens them for a part, with the flow's columns in its order, found by their
    names where both have names.

    A range of rows that a run's record brought along says nothing about the rows to be scored: they are all used.
    """
    if isinstance(data, DataSpec) and "select" in data.recorded:
        data = replace(data, select=None)
    return matched(open_source(data, part), flow.info.columns)


def _refuse_training_rows(flow: NICE, data: Any, source: Source) -> None:
    """DataError where there is no test dataset, or where it is what the flow was trained on."""
    data = plain_data(data)
    if not isinstance(data, (str, os.PathLike)) or data == DEMO:
        return
    trained_on = flow.info.fingerprint and source.fingerprint() == flow.info.fingerprint
    if trained_on or not (_is_named(data, source) or source.name.rpartition("/")[2] in TEST_NAMES):
        source.close()
        path = split_spec(data)[0]
        problem = f"{source.name!r} is what the flow was trained on" if trained_on else "it has no test dataset"
        remedy = f"name another dataset as FILE.h5:/NAME (this file has {candidates(path)}), or leave --split out"
        raise DataError(about_file(path, problem, remedy))


def _all_rows(flow: NICE, source: Source, part: str) -> Split:
    split = Split.contiguous(source, 0, source.n_rows, _NOISE[part])
    try:
        check_fits(flow, split)
    except DataError:
        source.close()
        raise
    return split


def _is_named(data: Any, source: Source) -> bool:
    """Whether the data were given as FILE:/DATASET with this very dataset, or as an array."""
    data = plain_data(data)
    if not isinstance(data, (str, os.PathLike)):
        return True
    path, dataset = split_spec(data)
    return dataset is not None and source.name == f"{path}:/{dataset.strip('/')}"


def _plays_train(data: Any, source: Source) -> bool:
    """Whether the test rows are the training dataset, for want of a test dataset."""
    try:
        train = open_source(data, "train")
    except DataError:
        return False
    train.close()
    return train.name == source.name


def _own_rows(flow: NICE, record: RunRecord | None, data: Any, part: str) -> Split | None:
    """The run's own training or validation rows, if these are the data that it was trained on."""
    settings = recorded_settings(record)
    if settings is None or not flow.info.fingerprint:
        return None
    try:
        splits = open_splits(data, settings.valid_fraction, settings.seed)
    except DataError:
        return None  # a file without training data cannot be the run's; opening the named dataset says what is wrong
    split = splits.train if part == "train" else splits.valid
    if split is None or splits.train.source.fingerprint() != flow.info.fingerprint:
        splits.close()
        return None
    for other in (splits.train, splits.valid, splits.test):
        if other is not None and other.source is not split.source:
            other.source.close()
    check_fits(flow, split)
    return split


def accept_changed_data(flow: NICE, splits: Splits, record: RunRecord, step: int) -> bool:
    """Whether the data are not those of the run: then there is a warning and an event, and the flow goes on with them.

    Raises DataError where they do not fit the flow.
    """
    try:
        check_same_data(flow, splits, record)
    except DataError as error:
        source = splits.train.source
        check_fits(flow, splits.train)
        check_representable(splits, flow.preprocessing, flow.dtype, record.seed)
        flow.info = replace(source.info, fingerprint=source.fingerprint())
        message = f"resumed on changed data, as asked for: {error}"
        logger.warning("%s", message)
        record.events.append(Event(record.epoch, step, "data", message))
        return True
    return False


def check_same_data(flow: NICE, splits: Splits, record: RunRecord | None) -> None:
    """DataError unless the rows are those of the run: the training data's fingerprint and the rule of the split.

    Without a record the fingerprint alone counts.
    """
    source = splits.train.source
    check_fits(flow, splits.train)
    if source.fingerprint() != flow.info.fingerprint:
        problem = "its numbers are not those that the run was trained on (another fingerprint)"
        raise DataError(
            about_file(
                source.name,
                problem,
                "pass the run's own data with --data, allow it (--allow-changed-data), or start a new run",
            )
        )
    if record is None:
        return
    recorded = record.config.get("rows")
    for name, split in (("train", splits.train), ("valid", splits.valid)):
        was = recorded.get(name) if isinstance(recorded, dict) else None
        now = None if split is None else split.describe()
        if _without_source(was) != _without_source(now):
            problem = f"its {name} rows are not those of the run"
            raise DataError(
                about_file(
                    source.name, problem, "pass the run's own data with --data, or allow it (--allow-changed-data)"
                )
            )


def _without_source(described: Any) -> Any:
    """A split's description but for the file's name: a file may have been moved."""
    return {key: value for key, value in described.items() if key != "source"} if isinstance(described, dict) else None


def describe_rows(split: Split) -> str:
    """Which rows a split holds, in words."""
    name, n = split.source.name, len(split)
    if split.fraction is not None:
        which = "held out" if split.member else "not held out"
        return f"the {n:,} rows of {name} {which} by seed {split.seed}"
    if split.source.weight is not None and n < split.stop - split.start:
        return f"the {n:,} rows of {name} that have a weight"
    if n == split.source.n_rows:
        return f"all {n:,} rows of {name}"
    return f"rows {split.start:,} to {split.stop - 1:,} of {name}"


def example_rows(flow: NICE, split: Split, n: int) -> NDArray[np.float64]:
    """The first n rows of a split in data space : (<= n, d); 8-bit values as the middle of their bins."""
    rows = np.asarray(split.head(n).load()[0][:n], np.float64)
    for step in flow.preprocessing:
        if isinstance(step, Dequantize):
            return step.low + (step.high - step.low) * (rows + 0.5) / step.levels
    return rows


def example_context(split: Split, n: int) -> NDArray[np.float64] | None:
    """The context of example_rows : (<= n, k), None without one."""
    context = split.source.context
    return None if context is None else context[split.head(n).rows()[:n]]


def round_trip_error(flow: NICE, x: NDArray[np.float64], context: NDArray[np.float64] | None = None) -> float:
    """max |x - f^-1(f(x))| over rows x : (n, d), in data space, at their context : (n, k)."""
    gap = x - flow.inverse(flow.forward(x, context)[0], context)[0]
    for step in flow.preprocessing:
        if isinstance(step, Angle):  # x and x + period are one angle
            gap[:, step.columns] -= step.period * np.round(gap[:, step.columns] / step.period)
    return float(np.abs(gap).max(initial=0.0))

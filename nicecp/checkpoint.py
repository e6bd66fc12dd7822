"""Checkpoints of runs: ``run.h5`` holds the best model, ``run.state.h5`` beside it what resuming needs.

The format is described in docs/checkpoint.md; nicecp.store knows its bytes, nicecp.schema the model's part of it, and
this module the training's part. Nothing in a file is ever run.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from typing import Any

import numpy as np

from nicecp.errors import CheckpointError, about_file
from nicecp.files import reason
from nicecp.flow import NICE
from nicecp.kernels import get_backend, with_precision
from nicecp.kernels.backend import OPTIMIZERS, Backend, Slot
from nicecp.records import EpochRecord, Event, Parameters, ResumeState, RunRecord
from nicecp.schema import MAX_COUNT, Reader, add_parameters, model_tree, read_context, read_model, read_parameters
from nicecp.spec import ModelSpec
from nicecp.store import Attribute, Tree, read_tree, strings, write_tree

MAX_JSON = 1 << 20  # bytes
MAX_JSON_DEPTH = 32
MAX_MESSAGE = 1000  # characters of an event's message that are kept
MAX_EPOCH = (1 << 32) - 1  # the epoch is one word of the random numbers' counter

_HISTORY = ("train_log_likelihood", "valid_log_likelihood", "learning_rate", "seconds")
_AVERAGE = "average_log_likelihood"  # of runs that average their parameters
# What the state array must hold where training continues: (slot, name, whether it is a count).
_NEEDED = (
    (Slot.STEP, "step", True),
    (Slot.EPOCH, "epoch", True),
    (Slot.CURSOR, "batches presented", True),
    (Slot.SKIPPED, "steps skipped", True),
    (Slot.RATE, "learning rate", False),
    (Slot.WEIGHT_SUM, "rows summed", False),
)

StrPath = str | os.PathLike[str]


def state_path(path: StrPath) -> str:
    """The state file's path beside a run's file: run.h5 -> run.state.h5."""
    stem, suffix = os.path.splitext(os.fspath(path))
    return f"{stem}.state{suffix or '.h5'}"


def run_path(path: StrPath) -> str:
    """The run's file, of what is named to resume it: that or its state file. CheckpointError if there is no state."""
    out = os.fspath(path)
    stem = out.removesuffix(".h5").removesuffix(".state")
    if not os.path.lexists(state_path(out)) and state_path(stem + ".h5") == out:
        out = stem + ".h5"  # the state file itself was named
    if not os.path.lexists(state_path(out)):
        problem = f"its state file {state_path(out)!r} is not there" if os.path.lexists(out) else "no such run"
        raise CheckpointError(about_file(out, problem, "a run that has saved its state can be resumed"))
    return out


def load(path: StrPath, *, backend: Backend | None = None, precision: str | None = None) -> NICE:
    """The flow in a checkpoint: the best model of a run, or of a state file the one in training.

    precision : in place of the flow's own (nicecp.kernels.with_precision).

    Raises CheckpointError, in one line with the file's name, for anything that is not exactly as written.
    """
    return _load(path, backend, precision)[0]


def load_run(
    path: StrPath, *, backend: Backend | None = None, precision: str | None = None
) -> tuple[NICE, RunRecord | None]:
    """As load, with the record of the training; None where the flow was saved without one (NICE.save)."""
    flow, run, _ = _load(path, backend, precision)
    return flow, run


def load_state(path: StrPath, *, backend: Backend | None = None) -> tuple[NICE, RunRecord, ResumeState]:
    """The flow in training, the record so far, and what resuming needs, from a state file.

    Raises CheckpointError, also where the file is a checkpoint but not a state file.
    """
    flow, run, state = _load(path, backend)
    if run is None or state is None:
        problem = "holds a model but not the state of its training"
        raise CheckpointError(about_file(path, problem, f"resuming reads {state_path(path)!r} beside it"))
    return flow, run, state


def save_run(path: StrPath, flow: NICE, best_parameters: Parameters, run: RunRecord, overwrite: bool = False) -> None:
    """Write the architecture of ``flow`` with the best parameters, and the record of the run.

    The file appears whole or not at all. Raises OutputError (it exists already or cannot be written) and
    CheckpointError (the parameters are not finite).
    """
    write_tree(path, _run_tree(flow, best_parameters, run), overwrite)


def save_state(path: StrPath, flow: NICE, run: RunRecord, state: ResumeState, overwrite: bool = True) -> None:
    """Write all that resuming needs: the model in training, moments, position and the best model so far."""
    tree = _run_tree(flow, state.parameters, run)
    step = int(state.state[Slot.STEP])
    hyper: dict[str, Attribute] = {key: float(value) for key, value in state.hyper.items()}
    tree.attrs["/optimizer"] = {"kind": state.optimizer, "step": step, **hyper}
    add_parameters(tree, "/optimizer/first_moment", state.first_moment)
    add_parameters(tree, "/optimizer/second_moment", state.second_moment)
    seconds, stale = float(state.epoch_seconds), int(state.stale_epochs)
    tree.attrs["/resume"] = {"stale_epochs": stale, "epoch_seconds": seconds}
    if state.bad_steps:
        tree.attrs["/resume"]["bad_steps"] = int(state.bad_steps)
    tree.arrays["/resume/state"] = state.state
    add_parameters(tree, "/best", state.best_parameters)
    if state.average_epochs:
        tree.attrs["/resume"]["average_epochs"] = int(state.average_epochs)
        add_parameters(tree, "/average", state.average)
    _read_state(Reader(tree, path, "it is not saved"), flow.spec)
    write_tree(path, tree, overwrite)


def _load(
    path: StrPath, backend: Backend | None, precision: str | None = None
) -> tuple[NICE, RunRecord | None, ResumeState | None]:
    reader = Reader(read_tree(path), path)
    spec, parameters, preprocessing, info = read_model(reader)
    context = read_context(reader, spec.n_context)
    run = _read_run(reader) if reader.has("/training") else None
    state = None
    if run is not None and reader.has("/resume"):
        state = _read_state(reader, spec)
        state.parameters = parameters
    reader.finish()
    if precision is not None:
        backend = with_precision(backend or get_backend(), precision, required=True)
        spec = replace(spec, precision=precision)
    return NICE.from_spec(spec, parameters, preprocessing, info, context=context, backend=backend), run, state


# --- the record of a run ----------------------------------------------------------------------------------------------


def _run_tree(flow: NICE, parameters: Parameters, run: RunRecord) -> Tree:
    tree = model_tree(flow.spec, parameters, flow.preprocessing, flow.info, flow.context)
    attrs: dict[str, Attribute] = {
        "epoch": int(run.epoch),
        "best_epoch": int(run.best_epoch),
        "best_valid_log_likelihood": float(run.best_valid_log_likelihood),
        "seed": int(run.seed),
        "threads": int(run.threads),
    }
    if run.best_average:
        attrs["best_average"] = int(run.best_average)
    for key, version in run.versions.items():
        attrs["version_" + re.sub(r"\W", "_", key)] = version
    tree.attrs["/training"] = attrs
    try:
        text = json.dumps(run.config, allow_nan=False, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        problem = f"its config cannot be written as JSON ({reason(error)})"
        raise CheckpointError(about_file("run", problem, "it is not saved")) from error
    tree.arrays["/training/config"] = np.frombuffer(text.encode("utf-8", "backslashreplace"), np.uint8)
    history = "/training/history/"
    tree.arrays[history + "epoch"] = np.array([row.epoch for row in run.history], np.int64)
    for key in _HISTORY:
        tree.arrays[history + key] = np.array([getattr(row, key) for row in run.history], np.float64)
    averages = np.array([row.average_log_likelihood for row in run.history], np.float64)  # None is NaN
    if not np.isnan(averages).all():
        tree.arrays[history + _AVERAGE] = averages
    events = "/training/events/"
    tree.arrays[events + "epoch"] = np.array([event.epoch for event in run.events], np.int64)
    tree.arrays[events + "step"] = np.array([event.step for event in run.events], np.int64)
    tree.arrays[events + "kind"] = strings([event.kind for event in run.events])
    tree.arrays[events + "message"] = strings([event.message[:MAX_MESSAGE] for event in run.events])
    _read_run(Reader(tree, "run", "it is not saved"))
    return tree


def _read_run(reader: Reader) -> RunRecord:
    at = "/training"
    run = RunRecord(
        epoch=reader.integer(at, "epoch", 0, MAX_EPOCH),
        seed=reader.integer(at, "seed", 0, (1 << 64) - 1),
        threads=reader.integer(at, "threads", 1, 1 << 20),
        best_valid_log_likelihood=reader.number(at, "best_valid_log_likelihood", finite=False),
        config=_read_json(reader, at + "/config"),
    )
    run.best_epoch = reader.integer(at, "best_epoch", 0, run.epoch)
    if "best_average" in reader.attr_names(at):
        run.best_average = reader.integer(at, "best_average", 1, run.epoch)
    for key in reader.attr_names(at):
        if key.startswith("version_"):
            run.versions[key.removeprefix("version_")] = reader.text(at, key)
    history = at + "/history"
    epochs = reader.array(history + "/epoch", "int64", (None,))
    columns = [
        reader.array(f"{history}/{key}", "float64", epochs.shape, finite=not key.endswith("likelihood"))
        for key in (*_HISTORY, _AVERAGE)
        if key != _AVERAGE or reader.has(f"{history}/{_AVERAGE}")
    ]
    numbers_of = [column.tolist() for column in columns]
    if len(columns) > len(_HISTORY):
        numbers_of[-1] = [None if math.isnan(value) else value for value in numbers_of[-1]]
    run.history = [EpochRecord(*row) for row in zip(epochs.tolist(), *numbers_of, strict=True)]
    events = at + "/events"
    numbers = reader.array(events + "/epoch", "int64", (None,))
    steps = reader.array(events + "/step", "int64", numbers.shape)
    kinds, messages = (reader.names(f"{events}/{key}", len(numbers)) for key in ("kind", "message"))
    run.events = [Event(*row) for row in zip(numbers.tolist(), steps.tolist(), kinds, messages, strict=True)]
    for name, column, high in (
        (history + "/epoch", epochs, MAX_EPOCH),
        (events + "/epoch", numbers, MAX_EPOCH),
        (events + "/step", steps, MAX_COUNT),
    ):
        if column.size and not 0 <= column.min() <= column.max() <= high:
            raise reader.refuse(name, f"has values outside 0..{high}")
    return run


def _read_json(reader: Reader, path: str) -> dict[str, Any]:
    """An object of JSON in a uint8 dataset, limited in size and depth."""
    data = reader.array(path, "uint8", (None,)).tobytes()
    if len(data) > MAX_JSON:
        raise reader.refuse(path, f"has {len(data)} bytes, expected at most {MAX_JSON}")
    # Counted before parsing, which is recursive. Brackets within strings do not count.
    depth = 0
    for bracket in re.findall(rb"[][{}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise reader.refuse(path, f"is nested deeper than {MAX_JSON_DEPTH}")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise reader.refuse(path, f"is not JSON ({reason(error)})") from error
    if not isinstance(value, dict):
        raise reader.refuse(path, "is not a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# --- what resuming needs ----------------------------------------------------------------------------------------------


def _read_state(reader: Reader, spec: ModelSpec) -> ResumeState:
    """All of a ResumeState but the parameters, which are the model's."""
    kind = reader.text("/optimizer", "kind", OPTIMIZERS)
    step = reader.integer("/optimizer", "step", 0, MAX_COUNT)
    hyper = {key: reader.number("/optimizer", key) for key in reader.attr_names("/optimizer")}
    first = read_parameters(reader, "/optimizer/first_moment", spec)
    second = read_parameters(reader, "/optimizer/second_moment", spec)
    for key, moment in second.items():
        if moment.size and moment.min() < 0:
            raise reader.refuse(f"/optimizer/second_moment/{key}", "has negative elements")
    state = reader.array("/resume/state", "float64", (Slot.SIZE,), finite=False)
    for slot, name, count in _NEEDED:
        value = float(state[slot])
        if not 0 <= value <= MAX_COUNT or (count and value != int(value)):
            raise reader.refuse("/resume/state", f"element {slot} ({name}) is {value}")
    if state[Slot.STEP] != step:
        raise reader.refuse("/optimizer", f"attribute 'step' is {step}, /resume/state has {state[Slot.STEP]:.0f}")
    has_bad_steps, averages = (name in reader.attr_names("/resume") for name in ("bad_steps", "average_epochs"))
    return ResumeState(
        parameters={},
        first_moment=first,
        second_moment=second,
        best_parameters=read_parameters(reader, "/best", spec),
        optimizer=kind,
        hyper=hyper,
        state=state,
        stale_epochs=reader.integer("/resume", "stale_epochs", 0, MAX_EPOCH),
        epoch_seconds=reader.number("/resume", "epoch_seconds"),
        bad_steps=reader.integer("/resume", "bad_steps", 1, MAX_COUNT) if has_bad_steps else 0,
        average=read_parameters(reader, "/average", spec) if averages else {},
        average_epochs=reader.integer("/resume", "average_epochs", 1, MAX_EPOCH) if averages else 0,
    )

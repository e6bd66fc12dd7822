"""What a file holds, in a few values: a checkpoint's model and training, or a data file's datasets and their use."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from itertools import groupby
from typing import Any

from nicecp.checkpoint import load_run
from nicecp.data import DEMO, Splits, open_splits, split_spec
from nicecp.errors import DataError
from nicecp.extras import weights_line
from nicecp.flow import NICE
from nicecp.machine import open_backend
from nicecp.registry import MLP
from nicecp.scoring import describe_rows
from nicecp.sources import Source
from nicecp.spec import ModelSpec
from nicecp.store import is_checkpoint

StrPath = str | os.PathLike[str]


def sizes_text(hidden: tuple[int, ...]) -> str:
    """(1000, 1000, 1000) -> '3x1000'; (64, 32) -> '64-32'."""
    runs = [(size, len(list(same))) for size, same in groupby(hidden)]
    return "-".join(f"{count}x{size}" if count > 1 else str(size) for size, count in runs) or "no hidden layer"


def model_line(spec: ModelSpec) -> str:
    """An architecture in one line."""
    each = _couplings_line(spec)
    if spec.partition != "odd-even":
        each += f", parts by {spec.partition}"
    changes = sum(coupling.order is not None for coupling in spec.couplings)
    if changes:
        each += f", other parts {changes} time{'s' * (changes > 1)}"
    given = f" given {spec.n_context}" if spec.n_context else ""
    return (
        f"{spec.n_features} features{given}, {len(spec.couplings)} couplings, {each}, {spec.prior} prior, "
        f"{spec.dtype}, {spec.n_parameters:,} parameters"
    )


def _couplings_line(spec: ModelSpec) -> str:
    """'affine with hidden 2x64, additive with hidden 64 in turn'; '2 additive with hidden 3x8, then 4 additive ...'."""
    kinds = [
        f"{c.law} with {'' if c.network == MLP else c.network + ' '}hidden {sizes_text(c.hidden)}"
        for c in spec.couplings
    ]
    n = len(kinds)
    turns = next(p for p in range(1, n + 1) if all(kinds[k] == kinds[k % p] for k in range(n)))
    if turns <= (n + 1) // 2:
        return ", ".join(kinds[:turns]) + " in turn" * (turns > 1)
    runs = [(kind, len(list(same))) for kind, same in groupby(kinds)]
    return ", then ".join(f"{count} {kind}" for kind, count in runs)


def source_line(source: Source) -> str:
    """A data source in one line."""
    shape = source.info.image_shape
    kind = "8-bit values" if source.is_image8 else str(source.dtype)
    columns = "x".join(str(size) for size in shape) if shape is not None else f"{source.n_features} columns"
    return f"{source.name}, {source.n_rows:,} rows of {columns}, {kind}"


def splits_line(splits: Splits) -> str:
    """How many rows train, validate and test, and by which rule, in one line."""
    train, valid, test = splits.train, splits.valid, splits.test
    parts = [f"{len(train):,} rows to train on"]
    if valid is None:
        parts.append("none to validate on")
    elif valid.source is not train.source:
        parts.append(f"{len(valid):,} to validate on ({_dataset(valid.source)})")
    else:
        rule = "the last ones" if valid.fraction is None else f"drawn by seed {valid.seed}"
        rule += ", by weight" * (train.source.weight is not None)
        parts.append(f"{len(valid):,} to validate on ({rule})")
    parts.append("none to test on" if test is None else f"{len(test):,} to test on ({_dataset(test.source)})")
    weighted = weights_line(train)
    return ", ".join(parts) + ("" if not weighted else f"; {weighted} to train on")


def _dataset(source: Source) -> str:
    """'/test' of 'file.h5:/test'."""
    return "/" + source.name.rpartition(":/")[2]


def plain(value: float | None) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def describe(path: str, history: int = 5) -> dict[str, Any]:
    """A checkpoint (kind "checkpoint") or data (kind "data") as values that JSON has, with the last epochs."""
    if is_checkpoint(path):
        return describe_checkpoint(path, history)
    return describe_data(path)


def describe_checkpoint(path: StrPath, history: int = 5) -> dict[str, Any]:
    """CheckpointError for a file that is none."""
    flow, record = load_run(path, backend=open_backend("cpu", 1))
    found: dict[str, Any] = {"kind": "checkpoint", "file": os.fspath(path), "model": _model(flow), "training": None}
    if record is not None:
        rows = [
            {name: plain(value) for name, value in asdict(row).items()}
            for row in record.history[len(record.history) - min(history, len(record.history)) :]
        ]
        for row in rows:
            row["epoch"] = int(row["epoch"] or 0)
        found["training"] = {
            "epochs": record.epoch,
            "best_epoch": record.best_epoch,
            "best_valid_log_likelihood": plain(record.best_valid_log_likelihood),
            "best_average": record.best_average,
            "seconds": plain(sum(row.seconds for row in record.history)),
            "seed": record.seed,
            "threads": record.threads,
            "versions": record.versions,
            "config": record.config,
            "events": [asdict(event) for event in record.events],
            "history": rows,
        }
    return found


def _model(flow: NICE) -> dict[str, Any]:
    spec, info = flow.spec, flow.info
    return {
        "line": model_line(spec),
        "n_features": spec.n_features,
        "couplings": [{**asdict(coupling), "hidden": list(coupling.hidden)} for coupling in spec.couplings],
        "partition": spec.partition,
        "order": None if spec.order is None else list(spec.order),
        "prior": spec.prior,
        "dtype": spec.dtype,
        "n_parameters": spec.n_parameters,
        "preprocessing": [{"kind": step.kind, **step.attrs()} for step in flow.preprocessing],
        "image_shape": None if info.image_shape is None else list(info.image_shape),
        "columns": None if info.columns is None else list(info.columns),
        "context": _context(flow),
        "units": None if info.units is None else list(info.units),
        "fingerprint": info.fingerprint,
    }


def _context(flow: NICE) -> dict[str, Any] | None:
    context = flow.context
    if context is None:
        return None
    names = None if context.names is None else list(context.names)
    return {"n": len(context), "names": names, "mean": context.mean.tolist(), "std": context.std.tolist()}


def describe_data(spec: str) -> dict[str, Any]:
    """Datasets of a file, and which of them `nicecp train` would use, or why none. DataError if it is no HDF5."""
    found: dict[str, Any] = {"kind": "data", "file": spec, "datasets": [], "problem": None, "use": None}
    if spec != DEMO:
        found["datasets"] = _datasets(split_spec(spec)[0])
    try:
        with open_splits(spec) as splits:
            named = {"train": splits.train, "valid": splits.valid, "test": splits.test}
            found["use"] = {
                name: None if split is None else {**split.describe(), "line": describe_rows(split)}
                for name, split in named.items()
            }
            source = splits.train.source
            found["line"] = source_line(source)
            found["n_features"] = source.n_features
            found["eight_bit"] = source.is_image8
            found["columns"] = None if source.info.columns is None else list(source.info.columns)
            found["image_shape"] = None if source.info.image_shape is None else list(source.info.image_shape)
    except DataError as error:
        if not found["datasets"]:
            raise
        found["problem"] = str(error)
    return found


def _datasets(path: str) -> list[dict[str, str]]:
    from nicecp.hdf5_data import search
    from nicecp.hdf5_open import damage_reported, open_hdf5

    with open_hdf5(path) as file, damage_reported(path):
        return [{"path": entry.path, "content": entry.label, "problem": entry.problem} for entry in search(file, "/")]

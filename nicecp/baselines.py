"""What a flow's log-likelihood is to be compared with: simpler models fitted to the same rows, and the paper's numbers.

All are in nats per row in the space of the data, on the same rows with the same dequantization noise.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import has_weights
from nicecp.checkpoint import load_run
from nicecp.data import open_source, open_splits
from nicecp.errors import CheckpointError, DataError, about_file
from nicecp.evaluate import evaluate
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose, Slot
from nicecp.loading import Loader
from nicecp.machine import open_backend
from nicecp.preprocessing import Dequantize, Standardize, Step
from nicecp.preset_table import PRESETS
from nicecp.records import RunRecord
from nicecp.scoring import as_recorded, choose_rows, recorded_settings
from nicecp.spec import ModelSpec, alternating
from nicecp.split import SequentialReader, Split
from nicecp.whitening import fit_gaussian

FloatArray = NDArray[np.float64]

# Test log-likelihoods, nats. Source: Dinh et al. 2015, table 3; Deep MFA and GRBM are of Tang et al. 2012, whose
# whitening differs in one point, as the authors note.
PUBLISHED: dict[str, dict[str, float]] = {
    "mnist": {"NICE": 1980.50},
    "tfd": {"NICE": 5514.71, "Deep MFA": 5250.0, "GRBM": 2413.0},
    "svhn": {"NICE": 11496.55},
    "cifar10": {"NICE": 5371.78, "Deep MFA": 3622.0, "GRBM": 2365.0},
}
FACTORS = 50
COMPONENTS = 10
MAX_ROWS = 10_000  # that scikit-learn is given: it holds them in float64
_BATCH = 1000


@dataclass(frozen=True)
class Baseline:
    """A model's mean log-likelihood and standard error, nats per row; or why it is not known."""

    name: str
    mean: float | None
    standard_error: float | None = None
    note: str = ""


def published(record: RunRecord | None) -> list[Baseline]:
    """The paper's numbers for the data of a run that used one of its presets, in that preset's range; else nothing."""
    settings = recorded_settings(record)
    name = "" if settings is None else settings.preset.removesuffix("-code")
    if settings is None or name not in PUBLISHED or settings.value_range != PRESETS[name].value_range:
        return []
    return [Baseline(f"{model}, paper", mean) for model, mean in PUBLISHED[name].items()]


def compare(
    checkpoint: str | os.PathLike[str],
    data: Any,
    part: str = "auto",
    seed: int | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> list[Baseline]:
    """Baselines fitted to the rows that a checkpoint's flow was trained on, scored on those that scoring.score means.

    A Gaussian with full covariance; with scikit-learn (extra ``compare``) also factor analysis with FACTORS factors and
    a mixture of COMPONENTS Gaussians with diagonal covariances, both fitted to at most MAX_ROWS rows; the published
    numbers, where the run used one of the paper's presets.

    Raises as score; DataError also where the training rows are not in the data.
    """
    flow, record = load_run(checkpoint, backend=open_backend(device, threads))
    data = as_recorded(data, record)
    if flow.context is not None or has_weights(data):
        what = "that are conditioned on a context" if flow.context is not None else "on weighted rows"
        raise CheckpointError(about_file(checkpoint, f"there are no baselines for flows {what}", "leave --compare out"))
    seed = seed if seed is not None else record.seed if record is not None else 0
    split = choose_rows(flow, record, data, part)
    try:
        train = _training_rows(flow, record, data, split)
        try:
            epoch = record.best_epoch if record is not None and split.purpose == Purpose.VALID_NOISE else 0
            found = [_gaussian(flow, train, split, seed, epoch)]
            found += _scikit_learn(flow, train, split, seed, epoch)
        finally:
            train.source.close()
    finally:
        split.source.close()
    return found + published(record)


def _training_rows(flow: NICE, record: RunRecord | None, data: Any, split: Split) -> Split:
    """The run's own training rows; without a record, the training dataset if it is not what is scored."""
    settings = recorded_settings(record)
    if settings is not None:
        try:
            splits = open_splits(data, settings.valid_fraction, settings.seed)
        except DataError:
            splits = None  # no training data in it: opening them below says what is wrong
        if splits is not None:
            if splits.train.source.fingerprint() == flow.info.fingerprint:
                for other in (splits.valid, splits.test):
                    if other is not None and other.source is not splits.train.source:
                        other.source.close()
                return splits.train
            splits.close()
    source = open_source(data, "train")
    if source.fingerprint() == split.source.fingerprint():
        source.close()
        problem = "baselines need other rows than those that are scored, and it has no others"
        raise DataError(about_file(source.name, problem, "give a file with a train and a test dataset"))
    return Split.contiguous(source, 0, source.n_rows, Purpose.TRAIN_NOISE)


def _bare(flow: NICE, steps: tuple[Step, ...]) -> NICE:
    """The identity as a flow in float64 with a standard Gaussian prior after ``steps``."""
    spec = ModelSpec(flow.n_features, alternating((), 3), "gaussian", "float64")
    zeros = {name: np.zeros(shape) for name, shape in spec.parameter_shapes().items()}
    return NICE.from_spec(spec, zeros, steps, flow.info, backend=flow.backend)


def _gaussian(flow: NICE, train: Split, split: Split, seed: int, epoch: int) -> Baseline:
    """The maximum-likelihood Gaussian, scored by the library's own evaluation: the same noise as the flow's."""
    name = "Gaussian, full covariance"
    steps = tuple(step for step in flow.preprocessing if isinstance(step, (Dequantize, Standardize)))
    try:
        with flow.backend.computing():
            whitening = fit_gaussian(train, steps)
    except DataError as error:
        return Baseline(name, None, note=str(error))
    found = evaluate(_bare(flow, (*steps, whitening)), split, seed, epoch)
    return Baseline(name, found.mean, found.standard_error)


def _scikit_learn(flow: NICE, train: Split, split: Split, seed: int, epoch: int) -> list[Baseline]:
    d = flow.n_features
    factors = min(FACTORS, d // 2)
    names = f"factor analysis, {factors} factors", f"mixture of {COMPONENTS} diagonal Gaussians"
    try:
        from sklearn.decomposition import FactorAnalysis
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ImportError:
        note = "scikit-learn is not installed; pip install 'nicecp[compare]'"
        return [Baseline(name, None, note=note) for name in names]
    rows, scored = (_values(flow, part, seed, at) for part, at in ((_head_of(train), 1), (split, epoch)))
    # In units of each column's deviation, in which scikit-learn's regularisation is small; undone in the density.
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    found = []
    models = (
        FactorAnalysis(n_components=factors, svd_method="randomized", random_state=0),
        GaussianMixture(min(COMPONENTS, len(rows)), covariance_type="diag", random_state=0),
    )
    for name, model in zip(names, models, strict=True):
        with flow.backend.computing(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit((rows - mean) / deviation)
            values = model.score_samples((scored - mean) / deviation) - np.log(deviation).sum()
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        note = f"fitted to {len(rows):,} rows" if len(rows) < len(train) else ""
        found.append(Baseline(name, float(np.mean(values)), error, note))
    return found


def _head_of(split: Split) -> Split:
    """At most about MAX_ROWS rows of a split: those in its first rows of the file."""
    if len(split) <= MAX_ROWS:
        return split
    return split.head(math.ceil(MAX_ROWS / len(split) * (split.stop - split.start)))


def _values(flow: NICE, split: Split, seed: int, epoch: int) -> FloatArray:
    """(len, d) float64 values in data space, dequantized as evaluation does it."""
    steps = tuple(step for step in flow.preprocessing if isinstance(step, Dequantize))
    bare, reader = _bare(flow, steps), SequentialReader(split, min(_BATCH, len(split)))
    backend, loader, n = flow.backend, Loader(bare, reader.batch_size), reader.batch_size
    ws, state = bare.network.workspace(n, False), backend.alloc(Slot.SIZE, np.float64)
    x = backend.alloc((n, flow.n_features), np.float64)
    out, done = np.empty((len(split), flow.n_features)), 0
    for window in reader:
        data, index, rows = (backend.asarray(a) for a in (window.data, window.index, window.rows))
        for i in range(window.n_batches):
            host = np.zeros(Slot.SIZE)
            host[Slot.EPOCH], host[Slot.CURSOR] = epoch, i
            backend.copy_in(state, host)
            loader.load(ws, data, index, rows, state, seed, split.purpose)
            backend.join(x, *ws.x, bare.network.order)
            part = out[done : done + n]
            part[...] = backend.copy_out(x)[: len(part)]
            done += len(part)
    return out

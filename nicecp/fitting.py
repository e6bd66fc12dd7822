"""From data to a trained flow: choose the preprocessing, train, keep the best."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.bounded import logit_step, spread_after
from nicecp.columns import check_representable, discrete_columns_noted
from nicecp.data import Splits, check_constant, check_finite, column_stats, open_splits
from nicecp.data_spec import DataSpec
from nicecp.evaluate import check_fits, check_width
from nicecp.extras import check_context, fit_context, weights_noted
from nicecp.flow import NICE
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Backend
from nicecp.machine import versions
from nicecp.optimizers import AdaM, Optimizer
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize, Standardize, Step
from nicecp.presented import presented
from nicecp.preset_table import RANGE
from nicecp.presets import Settings
from nicecp.records import Event, RunRecord
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import Callbacks, Trainer, as_callbacks
from nicecp.train_config import TrainConfig
from nicecp.transform_fit import fit_transforms
from nicecp.transform_spec import NONE, as_text
from nicecp.whitening import whitening_step

MAX_RANGE = 1e6  # of dequantized values: float32 networks are trained on them as they are

logger = logging.getLogger("nicecp")


def preprocessing_for(
    train: Split,
    value_range: tuple[float, float] = (0.0, 1.0),
    standardize: bool = True,
    allow_constant: bool = False,
    transform: str = NONE,
    seed: int = 0,
    events: list[Event] | None = None,
    logit: float | None = None,
) -> tuple[Step, ...]:
    """The preprocessing of a data set: dequantization of 8-bit values; transforms and standardisation of floats.

    Reads float data once (mean and standard deviation of the training rows), twice with transforms of columns
    (``transform``: see nicecp.transform_spec; ``seed``: of the noise on recorded values). What each column was given,
    and why, is logged and added to ``events``. logit : with a margin, the logit of values in ``value_range`` comes
    before the standardisation (nicecp.bounded).

    Raises
    ------
    DataError
        A value is not finite, outside a transform's support or beyond the logit's range, or a float column is constant
        (its likelihood is unbounded) and not allowed to be.
    ValueError
        The value range is not one, or is beyond +-MAX_RANGE; a margin that will not do.
    """
    if train.source.is_image8:
        if max(abs(value) for value in value_range) > MAX_RANGE:
            raise ValueError(f"the range must lie within -{MAX_RANGE:g} and {MAX_RANGE:g}, got {value_range}")
        if transform != NONE:
            raise ValueError("transforms of columns are for floats, and these are 8-bit data: leave them out")
        if not standardize:
            raise ValueError("8-bit data are not standardised: leave standardize out")
        first = Dequantize(*value_range)
        return (first,) if logit is None else (first, logit_step(train, None, value_range, logit))
    if transform != NONE and logit is not None:
        raise ValueError("a logit of all columns and transforms of single ones exclude each other: leave one out")
    if tuple(value_range) != RANGE and logit is None:
        raise ValueError("a value range is for 8-bit data, or for floats with a logit: leave value_range out")
    stats = column_stats(train)
    check_constant(stats, train, allow_constant)
    steps: tuple[Step, ...] = ()
    mean, std = stats.mean, stats.std
    if transform != NONE:
        steps = _transforms(train, transform, [] if events is None else events)
        stats = column_stats(presented(train, steps, seed)) if steps else stats
        mean, std = stats.mean, stats.std
    elif logit is not None:
        steps = (logit_step(train, stats, value_range, logit),)
        mean, std = spread_after(train, steps)
    if not standardize:
        return steps
    return (*steps, Standardize(mean, np.where(stats.low == stats.high, 1.0, std)))


def preprocessing_of(settings: Settings, train: Split, events: list[Event]) -> tuple[Step, ...]:
    """preprocessing_for, of a run's settings."""
    choices = (settings.value_range, settings.standardize, settings.allow_constant, settings.transform, settings.seed)
    return preprocessing_for(train, *choices, events, settings.logit)


def _transforms(train: Split, transform: str, events: list[Event]) -> tuple[Step, ...]:
    fitted = fit_transforms(train, transform)
    for line in fitted.lines:
        logger.info("column %s", line)
        events.append(Event(0, 0, "transform", line))
    for note in fitted.notes:
        message = f"{train.source.name!r}: {note}"
        logger.warning("%s", message)
        events.append(Event(0, 0, "columns", message))
    return fitted.steps


def prepared(settings: Settings, splits: Splits, backend: Backend) -> tuple[tuple[Step, ...], list[Event]]:
    """The preprocessing that settings ask for, fitted to the training rows; what is worth knowing of their columns.

    All rows are looked through. Raises DataError, as preprocessing_for, check_finite and check_representable do.
    """
    train, events = splits.train, discrete_columns_noted(splits.train)
    steps = preprocessing_of(settings, train, events)
    check_finite(splits)
    steps += whitening_step(
        settings.whiten, train, steps, splits.valid, settings.regularization, settings.seed, backend
    )
    check_representable(splits, steps, settings.dtype, settings.seed)
    return steps, events


def fit_preprocessing(
    data: Any,
    transform: str | Mapping[Any, str] = "auto",
    *,
    columns: Sequence[str] | None = None,
    sample_weight: Any = None,
    standardize: bool = True,
    whiten: str = "none",
    regularization: float = 0.0,
    allow_constant: bool = False,
    seed: int = 0,
) -> tuple[tuple[Step, ...], list[str]]:
    """Column transforms, standardisation and whitening fitted to all rows of a table, for ``NICE(preprocessing=)``.

    It is what ``fit`` does with its training rows; a flow that is given these steps keeps them in every fit.

    data, transform, sample_weight, whiten : as for ``fit``; 8-bit integers are not for this
    columns : names for those of an array

    -> the steps, and a line for each column (and for what is worth knowing): what it was given, and why

    Raises DataError, ValueError and TypeError as ``fit`` does.
    """
    spec: Any = data if columns is None else ArraySource(data, columns=columns)
    if sample_weight is not None:
        spec = DataSpec(spec, None, sample_weight)
    with open_splits(spec, 0.0) as splits:
        train, text = splits.train, as_text(transform)
        if train.source.is_image8:
            raise TypeError("fit_preprocessing is for tables of floats: pass x.astype(float) if these are numbers")
        events = discrete_columns_noted(train)
        steps = preprocessing_for(train, (0.0, 1.0), standardize, allow_constant, text, seed, events)
        steps += whitening_step(whiten, train, steps, splits.valid, regularization, seed, get_backend("cpu"))
    return steps, [event.message for event in events]


def fit(
    flow: NICE,
    data: str | os.PathLike[str] | NDArray[Any],
    *,
    epochs: int = 100,
    batch_size: int = 200,
    optimizer: Optimizer | None = None,
    patience: int | None = 20,
    valid_fraction: float = 1 / 6,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    standardize: bool = True,
    allow_constant: bool = False,
    transform: str | Mapping[Any, str] = NONE,
    logit: float | None = None,
    whiten: str = "none",
    regularization: float = 0.0,
    activations: str = "store",
    schedule: str = "constant",
    weight_decay: float = 0.0,
    weight_average: str = "none",
    context: Any = None,
    sample_weight: Any = None,
    callbacks: Callbacks = (),
    communicator: Communicator = ALONE,
) -> RunRecord:
    """Train a flow on an array or an HDF5 file, in place; it then holds the parameters with the best validation.

    Parameters
    ----------
    flow : NICE
    data : (n, d) array or pandas table, or a path "FILE.h5" or "FILE.h5:/dataset"
        uint8 is dequantized into ``value_range``, floats are standardised; a flow that has preprocessing keeps its own,
        and takes on no other (fit_preprocessing makes it beforehand).
        A file's dataset ``valid`` validates; without one ``valid_fraction`` of the rows does: the last ones of images,
        keyed random ones of tables.
    transform : str or mapping
        Transforms of single float columns before standardisation: "auto", "quantile", or for each column
        {"mass": "log", "phi": "angle", "*": "quantile"}, also written "mass=log,phi=angle,*=quantile"
        (docs/tables.md). record.events say what each column was given, and why.
    logit : float, optional
        A margin: values between the ends of ``value_range`` go through a logit (nicecp.preprocessing.Logit) first.
    whiten, regularization : see nicecp.whitening
        "zca", "gaussian" or "approximate" adds a whitening, fitted to the training rows.
    context : (n, k) array, or text; see nicecp.data_spec.DataSpec
        What the density of each row is conditioned on, for a flow with n_context = k: 'a,b' takes columns of the data,
        'FILE.h5:/NAME' a dataset. It is standardised by its own mean and standard deviation.
    sample_weight : (n,) array, or text
        Weights of rows, finite and not negative; their scale does not matter, and rows of weight 0 are ignored. The
        loss and all means are weighted, and the rows that validate hold ``valid_fraction`` of the weight.
    optimizer : AdaM or RMSProp
        The paper's AdaM by default.
    schedule : "constant" or "cosine"; weight_decay : float
        Of the learning rate over the epochs, and of the networks' weights (nicecp.decay).
    weight_average : "none", "tail:EPOCHS" or "ema:DECAY"
        Parameters averaged over the last epochs, or with a decay per epoch (nicecp.averaging), are validated beside
        those of every epoch, and the better ones kept.
    activations : "store", "halves" or "recompute"
        What a step keeps for its backward pass (nicecp.network.ACTIVATIONS): memory against a third more work.
    patience : int or None
        Epochs without a better validation log-likelihood before training stops.
    callbacks : Callback objects, or functions called with each EpochRecord; or a single one of these.
    communicator : nicecp.parallel.Communicator
        Of ranks that train together, such as nicecp.parallel.Mpi(MPI.COMM_WORLD): all make the same call with the same
        data and flow, each works on a part of every batch, and all end with the same flow.

    Returns
    -------
    RunRecord
        history (mean log-likelihoods in nats per row, in the data's space), best epoch. ``flow.save`` writes the flow
        alone; to keep the record with it: ``nicecp.checkpoint.save_run("flow.h5", flow, flow.parameters(), record)``.

    Raises
    ------
    DataError
        The data cannot be used; the message says why and what to do.
    TrainingError
        The loss is not finite again and again (nicecp.recovery).
    TypeError, ValueError
        An argument will not do; nothing has been changed then.
    """
    if not isinstance(flow, NICE):
        raise TypeError(f"flow must be a NICE, got {reprlib.repr(flow)}")
    called, transform = as_callbacks(callbacks), as_text(transform)
    config = TrainConfig(
        epochs,
        batch_size,
        optimizer or AdaM(),
        patience,
        seed,
        activations=activations,
        schedule=schedule,
        weight_decay=weight_decay,
        weight_average=weight_average,
    )
    spec: Any = data
    if context is not None or sample_weight is not None:
        spec = DataSpec(data, context, sample_weight)
    with open_splits(spec, valid_fraction=valid_fraction, seed=seed) as splits:
        train = splits.train
        check_width(flow, train)
        steps, events = flow.preprocessing, discrete_columns_noted(train)
        check_context(flow, train.source)
        if steps:
            check_fits(flow, train)
            if transform != NONE or whiten != "none" or logit is not None:
                logger.warning("the flow has preprocessing, which it keeps: transform, whiten and logit have no effect")
        else:
            given = (value_range, standardize, allow_constant, transform, seed, events, logit)
            steps = preprocessing_for(train, *given)
            steps += whitening_step(whiten, train, steps, splits.valid, regularization, seed, flow.backend)
        check_finite(splits)
        check_representable(splits, steps, flow.dtype, seed)
        scale = fit_context(train) if flow.context is None or flow.context.fresh else None
        flow.prepare(steps, train.source.info, train.source.is_image8, scale)
        config = replace(config, batch_size=min(batch_size, max(1, len(train))))
        trainer = Trainer(flow, train, splits.valid, config, called, communicator)
        trainer.record.versions = versions(flow.backend)
        trainer.record.threads = int(getattr(flow.backend, "threads", 1))
        trainer.record.events += events + weights_noted(train, flow.n_parameters)
        return trainer.run()

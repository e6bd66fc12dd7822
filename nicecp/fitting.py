"""From data to a trained flow: choose the preprocessing, train, keep the best."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.bounded import logit_step, spread_after
from nicecp.columns import check_representable, discrete_columns_noted
from nicecp.data import Splits, check_constant, check_finite, column_stats, open_splits
from nicecp.evaluate import check_fits, check_width
from nicecp.flow import NICE
from nicecp.kernels.backend import Backend
from nicecp.machine import versions
from nicecp.optimizers import AdaM, Optimizer
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize, Standardize, Step
from nicecp.presets import Settings
from nicecp.records import RunRecord
from nicecp.split import Split
from nicecp.train import Callbacks, TrainConfig, Trainer, as_callbacks
from nicecp.whitening import whitening_step

MAX_RANGE = 1e6  # of dequantized values: float32 networks are trained on them as they are

logger = logging.getLogger("nicecp")


def preprocessing_for(
    train: Split,
    value_range: tuple[float, float] = (0.0, 1.0),
    standardize: bool = True,
    allow_constant: bool = False,
    logit: float | None = None,
) -> tuple[Step, ...]:
    """The preprocessing of a data set: dequantization of 8-bit values, standardisation of floats.

    logit : with a margin, the logit of values in ``value_range`` comes before the standardisation (nicecp.bounded)

    Reads float data once (mean and standard deviation of the training rows), with a logit three times.

    Raises
    ------
    DataError
        A value is not finite, or a float column is constant (its likelihood is unbounded) and not allowed to be, or
        goes beyond the range of the logit.
    ValueError
        The value range is not one, or is beyond +-MAX_RANGE; a margin that will not do.
    """
    if train.source.is_image8:
        if max(abs(value) for value in value_range) > MAX_RANGE:
            raise ValueError(f"the range must lie within -{MAX_RANGE:g} and {MAX_RANGE:g}, got {value_range}")
        first = Dequantize(*value_range)
        return (first,) if logit is None else (first, logit_step(train, None, value_range, logit))
    stats = column_stats(train)
    check_constant(stats, train, allow_constant)
    steps: tuple[Step, ...] = () if logit is None else (logit_step(train, stats, value_range, logit),)
    if not standardize:
        return steps
    mean, std = spread_after(train, steps) if steps else (stats.mean, stats.std)
    return (*steps, Standardize(mean, np.where(stats.low == stats.high, 1.0, std)))


def prepared(settings: Settings, splits: Splits, backend: Backend) -> tuple[Step, ...]:
    """The preprocessing that settings ask for, fitted to the training rows, and all rows looked through.

    Raises DataError, as preprocessing_for, check_finite and check_representable do.
    """
    train = splits.train
    steps = preprocessing_for(train, *settings.preprocessing)
    check_finite(splits)
    steps += whitening_step(
        settings.whiten, train, steps, splits.valid, settings.regularization, settings.seed, backend
    )
    check_representable(splits, steps, settings.dtype)
    return steps


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
    logit: float | None = None,
    whiten: str = "none",
    regularization: float = 0.0,
    activations: str = "store",
    callbacks: Callbacks = (),
    communicator: Communicator = ALONE,
) -> RunRecord:
    """Train a flow on an array or an HDF5 file, in place; it then holds the parameters with the best validation.

    Parameters
    ----------
    flow : NICE
    data : (n, d) array, or a path "FILE.h5" or "FILE.h5:/dataset"
        uint8 is dequantized into ``value_range``, floats are standardised; a flow that has preprocessing keeps its own.
        A file's dataset ``valid`` validates; without one ``valid_fraction`` of the rows does: the last ones of images,
        keyed random ones of tables.
    logit : float, optional
        A margin: values between the ends of ``value_range`` go through a logit (nicecp.preprocessing.Logit) first.
    whiten, regularization : see nicecp.whitening
        "zca", "gaussian" or "approximate" adds a whitening, fitted to the training rows.
    optimizer : AdaM or RMSProp
        The paper's AdaM by default.
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
        raise TypeError(f"flow must be a NICE, got {flow!r}")
    called = as_callbacks(callbacks)
    config = TrainConfig(epochs, batch_size, optimizer or AdaM(), patience, seed, activations=activations)
    with open_splits(data, valid_fraction=valid_fraction, seed=seed) as splits:
        train = splits.train
        check_width(flow, train)
        steps = flow.preprocessing
        if steps:
            check_fits(flow, train)
        else:
            steps = preprocessing_for(train, value_range, standardize, allow_constant, logit)
            steps += whitening_step(whiten, train, steps, splits.valid, regularization, seed, flow.backend)
        check_finite(splits)
        check_representable(splits, steps, flow.dtype)
        flow.prepare(steps, train.source.info, train.source.is_image8)
        config = replace(config, batch_size=min(batch_size, max(1, len(train))))
        trainer = Trainer(flow, train, splits.valid, config, called, communicator)
        trainer.record.versions = versions()
        trainer.record.threads = int(getattr(flow.backend, "threads", 1))
        trainer.record.events += discrete_columns_noted(train)
        return trainer.run()

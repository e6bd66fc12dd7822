"""What a training step costs: numbers of operations and bytes from the architecture, seconds from a few timed steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from nicecp.averaging import NONE
from nicecp.beside import n_context_of
from nicecp.data import Splits
from nicecp.evaluate import BATCH
from nicecp.feed import streamed_batches
from nicecp.kernels.cuda_pinned import STAGED
from nicecp.presets import Settings
from nicecp.reconstruction import workspace_bytes
from nicecp.registry import MLP
from nicecp.spec import ModelSpec
from nicecp.split import Split
from nicecp.train import Trainer


@dataclass(frozen=True)
class Cost:
    """flops: of one training step (multiplications and additions of its matrix products). The others are bytes:
    parameters, gradients, two moments, the best model and, where they are averaged, that; buffers of a step and of
    validation; data kept in memory; page-locked memory of the host, through which data stream to a GPU."""

    n_parameters: int
    flops: int
    parameter_bytes: int
    buffer_bytes: int
    data_bytes: int
    pinned_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.parameter_bytes + self.buffer_bytes + self.data_bytes + self.pinned_bytes


def flops_of(spec: ModelSpec, n: int) -> tuple[int, int]:
    """(forward, training step) for n rows: 2 n i o for each product of (n, i) and (i, o).

    A step has three products for each layer (y, dx, dw); the first layer of the first coupling needs no dx. Of a
    registered network each parameter of two dimensions or more counts as one such product: what it does is not known.
    """
    forward, first = 0, 0
    for k, coupling in enumerate(spec.couplings):
        sizes = [a * b for a, b in spec.dense_layers(k)]
        if coupling.network != MLP:
            sizes = [math.prod(shape) for name, shape in spec.own_shapes(k).items()
                     if name.startswith("network/") and len(shape) > 1]  # fmt: skip
        products = [2 * n * size for size in sizes]
        forward += sum(products)
        if k == 0 and coupling.network == MLP:  # a registered one is asked for dx all the same
            first = products[0]
    return forward, 3 * forward - first


def cost_of(
    spec: ModelSpec,
    batch_size: int,
    rows_in_memory: int = 0,
    row_bytes: int = 0,
    whitened: bool = False,
    activations: str = "store",
    averaged: bool = False,
) -> Cost:
    """The cost of training this architecture, with the buffers of loading.Loader.

    whitened : a matrix (d, d) is part of the preprocessing, in float64 and for training and scoring.
    activations : network.ACTIVATIONS; what is computed once more counts as operations. averaged : with the average of
    the parameters (nicecp.averaging).
    """
    item = 4 if spec.dtype == "float32" else 8
    d, n = spec.n_features, batch_size
    training = workspace_bytes(spec, n, True, activations)
    scoring = workspace_bytes(spec, BATCH, False)
    forward, flops = flops_of(spec, n)
    if activations != "store":
        flops += forward
    if whitened:
        flops += 2 * n * d * d
        training += (d * d + 2 * n * d) * item + 3 * 8 * d * d
        scoring += (d * d + 2 * BATCH * d) * item
    return Cost(
        n_parameters=spec.n_parameters,
        flops=flops,
        parameter_bytes=(5 + averaged) * spec.n_parameters * item,
        buffer_bytes=training + scoring,
        data_bytes=rows_in_memory * row_bytes,
    )


def pinned_bytes(settings: Settings, train: Split, device: str) -> int:
    """Page-locked memory of the host that a run on a device takes: two blocks of streamed data, and its copies'."""
    if device == "cpu":
        return 0
    row, size = train.source.n_features * train.source.dtype.itemsize, settings.batch_size
    rows, limit = len(train), settings.device_memory_limit
    batches = streamed_batches(device, rows, size, rows // size, row, rows <= settings.window, limit)
    return 2 * batches * size * (row + 8) + STAGED


def cost_of_run(settings: Settings, splits: Splits, device: str = "cpu") -> Cost:
    """The cost of a run with these settings on these rows, of which at most two shuffle windows are in memory.

    device : of a Backend. Raises ValueError where the limit on its memory does not hold two batches.
    """
    source = splits.train.source
    rows = min(len(splits.train), 2 * settings.window)
    if splits.valid is not None:
        rows += min(len(splits.valid), 2**16)
    row_bytes = source.n_features * source.dtype.itemsize
    spec = settings.model_spec(source.n_features, n_context_of(source))
    matrix = settings.whiten != "none" or (settings.logit is not None and not source.is_image8 and settings.standardize)
    cost = cost_of(
        spec, settings.batch_size, rows, row_bytes, matrix, settings.activations, settings.weight_average != NONE
    )
    kept = 2 * source.n_rows * 8 * (spec.n_context + (source.weight is not None))  # here and on the device
    return replace(cost, data_bytes=cost.data_bytes + kept, pinned_bytes=pinned_bytes(settings, splits.train, device))


@dataclass(frozen=True)
class Timing:
    """Seconds of one step and of one epoch with its validation."""

    step: float
    epoch: float


def time_steps(trainer: Trainer, seconds: float = 1.0, most: int = 20) -> Timing:
    """Run training steps for about ``seconds`` (the first, which may compile, is not counted) and take their median.

    Several ranks, which must make the same number of steps, make a few.
    The trainer's flow changes: this is for a run that is not going to be trained.
    """
    times: list[float] = []
    most = most if trainer.communicator.size == 1 else 3
    with trainer.backend.computing(), np.errstate(over="ignore", invalid="ignore"):
        trainer.step()
        trainer.backend.synchronize()
        begin = time.perf_counter()
        while len(times) < 3 or (len(times) < most and time.perf_counter() - begin < seconds):
            before = time.perf_counter()
            trainer.step()
            trainer.backend.synchronize()
            times.append(time.perf_counter() - before)
    trainer.reader.close()
    step = sorted(times)[len(times) // 2]
    forward, whole = flops_of(trainer.flow.spec, trainer.config.batch_size)
    valid_rows = len(trainer.valid_split) if trainer.valid_split is not None else 0
    valid = step * forward / max(1, whole) * valid_rows / trainer.config.batch_size
    return Timing(step, step * trainer.reader.n_batches + valid)

"""Whitening fitted to training rows: ZCA, the Gaussian of greatest likelihood, and the same Gaussian learned.

Each is an affine bijection with an exact log-determinant (nicecp.preprocessing.Zca, Triangular). Covariances are those
of dequantized values: 8-bit values k stand for low + w (k + u) / 256, whose noise adds (w / 256)^2 / 12 to every
variance exactly, so that no covariance of images is singular.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nicecp.bounded import moments_after
from nicecp.data import column_stats
from nicecp.errors import DataError, about_file
from nicecp.kernels.backend import OPTIMIZERS, Array, Backend, Purpose, Slot
from nicecp.loading import loading
from nicecp.optimizers import RMSProp
from nicecp.preprocessing import Dequantize, Step, Triangular, Zca
from nicecp.presented import device_part, host_part, presented
from nicecp.split import EpochReader, SequentialReader, Split

logger = logging.getLogger("nicecp")
FloatArray = NDArray[np.float64]

KINDS = ("none", "zca", "gaussian", "approximate")
_BLOCK_ELEMENTS = 2**22  # of rows that are turned into float64 at a time
_SLOW = 1000  # features: a step takes some 20 ms
_SINGULAR = 1e-13  # of the largest eigenvalue, times d: what is smaller is rounding


def whitening_step(
    kind: str,
    train: Split,
    steps: tuple[Step, ...],
    valid: Split | None,
    regularization: float,
    seed: int,
    backend: Backend,
) -> tuple[Step, ...]:
    """The step of a kind ("none": no step), fitted to training rows after ``steps``.

    Raises ValueError for an unknown kind or a regularization that does not apply, DataError as fit_zca.
    """
    if kind not in KINDS:
        raise ValueError(f"whiten must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= regularization < math.inf:
        raise ValueError(f"regularization must be at least 0 and finite, got {regularization}")
    if regularization and kind not in ("zca", "gaussian"):
        raise ValueError(f"regularization is for whitening by zca or gaussian, got {regularization} with {kind!r}")
    if kind == "none":
        return ()
    host, steps = host_part(steps), device_part(steps)
    train = presented(train, host, seed)
    valid = None if valid is None else presented(valid, host, seed)
    with backend.computing():
        if kind == "zca":
            return (fit_zca(train, steps, regularization),)
        if kind == "gaussian":
            return (fit_gaussian(train, steps, regularization),)
        if not all(step.affine for step in steps):
            raise ValueError("whiten must be zca or gaussian behind a logit, whose closed form approximate would learn")
        return (fit_approximate(train, steps, valid, backend=backend, seed=seed).step,)


def moments(split: Split, steps: tuple[Step, ...] = ()) -> tuple[FloatArray, FloatArray]:
    """Mean (d,) and covariance (d, d, divided by the number of rows) of a split's rows after ``steps``, float64.

    Two passes in blocks. Without a logit the dequantization noise is accounted for exactly, with one it is drawn.
    Raises DataError as column_stats, ValueError for steps that mix features.
    """
    if not all(step.affine for step in steps):
        return moments_after(split, steps)
    shift, scale, matrix = loading(steps, split.source.n_features)
    if matrix is not None:
        raise ValueError("moments are those of data without whitening")
    d, stats = split.source.n_features, column_stats(split)
    eight_bit = bool(steps) and isinstance(steps[0], Dequantize)
    total = np.zeros((d, d))
    step = max(1, _BLOCK_ELEMENTS // (1024 * d))
    for first in range(0, split.n_blocks, step):
        block = split.load_blocks(np.arange(first, min(first + step, split.n_blocks)))[0].astype(np.float64)
        block -= stats.mean
        total += block.T @ block
    total /= stats.count
    if not eight_bit:
        return (stats.mean - shift) * scale, total * np.outer(scale, scale)
    bin_width = scale / 256
    mean = shift + bin_width * (stats.mean + 0.5)
    covariance = total * np.outer(bin_width, bin_width)
    covariance[np.diag_indices(d)] += bin_width**2 / 12
    return mean, covariance


def fit_zca(train: Split, steps: tuple[Step, ...] = (), regularization: float = 0.0) -> Zca:
    """ZCA whitening of rows after ``steps``; ``regularization`` is added to every eigenvalue of their covariance.

    The eigen-decomposition is in float64. 50,000 rows of 3072 bytes take 17 s on one AVX-512 core (a run uses one BLAS
    thread here, so that the result does not depend on their number) and 0.44 GB beside the data: five arrays (d, d).

    Raises DataError where the covariance is singular, also with the regularization.
    """
    mean, covariance = moments(train, steps)
    values, vectors = np.linalg.eigh(covariance)
    smallest = float(values[0]) + regularization
    if not smallest > _SINGULAR * len(values) * float(values[-1]):
        raise _singular(train)
    return Zca(mean, np.maximum(values, 0.0), vectors, regularization)


def fit_gaussian(train: Split, steps: tuple[Step, ...] = (), regularization: float = 0.0) -> Triangular:
    """z = L (x - mean) with L = C^-1, C C^T the covariance: no affine map gives the rows a greater likelihood under a
    standard Gaussian. The closed form of fit_approximate; raises as fit_zca."""
    from scipy.linalg import solve_triangular

    mean, covariance = moments(train, steps)
    d = len(mean)
    largest = float(np.diagonal(covariance).max())
    covariance[np.diag_indices(d)] += regularization
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        raise _singular(train) from None
    if not float(np.diagonal(factor).min()) ** 2 > _SINGULAR * d * largest:
        raise _singular(train)
    lower = np.tril(solve_triangular(factor, np.eye(d), lower=True))
    return Triangular(lower, -lower @ mean)


def _singular(train: Split) -> DataError:
    problem = f"the covariance of the {len(train):,} training rows is singular: some columns follow from others"
    remedy = "leave such columns out, give more rows, or add --regularization (regularization=)"
    return DataError(about_file(train.source.name, problem, remedy))


# --- learned ----------------------------------------------------------------------------------------------------------


@dataclass
class Approximate:
    """A learned whitening, and its mean log-likelihood (nats, in the space before it) after each epoch on the rows that
    decide when to stop."""

    step: Triangular
    history: list[float] = field(default_factory=list)
    best_epoch: int = 0


# The rate falls from 3e-3 to 1e-5; the momentum is that of the published code's later epochs.
WHITENING_RMSPROP = RMSProp(rate=3e-3, average=0.95, floor=1e-4, momentum_epoch=0, rate_decay=1.001, rate_floor=1e-5)


def fit_approximate(
    train: Split,
    steps: tuple[Step, ...] = (),
    valid: Split | None = None,
    *,
    backend: Backend,
    optimizer: RMSProp = WHITENING_RMSPROP,
    batch_size: int = 128,
    epochs: int = 500,
    patience: int = 20,
    seed: int = 0,
) -> Approximate:
    """Approximate whitening: z = L x + b learned by maximum likelihood under a standard Gaussian prior.

    RMSProp with momentum on batches with fresh noise, stopped ``patience`` epochs after the best validation likelihood
    (the training rows where there are none), whose L and b are kept. It starts at standardisation, and L's columns are
    learned in units of each feature's standard deviation, so that one rate suits all.
    With a gradient of g = dz x^T, dz = -z, and 1 / L_ii on the diagonal; L stays lower triangular.
    Source: Dinh et al. 2015, appendix B.
    """
    if train.source.n_features >= _SLOW:
        logger.warning(
            "learning the whitening of %d features comes before the first epoch and takes minutes or more; "
            "gaussian whitening is its closed form",
            train.source.n_features,
        )
    learner = _Learner(train, steps, backend, optimizer, min(batch_size, len(train)), seed)
    judge = valid if valid is not None and len(valid) else train
    best, best_score = learner.parameters(), -math.inf
    result = Approximate(learner.step(*best))
    for epoch in range(1, epochs + 1):
        learner.run_epoch(epoch)
        score = learner.score(judge, epoch)
        result.history.append(score)
        logger.info("whitening, epoch %d: %.3f nats", epoch, score)
        if score > best_score:
            best, best_score, result.best_epoch = learner.parameters(), score, epoch
        elif epoch - result.best_epoch >= patience:
            break
    result.step = learner.step(*best)
    return result


class _Learner:
    """L and b in a flat buffer that the backend's RMSProp updates, d * d and d numbers, float64."""

    def __init__(
        self, train: Split, steps: tuple[Step, ...], backend: Backend, optimizer: RMSProp, batch_size: int, seed: int
    ) -> None:
        self._backend, self._optimizer, self._seed, self._n = backend, optimizer, seed, batch_size
        self._d = d = train.source.n_features
        self._before = steps
        mean, deviation = _mean_and_deviation(train, steps)
        if not deviation.all():
            raise _singular(train)
        self._mean, self._deviation = mean, deviation
        # load_batch gives (x - mean) / deviation, x being what the steps give.
        shift, scale, _ = loading(steps, d)
        eight_bit = bool(steps) and isinstance(steps[0], Dequantize)
        shift = (shift - mean) / deviation if eight_bit else shift + mean / scale
        self._shift, self._scale = backend.asarray(shift), backend.asarray(scale / deviation)
        self._order = backend.asarray(np.arange(d))
        self._reader = EpochReader(train, batch_size, seed)
        self._p, self._g, self._m, self._v = (backend.alloc(d * d + d, np.float64) for _ in range(4))
        self._p[: d * d] = np.eye(d).ravel()
        self._state = backend.alloc(Slot.SIZE, np.float64)
        self._set(optimizer.write)

    def _set(self, change: Callable[[FloatArray], object]) -> None:
        host = self._backend.copy_out(self._state)
        change(host)
        self._backend.copy_in(self._state, host)

    def _load(self, n: int, data: Array, index: Array, rows: Array, purpose: int) -> FloatArray:
        """(n, d) the batch at the state's cursor, padding as zeros."""
        d, backend = self._d, self._backend
        x0, x1 = backend.alloc((n, (d + 1) // 2), np.float64), backend.alloc((n, d // 2), np.float64)
        x, weight = backend.alloc((n, d), np.float64), backend.alloc(n, np.float64)
        scaling = self._order, self._shift, self._scale
        backend.load_batch(x0, x1, weight, data, index, rows, *scaling, self._state, self._seed, purpose)
        backend.join(x, x0, x1, self._order)
        return np.asarray(x)

    def run_epoch(self, epoch: int) -> None:
        d, n, backend = self._d, self._n, self._backend
        momentum = self._optimizer.momentum_at(epoch)
        lower, bias = self._p[: d * d].reshape(d, d), self._p[d * d :]
        diagonal = np.arange(d)
        for window in self._reader.epoch(epoch):
            self._at(epoch, 0, momentum)
            data, index, rows = (backend.asarray(a) for a in (window.data, window.index, window.rows))
            for _ in range(window.n_batches):
                x = self._load(n, data, index, rows, Purpose.TRAIN_NOISE)
                z = x @ lower.T + bias
                gradient = np.tril(z.T @ x) / n  # of -mean log-likelihood
                gradient[diagonal, diagonal] -= 1.0 / lower[diagonal, diagonal]
                self._g[: d * d] = gradient.ravel()
                self._g[d * d :] = z.mean(axis=0)
                size = d * d + d
                backend.update(
                    self._p, self._g, self._m, self._v, 0, size, self._state, OPTIMIZERS[self._optimizer.kind]
                )
                backend.advance(self._state)

    def _at(self, epoch: int, cursor: int, momentum: float) -> None:
        def change(host: FloatArray) -> None:
            host[Slot.EPOCH], host[Slot.CURSOR], host[Slot.MOMENTUM] = epoch, cursor, momentum

        self._set(change)

    def score(self, split: Split, epoch: int) -> float:
        """Mean log-likelihood in the space after the steps before whitening, nats per row."""
        lower, bias = self.parameters()
        reader = SequentialReader(split, min(1000, len(split)))
        total, momentum = 0.0, self._optimizer.momentum_at(epoch)
        for window in reader:
            data, index, rows = (self._backend.asarray(a) for a in (window.data, window.index, window.rows))
            for i in range(window.n_batches):
                self._at(epoch, i, momentum)
                x = self._load(reader.batch_size, data, index, rows, split.purpose)
                seen = window.index[i * reader.batch_size : (i + 1) * reader.batch_size] >= 0
                z = x[seen] @ lower.T + bias
                total -= 0.5 * float(np.square(z).sum())
        log_det = float(np.log(np.abs(np.diagonal(lower))).sum() - np.log(self._deviation).sum())
        return total / len(split) + log_det - 0.5 * self._d * math.log(2 * math.pi)

    def parameters(self) -> tuple[FloatArray, FloatArray]:
        """Copies of L : (d, d) and b : (d,), of standardised values."""
        host, d = self._backend.copy_out(self._p), self._d
        return host[: d * d].reshape(d, d), host[d * d :]

    def step(self, lower: FloatArray, bias: FloatArray) -> Triangular:
        """The step that maps values before standardisation."""
        scaled = lower / self._deviation
        return Triangular(scaled, bias - scaled @ self._mean)


def _mean_and_deviation(train: Split, steps: tuple[Step, ...]) -> tuple[FloatArray, FloatArray]:
    """Of the rows after ``steps``, dequantization noise included."""
    stats, (shift, scale, _) = column_stats(train), loading(steps, train.source.n_features)
    if steps and isinstance(steps[0], Dequantize):
        width = scale / 256
        return shift + width * (stats.mean + 0.5), width * np.sqrt(stats.std**2 + 1 / 12)
    return (stats.mean - shift) * scale, stats.std * scale

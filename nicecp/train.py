"""The training loop: maximum likelihood by mini-batches, validation every epoch, the best model kept in memory."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nicecp.decay import WeightDecay, check_decay, rate_factor
from nicecp.errors import TrainingError
from nicecp.evaluate import Evaluator, check_fits, log_det
from nicecp.extras import Extras
from nicecp.feed import Fed, Feed
from nicecp.flow import NICE
from nicecp.kernels.backend import OPTIMIZERS, Array, Purpose, Slot
from nicecp.loading import Loader
from nicecp.network import ACTIVATIONS
from nicecp.optimizers import AdaM, Optimizer
from nicecp.params import Range
from nicecp.presented import mean_log_det, presented
from nicecp.reconstruction import check_reconstruction
from nicecp.records import EpochRecord, Event, ResumeState, RunRecord
from nicecp.recovery import Recovery
from nicecp.spec import whole_number
from nicecp.split import SHUFFLE_WINDOW, EpochReader, Split

logger = logging.getLogger("nicecp")

# Above this many parameters each layer is updated as soon as its gradients are ready, while they are in cache; below,
# one call for all of them costs less than one per layer.
UPDATE_BY_LAYER = 2**17


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train. patience: epochs without a better validation log-likelihood before stopping.

    device_memory_limit: bytes of a GPU's memory that training data may take; more of them stream (nicecp.feed).
    activations: what is kept for the backward pass, see nicecp.network.ACTIVATIONS. schedule, weight_decay: of the
    learning rate and of the networks' weights, see nicecp.decay.
    """

    epochs: int = 100
    batch_size: int = 200
    optimizer: Optimizer = AdaM()  # noqa: RUF009 (frozen, so sharing it is safe)
    patience: int | None = None
    seed: int = 0
    window: int = SHUFFLE_WINDOW
    activations: str = "store"
    device_memory_limit: int | None = None
    schedule: str = "constant"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_decay(self.schedule, self.weight_decay)
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")
        for name in ("epochs", "batch_size", "window", "seed"):
            whole_number(getattr(self, name), name)
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(f"optimizer must be an AdaM or RMSProp object, got {self.optimizer!r}")
        if self.patience is not None:
            whole_number(self.patience, "patience")
        for name in ("epochs", "batch_size", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {self.seed}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


class Callback:
    """What can be told about a run; override what is of interest."""

    def on_step(self, trainer: Trainer) -> None:
        """After every training step. Reading numbers from the device here costs time."""

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """After every epoch and its validation."""


class _EpochFunction(Callback):
    def __init__(self, function: Callable[[EpochRecord], object]) -> None:
        self._function = function

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        self._function(record)


OneCallback = Callback | Callable[[EpochRecord], object]
Callbacks = OneCallback | Iterable[OneCallback]


def as_callbacks(callbacks: Callbacks) -> list[Callback]:
    """Callback objects of what a caller gave: one or several of them, or of functions; TypeError for anything else."""
    several = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for given in several:
        if isinstance(given, type) or not (isinstance(given, Callback) or callable(given)):
            raise TypeError(f"a callback must be a Callback object or a function of an EpochRecord, got {given!r}")
    return [c if isinstance(c, Callback) else _EpochFunction(c) for c in several]


class Trainer:
    """Trains a flow in place on the rows of a split.

    The flow's preprocessing must fit the data (NICE.prepare). callbacks: Callback objects, or functions of an
    EpochRecord, or a single one. After ``run`` the flow holds the best parameters (by validation; the last ones without
    validation).
    """

    def __init__(
        self,
        flow: NICE,
        train: Split,
        valid: Split | None,
        config: TrainConfig,
        callbacks: Callbacks = (),
    ) -> None:
        check_fits(flow, train)
        self.flow, self.config, self.train_split, self.valid_split = flow, config, train, valid
        self.callbacks = as_callbacks(callbacks)
        rows = presented(train, flow.preprocessing, config.seed)
        self.reader = EpochReader(rows, config.batch_size, config.seed, max(config.window, config.batch_size))
        self.record = RunRecord(seed=config.seed)
        self.position = 0  # batches of the running epoch already presented
        self.stale_epochs = 0
        self._stop = False
        self._epoch_seconds = 0.0
        self._skipped = 0  # steps skipped up to the end of the last epoch

        backend, network = flow.backend, flow.network
        self.backend, self.network = backend, network
        size = network.layout.size
        self.p: Array = flow.flat
        self.g, self.m, self.v, self.best = (backend.alloc(size, flow.spec.dtype) for _ in range(4))
        self.views, self._grads = network.layout.views(self.p), network.layout.views(self.g)
        self.state = backend.alloc(Slot.SIZE, np.float64)
        host = np.zeros(Slot.SIZE)
        config.optimizer.write(host)
        backend.copy_in(self.state, host)
        backend.assign(self.best, self.p)
        self._optimizer = OPTIMIZERS[config.optimizer.kind]
        self._decay: WeightDecay | None = None
        if config.weight_decay:
            decay = config.optimizer.rate * config.weight_decay
            self._decay = WeightDecay(backend, network.layout, flow.spec.dtype, self.p, decay)
        self._ws = network.workspace(config.batch_size, keep=True, activations=config.activations)
        self._loader = Loader(flow, config.batch_size)
        self._extras = Extras(flow, train.source)
        self._evaluator = Evaluator(flow, valid) if valid is not None and len(valid) else None
        self._feed = Feed(backend, self.reader, config.device_memory_limit)
        self._fed: Fed | None = None
        self._batches_left = 0
        self._steps: dict[int, Callable[[], None]] = {}  # recorded, for each slot of the feed
        self._recovery = Recovery(self)
        # Of all rows; an epoch leaves out less than a batch of them.
        self.offset = log_det(flow.preprocessing) + mean_log_det(train, flow.preprocessing, config.seed)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _update(self, part: Range) -> None:
        self.backend.update(self.p, self.g, self.m, self.v, part.offset, part.size, self.state, self._optimizer)

    def _step(self) -> None:
        """One mini-batch: load, forward, loss, backward, update. Allocates nothing, and the host reads nothing."""
        backend, ws = self.backend, self._ws
        seed, purpose = self.config.seed, Purpose.TRAIN_NOISE
        fed = self._fed
        assert fed is not None
        self._loader.load(ws, fed.data, fed.index, fed.rows, self.state, seed, purpose)
        self._extras.load(ws, fed.rows, self.state)
        self.network.forward(ws, self.views)
        backend.loss(self.state, ws.dlogp, ws.logp, ws.weight)
        by_layer = self.network.layout.size > UPDATE_BY_LAYER
        self.network.backward(ws, self.views, self._grads, want_dx=False, ready=self._update if by_layer else None)
        if not by_layer:
            self._update(Range(0, self.network.layout.size))
        backend.advance(self.state)

    def _check(self) -> None:
        """Before the first step of an epoch: can its batch be recomputed from what the flow makes of it?"""
        if self.config.activations == "recompute":
            seed, fed = self.config.seed, self._fed
            assert fed is not None
            self._loader.load(self._ws, fed.data, fed.index, fed.rows, self.state, seed, Purpose.TRAIN_NOISE)
            check_reconstruction(self.network, self._ws, self.views, self.record.epoch + 1)

    def step(self) -> None:
        """One training step on the next batch; begins and ends epochs' windows as needed, without validation."""
        if self._batches_left == 0:
            if self.position >= self.reader.n_batches:
                self.position = 0
                self.record.epoch += 1
            if self.position == 0:
                self._begin_epoch()
            self._open(next(self._feed.epoch(self.record.epoch + 1, self.position)))
        self._next_batch()

    def _next_batch(self) -> None:
        assert self._fed is not None
        self._steps[self._fed.slot]()
        if self._decay is not None:
            self._decay.after_step()
        self._batches_left -= 1
        self.position += 1

    def _open(self, fed: Fed) -> None:
        """Make these rows the ones that steps read."""
        if self._decay is not None:
            self._decay.begin(self._rate_factor(self.record.epoch + 1))
        self._set(CURSOR=0.0)
        self._fed, self._batches_left = fed, fed.n_batches
        if fed.fresh or fed.slot not in self._steps:
            self._steps[fed.slot] = self.backend.record(self._step)
        self._recovery.window_opened()

    def _set(self, **slots: float) -> None:
        host = self.backend.copy_out(self.state)
        for name, value in slots.items():
            host[getattr(Slot, name)] = value
        self.backend.copy_in(self.state, host)

    # --- epochs -----------------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Finish the running step, then leave run(). May be called from a signal handler."""
        self._stop = True

    @property
    def stopped(self) -> bool:
        """True if run() was left because of request_stop."""
        return self._stop

    @property
    def finished(self) -> bool:
        """No epochs left, or patience has run out."""
        patience = self.config.patience
        return self.record.epoch >= self.config.epochs or (patience is not None and self.stale_epochs >= patience)

    def run(self) -> RunRecord:
        """Train until finished or stopped; the flow then holds the best parameters if finished.

        Raises
        ------
        TrainingError
            The loss is not finite again and again (nicecp.recovery), or every epoch's validation; or activations
            cannot be recomputed (nicecp.reconstruction).
        """
        self._stop = False
        # An overflow shows in the loss: the step is skipped, counted and reported.
        with self.backend.computing(), np.errstate(over="ignore", invalid="ignore"):
            while not self.finished and not self._stop:
                self._run_epoch()
        if self.finished:
            self.backend.assign(self.p, self.best)
            if self.record.best_epoch == 0:
                problem = "no epoch had a finite validation log-likelihood"
                raise TrainingError(f"{problem}; lower the learning rate (--lr) or look at the data")
        return self.record

    def _begin_epoch(self) -> None:
        epoch = self.record.epoch + 1
        momentum = self.config.optimizer.momentum_at(epoch)
        self._set(EPOCH=float(epoch), MOMENTUM=momentum, LOG_PROB_SUM=0.0, WEIGHT_SUM=0.0)
        if epoch > 1 and self.config.schedule != "constant":  # as a ratio: recovery may have lowered the rate
            rate = float(self.backend.copy_out(self.state)[Slot.RATE])
            self._set(RATE=rate * self._rate_factor(epoch) / self._rate_factor(epoch - 1))
        self._epoch_seconds = 0.0

    def _rate_factor(self, epoch: int) -> float:
        return rate_factor(self.config.schedule, epoch, self.config.epochs)

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        if self.position == 0:
            self._begin_epoch()
        for count, fed in enumerate(self._feed.epoch(self.record.epoch + 1, self.position)):
            self._open(fed)
            if count == 0:
                self._check()
            while self._batches_left:
                self._next_batch()
                self._recovery.after_step(self._batches_left == 0)
                for callback in self.callbacks:
                    callback.on_step(self)
                if self._stop:
                    break
            if self._stop:
                break
        self.backend.synchronize()
        if self.position < self.reader.n_batches:
            self._epoch_seconds += time.perf_counter() - started
            return
        self._end_epoch(started)

    def _end_epoch(self, started: float) -> None:
        epoch = self.record.epoch + 1
        self._recovery.before_validation()
        state = self.backend.copy_out(self.state)
        self._note_skipped(epoch, state)
        train = math.nan  # no batch had a finite loss
        if state[Slot.WEIGHT_SUM]:
            train = float(state[Slot.LOG_PROB_SUM] / state[Slot.WEIGHT_SUM]) + self.offset
        valid = math.nan
        if self._evaluator is not None:
            valid = self._evaluator.run(self.views, self.config.seed, epoch).mean
        self.position = 0
        self.record.epoch = epoch
        best = self.record.best_valid_log_likelihood
        if self._evaluator is None or (math.isfinite(valid) and not valid <= best):  # at first best is NaN
            self.backend.assign(self.best, self.p)
            self.record.best_epoch, self.record.best_valid_log_likelihood = epoch, valid
            self.stale_epochs = 0
        else:
            self.stale_epochs += 1
        self._epoch_seconds += time.perf_counter() - started
        row = EpochRecord(epoch, train, valid, float(state[Slot.RATE]), self._epoch_seconds)
        self.record.history.append(row)
        logger.info("epoch %d: train %.3f, validation %.3f nats", epoch, train, valid)
        for callback in self.callbacks:
            callback.on_epoch(self, row)

    def _note_skipped(self, epoch: int, state: np.ndarray) -> None:
        skipped = int(state[Slot.SKIPPED]) - self._skipped
        if skipped:
            count, were = ("1 step", "was") if skipped == 1 else (f"{skipped} steps", "were")
            message = f"{count} had a loss or gradients that are not finite and {were} skipped"
            logger.warning("epoch %d: %s", epoch, message)
            self.record.events.append(Event(epoch, int(state[Slot.STEP]), "skipped", message))
        self._skipped += skipped

    # --- resuming ----------------------------------------------------------------------------------------------------

    def resume_state(self) -> ResumeState:
        """All that ``restore`` needs to go on with the same bits."""
        layout, backend = self.network.layout, self.backend
        state = backend.copy_out(self.state)
        state[Slot.CURSOR] = self.position
        optimizer = self.config.optimizer
        return ResumeState(
            parameters=layout.to_host(backend, self.p),
            first_moment=layout.to_host(backend, self.m),
            second_moment=layout.to_host(backend, self.v),
            best_parameters=layout.to_host(backend, self.best),
            optimizer=optimizer.kind,
            hyper={name: float(value) for name, value in vars(optimizer).items()},
            state=state,
            stale_epochs=self.stale_epochs,
            epoch_seconds=self._epoch_seconds,
            bad_steps=self._recovery.count(),
        )

    def restore(self, record: RunRecord, resume: ResumeState) -> None:
        """Go on where resume_state() was taken. The flow, splits and config must be those of that run."""
        layout, backend = self.network.layout, self.backend
        for flat, named in (
            (self.p, resume.parameters),
            (self.m, resume.first_moment),
            (self.v, resume.second_moment),
            (self.best, resume.best_parameters),
        ):
            layout.from_host(backend, flat, named)
        backend.copy_in(self.state, resume.state)
        self.position = int(resume.state[Slot.CURSOR])
        self.stale_epochs, self._epoch_seconds = resume.stale_epochs, resume.epoch_seconds
        self.record = record
        self._skipped = int(resume.state[Slot.SKIPPED])
        self._batches_left = 0
        self._recovery.restored(resume.bad_steps)

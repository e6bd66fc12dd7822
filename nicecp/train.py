"""The training loop: maximum likelihood by mini-batches, validation every epoch, the best model kept in memory."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable

import numpy as np

from nicecp.averaging import Average, average_kind, better
from nicecp.decay import WeightDecay, rate_factor
from nicecp.errors import TrainingError
from nicecp.evaluate import Evaluator, check_fits, log_det
from nicecp.extras import Extras
from nicecp.feed import Fed, Feed
from nicecp.flow import NICE
from nicecp.kernels.backend import OPTIMIZERS, Array, Purpose, Slot
from nicecp.loading import Loader
from nicecp.parallel import ALONE, Communicator
from nicecp.params import Range
from nicecp.presented import mean_log_det, presented
from nicecp.rank_devices import with_device_sums
from nicecp.ranks import SharedStep, own_rows
from nicecp.reconstruction import check_reconstruction
from nicecp.records import EpochRecord, Event, ResumeState, RunRecord
from nicecp.recovery import Recovery
from nicecp.split import Split
from nicecp.stream import StreamReader
from nicecp.train_config import TrainConfig

logger = logging.getLogger("nicecp")

# Above this many parameters each layer is updated as soon as its gradients are ready, while they are in cache; below,
# one call for all of them costs less than one per layer.
UPDATE_BY_LAYER = 2**17


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
    validation). communicator: of the ranks that train together, each with its own Trainer on the same data.
    """

    def __init__(
        self,
        flow: NICE,
        train: Split,
        valid: Split | None,
        config: TrainConfig,
        callbacks: Callbacks = (),
        communicator: Communicator = ALONE,
    ) -> None:
        check_fits(flow, train)
        communicator = self.communicator = with_device_sums(communicator, flow.backend)
        self.flow, self.config, self.train_split, self.valid_split = flow, config, train, valid
        self.callbacks = as_callbacks(callbacks)
        window, own = max(config.window, config.batch_size), own_rows(config.batch_size, communicator)
        rows = presented(train, flow.preprocessing, config.seed)
        self.reader = StreamReader(rows, config.batch_size, config.seed, window, own)
        self.record = RunRecord(seed=config.seed)
        self.position = 0  # batches of the running epoch already presented
        self.stale_epochs = 0
        self._stop = 0  # the number with which this process was asked to
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
        averaged = average_kind(config.weight_average)
        self._average = None if averaged is None else Average(backend, network.layout, flow.spec.dtype, averaged)
        self.workspace = network.workspace(len(own), keep=True, activations=config.activations)
        self._loader = Loader(flow, len(own))
        self._extras = Extras(flow, train.source)
        self._evaluator = None
        if valid is not None and len(valid):
            self._evaluator = Evaluator(flow, valid, communicator=communicator, read_rows=config.read_rows)
        self._feed = Feed(backend, self.reader, config.device_memory_limit)
        self._fed: Fed | None = None
        self._batches_left = 0
        self._steps: dict[int, Callable[[], None]] = {}  # recorded, for each slot of the feed
        self._recovery = Recovery(self)
        # Of all rows; an epoch leaves out less than a batch of them.
        self.offset = log_det(flow.preprocessing) + mean_log_det(train, flow.preprocessing, config.seed)
        alone = communicator.size == 1 and not communicator.on_device
        self._shared = None if alone else SharedStep(self, self._grads, config.batch_size, communicator)

    # --- one step ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """The rows of the batch that the state's CURSOR names into the workspace."""
        ws, fed, seed = self.workspace, self._fed, self.config.seed
        assert fed is not None
        self._loader.load(ws, fed.data, fed.index, fed.rows, self.state, seed, Purpose.TRAIN_NOISE)
        self._extras.load(ws, fed.rows, self.state)

    def update(self, part: Range) -> None:
        """The parameters of a range from their gradients."""
        self.backend.update(self.p, self.g, self.m, self.v, part.offset, part.size, self.state, self._optimizer)

    def _step(self) -> None:
        """One mini-batch: load, forward, loss, backward, update. Allocates nothing, and the host reads nothing."""
        backend, ws = self.backend, self.workspace
        self.load()
        self.network.forward(ws, self.views)
        backend.loss(self.state, ws.dlogp, ws.logp, ws.weight)
        by_layer = self.network.layout.size > UPDATE_BY_LAYER
        self.network.backward(ws, self.views, self._grads, want_dx=False, ready=self.update if by_layer else None)
        if not by_layer:
            self.update(Range(0, self.network.layout.size))
        backend.advance(self.state)

    def _check(self) -> None:
        """Before the first step of an epoch: can its batch be recomputed from what the flow makes of it?"""
        if self.config.activations == "recompute":
            self.load()
            check_reconstruction(self.network, self.workspace, self.views, self.record.epoch + 1, self.communicator)

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
            self._steps[fed.slot] = self.backend.record(self._step) if self._shared is None else self._shared.record()
        self._recovery.window_opened()

    def _set(self, **slots: float) -> None:
        host = self.backend.copy_out(self.state)
        for name, value in slots.items():
            host[getattr(Slot, name)] = value
        self.backend.copy_in(self.state, host)

    # --- epochs -----------------------------------------------------------------------------------------------------

    def request_stop(self, number: int = -1) -> None:
        """Finish the running step, then leave run(); of several ranks, all do. May be called from a signal handler.

        number : of the signal, if there was one.
        """
        self._stop = number
        if self._shared is not None:
            self._shared.request = number

    @property
    def stop_number(self) -> int:
        """With what the running or last run() was asked to stop, by this rank or, in step with all, another; else 0."""
        return self._stop if self._shared is None else self._shared.stop

    @property
    def stopped(self) -> bool:
        """True if run() was left because of request_stop."""
        return self.stop_number != 0

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
        self._stop = 0
        if self._shared is not None:
            self._shared.request = self._shared.stop = 0
        # An overflow shows in the loss: the step is skipped, counted and reported.
        with self.backend.computing(), np.errstate(over="ignore", invalid="ignore"):
            try:
                while not self.finished and not self.stopped:
                    self._run_epoch()
            finally:
                self.reader.close()
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
        # Closed even when a step fails: its thread, if it has one, must be done before the reader's is stopped.
        with contextlib.closing(self._feed.epoch(self.record.epoch + 1, self.position)) as blocks:
            self._run_blocks(blocks)
        self.backend.synchronize()
        if self.position < self.reader.n_batches:
            self._epoch_seconds += time.perf_counter() - started
            return
        self._end_epoch(started)

    def _run_blocks(self, blocks: Iterable[Fed]) -> None:
        """The steps on what is left of an epoch, or until stopped."""
        for count, fed in enumerate(blocks):
            self._open(fed)
            if count == 0:
                self._check()
            while self._batches_left:
                self._next_batch()
                self._recovery.after_step(self._batches_left == 0)
                for callback in self.callbacks:
                    callback.on_step(self)
                if self.stopped:
                    return

    def _end_epoch(self, started: float) -> None:
        epoch = self.record.epoch + 1
        self._recovery.before_validation()
        if self._shared is not None:
            number = self._shared.checksum(self.p, self.m, self.v, self.state)
            logger.info("epoch %d: %s, checksum %08x", epoch, self.communicator.describe(), number)
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
        averaged = self._keep_best(epoch, valid)
        self._epoch_seconds += time.perf_counter() - started
        row = EpochRecord(
            epoch,
            train,
            valid,
            float(state[Slot.RATE]),
            self._epoch_seconds,
            None if math.isnan(averaged) else averaged,
        )
        self.record.history.append(row)
        logger.info("epoch %d: train %.3f, validation %.3f nats", epoch, train, valid)
        for callback in self.callbacks:
            callback.on_epoch(self, row)

    def _keep_best(self, epoch: int, valid: float) -> float:
        """Compare an epoch's parameters, and what they are averaged to, with the best -> the average's validation."""
        record, average = self.record, self._average
        score, found, count, averaged = valid, self.p, 0, math.nan
        if average is not None:
            average.after_epoch(self.p, epoch, self.config.epochs)
        if average is not None and average.ready:
            if self._evaluator is not None:
                averaged = self._evaluator.run(average.views, self.config.seed, epoch).mean
            if self._evaluator is None or better(averaged, valid):
                score, found, count = averaged, average.flat, average.count
        if self._evaluator is None or better(score, record.best_valid_log_likelihood):  # at first that is NaN
            self.backend.assign(self.best, found)
            record.best_epoch, record.best_valid_log_likelihood, record.best_average = epoch, score, count
            self.stale_epochs = 0
        else:
            self.stale_epochs += 1
        return averaged

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
        average, count = ({}, 0) if self._average is None else self._average.state()
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
            average=average,
            average_epochs=count,
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
        if self._average is not None:
            self._average.restore(resume.average, resume.average_epochs)

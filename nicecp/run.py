"""A training run with its files: start or resume, save while training and at the end, stop on signals."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nicecp.beside import n_context_of
from nicecp.checkpoint import load_state, run_path, save_run, save_state, state_path
from nicecp.data import DEMO, Splits, check_finite, open_splits, split_spec
from nicecp.data_spec import files_in, from_record, plain_data, to_record
from nicecp.decay import change_epochs
from nicecp.errors import CheckpointError, TrainingError, about_file
from nicecp.evaluate import READ_ROWS
from nicecp.extras import fit_context, weights_noted
from nicecp.fitting import prepared
from nicecp.flow import NICE
from nicecp.keeper import CHECKPOINT_EVERY, Keeper, Saving, files_of, older_kept
from nicecp.kernels import Slot, with_precision
from nicecp.locking import claim
from nicecp.machine import require_memory, versions
from nicecp.memory import within
from nicecp.outcome import Outcome, Progress, outcome_of, progress_of
from nicecp.parallel import ALONE, Communicator
from nicecp.plan import cost_of_run
from nicecp.preset_table import valid_fraction_of
from nicecp.presets import CHANGEABLE, Settings, check, check_names, contradiction, resolve
from nicecp.rank_devices import open_for
from nicecp.records import note_differences
from nicecp.scoring import accept_changed_data, check_same_data, recorded_settings
from nicecp.signals import stopping
from nicecp.split import SHUFFLE_WINDOW
from nicecp.table_size import TableSize
from nicecp.train import Callback, Trainer

logger = logging.getLogger("nicecp")

StrPath = str | os.PathLike[str]


class Run:
    """One training run; made by ``start`` or ``resume``, carried out by ``execute``, closed at the end.

    ``out`` receives the best model, ``state`` beside it what resuming needs (nicecp.checkpoint).
    """

    def __init__(
        self,
        settings: Settings,
        data: Any,
        splits: Splits,
        flow: NICE,
        out: str | None,
        saving: Saving,
        communicator: Communicator = ALONE,
        read_rows: int = READ_ROWS,
    ) -> None:
        self.settings, self.data, self.splits, self.flow, self.out = settings, data, splits, flow, out
        self._held = contextlib.ExitStack()  # the output's lock and the data: released by close
        config = replace(settings.train_config(), read_rows=read_rows)
        self._keeper = Keeper(self, saving)
        self.communicator = communicator
        self.trainer = Trainer(flow, splits.train, splits.valid, config, [self._keeper], communicator)
        self.trainer.record.config = self._config()
        self.trainer.record.versions = versions(flow.backend) | {"ranks": str(communicator.size)}
        self.trainer.record.threads = int(getattr(flow.backend, "threads", 1))
        self.stopped_by: int | None = None
        self.resumed = False
        self.begun = False  # took a step
        self.complete = False  # trained to the end and saved
        if settings.patience is not None and splits.valid is None:
            logger.warning("without validation rows patience has no effect: all %d epochs are run", settings.epochs)

    # --- beginning --------------------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        data: Any,
        out: StrPath | None = "run.h5",
        *,
        preset: str = "auto",
        optimizer: str | None = None,
        numbers: Mapping[str, float | None] | None = None,
        overwrite: bool = False,
        device: str = "auto",
        threads: int | None = None,
        checkpoint_every: float = CHECKPOINT_EVERY,
        checkpoint_epochs: int | None = None,
        keep: int = 1,
        memory_limit: int | None = None,
        communicator: Communicator = ALONE,
        **given: Any,
    ) -> Run:
        """A new run.

        Parameters
        ----------
        data : as nicecp.data.open_splits: a file, or an array, which whoever resumes the run must give again
        out : file for the best model, or None to write nothing
        preset, optimizer, numbers, **given : see nicecp.presets.resolve
        overwrite : replace existing files at the first checkpoint
        checkpoint_every, checkpoint_epochs, keep : seconds; epochs; state files that are kept (nicecp.keeper.Saving)
        memory_limit : bytes that the process may have in memory, by keeping fewer rows there (nicecp.memory)
        communicator : of the ranks that carry out the run together, all of which make the same calls; rank 0 writes

        Raises
        ------
        OutputError
            The output exists, another run is writing it, or its folder cannot be written; nothing has been read then.
        DataError, ValueError, DeviceError, MemoryError
            The data, a setting, the device or the machine will not do.
        TypeError
            A setting that there is not.
        """
        check_names(given)
        saving = Saving(checkpoint_every, checkpoint_epochs, keep)
        with contextlib.ExitStack() as held:
            first = communicator.from_first
            if out is not None:
                first(lambda: claim(held, out, files_of(out, keep), overwrite, files_in(data)))
            fraction, seed = given.get("valid_fraction"), given.get("seed")
            fraction = valid_fraction_of(preset) if fraction is None else fraction
            splits = open_splits(data, fraction, 0 if seed is None else seed)
            held.callback(splits.close)
            source, rows = splits.train.source, len(splits.train)
            size = TableSize.of(splits.train)
            settings = resolve(
                plain_data(data), source.is_image8, SHUFFLE_WINDOW, preset, optimizer, numbers, size, **given
            )
            if given.get("batch_size") is None:
                settings = replace(settings, batch_size=min(settings.batch_size, max(1, rows)))
            backend = open_for(communicator, device, threads)
            settings, read_rows = within(memory_limit, settings, splits, backend.device)
            spec = settings.model_spec(source.n_features, n_context_of(source))
            needed = cost_of_run(settings, splits, backend.device).memory_bytes
            require_memory(needed, f"a model of {spec.n_parameters:,} parameters")
            backend = with_precision(backend, settings.precision, required=True)
            steps, events = first(lambda: prepared(settings, splits, backend))
            info = first(lambda: replace(source.info, fingerprint=source.fingerprint()))
            context = fit_context(splits.train)
            flow = NICE.from_spec(
                spec, None, steps, info, settings.seed, context=context, init=settings.init, backend=backend
            )
            path = None if out is None else os.fspath(out)
            # Ranks differ in what they have in memory, from which windows follow, and must not differ in these.
            settings = first(lambda: settings)
            run = cls(settings, data, splits, flow, path, saving, communicator, read_rows)
            run.trainer.record.events += events + first(lambda: weights_noted(splits.train, spec.n_parameters))
            run._held = held.pop_all()
            return run

    @classmethod
    def resume(
        cls,
        path: StrPath,
        *,
        data: Any = None,
        allow_changed_data: bool = False,
        device: str = "auto",
        threads: int | None = None,
        checkpoint_every: float = CHECKPOINT_EVERY,
        checkpoint_epochs: int | None = None,
        keep: int = 1,
        preset: str = "auto",
        optimizer: str | None = None,
        numbers: Mapping[str, float | None] | None = None,
        memory_limit: int | None = None,
        communicator: Communicator = ALONE,
        **given: Any,
    ) -> Run:
        """Go on with a run from the state file beside ``path``, with its own settings and, by default, its own data.

        Settings of nicecp.presets.CHANGEABLE may be given anew; any other must be the run's own or None. The same
        machine and threads give the same bits as a run that was never interrupted. With ``allow_changed_data`` other
        rows of the same kind will do; the running epoch then begins anew.

        Raises
        ------
        CheckpointError
            No state file, or one that is not a run's.
        OutputError
            Another run is writing these files, or their folder cannot be written.
        DataError
            The data are not those that the run was trained on.
        ValueError
            A setting contradicts the run's.
        """
        check_names(given)
        out, saving = run_path(path), Saving(checkpoint_every, checkpoint_epochs, keep)
        with contextlib.ExitStack() as held:
            communicator.from_first(lambda: claim(held, out))
            run = cls._from_files(
                out, data, allow_changed_data, device, threads, saving, preset, optimizer, numbers, given, communicator,
                memory_limit,
            )  # fmt: skip
            held.callback(run.splits.close)
            run._held = held.pop_all()
            return run

    @classmethod
    def _from_files(
        cls,
        out: str,
        data: Any,
        allow_changed_data: bool,
        device: str,
        threads: int | None,
        saving: Saving,
        preset: str,
        optimizer: str | None,
        numbers: Mapping[str, float | None] | None,
        given: Mapping[str, Any],
        communicator: Communicator,
        memory_limit: int | None,
    ) -> Run:
        """What ``resume`` does once the files are its own."""
        state_file = state_path(out)
        backend = open_for(communicator, device, 1)  # until the run's own number of threads is known
        flow, record, state = load_state(state_file, backend=backend)
        settings = recorded_settings(record)
        if settings is None:
            problem = "does not say with which settings it was trained"
            raise CheckpointError(about_file(state_file, problem, "only runs of `nicecp train` can be resumed"))
        different = contradiction(settings, preset, optimizer, numbers, **given)
        if different:
            remedy = "leave it out, or start a new run with another --out"
            raise CheckpointError(about_file(out, different, remedy))
        changes = {name: given[name] for name in CHANGEABLE if given.get(name) is not None}
        epochs, settings = settings.epochs, replace(settings, **changes)
        check(settings)
        as_before = record.versions.get("ranks", "1") == str(communicator.size)
        usual = record.threads if as_before else communicator.threads()
        backend = open_for(communicator, device, usual if threads is None else threads)
        flow = NICE.from_spec(
            flow.spec, state.parameters, flow.preprocessing, flow.info, context=flow.context, backend=backend
        )
        if plain_data(data) is None:
            recorded = record.config.get("data")
            recorded = recorded if isinstance(recorded, str) else None  # the file may say anything
            data = replace(data, data=recorded) if data is not None else recorded
        data = from_record(data, record.config)
        if (isinstance(plain_data(data), str) and not plain_data(data)) or plain_data(data) is None:
            raise CheckpointError(about_file(state_file, "does not say where its data are", "pass --data"))
        splits = open_splits(data, settings.valid_fraction, settings.seed)
        try:
            changed = allow_changed_data and accept_changed_data(flow, splits, record, int(state.state[Slot.STEP]))
            check_same_data(flow, splits, None if changed else record)
            communicator.from_first(lambda: check_finite(splits))
            settings, read_rows = within(memory_limit, settings, splits, backend.device, resumed=True)
            run = cls(settings, data, splits, flow, out, saving, communicator, read_rows)
            note_differences(record, run.trainer.record, int(state.state[Slot.STEP]))
            record.config, record.versions = run.trainer.record.config, run.trainer.record.versions
            record.threads = run.trainer.record.threads
            if state.optimizer != settings.optimizer.kind:
                problem = f"holds the state of {state.optimizer}, its settings say {settings.optimizer.kind}"
                raise CheckpointError(about_file(state_file, problem, "use another copy of the file"))
            change_epochs(state.state, settings.schedule, epochs, settings.epochs, record.epoch)
            run.trainer.restore(record, state)
            run.trainer.position *= not changed
            run.resumed = True
            return run
        except BaseException:
            splits.close()
            raise

    def _config(self) -> dict[str, Any]:
        """What /training/config holds: enough to resume, and to repeat the run by hand."""
        data = plain_data(self.data)
        if isinstance(data, str) and data == DEMO:
            named = DEMO
        elif isinstance(data, (str, os.PathLike)):
            path, dataset = split_spec(data)
            named = os.path.abspath(path) + (f":{dataset}" if dataset else "")
        else:
            named = ""  # an array
        parts = {"train": self.splits.train, "valid": self.splits.valid, "test": self.splits.test}
        return {
            "data": named,
            **to_record(self.data),
            "settings": self.settings.to_json(),
            "rows": {name: None if split is None else split.describe() for name, split in parts.items()},
        }

    # --- doing ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str | None:
        return None if self.out is None else state_path(self.out)

    def execute(self, callbacks: Sequence[Callback] = ()) -> Outcome:
        """Train to the end or until a signal or trainer.request_stop(); save; score the best model.

        SIGINT, SIGTERM and SIGHUP finish the running step and save; a second SIGINT meanwhile is ignored, and a third
        one some seconds later raises KeyboardInterrupt with the files as they were (nicecp.signals). The files are
        written as ``nicecp.keeper.Saving`` says and at the end.

        Raises
        ------
        TrainingError
            The loss is not finite again and again (nicecp.recovery); the best model so far is saved.
        OutputError
            The files cannot be written at the end. (Before that a failure is a warning, and the next time may do.)
        """
        began = time.monotonic()
        trainer = self.trainer
        trainer.callbacks = [self._keeper, *callbacks]
        if trainer.finished:
            if self.out is not None and not os.path.lexists(self.out):
                self.save()
            self.complete = True
            return self._outcome(began)
        self._keeper.begin()
        with stopping(self._stop):
            if self.stopped_by is None or self.communicator.size > 1:  # then all must agree, after a step
                self._train()
            if not trainer.finished:
                if self.stopped_by is None and trainer.stop_number > 0:  # the signal was another rank's
                    self.stopped_by = trainer.stop_number
                self.save()
        return self._outcome(began)

    def _train(self) -> None:
        try:
            self.trainer.run()
        except TrainingError as error:
            if self.out is None or self.trainer.record.best_epoch == 0:
                raise
            self.save()
            raise TrainingError(f"{error}; the best model so far is kept in {self.out!r}") from error

    def save(self) -> None:
        """Write both files now; nothing without ``out``, and by rank 0 alone."""
        if self.out is None or self.state is None or self.communicator.rank > 0:
            return
        trainer = self.trainer
        resume = trainer.resume_state()
        # The state file first: it alone is enough to go on, so that between the two nothing is lost.
        with older_kept(self.state, self._keeper.saving.keep):
            save_state(self.state, self.flow, trainer.record, resume)
        save_run(self.out, self.flow, resume.best_parameters, trainer.record, overwrite=True)

    def _stop(self, number: int) -> None:
        self.stopped_by = number
        self.trainer.request_stop(number)

    @property
    def rows_done(self) -> int:
        """Rows presented so far, by earlier processes too."""
        trainer = self.trainer
        batches = trainer.record.epoch * trainer.reader.n_batches + trainer.position
        return batches * trainer.config.batch_size

    def progress(self) -> Progress:
        """Where the run is; copies 64 numbers from the device, so ask a few times a second, not every step."""
        return progress_of(self.trainer, self.rows_done, self._keeper.rows_per_second())

    def _outcome(self, began: float) -> Outcome:
        return outcome_of(self.trainer, self.splits, self.stopped_by, began)

    def close(self) -> None:
        """Close the data and let other runs have the files."""
        self._held.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

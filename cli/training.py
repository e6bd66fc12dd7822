"""What `nicecp train` prints: the beginning, the plan of a dry run, the end. Apart from train.py, which only parses."""

from __future__ import annotations

import json
import math
import shlex
import signal
from dataclasses import asdict
from typing import Any

from nicecp.cli.console import Output, clock, note, plural, table
from nicecp.cli.progress import Display
from nicecp.data_spec import plain_data
from nicecp.describe import model_line, plain, source_line, splits_line
from nicecp.evaluate import Evaluation
from nicecp.machine import as_bytes, blas_version
from nicecp.outcome import Outcome
from nicecp.plan import cost_of_run, time_steps
from nicecp.presets import Settings
from nicecp.profile import profile_step
from nicecp.run import Run

OUTPUT_FAILED = 2
COLUMNS = 20  # of which is said what they were given
PROFILE_SECONDS = 1.0  # for each part of a step


def carry_out(run: Run, as_json: bool) -> int:
    """Train, show, report -> exit code: 0, 128 + the signal that stopped the run, 2 if nothing could be shown."""
    output = Output()
    if as_json:
        output.line(json.dumps(start_json(run)))
    else:
        for line in beginning(run):
            output.line(line)
    already = run.trainer.finished
    display = Display(run, output, as_json)
    try:
        outcome = run.execute([display])
    finally:
        display.close()
    if as_json:
        output.line(json.dumps(outcome_json(run, outcome, already)))
    if not outcome.finished:
        name = "a request" if outcome.stopped_by is None else signal.Signals(outcome.stopped_by).name
        note(
            f"nicecp: stopped by {name} after {_position(run)}; "
            f"saved in {run.state!r}; to go on: nicecp train --resume {shlex.quote(str(run.out))}"
        )
        return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by
    if already:
        note(f"nicecp: {run.out!r} is finished already ({_why(run)}); to go on, ask for more --epochs or --patience")
    if not as_json:
        output.line(ending(run, outcome))
    if output.failure is not None:
        note(
            f"nicecp: warning: standard output cannot be written ({output.failure.strerror}); the run is finished and "
            f"saved in {run.out!r}: look at it with nicecp info"
        )
        return OUTPUT_FAILED
    return 0


def beginning(run: Run) -> list[str]:
    settings, backend = run.settings, run.flow.backend
    threads = run.trainer.record.threads
    lines = [
        f"data: {source_line(run.splits.train.source)}; {splits_line(run.splits)}",
        f"model: {model_line(run.flow.spec)}; preset {settings.preset}, {settings.optimizer.kind}, "
        f"batches of {settings.batch_size}, {plural(settings.epochs, 'epoch')}{_regularized(settings)}",
        f"device: {backend.device}, {plural(threads, 'thread')}, {blas_version()}{_ranks(run)}",
    ]
    columns = [f"column {event.message}" for event in run.trainer.record.events if event.kind == "transform"]
    lines += columns[:COLUMNS]
    if len(columns) > COLUMNS:
        lines.append(f"and {plural(len(columns) - COLUMNS, 'other column')}, which nicecp info {run.state} will show")
    if run.resumed:
        lines.append(f"resumed after {_position(run)} of the next")
    return lines


def _regularized(settings: Settings) -> str:
    """', weight decay 0.5, gaussian whitening', as far as there is any."""
    decay = f", weight decay {settings.weight_decay:.2g}" if settings.weight_decay else ""
    return decay + (f", {settings.whiten} whitening" if settings.whiten != "none" else "")


def _ranks(run: Run) -> str:
    """', 4 ranks, Open MPI 5.0' where there are several."""
    about = run.communicator.describe()
    return f", {about}" if about else ""


def _position(run: Run) -> str:
    return f"{plural(run.trainer.record.epoch, 'epoch')} and {plural(run.trainer.position, 'step')}"


def start_json(run: Run) -> dict[str, Any]:
    return {
        "event": "start",
        "data": run.trainer.record.config["data"],
        "context": run.trainer.record.config.get("context"),
        "weights": run.trainer.record.config.get("weights"),
        "rows": run.trainer.record.config["rows"],
        "model": model_line(run.flow.spec),
        "n_parameters": run.flow.n_parameters,
        "settings": run.settings.to_json(),
        "device": run.flow.backend.device,
        "threads": run.trainer.record.threads,
        "ranks": run.communicator.size,
        "versions": run.trainer.record.versions,
        "resumed_after_epoch": run.trainer.record.epoch if run.resumed else None,
        "out": run.out,
    }


def _why(run: Run) -> str:
    epochs = run.trainer.record.epoch
    if epochs >= run.settings.epochs:
        return plural(epochs, "epoch")
    return f"{plural(epochs, 'epoch')}, {run.settings.patience} without a better validation"


def _further(run: Run) -> str:
    """The option with which a finished run goes on."""
    epochs, patience = run.trainer.record.epoch, run.settings.patience
    return (
        f"--epochs {2 * epochs}" if epochs >= run.settings.epochs or patience is None else f"--patience {2 * patience}"
    )


def ending(run: Run, outcome: Outcome) -> str:
    record = outcome.record
    averaged = f", averaged over {plural(record.best_average, 'epoch')}" if record.best_average else ""
    rows = [("epochs", f"{_why(run)}; the best is {record.best_epoch}{averaged}")]
    for name, evaluation in (("train", outcome.train), ("valid", outcome.valid), ("test", outcome.test)):
        if evaluation is not None:
            rows.append((name, evaluation_text(evaluation)))
    rows.append(("round trip", f"max |x - f^-1(f(x))| = {outcome.round_trip:.2g} on {outcome.round_trip_rows} rows"))
    rows.append(("time", clock(outcome.seconds)))
    rows.append(("files", f"{run.out} (the best model), {run.state} (to go on)"))
    if run.settings.preset == "tabular":
        rows.append(("hint", "a first look; --preset tabular-spline fits tables much better, in minutes"))
    out = shlex.quote(str(run.out))
    picture = run.flow.info.image_shape is not None
    named, data = run.trainer.record.config.get("data") or "DATA.h5", plain_data(run.data)
    context = run.flow.context
    given = "" if context is None else " --context " + ",".join(f"{value:.4g}" for value in context.mean)
    sample = f"nicecp sample {out} -n 100{given} --out samples.{'png' if picture else 'h5'}"
    commands = [
        sample,
        f"nicecp evaluate {out} --data {shlex.quote(data if isinstance(data, str) else named)}",
        f"nicecp train --resume {out} " + _further(run),
    ]
    return table(rows) + "\nnext:\n" + "\n".join("  " + line for line in commands)


def evaluation_text(evaluation: Evaluation) -> str:
    """'1980.50 +- 0.31 nats per row, 4.36 bits/dim (10,000 rows)'."""
    error = "" if not math.isfinite(evaluation.standard_error) else f" +- {evaluation.standard_error:.2g}"
    bits = "" if evaluation.bits_per_dim is None else f", {evaluation.bits_per_dim:.4g} bits/dim"
    effective = evaluation.effective_rows
    worth = "" if effective is None else f", weighted, worth {effective:,.1f}"
    size = abs(evaluation.mean)
    mean = format(evaluation.mean, ".4f" if size < 100 else ".2f" if size < 1e9 else ".6g")
    return f"{mean}{error} nats per row{bits} ({plural(evaluation.rows, 'row')}{worth})"


def evaluation_json(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {name: value if name == "rows" else plain(value) for name, value in asdict(evaluation).items()}


def outcome_json(run: Run, outcome: Outcome, already: bool) -> dict[str, Any]:
    record = outcome.record
    return {
        "event": "end",
        "finished": outcome.finished,
        "was_finished_before": already,
        "stopped_by": None if outcome.stopped_by is None else signal.Signals(outcome.stopped_by).name,
        "epochs": record.epoch,
        "best_epoch": record.best_epoch,
        "best_valid_log_likelihood": plain(record.best_valid_log_likelihood),
        "best_average": record.best_average,
        "train": evaluation_json(outcome.train),
        "valid": evaluation_json(outcome.valid),
        "test": evaluation_json(outcome.test),
        "round_trip_error": plain(outcome.round_trip),
        "seconds": outcome.seconds,
        "out": run.out,
        "state": run.state,
    }


def short_time(seconds: float) -> str:
    """'12.3 ms', '2.72 s'."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s" if seconds < 100 else clock(seconds)


def show_profile(run: Run, as_json: bool) -> None:
    """Where a step's time goes."""
    parts = profile_step(run.trainer, PROFILE_SECONDS)
    output = Output()
    if as_json:
        about = {"event": "profile", "model": model_line(run.flow.spec), "threads": run.trainer.record.threads}
        output.line(json.dumps({**about, "parts": [asdict(part) for part in parts]}))
        return
    for line in beginning(run):
        output.line(line)
    whole = parts[-1].seconds
    rows = []
    for part in parts:
        rate = f"  {part.flops / part.seconds / 1e9:.3g} GFLOP/s" if part.flops else ""
        rate += f"  {part.bytes / part.seconds / 1e9:.3g} GB/s updated" if part.bytes else ""
        share = f"{part.seconds / whole:6.1%}"
        rows.append((part.name, f"{short_time(part.seconds):>9}  {share}  {plural(part.calls, 'call'):>9}{rate}"))
    output.line(table(rows))
    if run.trainer.record.threads > 1:
        output.line("  threads do different parts side by side: these add up to more than the whole")


def show_plan(run: Run, as_json: bool) -> None:
    """What training would take."""
    cost = cost_of_run(run.settings, run.splits, run.flow.backend.device)
    timing = time_steps(run.trainer)
    steps = run.trainer.reader.n_batches
    total = timing.epoch * run.settings.epochs
    output = Output()
    if as_json:
        plan = {
            "event": "plan",
            "model": model_line(run.flow.spec),
            "settings": run.settings.to_json(),
            **asdict(cost),
            "memory_bytes": cost.memory_bytes,
            "steps_per_epoch": steps,
            "seconds_per_step": timing.step,
            "seconds_per_epoch": timing.epoch,
            "seconds": total,
        }
        output.line(json.dumps(plan))
        return
    for line in beginning(run):
        output.line(line)
    rows = [
        ("parameters", f"{cost.n_parameters:,}"),
        (
            "memory",
            f"{as_bytes(cost.memory_bytes)}: parameters, gradients, moments and best model "
            f"{as_bytes(cost.parameter_bytes)}, buffers {as_bytes(cost.buffer_bytes)}, "
            f"data {as_bytes(cost.data_bytes)}"
            + (f", page-locked {as_bytes(cost.pinned_bytes)}" if cost.pinned_bytes else ""),
        ),
        (
            "one step",
            f"{cost.flops / 1e9:.3g} GFLOP, {short_time(timing.step)}, {cost.flops / timing.step / 1e9:.3g} GFLOP/s",
        ),
        ("one epoch", f"{plural(steps, 'step')}, {clock(timing.epoch)}"),
        ("all", f"{plural(run.settings.epochs, 'epoch')}, {clock(total)} at most"),
    ]
    output.line(table(rows))

"""`nicecp info`: what a checkpoint or a data file holds."""

from __future__ import annotations

import json
from typing import Any

import click

from nicecp.cli.console import clock, plural, table
from nicecp.cli.options import command, data_name, json_option

EXAMPLES = """\
  nicecp info run.h5
  nicecp info run.state.h5 --history 20
  nicecp info mnist.h5 --json
"""
_LISTED = 24  # names of columns
EVENTS = 100  # of a run, that are shown


@command("info", EXAMPLES)
@click.argument("file", type=data_name)
@click.option(
    "--history", type=click.IntRange(min=0), default=5, show_default=True, help="Last epochs of a checkpoint to list."
)
@json_option
def info(file: str, history: int, as_json: bool) -> None:
    """What FILE holds: a checkpoint's model and training, or a data file's datasets and which ones train would use."""
    from nicecp.describe import describe

    found = describe(file, history)
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(_checkpoint(found) if found["kind"] == "checkpoint" else _data(found))


def _checkpoint(found: dict[str, Any]) -> str:
    model, training = found["model"], found["training"]
    steps = [
        " ".join([step["kind"], *(f"{name}={value:g}" for name, value in step.items() if name != "kind")])
        for step in model["preprocessing"]
    ]
    rows = [("checkpoint", found["file"]), ("model", model["line"]), ("preprocessing", ", ".join(steps) or "none")]
    if model["image_shape"]:
        rows.append(("images", "x".join(str(size) for size in model["image_shape"])))
    if model["order"]:
        rows.append(("parts", _parts(model["order"])))
    changed = [(number, coupling["order"]) for number, coupling in enumerate(model["couplings"]) if coupling["order"]]
    rows += [(f"parts from coupling {number}", _parts(order)) for number, order in changed[:12]]
    if len(changed) > 12:
        rows.append(("", f"and {len(changed) - 12} more"))
    if model["columns"]:
        rows.append(("columns", _listed(model["columns"])))
    if model["context"]:
        rows.append(("context", context_text(model["context"])))
    if training is None:
        return table([*rows, ("training", "not recorded")])
    best, averaged = training["best_valid_log_likelihood"], training["best_average"]
    rows.append(
        (
            "training",
            f"{plural(training['epochs'], 'epoch')} in {clock(training['seconds'] or 0.0)}, "
            f"the best is {training['best_epoch']}"
            + (f", averaged over {plural(averaged, 'epoch')}," if averaged else "")
            + ("" if best is None else f" with validation {best:.2f} nats"),
        )
    )
    if training["config"].get("data"):
        rows.append(("data", str(training["config"]["data"])))
    for name in ("context", "weights"):
        if name in training["config"]:
            rows.append((f"{name} from", str(training["config"][name]) or "an array"))
    rows.append(("seed, threads", f"{training['seed']}, {training['threads']}"))
    rows.append(("versions", ", ".join(f"{name} {text}" for name, text in training["versions"].items())))
    events = training["events"]
    if len(events) > EVENTS:
        rows.append(("events", f"{len(events)}, the last {EVENTS} of them:"))
    rows += [(f"event, epoch {event['epoch']}", f"{event['kind']}: {event['message']}") for event in events[-EVENTS:]]
    lines = [table(rows)]
    if training["history"]:
        lines.append("  epoch       train       valid        rate   seconds")
        lines += [
            f"  {row['epoch']:5d}  {_number(row['train_log_likelihood'])}  {_number(row['valid_log_likelihood'])}"
            f"  {row['learning_rate']:10.3g}  {row['seconds']:8.1f}"
            for row in training["history"]
        ]
    return "\n".join(lines)


def _parts(order: list[int]) -> str:
    """'3 0 4 | 2 1'; of many columns only the first."""
    half = (len(order) + 1) // 2
    shown = (
        " ".join(map(str, part[:12])) + (" ..." if len(part) > 12 else "") for part in (order[:half], order[half:])
    )
    return " | ".join(shown)


def context_text(context: dict[str, Any]) -> str:
    """'2 numbers: mass (mean 3.1, std 0.5), age (mean 70, std 12)'; of many only the first."""
    names = context["names"] or [str(number) for number in range(context["n"])]
    each = zip(names, context["mean"], context["std"], strict=True)
    shown = [f"{name} (mean {mean:.4g}, std {std:.4g})" for name, mean, std in each]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f"{plural(context['n'], 'number')}: {', '.join(shown[:8])}{more}"


def _listed(names: list[str]) -> str:
    """'a, b, c'; of many only the first."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _number(value: float | None) -> str:
    return " " * 9 + "-" if value is None else f"{value:10.2f}"


def _data(found: dict[str, Any]) -> str:
    rows = [("data", found["file"])]
    rows += [("dataset", f"{one['path']}  {one['content']}") for one in found["datasets"]]
    if found["problem"] is not None:
        return table([*rows, ("train", f"cannot use it as it is: {found['problem']}")])
    rows.append(("kind", "8-bit values, dequantized" if found["eight_bit"] else "floats, standardised"))
    if found["image_shape"]:
        rows.append(("images", "x".join(str(size) for size in found["image_shape"])))
    if found["columns"]:
        rows.append(("columns", _listed(found["columns"])))
    verbs = {"train": "trains on", "valid": "validates on", "test": "tests on"}
    rows += [(verbs[name], use["line"]) for name, use in found["use"].items() if use is not None]
    return table(rows)

"""What several commands share: kinds of values, and options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "": 60.0}
_EPOCHS = ("e", "epoch", "epochs")
MAX_EPOCHS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_LAYERS = 1000  # of one network


def hidden_sizes(text: str) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """'1000,1000', '5x1000', '2x64,32', or 'none' for networks without a hidden layer; '3x64/64' for each coupling."""
    if "/" in text:
        return tuple(_sizes(part) for part in text.split("/"))
    return _sizes(text)


def _sizes(text: str) -> tuple[int, ...]:
    if text.strip().lower() == "none":
        return ()
    sizes: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(?:(\d{1,4})\s*[xX*]\s*)?(\d{1,9})\s*", part)
        count, size = (int(found[1] or 1), int(found[2])) if found else (0, 0)
        if count < 1 or size < 1 or len(sizes) + count > MAX_LAYERS:
            raise click.BadParameter(f"{text!r} is not a list of layer sizes such as 1000,1000 or 5x1000")
        sizes += [size] * count
    return tuple(sizes)


def laws(text: str) -> tuple[str, ...]:
    """'affine', or several laws: 'affine,additive'."""
    return tuple(part.strip().lower() for part in text.split(","))


def interval(text: str) -> tuple[float, int | None]:
    """(seconds, None) of '30s', '5min', '1.5h', where a plain number is minutes; (inf, 10) of '10 epochs' or '10e'."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if found and found[2] in _EPOCHS and found[1].isdecimal() and 1 <= int(found[1]) <= MAX_EPOCHS:
        return math.inf, int(found[1])
    seconds = float(found[1]) * _UNITS.get(found[2], 0.0) if found else 0.0
    if not 0 < seconds < 1e9:
        remedy = "is not a time such as 30s, 5min or 2h (a plain number is minutes), nor epochs such as 10e"
        raise click.BadParameter(f"{text!r} {remedy}")
    return seconds, None


def byte_size(text: str) -> int:
    """Bytes of '8GiB', '500 MB', '2g' (GiB), or a plain number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(b|ib?)?|b)?\s*", text.lower())
    power = "kmgt".index(found[2]) + 1 if found is not None and found[2] else 0
    number = float(found[1]) * (1000.0 if found[3] == "b" else 1024.0) ** power if found is not None else 0.0
    if not 1 <= number < 2**60:
        raise click.BadParameter(f"{text!r} is not a size such as 4GiB, 500MB or 2g")
    return int(number)


def value_range(text: str) -> tuple[float, float]:
    """Two numbers 'LO,HI'."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise click.BadParameter(f"{text!r} is not a range LO,HI such as -1,1")
    return low, high


def data_name(text: str) -> str:
    """The data's name as it stands; an empty one is a mistake in a script."""
    if not text:
        raise click.BadParameter("the name is empty")
    return text


def numbers_or_dataset(text: str) -> tuple[float, ...] | str:
    """'0.5,1' as numbers, or a dataset's name as it stands."""
    if ":/" in text:
        return text
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise click.BadParameter(f"{text!r} is neither numbers such as 0.5,1 nor a dataset FILE.h5:/NAME")
    return values


def numbers(text: str) -> tuple[float, ...]:
    """'0.5,1' as numbers."""
    values = numbers_or_dataset(text)
    if isinstance(values, str):
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0.5,1")
    return values


DEBUG = "Show the traceback of an error, and the library's messages."
SEED = click.IntRange(0, MAX_SEED)


def debug_option(group: F) -> F:
    """--debug: read by nicecp.cli.main from the arguments, since it must work when parsing fails."""
    return click.option("--debug", is_flag=True, expose_value=False, help=DEBUG)(group)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on standard output.")(
        command
    )


def memory_option(function: F) -> F:
    """--memory-limit."""
    return click.option(
        "--memory-limit",
        type=byte_size,
        metavar="SIZE",
        show_default="none",
        help="Memory that the process may take, such as 4GiB: of larger data fewer rows are in memory at a time.",
    )(function)


def beside_options(default: str) -> Callable[[F], F]:
    """--context and --weights: what belongs to the rows of --data beside their features."""

    def wrap(function: F) -> F:
        context = click.option(
            "--context",
            type=data_name,
            metavar="COLUMNS|FILE.h5:/DATASET",
            show_default=default,
            help="What each row's density is conditioned on: columns of the data by name or number (a,b), which are "
            "then no features, or a dataset with as many rows (/NAME: in the data's own file).",
        )
        weights = click.option(
            "--weights",
            type=data_name,
            metavar="COLUMN|FILE.h5:/DATASET",
            show_default=default,
            help="A weight for each row, at least 0, of any scale: a column or a dataset, as for --context.",
        )
        return context(weights(function))

    return wrap


def row_options(function: F) -> F:
    """--columns, --select, --burn and --thin: which of the rows and columns of --data are used."""
    for name, metavar, text in (
        ("--thin", "N", "Keep every N-th step of chains."),
        ("--burn", "N", "Leave out the first N steps of Markov chains stored as (steps, walkers, columns)."),
        ("--select", "A:B", "Use these rows of the training (or named) dataset only, counted from 0, B not included."),
        ("--columns", "A,B,...", "Use these columns, by name or number, in this order."),
    ):
        function = click.option(name, type=data_name, metavar=metavar, show_default="all", help=text)(function)
    return function


def fixed_context_option(function: F) -> F:
    """--context: one for everything that is drawn."""
    return click.option(
        "--context", type=numbers, metavar="NUMBERS", help="For a flow with a context: its numbers, such as 0.5,1."
    )(function)


def machine_options(function: F) -> F:
    """--device, --precision and --threads."""
    threads = click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        show_default="what the machine's linear algebra uses",
        help="CPU threads.",
    )
    device = click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to compute; auto is the GPU where one can be used (nicecp doctor), else the CPU.",
    )
    precision = click.option(
        "--precision",
        type=click.Choice(["full", "tf32"]),
        show_default="full, or the checkpoint's",
        help="Of float32 matrix products on a GPU; tf32 is faster and rounds their factors to 10 bits.",
    )
    return device(precision(threads(function)))


def command(name: str, examples: str) -> Callable[[F], click.Command]:
    """A command with --debug, -h, and examples at the end of its help; set up for its messages when it runs."""

    def wrap(function: F) -> click.Command:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        made = click.command(name, epilog="\b\nExamples:\n" + examples, context_settings=settings)(function)
        made.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=DEBUG))  # last in the help
        return made

    return wrap

"""Options of `nicecp train` that set the numbers of an optimiser."""

from __future__ import annotations

from typing import Any

import click

PRESET = "from the preset"

# Options that set a number of an optimiser: option, the number's name (nicecp.optimizers), type, help.
_POSITIVE = click.FloatRange(0, min_open=True)
_BELOW_ONE = click.FloatRange(0, 1, max_open=True)
_UP_TO_ONE = click.FloatRange(0, 1, min_open=True)
NUMBERS: tuple[tuple[str, str, Any, str], ...] = (
    ("--lr", "rate", _POSITIVE, "Learning rate."),
    ("--momentum", "momentum", _BELOW_ONE, "adam: averaging of gradients (1 - beta1 of the paper)."),
    ("--beta2", "beta2", _UP_TO_ONE, "adam: as the paper writes it, 0.01 is a decay of 0.99."),
    ("--lam", "lam", _UP_TO_ONE, "adam: decay of the first-moment coefficient."),
    ("--epsilon", "epsilon", _POSITIVE, "adam: added to the root mean square."),
    ("--rate-decay", "rate_decay", click.FloatRange(1), "The rate is divided by this at every update."),
    ("--rate-floor", "rate_floor", click.FloatRange(0), "The rate does not fall below this."),
    ("--average", "average", _BELOW_ONE, "rmsprop: averaging of squared gradients."),
    ("--rms-floor", "floor", _POSITIVE, "rmsprop: lower bound of the root mean square."),
    ("--momentum-start", "momentum_start", _BELOW_ONE, "rmsprop: momentum of the first epochs."),
    ("--momentum-end", "momentum_end", _BELOW_ONE, "rmsprop: momentum after them."),
    ("--momentum-epoch", "momentum_epoch", click.IntRange(0), "rmsprop: how many first epochs."),
)


def number_options(function: Any) -> Any:
    for option, name, kind, text in reversed(NUMBERS):
        function = click.option(option, f"number_{name}", type=kind, show_default=PRESET, help=text)(function)
    return function

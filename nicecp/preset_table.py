"""The presets: the paper's models, those of the authors' published files, and three of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nicecp.optimizers import AdaM, Optimizer, RMSProp
from nicecp.transform_spec import NONE

VALID_FRACTION = 1 / 6
WIDEST_SPLINES = 1_000  # columns: splines need 23 outputs of a network for each of them
RANGE = (0.0, 1.0)


@dataclass(frozen=True)
class Preset:
    """What a preset says about the model and its training; the data say the rest.

    hidden_by_coupling : hidden layers of each coupling, where they differ; then ``hidden`` is empty.
    valid_fraction : of the training rows, where the data have no validation set of their own.
    """

    name: str
    summary: str
    hidden: tuple[int, ...]
    couplings: int
    prior: str
    init: str
    optimizer: Optimizer
    batch_size: int
    epochs: int
    patience: int | None = None
    value_range: tuple[float, float] = RANGE
    whiten: str = "none"
    hidden_by_coupling: tuple[tuple[int, ...], ...] | None = None
    valid_fraction: float = VALID_FRACTION
    partition: str = "odd-even"
    transform: str = NONE
    coupling: tuple[str, ...] = ("additive",)
    schedule: str = "constant"
    weight_decay: float = 0.0
    repartition: int = 0
    regularization: float = 0.0
    by_size: bool = False  # some of these follow the table's rows and columns: nicecp.table_size


PAPER_ADAM = AdaM(rate=1e-3, momentum=0.9, beta2=0.01, lam=1.0, epsilon=1e-4)
# On two tables of 9 and 10 columns 8 couplings of 2x64 were better by 0.3 nats than 4 of 2x128, in less time.
TABULAR_ADAM = AdaM(rate=2e-3)
# Tried on the drawn digits: at 5e-3 the likelihood is higher after a minute, but the samples are more ragged.
DEMO_ADAM = AdaM(rate=3e-3, rate_decay=1.0005)

# The published configuration files: momentum 0 for 5 epochs, then 0.5; the rate is divided by 1.0005 at every update.
CODE_RMSPROP = RMSProp(rate=1e-3, average=0.95, floor=0.01, rate_decay=1.0005, rate_floor=1e-4)
CIFAR10_RMSPROP = RMSProp(rate=2e-4, average=0.95, floor=0.01, rate_decay=1.0005, rate_floor=1e-5)
SIGNED = (-1.0, 1.0)  # CIFAR-10's range
FIFTH = 1 / 5  # CIFAR-10: the last 10,000 of 50,000 rows validate


def _depths(size: int, *depths: int) -> tuple[tuple[int, ...], ...]:
    """Couplings whose networks have so many hidden layers of one size."""
    return tuple((size,) * depth for depth in depths)


PRESETS = {
    preset.name: preset
    for preset in (
        # Dinh et al. 2015, section 5.1: the best validation is kept out of 1500 epochs, without stopping early.
        Preset("mnist", "the paper's MNIST model", (1000,) * 5, 4, "logistic", "paper", PAPER_ADAM, 200, 1500),
        Preset(
            "tfd",
            "the paper's TFD model",
            (5000,) * 4,
            4,
            "gaussian",
            "paper",
            PAPER_ADAM,
            128,
            1500,
            whiten="approximate",
        ),
        Preset(
            "svhn", "the paper's SVHN model", (2000,) * 4, 4, "logistic", "paper", PAPER_ADAM, 200, 1500, whiten="zca"
        ),
        Preset(
            "cifar10",
            "the paper's CIFAR-10 model",
            (2000,) * 4,
            4,
            "logistic",
            "paper",
            PAPER_ADAM,
            200,
            1500,
            value_range=SIGNED,
            whiten="zca",
            valid_fraction=FIFTH,
        ),
        # The authors' files put even columns before odd ones and reverse the vector after every coupling: its halves
        # take turns, as odd and even do here. SVHN's and CIFAR-10's do not reorder: halves of the columns as they are.
        Preset("mnist-code", "the authors' MNIST file", (1000,) * 5, 4, "logistic", "paper", CODE_RMSPROP, 200, 1500),
        Preset(
            "tfd-code",
            "the authors' TFD file",
            (),
            8,
            "logistic",
            "paper",
            CODE_RMSPROP,
            128,
            1500,
            hidden_by_coupling=_depths(2000, 3, 3, 2, 2, 1, 1, 1, 1),
        ),
        Preset(
            "svhn-code",
            "the authors' SVHN file",
            (2000,) * 3,
            4,
            "gaussian",
            "paper",
            CODE_RMSPROP,
            200,
            1500,
            partition="halves",
        ),
        Preset(
            "cifar10-code",
            "the authors' CIFAR-10 file",
            (),
            8,
            "gaussian",
            "paper",
            CIFAR10_RMSPROP,
            200,
            1500,
            value_range=SIGNED,
            hidden_by_coupling=_depths(2400, 1, 1, 3, 3, 2, 2, 1, 1),
            valid_fraction=FIFTH,
            partition="halves",
        ),
        Preset(
            "tabular",
            "tables of floats, additive couplings",
            (64,) * 2,
            8,
            "logistic",
            "table",
            TABULAR_ADAM,
            256,
            300,
            30,
            transform="auto",
        ),
        # A neural spline flow (Durkan et al. 2019): docs/results.md, "Splines on tables". Parts that change let any two
        # columns meet in a network.
        Preset(
            "tabular-spline",
            "tables of floats, couplings of splines",
            (128,) * 2,
            6,
            "logistic",
            "table",
            TABULAR_ADAM,
            256,
            100,
            transform="auto",
            coupling=("spline",),
            schedule="cosine",
            weight_decay=0.05,
            repartition=2,
            by_size=True,
        ),
        Preset("demo", "the drawn digits", (256,) * 3, 4, "logistic", "he", DEMO_ADAM, 100, 50),
    )
}
CHOICES = ("auto", *PRESETS)


def valid_fraction_of(name: str) -> float:
    """The part of the training rows that a preset's runs are validated on; it is needed before the data are opened."""
    return PRESETS[name].valid_fraction if name in PRESETS else VALID_FRACTION


def choose(name: str, data: Any, eight_bit: bool, columns: int = 0) -> Preset:
    """The preset of a name; "auto" is demo for the data "demo", mnist for 8-bit data, tabular-spline for floats, but
    tabular for very many columns."""
    if name == "auto":
        table = "tabular-spline" if columns <= WIDEST_SPLINES else "tabular"
        name = "demo" if isinstance(data, str) and data == "demo" else "mnist" if eight_bit else table
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(CHOICES)}")
    return PRESETS[name]

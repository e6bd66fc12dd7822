"""Presets and the settings of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from nicecp.cli import train as cli_train
from nicecp.optimizers import AdaM, RMSProp
from nicecp.preset_table import CHOICES, PRESETS, choose, valid_fraction_of
from nicecp.presets import NAMES, Settings, contradiction, resolve
from nicecp.run import Run

WINDOW = 1000


def test_mnist_is_the_paper() -> None:
    """Dinh et al. 2015, section 5.1."""
    settings = resolve("mnist.h5", True, WINDOW)
    assert settings.hidden == (1000,) * 5
    assert (settings.couplings, settings.prior, settings.init) == (4, "logistic", "paper")
    assert settings.optimizer == AdaM(1e-3, 0.9, 0.01, 1.0, 1e-4)
    assert settings.optimizer.rate_decay == 1.0
    assert (settings.batch_size, settings.epochs, settings.patience) == (200, 1500, None)
    assert (settings.dtype, settings.value_range) == ("float32", (0.0, 1.0))
    assert (
        settings.model_spec(784).n_parameters
        == 4 * (392 * 1000 + 1000 + 4 * (1000 * 1000 + 1000) + 1000 * 392 + 392) + 784
    )


# name: hidden layers of each coupling, prior, optimiser, rate and its floor, batch, range, whitening, validation rows
# (PAPER: section 2's table, protocol and optimiser; section 5 for the published files).
PAPER = {
    "mnist": ([(1000,) * 5] * 4, "logistic", "adam", 1e-3, 0.0, 200, (0, 1), "none", 1 / 6),
    "tfd": ([(5000,) * 4] * 4, "gaussian", "adam", 1e-3, 0.0, 128, (0, 1), "approximate", 1 / 6),
    "svhn": ([(2000,) * 4] * 4, "logistic", "adam", 1e-3, 0.0, 200, (0, 1), "zca", 1 / 6),
    "cifar10": ([(2000,) * 4] * 4, "logistic", "adam", 1e-3, 0.0, 200, (-1, 1), "zca", 1 / 5),
    "mnist-code": ([(1000,) * 5] * 4, "logistic", "rmsprop", 1e-3, 1e-4, 200, (0, 1), "none", 1 / 6),
    "tfd-code": (
        [(2000,) * depth for depth in (3, 3, 2, 2, 1, 1, 1, 1)],
        *("logistic", "rmsprop", 1e-3, 1e-4, 128, (0, 1), "none", 1 / 6),
    ),
    "svhn-code": ([(2000,) * 3] * 4, "gaussian", "rmsprop", 1e-3, 1e-4, 200, (0, 1), "none", 1 / 6),
    "cifar10-code": (
        [(2400,) * depth for depth in (1, 1, 3, 3, 2, 2, 1, 1)],
        *("gaussian", "rmsprop", 2e-4, 1e-5, 200, (-1, 1), "none", 1 / 5),
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(name: str) -> None:
    hidden, prior, kind, rate, floor, batch, value_range, whiten, fraction = PAPER[name]
    settings = resolve("a.h5", True, WINDOW, name)
    spec = settings.model_spec(3072)
    assert [coupling.hidden for coupling in spec.couplings] == hidden
    assert [coupling.transforms for coupling in spec.couplings] == [1, 0] * (len(hidden) // 2)
    optimizer = settings.optimizer
    assert (spec.prior, optimizer.kind, optimizer.rate, optimizer.rate_floor) == (prior, kind, rate, floor)
    if isinstance(optimizer, RMSProp):
        assert (optimizer.average, optimizer.floor, optimizer.rate_decay) == (0.95, 0.01, 1.0005)
        assert [optimizer.momentum_at(epoch) for epoch in (1, 5, 6, 7)] == [0.0, 0.0, 0.5, 0.5]
    else:
        assert optimizer == AdaM(1e-3, 0.9, 0.01, 1.0, 1e-4)
    assert (settings.batch_size, settings.value_range, settings.whiten) == (batch, value_range, whiten)
    assert (settings.epochs, settings.patience, settings.init) == (1500, None, "paper")
    assert settings.valid_fraction == valid_fraction_of(name) == fraction


def test_settings_of_older_runs_are_read() -> None:
    settings = resolve("a.h5", True, WINDOW)
    values = settings.to_json()
    for name in ("whiten", "regularization", "hidden_by_coupling"):
        del values[name]
    assert Settings.from_json(values) == settings


def test_sizes_given_replace_those_of_each_coupling() -> None:
    settings = resolve("a.h5", True, WINDOW, "cifar10-code", hidden=(7,), couplings=3)
    assert [coupling.hidden for coupling in settings.model_spec(6).couplings] == [(7,)] * 3
    own = resolve("a.h5", True, WINDOW, couplings=3, hidden_by_coupling=((1,), (2, 3), ()))
    assert [coupling.hidden for coupling in own.model_spec(6).couplings] == [(1,), (2, 3), ()]
    recorded = resolve("a.h5", True, WINDOW, "cifar10-code")
    assert contradiction(recorded, hidden=(7,)) != ""
    assert contradiction(recorded, preset="cifar10-code") == ""


def test_the_command_line_offers_every_preset() -> None:
    assert set(cli_train.PRESETS) == set(CHOICES)


def test_auto_follows_the_data() -> None:
    assert choose("auto", "demo", True).name == "demo"
    assert choose("auto", "a.h5", True).name == "mnist"
    assert choose("auto", "a.h5", False).name == "tabular-spline"
    assert choose("auto", "a.h5", False, 1000).name == "tabular-spline"
    assert choose("auto", "a.h5", False, 1001).name == "tabular"
    assert choose("tabular", "demo", True).name == "tabular"
    assert set(CHOICES) == {"auto", *PRESETS}
    with pytest.raises(ValueError, match=r"'mnits'.*mnist"):
        choose("mnits", "a.h5", True)


def test_what_is_given_wins_and_none_does_not() -> None:
    settings = resolve("a.h5", False, WINDOW, hidden=(3, 4), epochs=7, couplings=None, prior="gaussian", seed=5)
    preset = PRESETS["tabular-spline"]
    assert (settings.hidden, settings.epochs, settings.prior, settings.seed) == ((3, 4), 7, "gaussian", 5)
    assert (settings.couplings, settings.batch_size, settings.dtype) == (preset.couplings, preset.batch_size, "float64")
    assert resolve("a.h5", True, WINDOW, dtype="float64").dtype == "float64"
    assert resolve("a.h5", True, WINDOW, dtype="auto").dtype == "float32"


def test_a_presets_parts_are_for_its_own_partition() -> None:
    """Splines on tables draw other parts after every two couplings, unless the user says how columns are parted."""
    orders = [coupling.order for coupling in resolve("a.h5", False, WINDOW, "tabular-spline").model_spec(8).couplings]
    assert [order is not None for order in orders] == [False, False, True, False, True, False]
    for given in ({"partition": "halves"}, {"order": (1, 0, 2, 3)}, {"repartition": 0}):
        assert resolve("a.h5", False, WINDOW, "tabular-spline", **given).repartition == 0
    assert resolve("a.h5", False, WINDOW, "tabular-spline", partition="halves", repartition=3).repartition == 3
    assert PRESETS["tabular"].init == PRESETS["tabular-spline"].init == "table"
    assert PRESETS["demo"].init == "he", "images are not standardised"


def test_optimizers() -> None:
    assert resolve("a", False, WINDOW, numbers={"rate": 0.5, "beta2": None}).optimizer == AdaM(rate=0.5)
    made = resolve("a", False, WINDOW, optimizer="rmsprop", numbers={"momentum_epoch": 3}).optimizer
    assert made == RMSProp(momentum_epoch=3)
    with pytest.raises(ValueError, match="adam has no setting average"):
        resolve("a", False, WINDOW, numbers={"average": 0.5})
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        resolve("a", False, WINDOW, optimizer="sgd")


@pytest.mark.parametrize(
    ("eight_bit", "given", "words"),
    [
        (False, {"value_range": (-1.0, 1.0)}, "8-bit"),
        (True, {"standardize": False}, "not standardised"),
        (True, {"allow_constant": True}, "leave --allow-constant out"),
        (False, {"epochs": 0}, "epochs must be at least 1"),
        (False, {"batch_size": 0}, "batch_size"),
        (False, {"patience": 0}, "patience"),
        (False, {"hidden": (4, 0)}, "hidden sizes"),
        (False, {"seed": -1}, "seed"),
        (False, {"seed": 2**64}, "seed"),
        (False, {"dtype": "float16"}, "float16"),
        (False, {"prior": "laplace"}, "laplace"),
        (False, {"init": "zeros"}, "zeros"),
        (False, {"valid_fraction": 1.0}, "fraction"),
        (False, {"numbers": {"rate": 0.0}}, "rate must be positive"),
        (False, {"whiten": "pca"}, "whiten must be one of none, zca, gaussian, approximate"),
        (False, {"whiten": "zca", "regularization": -1.0}, "regularization must be at least 0"),
        (False, {"regularization": 0.1}, "leave it out"),
        (False, {"whiten": "approximate", "regularization": 0.1}, "leave it out"),
        (False, {"hidden_by_coupling": ((3,), (3,))}, "hidden_by_coupling must be 6 lists"),
        (False, {"couplings": 1, "hidden_by_coupling": ((0,),)}, "at least 1"),
        (True, {"preset": "tfd-code", "couplings": 4}, "couplings must be those of the preset 'tfd-code'"),
    ],
)
def test_refused(eight_bit: bool, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve("a.h5", eight_bit, WINDOW, **given)


def test_unknown_names_are_mistakes_of_the_caller() -> None:
    with pytest.raises(TypeError, match="layers"):
        resolve("a.h5", False, WINDOW, layers=3)
    for name in ("layers", "window"):  # the window follows from the data and the memory limit
        with pytest.raises(TypeError, match=f"unknown setting {name}"):
            Run.start(np.zeros((9, 2)), None, **{name: 3})
        with pytest.raises(TypeError, match=f"unknown setting {name}"):
            Run.resume("run.h5", **{name: 3})
    assert "hidden" in NAMES
    assert "preset" not in NAMES


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_json_and_back(name: str, optimizer: str) -> None:
    settings = resolve("a.h5", True, WINDOW, name, optimizer, {"rate": 0.1 / 3}, value_range=(-1.0, 1 / 3))
    text = json.dumps(settings.to_json(), allow_nan=False)
    assert Settings.from_json(json.loads(text)) == settings


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": "7"},
        {"epochs": True},
        {"seed": 1.5},
        {"hidden": 3},
        {"optimizer": {"kind": "adam", "speed": 1}},
        {"optimizer": {}},
        {"value_range": [0]},
        {"extra": 1},
        {"prior": None},
        {"logit": "x"},
        {"order": ["x"]},
        {"order": 3},
        {"partition": None},
        {"network": 1},
    ],
)
def test_json_of_another_form(change: dict[str, Any]) -> None:
    values = resolve("a.h5", False, WINDOW).to_json() | change
    with pytest.raises((ValueError, TypeError, KeyError)):
        Settings.from_json(values)


def test_contradictions() -> None:
    settings = resolve("a.h5", False, WINDOW, hidden=(8, 8), seed=3)
    assert contradiction(settings) == ""
    assert contradiction(settings, epochs=10**6, patience=1) == ""
    assert contradiction(settings, "tabular-spline", "adam", {"rate": 2e-3}, hidden=(8, 8), seed=3, dtype="auto") == ""
    assert contradiction(settings, hidden=(8,)) == "hidden is 8,8 in the run, 8 was asked for"
    assert contradiction(settings, preset="mnist") == "preset is tabular-spline in the run, mnist was asked for"
    assert contradiction(settings, optimizer="rmsprop").startswith("optimizer is adam")
    assert contradiction(settings, numbers={"rate": 0.5, "beta2": None}).startswith("rate is 0.002 in the run")
    assert "average" in contradiction(settings, numbers={"average": 0.5})


def test_every_setting_takes_part_in_the_comparison() -> None:
    """A setting that may differ without notice would make a resumed run another run."""
    settings = resolve("a.h5", False, WINDOW)
    for name in NAMES:
        if name in ("epochs", "patience", "activations", "device_memory_limit"):
            continue
        value = asdict(settings)[name]
        other = "other" if isinstance(value, str) else (not value if isinstance(value, bool) else None)
        if value is None:
            other = ((9,),)
        elif other is None:
            other = (*value, 9) if isinstance(value, tuple) else value + 1
        assert contradiction(settings, **{name: other}) != "", name
        assert contradiction(replace(settings, **{name: other}), **{name: other}) == ""

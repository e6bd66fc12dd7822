"""Presets and the settings of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from nicecp.optimizers import AdaM, RMSProp
from nicecp.presets import CHOICES, NAMES, PRESETS, Settings, choose, contradiction, resolve

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


def test_auto_follows_the_data() -> None:
    assert choose("auto", "demo", True).name == "demo"
    assert choose("auto", "a.h5", True).name == "mnist"
    assert choose("auto", "a.h5", False).name == "tabular"
    assert choose("tabular", "demo", True).name == "tabular"
    assert set(CHOICES) == {"auto", *PRESETS}
    with pytest.raises(ValueError, match=r"'mnits'.*mnist"):
        choose("mnits", "a.h5", True)


def test_what_is_given_wins_and_none_does_not() -> None:
    settings = resolve("a.h5", False, WINDOW, hidden=(3, 4), epochs=7, couplings=None, prior="gaussian", seed=5)
    preset = PRESETS["tabular"]
    assert (settings.hidden, settings.epochs, settings.prior, settings.seed) == ((3, 4), 7, "gaussian", 5)
    assert (settings.couplings, settings.batch_size, settings.dtype) == (preset.couplings, preset.batch_size, "float64")
    assert resolve("a.h5", True, WINDOW, dtype="float64").dtype == "float64"
    assert resolve("a.h5", True, WINDOW, dtype="auto").dtype == "float32"


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
    ],
)
def test_refused(eight_bit: bool, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve("a.h5", eight_bit, WINDOW, **given)


def test_unknown_names_are_mistakes_of_the_caller() -> None:
    with pytest.raises(TypeError, match="layers"):
        resolve("a.h5", False, WINDOW, layers=3)
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
    assert contradiction(settings, "tabular", "adam", {"rate": 2e-3}, hidden=(8, 8), seed=3, dtype="auto") == ""
    assert contradiction(settings, hidden=(8,)) == "hidden is 8,8 in the run, 8 was asked for"
    assert contradiction(settings, preset="mnist") == "preset is tabular in the run, mnist was asked for"
    assert contradiction(settings, optimizer="rmsprop").startswith("optimizer is adam")
    assert contradiction(settings, numbers={"rate": 0.5, "beta2": None}).startswith("rate is 0.002 in the run")
    assert "average" in contradiction(settings, numbers={"average": 0.5})


def test_every_setting_takes_part_in_the_comparison() -> None:
    """A setting that may differ without notice would make a resumed run another run."""
    settings = resolve("a.h5", False, WINDOW)
    for name in NAMES:
        if name in ("epochs", "patience"):
            continue
        value = asdict(settings)[name]
        other = "other" if isinstance(value, str) else (not value if isinstance(value, bool) else None)
        if other is None:
            other = (*value, 9) if isinstance(value, tuple) else value + 1
        assert contradiction(settings, **{name: other}) != "", name
        assert contradiction(replace(settings, **{name: other}), **{name: other}) == ""

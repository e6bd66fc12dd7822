"""`nicecp evaluate --compare`: baselines against other implementations of the same densities, on the same noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from nicecp.baselines import PUBLISHED, compare
from nicecp.checkpoint import load_run, save_run
from nicecp.cli.main import main
from nicecp.data import open_splits
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Purpose
from nicecp.scoring import score

SMALL = ["--hidden", "6", "--couplings", "3", "--batch-size", "20", "--threads", "1", "--epochs", "1"]
MIX = np.random.default_rng(8).normal(size=(5, 5)) + np.eye(5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(3)
    with h5py.File(folder / "table.h5", "w") as file:
        file["train"] = rng.normal(size=(480, 5)) @ MIX * [1, 10, 0.1, 3, 5] + 2
        file["test"] = rng.normal(size=(90, 5)) @ MIX * [1, 10, 0.1, 3, 5] + 2
    common = rng.normal(size=(690, 2)) @ rng.normal(size=(2, 12))
    pixels = np.clip(50 * common + 20 * rng.normal(size=common.shape) + 128, 0, 255).astype(np.uint8)
    with h5py.File(folder / "images.h5", "w") as file:
        file["train"], file["test"] = pixels[:600].reshape(-1, 2, 2, 3), pixels[600:].reshape(-1, 2, 2, 3)
    for name, words in (("table", []), ("images", ["--preset", "cifar10", "--whiten", "zca"])):
        out = str(folder / f"run-{name}.h5")
        assert main(["train", "--data", str(folder / f"{name}.h5"), "--out", out, "--seed", "5", *words, *SMALL]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(trained)
    capsys.readouterr()
    return trained


def rows_of(name: str) -> tuple[Any, Any]:
    """Training rows (float64) and test rows dequantized with the evaluation's noise, in data space."""
    with h5py.File(f"{name}.h5") as file:
        train, test = (file[role][()].reshape(len(file[role]), -1).astype(float) for role in ("train", "test"))
    if name == "table":
        return train, test
    noise = np.empty(test.shape)
    get_backend("cpu", 1).fill_uniform(noise, 5, Purpose.TEST_NOISE, 0)
    return train, -1 + 2 * (test + noise) / 256


def test_the_gaussian_of_a_table(folder: Path) -> None:
    _, record = load_run("run-table.h5")
    assert record is not None
    held = score("run-table.h5", "table.h5", "train")
    assert held.evaluation.rows == 400  # a sixth of 480 validates: what the Gaussian is fitted to
    (gaussian, *_) = compare("run-table.h5", "table.h5", threads=1)
    train, test = rows_of("table")
    everything = multivariate_normal(train.mean(0), np.cov(train.T, bias=True)).logpdf(test)
    assert gaussian.mean is not None
    assert gaussian.mean != pytest.approx(everything.mean(), abs=1e-6)  # not fitted to validation rows
    with open_splits("table.h5", 1 / 6, 5) as splits:
        own = np.asarray(splits.train.load()[0], float)
    expected = multivariate_normal(own.mean(0), np.cov(own.T, bias=True)).logpdf(test)
    assert gaussian.mean == pytest.approx(expected.mean(), abs=1e-9)
    assert gaussian.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(90), rel=1e-9)


def test_the_gaussian_of_images_has_the_flows_noise(folder: Path) -> None:
    (gaussian, *_) = compare("run-images.h5", "images.h5", threads=1)
    train, test = rows_of("images")
    own = train[:480]  # cifar10: the last fifth validates
    covariance = np.cov(own.T, bias=True) * (2 / 256) ** 2 + np.eye(12) * (2 / 256) ** 2 / 12
    expected = multivariate_normal(-1 + 2 * (own.mean(0) + 0.5) / 256, covariance).logpdf(test)
    assert gaussian.mean == pytest.approx(expected.mean(), abs=1e-9)


def test_factor_analysis_and_mixture(folder: Path) -> None:
    """The density in data space that scikit-learn's fit stands for."""
    from sklearn.decomposition import FactorAnalysis

    found = {other.name: other for other in compare("run-table.h5", "table.h5", threads=1)}
    factors, mixture = found["factor analysis, 2 factors"], found["mixture of 10 diagonal Gaussians"]
    with open_splits("table.h5", 1 / 6, 5) as splits:
        own = np.asarray(splits.train.load()[0], float)
    model = FactorAnalysis(2, random_state=0).fit((own - own.mean(0)) / own.std(0))
    covariance = model.get_covariance() * np.outer(own.std(0), own.std(0))
    _, test = rows_of("table")
    expected = multivariate_normal(own.mean(0), covariance).logpdf(test).mean()
    assert factors.mean == pytest.approx(expected, abs=1e-6)
    assert mixture.mean is not None
    gaussian = found["Gaussian, full covariance"].mean
    assert gaussian is not None
    assert gaussian - 5 < mixture.mean < gaussian + 1  # on Gaussian rows nothing beats the Gaussian by much


def test_the_papers_numbers_are_shown_for_its_presets(folder: Path) -> None:
    """PAPER's table."""
    assert PUBLISHED == {
        "mnist": {"NICE": 1980.50},
        "tfd": {"NICE": 5514.71, "Deep MFA": 5250.0, "GRBM": 2413.0},
        "svhn": {"NICE": 11496.55},
        "cifar10": {"NICE": 5371.78, "Deep MFA": 3622.0, "GRBM": 2365.0},
    }
    found = {other.name: other.mean for other in compare("run-images.h5", "images.h5", threads=1)}
    assert found["NICE, paper"] == 5371.78
    assert found["Deep MFA, paper"] == 3622.0
    assert not any("paper" in other.name for other in compare("run-table.h5", "table.h5", threads=1))
    flow, record = load_run("run-images.h5")
    assert record is not None
    record.config["settings"]["value_range"] = [0.0, 1.0]  # other units than the paper's
    save_run("other.h5", flow, flow.parameters(), record, overwrite=True)
    assert not any("paper" in other.name for other in compare("other.h5", "images.h5", threads=1))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "run-images.h5", "--data", "images.h5", "--threads", "1", "--compare"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [other["name"] for other in found["compare"]]
    assert names[:3] == ["Gaussian, full covariance", "factor analysis, 6 factors", "mixture of 10 diagonal Gaussians"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["this", "flow", f"{found['mean']:.2f}"]
    assert lines[3].startswith("  Gaussian, full covariance")
    assert f"{found['compare'][0]['mean']:.2f} +- " in lines[3]
    assert lines[6].split() == ["NICE,", "paper", "5371.78"]
    assert main([*words, "--split", "valid"]) == 0
    assert "on rows 480 to 599" in capsys.readouterr().out


def test_without_scikit_learn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["evaluate", "run-table.h5", "--data", "table.h5", "--compare", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("scikit-learn is not installed; pip install 'nicecp[compare]'") == 2
    assert "Gaussian, full covariance" in shown.out


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows that are not the run's, and no others to fit to; a singular covariance is said in its line."""
    with h5py.File(tmp_path / "lonely.h5", "w") as file:
        file["train"] = np.random.default_rng(0).normal(size=(30, 5))
    assert main(["evaluate", "run-table.h5", "--data", str(tmp_path / "lonely.h5"), "--compare"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "baselines need other rows than those that are scored" in shown.err
    rows = np.random.default_rng(0).normal(size=(60, 5))
    rows[:, 4] = rows[:, 0]
    with h5py.File(tmp_path / "singular.h5", "w") as file:
        file["train"], file["test"] = rows, rows[:20]
    assert main(["evaluate", "run-table.h5", "--data", str(tmp_path / "singular.h5"), "--compare"]) == 0
    assert "the covariance of the 60 training rows is singular" in capsys.readouterr().out

"""nicecp.NICEDensity among scikit-learn's own tools: its checks, pipelines, searches, names of columns."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nicecp
from nicecp.errors import DataError, MissingExtra

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn", minversion="1.6")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from nicecp import NICEDensity  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# Not the default of any parameter.
OTHER: dict[str, Any] = {
    "hidden": (8,), "n_couplings": 3, "coupling": "additive", "repartition": 1, "prior": "gaussian", "epochs": 4,
    "batch_size": 30, "learning_rate": 5e-3, "weight_decay": 0.125, "patience": 2,
    "valid_fraction": 0.25, "transforms": "none", "whiten": "zca", "regularization": 0.5, "allow_constant": True,
    "threads": 2, "random_state": 3,
}  # fmt: skip


def correlated(n: int, seed: int = 0) -> Any:
    """Rows of a Gaussian : (n, 3) in units far from 1, and what their mean log-density is in expectation."""
    factor = np.array([[2.0, 0, 0], [30.0, 10.0, 0], [0.01, -0.02, 0.01]])
    x = np.random.default_rng(seed).normal(size=(n, 3)) @ factor.T + [5, -100, 1]
    return x, -1.5 * np.log(2 * np.pi * np.e) - np.log(np.abs(np.linalg.det(factor)))


@parametrize_with_checks([NICEDensity(), NICEDensity(coupling="additive", prior="gaussian", epochs=5)])
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
def test_no_check_is_left_out() -> None:
    """One of them only runs where SciPy was told so before it was imported."""
    code = (
        "import json, nicecp; from sklearn.utils.estimator_checks import check_estimator as check;"
        "print(json.dumps({r['check_name']: r['status'] for r in check(nicecp.NICEDensity(epochs=2), on_fail=None)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SCIPY_ARRAY_API": "1"}, cwd=ROOT, check=True,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert {name: status for name, status in found.items() if status != "passed"} == {}
    assert len(found) >= 40
    assert "check_array_api_input" in found


def test_every_parameter_is_kept_and_used() -> None:
    estimator = NICEDensity(**OTHER)
    assert estimator.get_params() == OTHER
    assert NICEDensity().set_params(**OTHER).get_params() == OTHER
    assert not any(OTHER[name] == value for name, value in NICEDensity().get_params().items())
    fitted = clone(estimator).fit(correlated(200)[0])
    flow, record = fitted.flow_, fitted.record_
    assert [coupling.hidden for coupling in flow.spec.couplings] == [(8,)] * 3
    assert [coupling.order is not None for coupling in flow.spec.couplings] == [False, True, True]
    assert ({coupling.law for coupling in flow.spec.couplings}, flow.spec.prior) == ({"additive"}, "gaussian")
    assert flow.backend.threads == 2
    assert (record.epoch, record.history[0].epoch) == (4, 1)
    assert (flow.preprocessing[1].kind, flow.preprocessing[1].regularization) == ("zca", 0.5)
    assert record.history[-1].learning_rate == pytest.approx(5e-3 * 0.5 * (1 + np.cos(0.75 * np.pi)))
    kept = clone(estimator).set_params(weight_decay=0.0).fit(correlated(200)[0]).flow_.parameters()
    decayed = flow.parameters()
    norms = [np.linalg.norm(values["couplings/0/layers/0/weight"]) for values in (decayed, kept)]
    assert 0.9 < norms[0] / norms[1] < 0.9999
    with pytest.raises(DataError, match="constant columns"):
        NICEDensity(epochs=1).fit(np.ones((50, 2)) * [1, 2])
    NICEDensity(epochs=1, allow_constant=True).fit(np.ones((50, 2)) * [1, 2])
    white = NICEDensity(epochs=1, transforms="quantile", whiten="gaussian").fit(correlated(200)[0]).flow_.preprocessing
    assert [step.kind for step in white] == ["quantile", "standardize", "triangular"]
    steps = NICEDensity(epochs=1, transforms="quantile").fit(correlated(200)[0]).flow_.preprocessing
    assert [step.kind for step in steps] == ["quantile", "standardize"]


def test_what_is_not_given_follows_rows_and_columns() -> None:
    """As the preset tabular-spline: repeated rows count once, those without weight not at all."""
    x = np.random.default_rng(5).normal(size=(60, 40))
    chosen = NICEDensity()._chosen(x, None)
    assert (chosen.batch_size, chosen.epochs, chosen.weight_decay) == (32, 100, 20.0)
    assert (chosen.whiten, chosen.regularization) == ("gaussian", (40 / 50) ** 2)
    assert NICEDensity()._chosen(np.repeat(x, 7, axis=0), None) == chosen
    weight = np.repeat([1.0, 0.0], [42, 18])
    assert NICEDensity()._chosen(x, weight).regularization == (40 / 35) ** 2
    assert NICEDensity(whiten="zca")._chosen(x[:, :8], None).regularization == (8 / 50) ** 2
    assert NICEDensity()._chosen(x[:, :8], None).whiten == "none"
    assert NICEDensity(whiten="none", regularization=0.5)._chosen(x, None).regularization == 0
    given = NICEDensity(epochs=3, batch_size=7, weight_decay=0.0, regularization=0.5)._chosen(x, None)
    assert (given.epochs, given.batch_size, given.weight_decay, given.regularization) == (3, 7, 0.0, 0.5)


def test_score_is_the_mean_log_density_in_the_units_of_the_data() -> None:
    x, expected = correlated(2000)
    test = correlated(4000, seed=1)[0]
    estimator = NICEDensity(hidden=(16,), random_state=0).fit(x)
    values = estimator.score_samples(test)
    assert (values.shape, values.dtype) == ((4000,), np.float64)
    np.testing.assert_array_equal(values, estimator.flow_.log_prob(test))
    assert estimator.score(test) == pytest.approx(values.mean(), rel=1e-14)
    # A mean of 4000 has a standard error of sqrt(1.5 / 4000) = 0.02; fits to 2000 rows are 0.03 too low (measured).
    assert -0.1 < estimator.score(test) - expected < 0.05
    drawn = estimator.sample(4000, random_state=1)
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), atol=5 * x.std(0).max() / np.sqrt(2000))
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.corrcoef(x.T), atol=0.1)


def test_few_rows_of_many_columns_are_whitened_with_care() -> None:
    """By (columns / training rows)^2, without which the whitening fits the few rows there are far too closely."""
    rng = np.random.default_rng(5)
    x, test = rng.normal(size=(60, 40)), rng.normal(size=(2000, 40))
    fits = {
        key: NICEDensity(epochs=2, random_state=0, regularization=value).fit(x).score(test)
        for key, value in {"default": None, "same": (40 / 50) ** 2, "least": 1e-3}.items()
    }
    assert fits["default"] == pytest.approx(fits["same"], rel=1e-9)
    assert fits["least"] < fits["default"] - 30
    assert fits["default"] > -0.5 * 40 * np.log(2 * np.pi * np.e) - 25


def test_random_states_decide() -> None:
    x = correlated(300)[0]
    one, same, other = (NICEDensity(epochs=3, random_state=seed).fit(x) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.score_samples(x), same.score_samples(x))
    assert np.abs(one.score_samples(x) - other.score_samples(x)).max() > 1e-3
    np.testing.assert_array_equal(one.sample(5, random_state=7), one.sample(5, np.random.RandomState(7)))
    assert one.sample().shape == (1, 3)
    assert np.abs(one.sample(random_state=7) - one.sample(random_state=8)).max() > 1e-3
    with pytest.raises(NotFittedError):
        NICEDensity().sample()
    with pytest.raises(NotFittedError):
        NICEDensity().score_samples(x)


@pytest.mark.slow
def test_pipelines_and_searches_in_two_processes() -> None:
    x, expected = correlated(600)
    pipeline = make_pipeline(StandardScaler(), NICEDensity(hidden=(16,), epochs=40, random_state=0))
    direct = clone(pipeline[-1]).fit(x)
    pipeline.fit(x)
    # The pipeline's density is that of the scaled rows.
    log_det = -np.log(pipeline[0].scale_).sum()
    np.testing.assert_allclose(pipeline.score_samples(x) + log_det, direct.score_samples(x), atol=1e-6)
    # A sum over rows instead of their mean would be hundreds off.
    assert cross_val_score(pipeline, x, cv=3).mean() == pytest.approx(pipeline.score(x), abs=0.3)
    grid = {"nicedensity__whiten": ["none", "gaussian"], "nicedensity__coupling": ["affine", "additive"]}
    two, one = (GridSearchCV(pipeline, grid, cv=3, n_jobs=jobs).fit(x) for jobs in (2, 1))
    assert two.best_params_["nicedensity__whiten"] == "gaussian"
    assert two.best_score_ + log_det == pytest.approx(expected, abs=0.2)
    np.testing.assert_array_equal(two.cv_results_["mean_test_score"], one.cv_results_["mean_test_score"])


@pytest.mark.parametrize("whiten", ["none", "gaussian"])
def test_weights_are_repetitions(whiten: str) -> None:
    """Where every step sees all rows, and none validates: then the same sums are added in another order."""
    x = correlated(80)[0]
    weight = np.random.default_rng(1).integers(0, 4, 80)
    settings: dict[str, Any] = {
        "hidden": (8,), "epochs": 30, "batch_size": 1000, "valid_fraction": 0.0, "transforms": "none",
        "whiten": whiten, "random_state": 0,
    }  # fmt: skip
    weighted = NICEDensity(**settings).fit(x, sample_weight=weight / 3)
    repeated = NICEDensity(**settings).fit(x.repeat(weight, axis=0))
    plain = NICEDensity(**settings).fit(x)
    np.testing.assert_allclose(weighted.score_samples(x), repeated.score_samples(x), rtol=1e-7)
    assert np.abs(weighted.score_samples(x) - plain.score_samples(x)).max() > 1e-3
    for wrong in (-weight, np.full(80, np.nan), weight[:5], np.zeros(80)):
        with pytest.raises(ValueError):
            NICEDensity(**settings).fit(x, sample_weight=wrong)


def test_names_of_columns_come_from_tables_and_stay() -> None:
    frame = pd.DataFrame(correlated(200)[0], columns=["pt", "eta", "phi"])
    estimator = NICEDensity(epochs=2, random_state=0).fit(frame)
    assert list(estimator.feature_names_in_) == ["pt", "eta", "phi"]
    assert estimator.flow_.info.columns == ("pt", "eta", "phi")
    with pytest.raises(ValueError, match="feature names"):
        estimator.score_samples(frame[["eta", "pt", "phi"]])
    frame["eta"] = 1.0
    with pytest.raises(ValueError, match=r"'X': constant columns .*1 \('eta'\)"):
        estimator.fit(frame)


def test_integers_are_numbers_and_float32_is_read_as_it_is() -> None:
    x = np.random.default_rng(0).integers(0, 256, (200, 4), dtype=np.uint8)
    estimator = NICEDensity(epochs=2, random_state=0).fit(x)
    assert "dequantize" not in [step.kind for step in estimator.flow_.preprocessing]
    np.testing.assert_array_equal(estimator.score_samples(x), estimator.score_samples(x.astype(float)))
    assert estimator.score_samples(x.astype(np.float32)).dtype == np.float64


def test_a_fitted_estimator_is_pickled_with_its_flow() -> None:
    x = correlated(100)[0]
    estimator = NICEDensity(epochs=2, random_state=0).fit(x)
    twin = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(twin.score_samples(x), estimator.score_samples(x))
    assert twin.record_.history == estimator.record_.history


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"hidden": 64}, TypeError, "hidden must be a sequence"),
        ({"coupling": "cubic"}, ValueError, "unknown coupling law 'cubic'"),
        ({"valid_fraction": 1.0}, ValueError, "fraction of held-out rows"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, ValueError, "rate must be positive"),
        ({"threads": 0}, ValueError, "thread"),
    ],
)
def test_parameters_out_of_bounds(parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NICEDensity(**parameters).fit(correlated(50)[0])


def test_without_scikit_learn_the_rest_works(tmp_path: Path) -> None:
    """A package of that name that cannot be imported stands for one that is not installed, or too old."""
    code = (
        "import sys; sys.modules['sklearn'] = None; import nicecp; nicecp.NICE(4, (4,));"
        "print('NICEDensity' in dir(nicecp));\ntry:\n nicecp.NICEDensity\nexcept ImportError as e:\n print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    listed, message = done.stdout.splitlines()
    assert "pip install 'nicecp[sklearn]'" in message
    assert listed == "False"
    assert issubclass(MissingExtra, ImportError)
    assert "NICEDensity" in dir(nicecp)

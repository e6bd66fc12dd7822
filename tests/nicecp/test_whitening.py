"""Whitening: exact bijections, fits against closed forms, and their place in training and evaluation."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from nicecp import fit, load
from nicecp.data import open_splits
from nicecp.errors import DataError
from nicecp.evaluate import evaluate
from nicecp.flow import NICE
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Purpose, Slot
from nicecp.loading import Loader, loading
from nicecp.preprocessing import Dequantize, Standardize, Step, Triangular, Zca
from nicecp.split import Split
from nicecp.testing import check_gradients
from nicecp.train import TrainConfig, Trainer
from nicecp.whitening import fit_approximate, fit_gaussian, fit_zca, moments, whitening_step
from tests import gates
from tests.nicecp.test_checkpoint import documented_log_prob

D = 5
RNG = np.random.default_rng(7)
MIX = RNG.normal(size=(D, D)) + 2 * np.eye(D)
TABLE = RNG.normal(size=(3000, D)) @ MIX.T * [1, 30, 0.2, 4, 1] + [3, 0, -1, 9, 2]
COMMON = RNG.normal(size=(800, 2)) @ RNG.normal(size=(2, 6))
PIXELS = np.clip(30 * COMMON + 15 * RNG.normal(size=(800, 6)) + 128, 0, 255).astype(np.uint8)


def train_of(data: Any, fraction: float = 0.0) -> Split:
    return open_splits(data, fraction).train


def rotated(d: int, seed: int = 0) -> Any:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


ZCA = Zca(np.linspace(-1, 1, D), np.linspace(0.0, 3, D), rotated(D), 0.3)
TRIANGULAR = Triangular(np.tril(np.random.default_rng(4).normal(size=(D, D))) - 2 * np.eye(D), np.arange(5.0))
STANDARDIZE = Standardize(np.linspace(-3, 5, D), np.linspace(0.5, 4, D))


# --- bijections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [ZCA, TRIANGULAR, STANDARDIZE, Dequantize(-1, 1)], ids=lambda step: step.kind)
def test_each_step_is_a_bijection_with_its_log_determinant(step: Step) -> None:
    x = np.random.default_rng(1).normal(size=(7, D)) * 3
    z = step.forward(x)
    np.testing.assert_allclose(step.inverse(z), x, rtol=0, atol=1e-12)
    # The steps are affine: a difference of step 1 has no error but rounding.
    jacobian = np.array([(step.forward(x[:1] + e) - step.forward(x[:1]))[0] for e in np.eye(D)]).T
    sign, log_det = np.linalg.slogdet(jacobian)
    assert sign != 0
    assert step.log_det == pytest.approx(log_det, abs=1e-10)
    dz = np.random.default_rng(2).normal(size=(7, D))
    np.testing.assert_allclose(step.backward(dz, x[:1]), dz @ jacobian, rtol=0, atol=1e-12)


def test_zca_is_symmetric_and_triangular_is_not() -> None:
    origin = np.zeros((1, D))
    matrix = ZCA.forward(np.eye(D)) - ZCA.forward(origin)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
    lower = (TRIANGULAR.forward(np.eye(D)) - TRIANGULAR.forward(origin)).T
    np.testing.assert_allclose(np.triu(lower, 1), 0, atol=1e-13)


@pytest.mark.parametrize("steps", [(ZCA,), (TRIANGULAR,), (STANDARDIZE, ZCA), (TRIANGULAR, STANDARDIZE, ZCA)])
def test_flows_with_whitening(steps: tuple[Step, ...], tmp_path: Path) -> None:
    """Log-density, gradients, inverse; the file, read by the page's own code too."""
    flow, x = gates.make_flow(gates.make_spec(D, [(6,)] * 3), None, preprocessing=steps)
    z = x
    for step in steps:
        z = step.forward(z)
    bare = NICE.from_spec(flow.spec, flow.parameters())
    np.testing.assert_allclose(flow.log_prob(x), bare.log_prob(z) + sum(s.log_det for s in steps), rtol=1e-12)
    check_gradients(flow, x)
    h, log_det = flow.forward(x)
    back, other = flow.inverse(h)
    np.testing.assert_allclose(back, x, atol=1e-9)
    np.testing.assert_allclose(log_det, -other)
    flow.save(tmp_path / "f.h5")
    np.testing.assert_array_equal(load(tmp_path / "f.h5").log_prob(x), flow.log_prob(x))
    np.testing.assert_allclose(documented_log_prob()(tmp_path / "f.h5", x), flow.log_prob(x), rtol=1e-10)


# --- fits -------------------------------------------------------------------------------------------------------------


def test_moments_of_floats() -> None:
    mean, covariance = moments(train_of(TABLE))
    np.testing.assert_allclose(mean, TABLE.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(TABLE.T, bias=True), rtol=1e-10)
    mean, covariance = moments(train_of(TABLE), (Standardize(TABLE.mean(0), TABLE.std(0)),))
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(covariance, np.corrcoef(TABLE.T), atol=1e-10)


def test_moments_of_bytes_are_those_of_many_dequantizations() -> None:
    few = PIXELS[:40] // 64  # noise of one level matters here
    mean, covariance = moments(train_of(few), (Dequantize(-1, 1),))
    u = np.random.default_rng(0).random((4000, *few.shape))
    x = (-1 + 2 * (few + u) / 256).reshape(-1, 6)
    # 160,000 rows: the mean's error is 2 / 256 / sqrt(12 * 160,000) = 6e-6, variances are good to 0.4 %
    np.testing.assert_allclose(mean, x.mean(0), atol=5e-5)
    np.testing.assert_allclose(covariance, np.cov(x.T, bias=True), atol=4e-3 * covariance.max())


@pytest.mark.parametrize("regularization", [0.0, 0.5])
def test_zca_whitens(regularization: float) -> None:
    step = fit_zca(train_of(TABLE), (), regularization)
    covariance = np.cov(step.forward(TABLE).T, bias=True)
    values, vectors = np.linalg.eigh(np.cov(TABLE.T, bias=True))
    expected = (vectors * (values / (values + regularization))) @ vectors.T  # the identity without regularization
    np.testing.assert_allclose(covariance, expected, atol=1e-9)
    np.testing.assert_allclose(step.forward(TABLE).mean(0), 0, atol=1e-10)


def test_the_gaussian_is_the_gaussian() -> None:
    step = fit_gaussian(train_of(TABLE))
    z = step.forward(TABLE)
    log_prob = -0.5 * (z**2 + np.log(2 * np.pi)).sum(1) + step.log_det
    expected = multivariate_normal(TABLE.mean(0), np.cov(TABLE.T, bias=True)).logpdf(TABLE)
    np.testing.assert_allclose(log_prob, expected, atol=1e-9)
    regular = fit_gaussian(train_of(TABLE), (), 0.7)
    expected = multivariate_normal(TABLE.mean(0), np.cov(TABLE.T, bias=True) + 0.7 * np.eye(D)).logpdf(TABLE)
    z = regular.forward(TABLE)
    np.testing.assert_allclose(-0.5 * (z**2 + np.log(2 * np.pi)).sum(1) + regular.log_det, expected, atol=1e-9)


def mean_log_prob(step: Step, x: Any) -> float:
    z = step.forward(x)
    return float(-0.5 * (z**2 + np.log(2 * np.pi)).sum(1).mean() + step.log_det)


@pytest.mark.parametrize("data", [TABLE, PIXELS], ids=["floats", "bytes"])
def test_approximate_whitening_converges_to_the_closed_form(data: Any) -> None:
    """Measured: 2e-4 nats below the best there is on the training rows, L within 1.1 % of its largest element."""
    backend = get_backend("cpu", 1)
    with open_splits(data, 0.2) as splits:
        steps: tuple[Step, ...] = (Dequantize(0, 1),) if data is PIXELS else ()
        best = fit_gaussian(splits.train, steps)
        found = fit_approximate(splits.train, steps, backend=backend, seed=3, patience=40)
        x = np.asarray(splits.train.load()[0], float)
        if data is PIXELS:
            x = (x + np.random.default_rng(0).random(x.shape)) / 256
    start = mean_log_prob(Standardize(x.mean(0), x.std(0)), x)
    top = mean_log_prob(best, x)
    assert top - start > 0.3  # there was something to learn
    assert top - mean_log_prob(found.step, x) < 0.002
    np.testing.assert_allclose(found.step.lower, best.lower, atol=0.03 * np.abs(best.lower).max())
    assert found.history[found.best_epoch - 1] == max(found.history)
    assert len(found.history) == min(500, found.best_epoch + 40)
    assert data is TABLE or len(found.history) < 500  # it stopped early


def test_early_stopping_keeps_the_best_and_scores_in_data_space() -> None:
    backend = get_backend("cpu", 1)
    with open_splits(TABLE, 0.2) as splits:
        assert splits.valid is not None
        found = fit_approximate(splits.train, (), splits.valid, backend=backend, epochs=3)
        again = fit_approximate(splits.train, (), splits.valid, backend=backend, epochs=3)
        x = splits.valid.load()[0]
    assert len(found.history) == 3
    assert found.history[2] == pytest.approx(mean_log_prob(found.step, x), rel=1e-10)
    np.testing.assert_array_equal(found.step.lower, again.step.lower)


def test_learning_many_features_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 1000))
    fit_approximate(train_of(rows), (), None, backend=get_backend("cpu", 1), epochs=1, batch_size=20)
    fit_approximate(train_of(rows[:, :9]), (), None, backend=get_backend("cpu", 1), epochs=1, batch_size=20)
    assert [record.getMessage()[:40] for record in caplog.records] == ["learning the whitening of 1000 features "]


def test_singular_covariances_are_refused() -> None:
    twice = np.column_stack([TABLE, TABLE[:, 0] * 2])
    for fitted in (fit_zca, fit_gaussian):
        with pytest.raises(DataError, match=r"3,000 training rows is singular.*--regularization"):
            fitted(train_of(twice))
        assert np.isfinite(fitted(train_of(twice), (), 0.1).log_det)
    few = train_of(TABLE[:4])
    with pytest.raises(DataError, match="4 training rows is singular"):
        fit_zca(few)
    fit_zca(train_of(PIXELS[:4]), (Dequantize(),))  # noise makes any covariance of bytes regular


@pytest.mark.parametrize(
    ("kind", "regularization", "message"),
    [("pca", 0.0, "none, zca"), ("zca", -1.0, "at least 0"), ("approximate", 0.1, "for whitening by zca or gaussian")],
)
def test_refused_settings(kind: str, regularization: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whitening_step(kind, train_of(TABLE), (), None, regularization, 0, get_backend("cpu", 1))


# --- in training and evaluation ---------------------------------------------------------------------------------------

PIXEL_ZCA = fit_zca(train_of(PIXELS), (Dequantize(-1, 1),))


@pytest.mark.parametrize(
    ("data", "steps"),
    [
        (TABLE, (ZCA,)),
        (TABLE, (TRIANGULAR,)),
        (TABLE, (STANDARDIZE, ZCA, TRIANGULAR)),
        (PIXELS, (Dequantize(-1, 1), PIXEL_ZCA)),
        (PIXELS, (Dequantize(-1, 1), Standardize(np.arange(6.0), np.arange(1.0, 7)), PIXEL_ZCA)),
    ],
)
def test_batches_are_whitened_after_fresh_noise(data: Any, steps: tuple[Step, ...]) -> None:
    d = data.shape[1]
    flow = NICE(d, (4,), 3, preprocessing=steps, threads=1)
    n, backend = 20, flow.backend
    loader, ws, state = Loader(flow, n), flow.network.workspace(n, False), np.zeros(Slot.SIZE)
    index = np.arange(2 * n)
    for epoch in (1, 2):
        state[Slot.EPOCH], state[Slot.CURSOR] = epoch, 1
        loader.load(ws, backend.asarray(data), index, index + 50, state, 9, Purpose.TRAIN_NOISE)
        x = np.asarray(data[n : 2 * n], float)
        if data is PIXELS:
            u = np.empty((n, d))
            backend.fill_uniform(u, 9, Purpose.TRAIN_NOISE, epoch, 50 + n)
            x = -1 + 2 * (x + u) / 256
        for step in steps:
            x = step.forward(x)
        got = np.empty((n, d))
        got[:, 0::2], got[:, 1::2] = ws.x
        np.testing.assert_allclose(got, x, rtol=0, atol=1e-10 * np.abs(x).max())


def test_a_dequantization_comes_first() -> None:
    with pytest.raises(ValueError, match="must be the first"):
        loading((Standardize(np.zeros(3), np.ones(3)), Dequantize()), 3)


def test_evaluation_and_training_report_data_space() -> None:
    flow = NICE(6, (8,), 3, prior="gaussian", seed=2, threads=1)
    record = fit(flow, PIXELS, epochs=2, batch_size=50, whiten="zca", value_range=(-1, 1), seed=3)
    assert [step.kind for step in flow.preprocessing] == ["dequantize", "zca"]
    with open_splits(PIXELS, seed=3) as splits:
        found = evaluate(flow, splits.valid, 3, record.best_epoch)  # type: ignore[arg-type]
        u = np.empty((133, 6))
        flow.backend.fill_uniform(u, 3, Purpose.VALID_NOISE, record.best_epoch, 667)
    x = -1 + 2 * (PIXELS[667:] + u) / 256
    assert found.mean == pytest.approx(flow.log_prob(x).mean(), rel=1e-5)  # a float32 flow
    assert found.mean == record.best_valid_log_likelihood
    assert abs(record.history[0].train_log_likelihood - record.history[0].valid_log_likelihood) < 3
    samples = flow.sample(500, 1)
    assert np.abs(samples.mean(0) - x.mean(0)).max() < 0.2  # in data space


def test_steps_with_whitening_allocate_nothing_that_grows() -> None:
    data = np.random.default_rng(0).integers(0, 256, (400, 64), np.uint8)
    split = train_of(data)
    flow = NICE(64, (32,), 3, dtype="float32", threads=1, preprocessing=(Dequantize(), fit_zca(split, (Dequantize(),))))
    trainer = Trainer(flow, split, None, TrainConfig(3, 100))
    addresses = [array.ctypes.data for array in (*trainer.workspace.x, trainer._loader._x, trainer._loader._z)]
    for _ in range(5):
        trainer.step()
    tracemalloc.start()
    try:
        trainer.step()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        trainer._steps[0]()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 100 * 64 * 4 // 2  # less than half a batch
    assert addresses == [array.ctypes.data for array in (*trainer.workspace.x, trainer._loader._x, trainer._loader._z)]

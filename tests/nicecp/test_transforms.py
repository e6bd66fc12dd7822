"""Column transforms: inverses, slopes against differences, log-determinants against slogdet, supports, tails."""

from __future__ import annotations

import numpy as np
import pytest

import nicecp
from nicecp import spline
from nicecp.preprocessing import Standardize, apply_steps, steps_backward, undo_steps
from nicecp.transforms import Angle, ColumnStep, Log, Logit, Quantile, Recorded, Student, column_step

ONE = np.array([1])


def heavy(n: int = 4000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(1.5, n)


# A step that changes column 1 of 3, and values of that column within its support.
CASES: dict[str, tuple[ColumnStep, np.ndarray]] = {
    "log": (Log(ONE, np.array([-2.0])), np.geomspace(1e-3, 1e6, 41) - 2.0),
    "logit": (Logit(ONE, np.array([-1.0]), np.array([3.0])), np.linspace(-0.999, 2.999, 41)),
    "angle": (Angle(ONE, np.array([0.4]), np.array([2 * np.pi])), 0.4 + 2 * np.pi * np.linspace(0.01, 0.99, 41)),
    "student": (
        Student(ONE, np.array([2.5]), np.array([0.3]), np.array([2.0])),
        0.3 + np.concatenate([-np.geomspace(1e5, 1e-2, 20), [0.0], np.geomspace(1e-2, 1e5, 20)]),
    ),
    "quantile": (
        Quantile.of(ONE, [spline.fit_knots(heavy(), 32)]),
        np.concatenate([-np.geomspace(1e4, 1e-2, 20), np.geomspace(1e-2, 1e4, 21)]),
    ),
}


def rows_of(values: np.ndarray) -> np.ndarray:
    other = np.random.default_rng(1).normal(size=(len(values), 2))
    return np.stack([other[:, 0], values, other[:, 1]], axis=1)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_other_columns(name: str) -> None:
    step, values = CASES[name]
    x = rows_of(values)
    z = step.forward(x)
    assert np.array_equal(z[:, [0, 2]], x[:, [0, 2]])
    assert np.isfinite(z).all()
    order = np.argsort(values)
    assert (np.diff(z[order, 1]) > 0).all()
    # 1e-9: the angle and the logit lose digits of 1 - u near an end, far tails those of log x
    assert np.allclose(step.inverse(z), x, rtol=1e-9, atol=1e-12)
    assert np.array_equal(step.inverse(z)[:, [0, 2]], x[:, [0, 2]])


@pytest.mark.parametrize("name", CASES)
def test_slopes_against_differences(name: str) -> None:
    """log_det_rows is log dz/dx, and backward adds its derivative; fourth-order central differences."""
    step, values = CASES[name]
    x = rows_of(values)
    h = 1e-4 * np.maximum(np.abs(x[:, 1] - {"log": -2.0}.get(name, 0.0)), 1e-2)
    if name == "logit":
        h = 1e-4 * np.minimum(x[:, 1] + 1.0, 3.0 - x[:, 1])
    shift = np.zeros_like(x)
    shift[:, 1] = h

    def difference(f: object) -> np.ndarray:
        at = [np.asarray(f(x + k * shift)) for k in (-2, -1, 1, 2)]  # type: ignore[operator]
        return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)

    if name == "quantile":  # not where a difference reaches over a knot, at which the second derivative jumps
        knots = step.arrays()["x"]
        away = (np.abs(x[:, 1:2] - knots) > 3 * h[:, None]).all(axis=1)
        assert away.sum() > 30
    else:
        away = np.ones(len(x), bool)
    slope = difference(lambda x: step.forward(x)[:, 1])
    assert np.allclose(np.log(slope), step.log_det_rows(x), atol=1e-6)
    z, log_det = step.forward_with_log_det(x)
    np.testing.assert_array_equal(z, step.forward(x))
    np.testing.assert_array_equal(log_det, step.log_det_rows(x))
    bend = difference(step.log_det_rows)
    ones = np.zeros_like(x)
    ones[:, 1] = 1.0
    expected = slope + bend
    assert np.allclose(step.backward(ones, x)[away, 1], expected[away], rtol=1e-5, atol=1e-7)


def test_log_determinants_against_slogdet() -> None:
    """A stack of all kinds on different columns, mixed afterwards: slogdet of the numerical Jacobian."""
    rng = np.random.default_rng(3)
    x = np.stack(
        [rng.gamma(2.0, size=50), rng.uniform(0, 1, 50), rng.uniform(-3, 3, 50), heavy(50), heavy(50, 1)], axis=1
    )
    steps = (
        Recorded(np.array([0]), np.array([0.01])),
        Log(np.array([0]), np.array([-0.1])),
        Logit(np.array([1]), np.array([-0.1]), np.array([1.1])),
        Angle(np.array([2]), np.array([-np.pi]), np.array([2 * np.pi])),
        Student(np.array([3]), np.array([1.5]), np.array([0.0]), np.array([1.0])),
        Quantile.of(np.array([2, 4]), [spline.fit_knots(rng.normal(size=500), 8), spline.fit_knots(heavy(), 16)]),
        Standardize(np.arange(5.0), np.arange(1.0, 6.0)),
    )
    z, log_det = apply_steps(steps, x)
    back, inverse_log_det = undo_steps(steps, z)
    assert np.allclose(back, x, rtol=1e-9)
    assert np.allclose(log_det, -np.asarray(inverse_log_det), atol=1e-9)
    for i in range(0, 50, 7):
        h = 1e-6 * np.maximum(np.abs(x[i]), 1e-2)
        up, down = x[i] + np.diag(h), x[i] - np.diag(h)
        jacobian = (apply_steps(steps, up)[0] - apply_steps(steps, down)[0]) / (2 * h[:, None])
        assert abs(np.linalg.slogdet(jacobian)[1] - np.asarray(log_det)[i]) < 1e-6


def test_gradient_of_a_flow_with_transforms() -> None:
    rng = np.random.default_rng(4)
    x = np.stack([rng.gamma(2.0, size=2000), heavy(2000), rng.normal(size=2000)], axis=1)
    steps = (
        Log(np.array([0]), np.array([-0.5])),
        Quantile.of(np.array([1]), [spline.fit_knots(x[:, 1], 16)]),
        Standardize(np.zeros(3), np.array([1.0, 2.0, 1.5])),
    )
    flow = nicecp.NICE(3, (16,), coupling="affine", init="he", seed=1, preprocessing=steps)
    rows = x[:20] + 0.01  # values that were fitted to are knots, where the second derivative jumps
    h = 1e-5 * np.maximum(np.abs(rows), 1e-2)
    got = flow.grad_log_prob(rows)
    for j in range(3):
        e = np.zeros_like(rows)
        e[:, j] = h[:, j]
        expected = (flow.log_prob(rows + e) - flow.log_prob(rows - e)) / (2 * h[:, j])
        assert np.allclose(got[:, j], expected, rtol=1e-4, atol=1e-5)
    log_prob, log_det = flow.log_prob(rows), flow.forward(rows)[1]
    again, back_log_det = flow.inverse(flow.forward(rows)[0])
    assert np.allclose(again, rows)
    assert np.allclose(log_det, -back_log_det)
    dz = np.ones((5, 3))
    assert np.allclose(steps_backward((), dz, rows[:5]), dz)
    assert np.isfinite(log_prob).all()


def test_density_integrates_to_one() -> None:
    """Over x in one column, with the other at a point: exp(log_det) times the normal density of z, for every kind."""
    for name, (step, _) in CASES.items():
        z = np.linspace(-9, 9, 4001)
        x = step.inverse(rows_of(z) * np.array([0.0, 1.0, 0.0]))
        x[:, 1] = np.maximum.accumulate(x[:, 1])
        density = np.exp(step.log_det_rows(x) - 0.5 * step.forward(x)[:, 1] ** 2) / np.sqrt(2 * np.pi)
        total = np.trapezoid(density, x[:, 1])
        assert total == pytest.approx(1.0, abs=2e-3), name


@pytest.mark.parametrize(
    ("name", "outside"),
    [("log", [-2.0, -3.0]), ("logit", [-1.0, 3.0, 3.5, -9.0]), ("student", []), ("quantile", []), ("angle", [])],
)
def test_outside_the_support(name: str, outside: list[float]) -> None:
    """-inf outside and at infinite values, NaN for NaN, and nothing else disturbed."""
    step, values = CASES[name]
    flow = nicecp.NICE(3, (4,), preprocessing=(step,))
    rows = rows_of(np.array([*outside, np.inf, -np.inf, np.nan, values[20]]))
    got = flow.log_prob(rows)
    assert (got[:-2] == -np.inf).all()
    assert np.isnan(got[-2])
    assert np.isfinite(got[-1])


def test_angles_have_one_density_whatever_the_turn() -> None:
    step, values = CASES["angle"]
    x, turned = rows_of(values), rows_of(values + 4 * np.pi)
    assert np.allclose(step.forward(x), step.forward(turned), atol=1e-9)
    assert np.allclose(step.log_det_rows(x), step.log_det_rows(turned), atol=1e-9)
    seam = rows_of(np.array([0.4, 0.4 + 2 * np.pi]))
    assert np.isfinite(step.forward(seam)).all()
    uniform = step.forward(rows_of(np.array([0.4 + 1.0])))[0, 1]
    log_logistic = -abs(uniform) - 2 * np.log1p(np.exp(-abs(uniform)))
    assert log_logistic + step.log_det_rows(rows_of(np.array([1.4])))[0] == pytest.approx(-np.log(2 * np.pi))


def test_student_far_out() -> None:
    """Beyond where the tail probability underflows, the leading term takes over without a step."""
    step = Student(ONE, np.array([20.0]), np.array([0.0]), np.array([1.0]))
    x = rows_of(np.array([1e14, 1.2e14, 1e15, 1e20, -1e20]))
    z = step.forward(x)
    assert np.isfinite(z).all()
    assert z[0, 1] < z[1, 1] < z[2, 1] < z[3, 1]
    assert z[4, 1] == -z[3, 1]
    assert np.allclose(step.inverse(z), x, rtol=1e-9)


def test_an_outlier_cannot_ruin_a_mean() -> None:
    """A value a million scales beyond the last knot stands within a few units of it, and costs tens of nats."""
    values = np.random.default_rng(5).normal(size=10_000)
    knots = spline.fit_knots(values, 64)
    z, log_slope, _ = spline.forward(np.array([1e6, -1e6, 1e12]), knots)
    assert (np.abs(z) < 35).all()
    assert np.abs(z[:2]).max() < 20
    assert (log_slope > -35).all()
    straight = knots.z[-1] + knots.slope[-1] * (1e6 - knots.x[-1])
    assert straight > 1e5  # what a linear tail would have made of it


def test_splines_fit_quantiles() -> None:
    rng = np.random.default_rng(6)
    values = np.concatenate([rng.normal(size=3000), 5 + 0.1 * rng.normal(size=3000)])
    z = spline.forward(values, spline.fit_knots(values, 128))[0]
    from scipy.stats import kstest

    assert kstest(z, "norm").statistic < 0.01
    with pytest.raises(ValueError, match="two different"):
        spline.fit_knots(np.ones(10), 4)
    few = spline.fit_knots(np.array([0.0, 1.0, 1.0, 2.0]), 64)
    assert len(few.x) >= 2


def test_a_repeated_value_stays_bounded() -> None:
    """Half of the rows at exactly 0: knots stay distinct, slopes finite."""
    values = np.concatenate([np.zeros(500), np.random.default_rng(7).gamma(2.0, size=500)])
    knots = spline.fit_knots(values, 64)
    assert (np.diff(knots.x) > 0).all()
    z, log_slope, _ = spline.forward(values, knots)
    assert np.isfinite(z).all()
    assert log_slope.max() < 20


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Log(np.array([1, 1]), np.zeros(2)), "increasing"),
        (lambda: Log(np.array([-1]), np.zeros(1)), "from 0 on"),
        (lambda: Log(np.array([], np.int64), np.zeros(0)), "at least one"),
        (lambda: Log(ONE, np.zeros(2)), "one entry"),
        (lambda: Log(ONE, np.array([np.nan])), "finite"),
        (lambda: Logit(ONE, np.ones(1), np.ones(1)), "low must be below"),
        (lambda: Student(ONE, np.ones(1), np.ones(1), np.zeros(1)), "positive"),
        (lambda: Angle(ONE, np.ones(1), np.zeros(1)), "positive"),
        (lambda: Recorded(ONE, np.zeros(1)), "positive"),
        (lambda: Quantile(ONE, np.array([2]), np.zeros(2), np.arange(2.0), np.ones(2), np.ones((1, 2))), "increase"),
        (lambda: Quantile(ONE, np.array([3]), np.arange(2.0), np.arange(2.0), np.ones(2), np.ones((1, 2))), "add up"),
        (
            lambda: Quantile(ONE, np.array([2]), np.arange(2.0), np.arange(2.0), np.zeros(2), np.ones((1, 2))),
            "positive",
        ),
        (lambda: nicecp.NICE(2, (4,), preprocessing=(Log(np.array([2]), np.zeros(1)),)), "column 2"),
    ],
)
def test_wrong_numbers_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_what_their_arrays_say(name: str) -> None:
    step, values = CASES[name]
    again = column_step(step.kind, step.arrays())
    x = rows_of(values)
    assert np.array_equal(again.forward(x), step.forward(x))

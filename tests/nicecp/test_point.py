"""One point: the compiled log-density, called from Python, from other people's compiled code and from C."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.errors import NumbaWarning, TypingError

from nicecp import spline
from nicecp.context import Context
from nicecp.flow import NICE
from nicecp.preprocessing import Dequantize, MarginLogit, Standardize, Step, Triangular, Zca, undo_steps
from nicecp.transforms import Angle, Log, Logit, Quantile, Recorded, Student
from tests import gates, oracle

ROOT = Path(__file__).resolve().parents[2]
D = 5
EXACT = 1e-13  # also of float32 flows: their weights are float32, sums are not; measured: below 1e-14


def zca(d: int) -> Step:
    vectors = np.linalg.qr(np.random.default_rng(3).normal(size=(d, d)))[0]
    return Zca(np.linspace(-1, 1, d), np.linspace(0.5, 3, d), vectors, 0.1)


def triangular(d: int) -> Step:
    lower = np.tril(np.random.default_rng(4).normal(size=(d, d)), -1) + np.diag(np.linspace(0.5, 2, d))
    return Triangular(lower, np.linspace(-1, 1, d))


def make(
    laws: Any = ("additive",),
    prior: str = "logistic",
    dtype: str = "float64",
    d: int = D,
    hidden: Any = ((7, 6),) * 3,
    steps: tuple[Step, ...] = (),
    **partition: Any,
) -> tuple[NICE, Any, Any]:
    """A flow, rows for it, and their log-densities by the oracle."""
    spec = gates.make_spec(d, hidden, prior, dtype, laws=laws, **partition)
    parameters = gates.draw_parameters(spec)
    z = np.random.default_rng(1).normal(0, 1.5, (20, d))
    x, log_det = undo_steps(steps, z)
    flow = NICE.from_spec(spec, parameters, steps)
    return flow, x, oracle.log_prob(spec, gates.host_parameters(flow), z) - log_det


def transforms(*kinds: str) -> tuple[Step, ...]:
    """Steps for columns 0, 2 and, of the quantile transform, 1; behind them what fitted flows have."""
    columns, edge = np.array([0, 2]), np.array([-3.0, 0.5])
    knots = spline.fit_knots(np.random.default_rng(5).standard_t(3, 500), 12)
    made: dict[str, Step] = {
        "recorded": Recorded(columns, np.array([0.1, 0.2])),
        "log": Log(columns, edge),
        "logit": Logit(columns, edge, np.array([-1.0, 9.0])),
        "angle": Angle(columns, edge, np.array([2 * np.pi, 24.0])),
        "student": Student(columns, np.array([1.5, 4.0]), edge, np.array([0.5, 3.0])),
        "quantile": Quantile.of(np.array([1]), [knots]),
    }
    return (*(made[kind] for kind in kinds), *gates.standardize(D))


CASES: dict[str, dict[str, Any]] = {
    "additive": {},
    "gaussian": {"prior": "gaussian"},
    "multiplicative": {"laws": ("multiplicative",)},
    "affine": {"laws": ("affine",), "prior": "gaussian"},
    "laws in turn": {"laws": ("affine", "additive", "multiplicative")},
    "spline": {"laws": ("spline",)},
    "spline, float32": {"laws": ("spline", "affine"), "dtype": "float32"},
    "splines of many features": {"laws": ("spline",), "d": 37, "hidden": ((5,), (7,), (6,))},
    "float32": {"dtype": "float32", "laws": ("affine",)},
    "no hidden layer": {"hidden": ((),) * 3},
    "wide": {"d": 3, "hidden": ((64, 67), (129, 1), (80, 100))},
    "many features": {"d": 150, "hidden": ((20,), (30,), (10,))},
    "two features": {"d": 2, "hidden": ((64, 64),) * 4},
    "halves": {"partition": "halves"},
    "permutation": {"partition": (3, 0, 4, 2, 1)},
    "other parts": {"orders": {1: (3, 0, 4, 2, 1), 2: (1, 2, 0, 4, 3)}, "laws": ("affine",)},
    "other parts, float32": {"orders": {2: (3, 0, 4, 2, 1)}, "dtype": "float32", "partition": "halves"},
    "standardize": {"steps": gates.standardize(D)},
    "dequantize": {"steps": (Dequantize(-1.0, 1.0), Standardize(np.full(D, 0.5), np.full(D, 0.25)))},
    "zca": {"steps": (*gates.standardize(D), zca(D)), "dtype": "float32"},
    **{kind: {"steps": transforms(kind)} for kind in ("recorded", "log", "logit", "angle", "student", "quantile")},
    "all columns": {"steps": (*transforms("log", "quantile"), zca(D)), "dtype": "float32"},
    "triangular": {"steps": (triangular(D), zca(D), triangular(D))},
    "logit of images": {"steps": (Dequantize(-1.0, 1.0), MarginLogit(np.full(D, -1.0), np.ones(D), 0.05), zca(D))},
}


@pytest.mark.parametrize("case", CASES)
def test_a_point_has_the_log_density_of_the_oracle(case: str) -> None:
    flow, x, expected = make(**CASES[case])
    tolerance = 1e-12 if flow.preprocessing else EXACT
    log_prob, in_c = flow.njit_log_prob(), flow.cfunc().ctypes
    for row, value in zip(x, expected, strict=True):
        found = log_prob(row)
        assert isinstance(found, float)
        assert found == pytest.approx(value, rel=tolerance, abs=tolerance)
        assert found == flow.log_prob(row) == in_c(len(row), row.ctypes.data_as(ctypes.POINTER(ctypes.c_double)))
    np.testing.assert_array_equal(flow.log_prob(x[:7]), [log_prob(row) for row in x[:7]])


def test_compiled_code_calls_it() -> None:
    flow, x, expected = make()
    log_prob = flow.njit_log_prob()

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def total(x: Any) -> float:
        result = 0.0
        for i in range(x.shape[0]):
            result += log_prob(x[i])
        return result

    assert total(x) == pytest.approx(expected.sum(), rel=1e-13)
    assert total(np.asfortranarray(x)) == total(x)
    assert log_prob.targetoptions["nogil"], "several threads score at once"


def test_arrays_of_other_kinds() -> None:
    flow, x, _ = make()
    log_prob, wide = flow.njit_log_prob(), np.zeros((D, 3))
    wide[:, 1] = x[0]
    fixed = x[0].copy()
    fixed.setflags(write=False)
    assert log_prob(wide[:, 1]) == log_prob(x[0])
    assert log_prob(x[0][::-1].copy()[::-1]) == log_prob(x[0])
    assert log_prob(fixed) == log_prob(x[0])
    assert flow.log_prob(wide[:, 1]) == flow.log_prob(fixed) == flow.log_prob(list(x[0])) == log_prob(x[0])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_context_comes_second_and_in_c_behind_the_point(dtype: str) -> None:
    spec = gates.make_spec(D, ((7, 6),) * 3, "logistic", dtype, laws=("affine",))
    spec = replace(spec, n_context=2)
    scale = Context(np.array([1.0, -2.0]), np.array([0.5, 3.0]))
    parameters = gates.draw_parameters(spec)
    flow = NICE.from_spec(spec, parameters, gates.standardize(D), context=scale)
    x, given = np.random.default_rng(1).normal(size=(2, 9, D))[0], np.random.default_rng(2).normal(size=(9, 2))
    tolerance = 1e-12 if dtype == "float64" else 2e-6
    log_prob, in_c = flow.njit_log_prob(), flow.cfunc().ctypes
    few, flow._few = flow._few, 0
    expected, one_given = flow.log_prob(x, given), flow.log_prob(x, given[0])
    flow._few = few
    assert not np.allclose(expected, one_given)
    np.testing.assert_allclose([log_prob(*pair) for pair in zip(x, given, strict=True)], expected, rtol=tolerance)
    np.testing.assert_allclose(flow.log_prob(x, given), expected, rtol=tolerance)
    np.testing.assert_allclose(flow.log_prob(x, given[0]), one_given, rtol=tolerance)
    np.testing.assert_allclose(flow.log_prob(x[:4], given[:4]), expected[:4], rtol=tolerance)
    np.testing.assert_allclose(flow.log_prob(x[:4], given[0]), one_given[:4], rtol=tolerance)
    whole = np.concatenate([x[3], given[3]])
    address = whole.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
    assert in_c(D + 2, address) == log_prob(x[3], given[3]) == pickle.loads(pickle.dumps(log_prob))(x[3], given[3])
    assert np.isnan(in_c(D, address))
    for bad in (np.nan, np.inf):
        assert np.isnan(log_prob(x[0], np.array([0.0, bad])))
        assert np.isnan(flow.log_prob(x[0], np.array([0.0, bad])))
    with pytest.raises(ValueError, match="context must have length 2"):
        log_prob(x[0], given[0, :1])


@pytest.mark.parametrize("x", [np.zeros(D, np.float32), np.zeros(D, np.int64), np.zeros((D, 1))])
def test_arrays_that_would_be_misread_are_refused(x: Any) -> None:
    with pytest.raises(TypingError, match="1-D arrays of float64"):
        make()[0].njit_log_prob()(x)


# --- what is no number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [None, -50.0])
def test_nan_and_infinity(floor: float | None) -> None:
    flow, x, _ = make(steps=gates.standardize(D))
    log_prob, in_c = flow.njit_log_prob(floor), flow.cfunc(floor)
    lowest = -np.inf if floor is None else floor
    points = [(np.nan, np.nan), (np.inf, lowest), (-np.inf, lowest)]
    if floor is not None:
        points.append((1e4, floor))
    for value, expected in points:
        point = x[0].copy()
        point[2] = value
        address = point.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
        many = np.tile(point, (3, 1))
        for found in (log_prob(point), in_c.ctypes(D, address), flow.log_prob(point, floor=floor)):
            np.testing.assert_equal(found, expected)
        for few in (flow._few, 0):
            flow._few = few
            np.testing.assert_array_equal(flow.log_prob(many, floor=floor), [expected] * 3)
    point = np.array([np.nan, np.inf, 0, 0, 0])
    assert np.isnan(log_prob(point))
    assert np.isnan(flow.log_prob(point))
    assert log_prob(x[0]) > -50.0


def test_what_float32_cannot_hold_is_infinitely_far_away() -> None:
    flow, x, _ = make(dtype="float32", steps=(Standardize(np.zeros(D), np.full(D, 0.1)),))
    x[0, 1], x[1, 1] = 1e38, 1e-3
    for few in (flow._few, 0):
        flow._few = few
        found = flow.log_prob(x[:2])
        assert found[0] == -np.inf
        assert np.isfinite(found[1])
    assert flow.njit_log_prob()(x[0]) == -np.inf


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_a_finite_point_without_a_finite_log_density_is_an_error(prior: str) -> None:
    """Infinity less infinity, and a square beyond the largest number."""
    flow, x, _ = make(prior=prior)
    named = flow.parameters()
    if prior == "logistic":
        named["couplings/0/layers/0/weight"][:] = 1e200
        named["couplings/0/layers/1/weight"][:] = np.array([1e200, -1e200, 1, 1, 1, 1])
        flow.set_parameters(named)
    x[0] = 1e200
    log_prob, in_c = flow.njit_log_prob(floor=-1e300), flow.cfunc(floor=-1e300).ctypes
    with pytest.raises(FloatingPointError, match="finite"):
        log_prob(x[0])
    assert np.isnan(in_c(D, x[0].ctypes.data_as(ctypes.POINTER(ctypes.c_double))))
    for few in (flow._few, 0):
        flow._few = few
        for rows in (x[0], np.concatenate([x[:1], np.full((1, D), np.nan)])):
            with pytest.raises(FloatingPointError, match="log_prob of row 0 "):
                flow.log_prob(rows, floor=-1e300)


def test_wrong_lengths_are_refused() -> None:
    flow, x, _ = make()
    with pytest.raises(ValueError, match=f"x must have length {D}"):
        flow.njit_log_prob()(x[0, :-1])
    in_c = flow.cfunc().ctypes
    for n in (D - 1, D + 1, 0, -1):
        assert np.isnan(in_c(n, x.ctypes.data_as(ctypes.POINTER(ctypes.c_double))))


def test_steps_without_a_compiled_form_are_named() -> None:
    class Odd(Standardize):
        kind = "odd"

    flow, x, _ = make(steps=(Odd(np.zeros(D), np.ones(D)),))
    for make_it in (flow.njit_log_prob, flow.cfunc):
        with pytest.raises(ValueError, match="'odd' has no compiled form"):
            make_it()
    plain = make()[0]
    np.testing.assert_allclose(flow.log_prob(x), plain.log_prob(x), rtol=1e-12)


@pytest.mark.parametrize("kind", ["log", "logit", "angle", "student", "quantile"])
def test_transforms_agree_with_those_of_rows_everywhere(kind: str) -> None:
    """At the ends of the support, beyond them, at knots and far out; the rows' have tests of their own."""
    flow, _, _ = make(steps=transforms(kind))
    column = 1 if kind == "quantile" else 2
    step = flow.preprocessing[0]
    knots = step.x if isinstance(step, Quantile) else []
    places = [-1e300, -1e30, -40.0, 0.5, np.nextafter(0.5, 1), 8.99, 9.0, 9.5, 24.5, 1e5, 1e30, 1e300, np.nan, *knots]
    x = np.zeros((len(places), D))
    x[:, 0], x[:, column] = -2.0, places
    log_prob = flow.njit_log_prob()
    expected = gates.log_prob_by_backend(flow, x)
    np.testing.assert_allclose([log_prob(row) for row in x], expected, rtol=1e-11)
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=1e-11)
    assert np.isinf(expected).any() == (kind in ("log", "logit"))


def test_ends_of_the_logit_of_images() -> None:
    """With a margin the ends have a density, and so has a little beyond them."""
    flow, _, _ = make(steps=(MarginLogit(np.zeros(D), np.linspace(1.0, 3.0, D), 0.05),))
    x = np.full((8, D), 0.5)
    x[:, 2] = [0.0, 2.0, 1e-9, -0.1, 2.1, -0.2, 3.0, np.nan]
    expected = gates.log_prob_by_backend(flow, x)
    log_prob = flow.njit_log_prob()
    np.testing.assert_array_equal(np.isfinite(expected), [True] * 5 + [False] * 3)
    np.testing.assert_allclose([log_prob(row) for row in x], expected, rtol=1e-12)
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=1e-12)


# --- weights --------------------------------------------------------------------------------------------------------


def test_log_prob_follows_the_weights_and_a_function_does_not() -> None:
    flow, x, _ = make()
    other = {name: value + 0.1 for name, value in flow.parameters().items()}
    before, log_prob = flow.log_prob(x[0]), flow.njit_log_prob()
    flow.set_parameters(other)
    assert flow.log_prob(x[0]) == flow.njit_log_prob()(x[0]) != before
    assert log_prob(x[0]) == before


def test_pickles_hold_the_weights_once() -> None:
    flow, x, _ = make(d=8, hidden=((64, 64),) * 4, steps=gates.standardize(8))
    log_prob, in_c = flow.njit_log_prob(-1e3), flow.cfunc(-1e3, exponentiate=True)
    weights = 8 * flow.n_parameters
    for made in (log_prob, in_c):
        assert weights <= len(pickle.dumps(made)) < 1.1 * weights + 4096
    twin, far = pickle.loads(pickle.dumps(log_prob)), np.full(8, 1e9)
    assert twin(x[0]) == log_prob(x[0])
    assert twin(far) == -1e3
    address = x[0].ctypes.data_as(ctypes.POINTER(ctypes.c_double))
    assert pickle.loads(pickle.dumps(in_c)).ctypes(8, address) == pytest.approx(np.exp(log_prob(x[0])), rel=1e-12)


def test_a_caller_keeps_the_weights_alive() -> None:
    flow, x, _ = make()
    functions = {"log_prob": flow.njit_log_prob()}
    kept = weakref.ref(functions["log_prob"]._model)
    exec("def call(x):\n    return log_prob(x) + 1.0", functions)
    call = numba.njit(functions["call"])
    expected = call(x[0])
    del functions["log_prob"], functions["call"]
    call.py_func.__globals__.clear()
    gc.collect()
    assert kept() is not None
    filler = [np.full(4096, np.nan) for _ in range(200)]
    assert call(x[0]) == expected
    del filler, call, functions
    gc.collect()
    assert kept() is None, "the last caller is gone"


CACHED = """
import warnings
import numba, numpy as np
from nicecp.flow import NICE

log_prob = NICE(3, (4,), 3).njit_log_prob()

@numba.njit(cache=True)
def call(x):
    return log_prob(x)

call(np.zeros(3))
"""


def test_a_function_with_an_address_in_it_is_not_cached(tmp_path: Path) -> None:
    """Another process would find the address of this one's weights."""
    path = tmp_path / "user.py"
    path.write_text(CACHED)
    with pytest.warns(NumbaWarning, match="dynamic globals"):
        exec(compile(CACHED, str(path), "exec"), {"__name__": "user"})
    assert [found.name for found in tmp_path.rglob("*.nb?")] == []


SECOND = """
import sys
import numpy as np
import nicecp
d, *hidden = map(int, sys.argv[1:])
flow = nicecp.NICE(d, hidden, 3, seed=d)
log_prob = flow.njit_log_prob()
assert log_prob(np.zeros(d)) == flow.log_prob(np.zeros(d))
"""


@pytest.mark.slow
def test_flows_of_all_shapes_share_one_compiled_function(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = []
    for shape in (["3", "4"], ["6", "20", "9"]):
        subprocess.run([sys.executable, "-c", SECOND, *shape], cwd=ROOT, env=environment, check=True, timeout=300)
        found.append(sorted(path.name for path in tmp_path.rglob("*.nbc")))
    assert found[0] == found[1] != []
    assert any("core_float64" in name for name in found[0])


# --- C --------------------------------------------------------------------------------------------------------------


def test_scipy_integrates_the_density_to_one() -> None:
    from scipy.integrate import nquad

    flow = NICE(2, (8,), 3, "gaussian", init="he", seed=2)
    function = flow.cfunc(exponentiate=True).low_level_callable()  # which keeps the rest
    gc.collect()
    mass, _ = nquad(function, [(-9, 9)] * 2, opts={"epsabs": 1e-6, "epsrel": 1e-6, "limit": 200})
    assert mass == pytest.approx(1.0, abs=1e-5)


def test_the_second_form_takes_a_point_alone() -> None:
    flow, x, _ = make()
    in_c = flow.cfunc()
    plain = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p)(in_c.point_address)
    assert plain(x[1].ctypes.data, None) == flow.log_prob(x[1])

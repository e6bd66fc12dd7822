"""Every operation of the kernel contract on every device, against the float64 oracle (tests/kernels/checks.py).

Sizes straddle what kernels are cut into: one, a warp and a row of threads less or more one, more than a block.
"""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.backend import ALIGNMENT, FACTOR_BOUND, PRIORS, SPLINE_BINS, SPLINE_BOUND, Backend
from tests import oracle
from tests.kernels import checks
from tests.kernels.checks import Device, halves, new_state

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
PRIOR = pytest.mark.parametrize("prior", sorted(PRIORS))
ROWS_COLUMNS = pytest.mark.parametrize(
    ("n", "d"), [(1, 2), (1, 1025), (31, 33), (33, 31), (1000, 3), (1025, 33), (31, 1000), (1000, 1025)]
)


# --- arrays ------------------------


@pytest.mark.parametrize("shape", [5, (3, 7), (0, 4), (1025,)])
def test_alloc_is_zero_contiguous_and_aligned(backend: Backend, shape: int | tuple[int, ...]) -> None:
    for dtype in (np.float32, np.float64, np.int64, np.uint8):
        array = backend.alloc(shape, dtype)
        host = backend.copy_out(array)
        assert host.shape == ((shape,) if isinstance(shape, int) else shape)
        assert host.dtype == dtype
        assert not host.any()
        assert array.flags.c_contiguous
        if backend.device == "cpu" and host.size:
            assert array.ctypes.data % ALIGNMENT == 0


def test_copies(backend: Backend) -> None:
    host = np.arange(6.0).reshape(2, 3)
    array = backend.alloc((2, 3), np.float32)
    backend.copy_in(array, host)
    out = backend.copy_out(array)
    assert out.dtype == np.float32
    assert np.array_equal(out, host)
    out[0, 0] = 99
    assert backend.copy_out(array)[0, 0] == 0, "copy_out must be a copy"
    given = backend.asarray(host.T)
    assert np.array_equal(backend.copy_out(given), host.T)
    assert given.flags.c_contiguous
    if backend.device == "cpu":
        assert backend.asarray(host) is host


def test_record_and_computing(backend: Backend) -> None:
    """A recorded step does each time what the step does."""
    total, one = backend.alloc((3, 2), np.float64), backend.asarray(np.ones((3, 2)))
    with backend.computing():
        step = backend.record(lambda: backend.couple(total, total, one, 1))
        before = backend.copy_out(total)[0, 0]
        step()
        step()
        backend.synchronize()
    assert (backend.copy_out(total) == before + 2).all()


# --- dense layers ------------------------

LAYERS = pytest.mark.parametrize(
    ("n", "i", "o"),
    [(1, 1, 1), (1, 1000, 1025), (31, 33, 1), (33, 1, 31), (1000, 33, 31), (1025, 31, 33), (33, 1025, 1000)],
)


@DTYPES
@LAYERS
@pytest.mark.parametrize("transposes", [(False, False), (True, False), (False, True)])
def test_matmul(backend: Backend, dtype: str, n: int, i: int, o: int, transposes: tuple[bool, bool]) -> None:
    checks.check_matmul(backend, dtype, n, i, o, *transposes)


@DTYPES
@LAYERS
@pytest.mark.parametrize("relu", [False, True])
def test_dense_forward(backend: Backend, dtype: str, n: int, i: int, o: int, relu: bool) -> None:
    checks.check_dense_forward(backend, dtype, n, i, o, relu)


@DTYPES
@LAYERS
@pytest.mark.parametrize("relu", [False, True])
def test_dense_backward(backend: Backend, dtype: str, n: int, i: int, o: int, relu: bool) -> None:
    checks.check_dense_backward(backend, dtype, n, i, o, relu, (True, True, True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "wanted",
    [(False, True, True), (True, False, False), (True, True, False), (True, False, True), (False, False, True)],
)
def test_dense_backward_without_some_outputs(backend: Backend, relu: bool, wanted: tuple[bool, bool, bool]) -> None:
    checks.check_dense_backward(backend, "float64", 33, 31, 17, relu, wanted)


@DTYPES
def test_dense_forward_keeps_nan(backend: Backend, dtype: str) -> None:
    device = Device(backend, dtype)
    x = np.ones((33, 4))
    x[5, 2] = np.nan
    y = device.out(33, 6)
    backend.dense_forward(y, device.put(x), device.put(np.ones((4, 6))), device.put(np.zeros(6)), True)
    assert np.array_equal(np.isnan(device.get(y)).all(axis=1), np.arange(33) == 5)
    assert np.isnan(device.get(y)).sum() == 6


# --- coupling ------------------------


@DTYPES
@ROWS_COLUMNS
@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_couple(backend: Backend, dtype: str, n: int, d: int, sign: int, aliased: bool) -> None:
    checks.check_couple(backend, dtype, n, d, sign, aliased)


FACTORS = pytest.mark.parametrize("law", ["multiplicative", "affine"])


@DTYPES
@ROWS_COLUMNS
@FACTORS
@pytest.mark.parametrize("sign", [1, -1])
def test_factor_forward(backend: Backend, dtype: str, n: int, d: int, law: str, sign: int) -> None:
    checks.check_factor_forward(backend, dtype, n, d, law, sign)
    checks.check_factor_forward(backend, dtype, n, d, law, sign, aliased=True, first=False)


@DTYPES
@ROWS_COLUMNS
@FACTORS
def test_factor_backward(backend: Backend, dtype: str, n: int, d: int, law: str) -> None:
    checks.check_factor_backward(backend, dtype, n, d, law)
    checks.check_factor_backward(backend, dtype, n, d, law, aliased=True)


SPLINES = pytest.mark.parametrize(("n", "d"), [(1, 2), (1, 1025), (31, 33), (33, 31), (1000, 3), (1025, 5)])


@DTYPES
@SPLINES
@pytest.mark.parametrize("sign", [1, -1])
def test_spline_forward(backend: Backend, dtype: str, n: int, d: int, sign: int) -> None:
    checks.check_spline_forward(backend, dtype, n, d, sign)
    checks.check_spline_forward(backend, dtype, n, d, sign, aliased=True, first=False)


@DTYPES
@SPLINES
def test_spline_backward(backend: Backend, dtype: str, n: int, d: int) -> None:
    checks.check_spline_backward(backend, dtype, n, d)
    checks.check_spline_backward(backend, dtype, n, d, aliased=True)


@DTYPES
def test_splines_far_out(backend: Backend, dtype: str) -> None:
    """Outside of the interval nothing changes, whatever the network says; inside slopes are bounded; NaN stays."""
    device, k = Device(backend, dtype), 3 * SPLINE_BINS - 1
    edge = SPLINE_BOUND
    x = np.array([-1e30, -1e6, -edge, 0.3, np.nextafter(edge, 0, dtype=dtype), edge, 1e6, 1e30, np.nan, 0.3, -np.inf])
    m = 1e30 * device.normal(len(x), k)
    m[-2] = np.nan
    put_x, put_m, n = device.put(x[:, None]), device.put(m), len(x)
    for sign in (1, -1):
        y, log_det = device.out(n, 1), device.out(n, dtype="float64")
        backend.spline_forward(y, log_det, put_x, put_m, sign, True)
        same = [0, 1, 2, 5, 6, 7, 8, 10]
        np.testing.assert_array_equal(device.get(y)[same, 0], x[same].astype(dtype))
        assert (device.get(log_det)[same] == 0).all()
        assert np.isnan(device.get(y)[9])
        inner = [3, 4]
        assert (abs(device.get(y)[inner]) <= edge).all()
        assert (abs(device.get(log_det)[inner]) < 30).all(), "slopes lie between 1e-13 and 1e4"
    dx, dm, dy = device.out(n, 1), device.out(n, k), device.put(np.ones((n, 1)))
    backend.spline_backward(dx, dm, dy, device.put(np.ones(n), "float64"), put_x, put_m)
    assert (device.get(dx)[same] == 1).all()
    assert not device.get(dm)[same].any()
    assert np.isfinite(device.get(dm)[inner]).all()
    backend.spline_backward(dx, dm, dy, device.put(np.ones(n), "float64"), put_x, device.put(np.zeros((n, k))))
    np.testing.assert_allclose(device.get(dx)[:8], 1, rtol=1e-6)  # the identity


@DTYPES
def test_factors_far_out(backend: Backend, dtype: str) -> None:
    """Never 0 and never infinite, however large the network's output; NaN stays NaN, in its own row."""
    device = Device(backend, dtype)
    u = np.array([[1e4], [-1e4], [1e-3], [0], [np.nan], [np.inf], [-np.inf]])
    y, log_det, ones = device.out(7, 1), device.out(7, dtype="float64"), device.put(np.ones((7, 1)))
    backend.factor_forward(y, log_det, ones, device.put(u), False, 1, True)
    # the third: a = u up to u^3 / 27
    expected = [FACTOR_BOUND, -FACTOR_BOUND, 1e-3, 0, np.nan, FACTOR_BOUND, -FACTOR_BOUND]
    np.testing.assert_allclose(device.get(log_det), expected, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(device.get(y)[:, 0], np.exp(expected), rtol=1e-6)
    dx, dm, zero = device.out(7, 1), device.out(7, 1), device.put(np.zeros(7), "float64")
    backend.factor_backward(dx, dm, ones, zero, ones, device.put(u), False)
    np.testing.assert_allclose(device.get(dm)[[0, 1, 5, 6], 0], 0, atol=1e-12)


def test_accumulate(backend: Backend) -> None:
    device = Device(backend, "float32")
    out, x = device.put(np.arange(33.0), "float64"), device.put(np.full(33, 1e-9), "float64")
    backend.accumulate(out, x)
    np.testing.assert_array_equal(device.get(out), np.arange(33.0) + 1e-9)


# --- scaling and prior ------------------------


@DTYPES
@ROWS_COLUMNS
@PRIOR
@pytest.mark.parametrize("aliased", [False, True])
def test_scale_prior_forward(backend: Backend, dtype: str, n: int, d: int, prior: str, aliased: bool) -> None:
    checks.check_scale_prior_forward(backend, dtype, n, d, prior, aliased)


@DTYPES
@ROWS_COLUMNS
@PRIOR
@pytest.mark.parametrize("aliased", [False, True])
def test_scale_prior_backward(backend: Backend, dtype: str, n: int, d: int, prior: str, aliased: bool) -> None:
    checks.check_scale_prior_backward(backend, dtype, n, d, prior, aliased)


@DTYPES
@PRIOR
def test_scale_prior_backward_without_ds(backend: Backend, dtype: str, prior: str) -> None:
    checks.check_scale_prior_backward(backend, dtype, 33, 7, prior, aliased=True, with_ds=False)


@DTYPES
@ROWS_COLUMNS
@pytest.mark.parametrize("aliased", [False, True])
def test_scale_inverse(backend: Backend, dtype: str, n: int, d: int, aliased: bool) -> None:
    checks.check_scale_inverse(backend, dtype, n, d, aliased)


def log_density(backend: Backend, dtype: str, h: np.ndarray, prior: str) -> np.ndarray:
    """h : (n, 2) -> logp : (n,) with log-scale 0."""
    device = Device(backend, dtype)
    n = len(h)
    logp, h0, h1 = device.out(n, dtype="float64"), device.out(n, 1), device.out(n, 1)
    zero = device.put(np.zeros(1))
    backend.scale_prior_forward(logp, h0, h1, device.put(h[:, :1]), device.put(h[:, 1:]), zero, zero, PRIORS[prior])
    return device.get(logp)


@DTYPES
@PRIOR
def test_log_density_far_out(backend: Backend, dtype: str, prior: str) -> None:
    """Row by row to a few units in the last place up to |h| = 1e4, where exp(|h|) overflows both dtypes."""
    far = np.concatenate([[0.0, 1e-20, 1e-7], np.logspace(-5, 4, 200)]).astype(dtype).astype(float)
    h = np.stack([np.concatenate([far, -far]), np.zeros(2 * len(far))], axis=1)
    expected = oracle.log_prior(h, prior).sum(axis=1)
    np.testing.assert_allclose(
        log_density(backend, dtype, h, prior), expected, rtol=2.5e-7 if dtype == "float32" else 1e-15
    )


@DTYPES
@PRIOR
def test_log_density_of_numbers_that_are_not_finite(backend: Backend, dtype: str, prior: str) -> None:
    inf, nan = np.inf, np.nan
    h = np.array([[inf, 0], [0, -inf], [inf, -inf], [nan, 0], [0, nan], [nan, inf], [-inf, nan], [1, 2]])
    expected = np.array([-inf, -inf, -inf, nan, nan, nan, nan, oracle.log_prior(h[-1], prior).sum()])
    np.testing.assert_allclose(log_density(backend, dtype, h, prior), expected, rtol=1e-6)


@DTYPES
@PRIOR
def test_overflow_of_the_scaling_is_not_nan(backend: Backend, dtype: str, prior: str) -> None:
    """h overflows: the log-density is -inf, or a huge negative number where it is summed in a wider type."""
    device = Device(backend, dtype)
    logp, x0, x1 = device.out(1, dtype="float64"), device.out(1, 1), device.put(np.zeros((1, 1)))
    backend.copy_in(x0, np.full((1, 1), np.finfo(dtype).max / 2))
    s0, s1 = device.put(np.full(1, 80.0)), device.put(np.zeros(1))
    backend.scale_prior_forward(logp, x0, x1, x0, x1, s0, s1, PRIORS[prior])
    assert device.get(x0)[0, 0] == np.inf
    assert device.get(logp)[0] < -1e38


@DTYPES
def test_logistic_gradient_far_out(backend: Backend, dtype: str) -> None:
    """-tanh(h / 2) is -+1 to the last bit far out, and -h / 2 near 0."""
    device = Device(backend, dtype)
    h = np.array([[1e4, -1e4], [200, -200], [1e-6, -1e-6], [0, 0]])
    dx0, dx1, dlogp = device.out(4, 1), device.out(4, 1), device.put(np.ones(4), "float64")
    h0, h1, zero = device.put(h[:, :1]), device.put(h[:, 1:]), device.put(np.zeros(1))
    backend.scale_prior_backward(dx0, dx1, None, None, dlogp, h0, h1, zero, zero, PRIORS["logistic"])
    got = np.concatenate([device.get(dx0), device.get(dx1)], axis=1)
    np.testing.assert_allclose(got, [[-1, 1], [-1, 1], [-5e-7, 5e-7], [0, 0]], rtol=2e-7, atol=0)


# --- loss ------------------------


@pytest.mark.parametrize("n", [1, 31, 33, 1000, 1025])
@pytest.mark.parametrize("cursor", [0, 31, 32, 77])
def test_loss(backend: Backend, n: int, cursor: int) -> None:
    rng = np.random.default_rng(n)
    weight = rng.uniform(0.5, 2, n)
    weight[n // 2 + 1 :: 3] = 0
    logp = rng.normal(-1000, 50, n)
    checks.check_loss(backend, n, logp, weight, cursor)
    logp[weight == 0] = np.nan  # padding is not looked at
    checks.check_loss(backend, n, logp, weight, cursor)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_loss_that_is_not_finite_skips(backend: Backend, bad: float) -> None:
    logp = np.linspace(-5, 5, 33)
    logp[20] = bad
    checks.check_loss(backend, 33, logp, np.ones(33), 3)


def test_loss_without_any_weight_skips(backend: Backend) -> None:
    checks.check_loss(backend, 5, np.zeros(5), np.zeros(5), 0)


# --- determinism ------------------------


@DTYPES
def test_the_same_arguments_give_the_same_bits(backend: Backend, dtype: str) -> None:
    """Every reduction of a step, twice on fresh arrays, at a size that is worth cutting into slices."""

    def once() -> list[bytes]:
        device = Device(backend, dtype, seed=3)
        n, d, k = 1025, 1000, 33
        (d0, d1), prior = halves(d), PRIORS["logistic"]
        x0, x1, s0, s1 = (device.put(device.normal(*shape)) for shape in ((n, d0), (n, d1), (d0,), (d1,)))
        logp, dlogp, state = (
            device.out(n, dtype="float64"),
            device.out(n, dtype="float64"),
            new_state(RATE=1e-3, MOMENTUM=0.9, SQUARE_DECAY=0.99, LAMBDA=1, EPSILON=1e-4),
        )
        weight, state = device.put(np.ones(n), "float64"), device.put(state, "float64")
        backend.scale_prior_forward(logp, x0, x1, x0, x1, s0, s1, prior)
        backend.loss(state, dlogp, logp, weight)
        ds0, ds1 = device.out(d0), device.out(d1)
        backend.scale_prior_backward(x0, x1, ds0, ds1, dlogp, x0, x1, s0, s1, prior)
        w, y, dw, db, dx = (device.out(*shape) for shape in ((d0, k), (n, k), (d0, k), (k,), (n, d0)))
        backend.dense_forward(y, x0, w, device.put(np.ones(k)), True)
        backend.dense_backward(dx, dw, db, y, y, x0, w, False)
        m, v = device.out(d0 * k), device.out(d0 * k)
        backend.update(w.reshape(-1), dw.reshape(-1), m, v, 0, d0 * k, state, 0)
        return [device.get(a).tobytes() for a in (logp, dlogp, state, ds0, ds1, y, dw, db, dx, w, m, v)]

    # Within computing(), as every caller does: outside it several threads share a BLAS with threads of its own.
    with backend.computing():
        first = once()
        second = once()
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a == b, f"result {number} differs"

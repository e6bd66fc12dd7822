"""The gates of the kernel contract: each runs one operation on a device and compares it with the oracle.

Inputs are rounded to the flow's dtype first, so the float64 oracle sees what the kernel sees. Tolerances are relative
norms: 5e-6 in float32 (single precision carries 6e-8; products over 1000 terms measure below 1e-6) and 1e-13 in
float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import OPTIMIZERS, PRIORS, Backend, Slot
from tests import oracle, oracle_parts

TOLERANCE = {"float32": 5e-6, "float64": 1e-13}
SPLINE_TOLERANCE = (
    1e-12  # float64: in a bin a hundredth wide a place is rounded to 1e-14 of it; measured: up to 1.2e-13
)
SENTINEL = 12345.0  # what a kernel must overwrite, or must leave alone


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """norm(actual - expected) / norm(expected), with NaN as inf so that it fails every bound.

    An infinite error over a finite norm fails by itself; expected numbers are finite.
    """
    error = float(np.linalg.norm(np.asarray(actual, float) - expected))
    size = float(np.linalg.norm(expected))
    return np.inf if np.isnan(error) else error / size if size else error


def assert_close(actual: NDArray[Any], expected: NDArray[Any], tolerance: float, what: str) -> None:
    actual = np.asarray(actual)
    assert actual.shape == np.shape(expected), f"{what}: shape {actual.shape}, expected {np.shape(expected)}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} is above {tolerance:.3g}"


class Device:
    """A backend with the traffic that tests need: numbers in, outputs prefilled with a sentinel, results out."""

    def __init__(self, backend: Backend, dtype: str, seed: int = 0) -> None:
        self.backend, self.dtype, self.tolerance = backend, dtype, TOLERANCE[dtype]
        self.rng = np.random.default_rng(seed)

    def put(self, host: NDArray[Any], dtype: Any = None) -> Any:
        """A device array of its own with the host array's content, in the flow's dtype unless told."""
        out = self.backend.alloc(host.shape, dtype or self.dtype)
        self.backend.copy_in(out, host)
        return out

    def out(self, *shape: int, dtype: Any = None) -> Any:
        return self.put(np.full(shape, SENTINEL), dtype)

    def get(self, array: Any) -> NDArray[Any]:
        return self.backend.copy_out(array)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        """Normal numbers that the flow's dtype represents."""
        return self.rng.standard_normal(shape).astype(self.dtype).astype(float)

    def close(self, array: Any, expected: NDArray[Any], what: str, tolerance: float | None = None) -> None:
        assert_close(self.get(array), expected, self.tolerance if tolerance is None else tolerance, what)


def halves(d: int) -> tuple[int, int]:
    return (d + 1) // 2, d // 2


def order_of(partition: str, d: int) -> NDArray[np.int64]:
    """(d,) data columns of part 0 and after them of part 1; "random" is a permutation that depends on d alone."""
    columns = np.arange(d)
    if partition == "random":
        return np.random.default_rng(d).permutation(d)
    return columns if partition == "halves" else np.concatenate([columns[0::2], columns[1::2]])


def new_state(**slots: float) -> NDArray[np.float64]:
    """A state array with the named slots, e.g. new_state(EPOCH=3)."""
    state = np.zeros(Slot.SIZE)
    for name, value in slots.items():
        state[getattr(Slot, name)] = value
    return state


def check_load_batch(
    backend: Backend,
    dtype: str,
    data_type: Any,
    n: int,
    d: int,
    *,
    cursor: int = 1,
    epoch: int = 3,
    seed: int = 7,
    purpose: int = 1,
    first_row: int = 0,
    plain: bool = False,
    padding: bool = True,
    partition: str = "odd-even",
) -> None:
    """plain: shift 0, scale 1, for which the values must be exact."""
    device = Device(backend, dtype, seed=n * 10_000 + d)
    m = n + 5
    if data_type == np.uint8:
        data = device.rng.integers(0, 256, (m, d)).astype(np.uint8)
        data[0], data[-1] = 0, 255
    else:
        data = device.rng.normal(2.0, 3.0, (m, d)).astype(data_type)
    index = device.rng.integers(0, m, (cursor + 1) * n)
    rows = first_row + 3 * np.arange(len(index))  # any numbers, and not the positions in data
    if padding:
        index[-(n // 3 + 1) :], rows[-(n // 3 + 1) :] = -1, -1
    shift = np.zeros(d) if plain else device.rng.normal(0, 1, d)
    scale = np.ones(d) if plain else device.rng.uniform(0.5, 2, d)
    state = new_state(CURSOR=cursor, EPOCH=epoch)
    x0, x1 = device.out(n, halves(d)[0]), device.out(n, halves(d)[1])
    weight, device_state = device.out(n, dtype="float64"), device.put(state, "float64")
    order = order_of(partition, d)
    arrays = [device.put(a, a.dtype) for a in (data, index, rows, order, shift, scale)]
    backend.load_batch(x0, x1, weight, *arrays, device_state, seed, purpose)
    e0, e1, expected_weight = oracle.load_batch(n, data, index, rows, order, shift, scale, state, seed, purpose)
    tolerance = 0.0 if plain and data_type == np.uint8 else None
    device.close(x0, e0, "x0", tolerance)
    device.close(x1, e1, "x1", tolerance)
    assert np.array_equal(device.get(weight), expected_weight)
    assert np.array_equal(device.get(device_state), state), "load_batch must not write the state"
    if plain and data_type == np.uint8:
        assert device.get(x0).min() >= 0
        assert device.get(x0).max() < 1


def check_split_join(backend: Backend, dtype: str, n: int, d: int, partition: str = "odd-even") -> None:
    device, host_order = Device(backend, dtype), order_of(partition, d)
    x, order = device.normal(n, d), device.put(host_order, "int64")
    x0, x1, joined = device.out(n, halves(d)[0]), device.out(n, halves(d)[1]), device.out(n, d)
    backend.split(x0, x1, device.put(x), order)
    e0, e1 = oracle_parts.parts_of(x, host_order)
    device.close(x0, e0, "part 0", 0)
    device.close(x1, e1, "part 1", 0)
    backend.join(joined, x0, x1, order)
    device.close(joined, x, "join after split", 0)


def check_permute(backend: Backend, dtype: str, n: int, d: int) -> None:
    """From one order to another, and back by the inverse permutation."""
    device, rng = Device(backend, dtype), np.random.default_rng(d)
    one, other = rng.permutation(d), rng.permutation(d)
    x = device.normal(n, d)
    x0, x1 = (device.put(part) for part in oracle_parts.parts_of(x, one))
    y0, y1, z0, z1 = (device.out(n, k) for k in halves(d) * 2)
    index = np.argsort(one)[other]
    backend.permute(y0, y1, x0, x1, device.put(index, "int64"))
    for part, (y, expected) in enumerate(zip((y0, y1), oracle_parts.parts_of(x, other), strict=True)):
        device.close(y, expected, f"part {part}", 0)
        np.testing.assert_array_equal(expected, oracle_parts.permute(*oracle_parts.parts_of(x, one), index)[part])
    backend.permute(z0, z1, y0, y1, device.put(np.argsort(index), "int64"))
    for back, first, expected in zip((z0, z1), (x0, x1), oracle_parts.parts_of(x, one), strict=True):
        device.close(back, expected, "there and back", 0)
        device.close(first, expected, "x must stay", 0)


def check_gather(
    backend: Backend, out_type: str, source_type: str, n: int, k: int | None, *, cursor: int = 1, padding: bool = True
) -> None:
    """k None: one number for each row. A few rows of the source come several times, others not at all."""
    device = Device(backend, out_type, seed=n)
    m, columns = n // 2 + 3, () if k is None else (k,)
    source = device.rng.standard_normal((m, *columns)).astype(source_type)
    index = device.rng.integers(0, m, (cursor + 1) * n)
    index[0], index[-1] = m - 1, 0
    if padding:
        index[-(n // 3 + 1) :] = -1
    state = new_state(CURSOR=cursor)
    out, device_state = device.out(n, *columns), device.put(state, "float64")
    backend.gather(out, device.put(source, source_type), device.put(index, "int64"), device_state)
    expected = oracle.gather(n, source, index, state).astype(out_type)  # a cast rounds, and no more than that
    device.close(out, expected.astype(float), "gathered", 0)
    assert np.array_equal(device.get(device_state), state), "gather must not write the state"


def check_copy_columns(
    backend: Backend, dtype: str, n: int, widths: tuple[int, int], starts: tuple[int, int], count: int
) -> None:
    """widths, starts : of out and of x."""
    device = Device(backend, dtype)
    before, x = device.normal(n, widths[0]), device.normal(n, widths[1])
    out, device_x = device.put(before), device.put(x)
    backend.copy_columns(out, starts[0], device_x, starts[1], count)
    device.close(out, oracle.copy_columns(before, starts[0], x, starts[1], count), "out", 0)
    device.close(device_x, x, "x must stay", 0)


def check_matmul(backend: Backend, dtype: str, n: int, i: int, o: int, transpose_a: bool, transpose_b: bool) -> None:
    device = Device(backend, dtype)
    a, b = device.normal(n, i), device.normal(i, o)
    out = device.out(n, o)
    stored_a, stored_b = (a.T.copy() if transpose_a else a), (b.T.copy() if transpose_b else b)
    backend.matmul(out, device.put(stored_a), device.put(stored_b), transpose_a, transpose_b)
    device.close(out, a @ b, "matmul")


def check_dense_forward(backend: Backend, dtype: str, n: int, i: int, o: int, relu: bool) -> None:
    device = Device(backend, dtype)
    x, w, b = device.normal(n, i), device.normal(i, o), device.normal(o)
    y = device.out(n, o)
    backend.dense_forward(y, device.put(x), device.put(w), device.put(b), relu)
    device.close(y, oracle.dense(x, w, b, relu), f"dense_forward, relu {relu}")


def check_dense_backward(
    backend: Backend, dtype: str, n: int, i: int, o: int, relu: bool, wanted: tuple[bool, bool, bool]
) -> None:
    """wanted: which of dx, dw, db are asked for."""
    device = Device(backend, dtype)
    x, w, y, dy = device.normal(n, i), device.normal(i, o), device.normal(n, o), device.normal(n, o)
    y = np.maximum(y, 0) if relu else y  # half of the units off, as y = 0
    outputs = [device.out(*shape) if want else None for want, shape in zip(wanted, [(n, i), (i, o), (o,)], strict=True)]
    device_dy, device_y = device.put(dy), device.put(y)
    backend.dense_backward(*outputs, device_dy, device_y, device.put(x), device.put(w), relu)
    *expected, masked = oracle.dense_backward(dy, y, x, w, relu)
    for name, output, value in zip(("dx", "dw", "db"), outputs, expected, strict=True):
        if output is not None:
            device.close(output, value, f"{name}, relu {relu}")
    device.close(device_dy, masked, "dy behind the ReLU", 0)
    device.close(device_y, y, "y must stay", 0)


def check_couple(backend: Backend, dtype: str, n: int, k: int, sign: int, aliased: bool) -> None:
    device = Device(backend, dtype)
    x, m = device.normal(n, k), device.normal(n, k)
    device_x = device.put(x)
    y = device_x if aliased else device.out(n, k)
    backend.couple(y, device_x, device.put(m), sign)
    device.close(y, x + sign * m, f"couple, sign {sign}")
    if not aliased:
        device.close(device_x, x, "x must stay", 0)


def check_factor_forward(
    backend: Backend, dtype: str, n: int, k: int, law: str, sign: int, aliased: bool = False, first: bool = True
) -> None:
    device = Device(backend, dtype)
    x, m = device.normal(n, k), 2 * device.normal(n, k * (2 if law == "affine" else 1))
    device_x, log_det = device.put(x), device.out(n, dtype="float64")
    y = device_x if aliased else device.out(n, k)
    backend.factor_forward(y, log_det, device_x, device.put(m), law == "affine", sign, first)
    expected, expected_log_det = oracle.couple(law, x, m, sign)
    device.close(y, expected, f"{law}, sign {sign}")
    # m is exact in either dtype and sums are float64: no more than rounding
    assert_close(device.get(log_det), expected_log_det + (0 if first else SENTINEL), 1e-13, "log_det")


def check_factor_backward(backend: Backend, dtype: str, n: int, k: int, law: str, aliased: bool = False) -> None:
    device = Device(backend, dtype)
    x, dy, m = device.normal(n, k), device.normal(n, k), 2 * device.normal(n, k * (2 if law == "affine" else 1))
    dlog_det = device.rng.standard_normal(n)
    device_dy, dm = device.put(dy), device.out(*m.shape)
    dx = device_dy if aliased else device.out(n, k)
    arrays = (device_dy, device.put(dlog_det, "float64"), device.put(x), device.put(m))
    backend.factor_backward(dx, dm, *arrays, law == "affine")
    expected_dx, expected_dm = oracle.couple_backward(law, dy, dlog_det, x, m)
    device.close(dx, expected_dx, "dx")
    device.close(dm, expected_dm, "dm")


def spline_inputs(device: Device, n: int, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values inside and outside of the interval, and what a network may give."""
    return 2 * device.normal(n, k), device.normal(n, oracle.spline.OUTPUTS * k)


def check_spline_forward(
    backend: Backend, dtype: str, n: int, k: int, sign: int, aliased: bool = False, first: bool = True
) -> None:
    device = Device(backend, dtype)
    x, m = spline_inputs(device, n, k)
    device_x, log_det = device.put(x), device.out(n, dtype="float64")
    y = device_x if aliased else device.out(n, k)
    backend.spline_forward(y, log_det, device_x, device.put(m), sign, first)
    expected, expected_log_det = oracle.couple("spline", x, m, sign)
    device.close(y, expected, f"spline, sign {sign}", max(device.tolerance, SPLINE_TOLERANCE))
    # x and m are exact in either dtype and the computation is float64
    assert_close(device.get(log_det), expected_log_det + (0 if first else SENTINEL), SPLINE_TOLERANCE, "log_det")


def check_spline_backward(backend: Backend, dtype: str, n: int, k: int, aliased: bool = False) -> None:
    device = Device(backend, dtype)
    (x, m), dy, dlog_det = spline_inputs(device, n, k), device.normal(n, k), device.rng.standard_normal(n)
    device_dy, dm = device.put(dy), device.out(*m.shape)
    dx = device_dy if aliased else device.out(n, k)
    arrays = (device_dy, device.put(dlog_det, "float64"), device.put(x), device.put(m))
    backend.spline_backward(dx, dm, *arrays)
    expected_dx, expected_dm = oracle.couple_backward("spline", dy, dlog_det, x, m)
    device.close(dx, expected_dx, "dx", max(device.tolerance, SPLINE_TOLERANCE))
    device.close(dm, expected_dm, "dm", max(device.tolerance, SPLINE_TOLERANCE))


def check_logit(
    backend: Backend, dtype: str, n: int, k: int, margin: float, aliased: bool = False, first: bool = True
) -> None:
    device = Device(backend, dtype)
    shift, width = device.rng.normal(0, 3, k), device.rng.uniform(0.5, 4, k)
    x = (shift + width * device.rng.uniform(1e-3, 1 - 1e-3, (n, k))).astype(dtype).astype(float)
    device_x, log_det = device.put(x), device.out(n, dtype="float64")
    z = device_x if aliased else device.out(n, k)
    scaling = (device.put(values, "float64") for values in (shift, 1 / width))
    backend.logit_forward(z, log_det, device_x, *scaling, margin, first)
    expected, expected_log_det = oracle.logit(x, shift, width, margin)
    device.close(z, expected, f"logit, margin {margin}")
    assert_close(device.get(log_det), expected_log_det + (0 if first else SENTINEL), 1e-12, "log_det")


def check_scale_prior_forward(backend: Backend, dtype: str, n: int, d: int, prior: str, aliased: bool) -> None:
    device = Device(backend, dtype)
    x, s = 3 * device.normal(n, d), device.normal(d) / 2
    x, s = (a.astype(dtype).astype(float) for a in (x, s))
    x0, x1 = device.put(x[:, 0::2]), device.put(x[:, 1::2])
    h0, h1 = (x0, x1) if aliased else (device.out(n, halves(d)[0]), device.out(n, halves(d)[1]))
    logp = device.out(n, dtype="float64")
    backend.scale_prior_forward(logp, h0, h1, x0, x1, device.put(s[0::2]), device.put(s[1::2]), PRIORS[prior])
    h, expected = oracle.scale_prior(x, s, prior)
    device.close(h0, h[:, 0::2], "h0")
    device.close(h1, h[:, 1::2], "h1")
    assert device.get(logp).dtype == np.float64
    device.close(logp, expected, f"logp, {prior}")


def check_scale_prior_backward(
    backend: Backend, dtype: str, n: int, d: int, prior: str, aliased: bool, with_ds: bool = True
) -> None:
    device = Device(backend, dtype)
    h, s = 3 * device.normal(n, d), device.normal(d) / 2
    h, s = (a.astype(dtype).astype(float) for a in (h, s))
    dlogp = -device.rng.uniform(0.5, 1.5, n) / n
    dlogp[n // 2] = 0 if n > 1 else dlogp[n // 2]  # a padding row
    h0, h1 = device.put(h[:, 0::2]), device.put(h[:, 1::2])
    dx0, dx1 = (h0, h1) if aliased else (device.out(n, halves(d)[0]), device.out(n, halves(d)[1]))
    ds0, ds1 = (device.out(halves(d)[0]), device.out(halves(d)[1])) if with_ds else (None, None)
    s0, s1 = device.put(s[0::2]), device.put(s[1::2])
    backend.scale_prior_backward(dx0, dx1, ds0, ds1, device.put(dlogp, "float64"), h0, h1, s0, s1, PRIORS[prior])
    dx, ds = oracle.scale_prior_backward(dlogp, h, s, prior)
    device.close(dx0, dx[:, 0::2], f"dx0, {prior}")
    device.close(dx1, dx[:, 1::2], f"dx1, {prior}")
    if with_ds:
        device.close(ds0, ds[0::2], f"ds0, {prior}")
        device.close(ds1, ds[1::2], f"ds1, {prior}")


def check_scale_inverse(backend: Backend, dtype: str, n: int, d: int, aliased: bool) -> None:
    device = Device(backend, dtype)
    h, s = device.normal(n, d), device.normal(d)
    h0, h1 = device.put(h[:, 0::2]), device.put(h[:, 1::2])
    x0, x1 = (h0, h1) if aliased else (device.out(n, halves(d)[0]), device.out(n, halves(d)[1]))
    backend.scale_inverse(x0, x1, h0, h1, device.put(s[0::2]), device.put(s[1::2]))
    device.close(x0, (h * np.exp(-s))[:, 0::2], "x0")
    device.close(x1, (h * np.exp(-s))[:, 1::2], "x1")


def check_loss(backend: Backend, n: int, logp: NDArray[np.float64], weight: NDArray[np.float64], cursor: int) -> None:
    """One loss after others: sums, ring and skip flag start from values that a wrong kernel would keep or lose."""
    device = Device(backend, "float64")
    state = new_state(CURSOR=cursor, LOSS=9, LOG_PROB_SUM=-50, WEIGHT_SUM=7, SKIP=1, SKIPPED=4, STEP=11, RATE=1e-3)
    state[Slot.LOSS_RING : Slot.LOSS_RING + Slot.RING_SIZE] = np.arange(Slot.RING_SIZE)
    device_state, dlogp = device.put(state), device.out(n)
    backend.loss(device_state, dlogp, device.put(logp), device.put(weight))
    with np.errstate(invalid="ignore"):  # inf - inf in a sum is one of the cases
        expected_state, expected = oracle.loss(state, logp, weight)
    np.testing.assert_allclose(device.get(device_state), expected_state, rtol=1e-13, err_msg="state")
    device.close(dlogp, expected, "dlogp")


def check_update(
    backend: Backend, dtype: str, optimizer: str, size: int, steps: int, tolerance: float, **slots: float
) -> None:
    """A series of updates, each on its own gradient, with the rate's decay, against the oracle in float64."""
    device = Device(backend, dtype, seed=size)
    p, m, v = device.normal(size), np.zeros(size), np.zeros(size)
    scale = 10.0 ** -(np.arange(size) % 5)  # some gradients are so small that epsilon or the floor decides
    state = new_state(**slots)
    device_state = device.put(state, "float64")
    device_p, device_m, device_v, device_g = (device.put(a) for a in (p, m, v, np.zeros(size)))
    for step in range(steps):
        g = (scale * (device.normal(size) + np.sin(0.1 * step))).astype(dtype).astype(float)
        backend.copy_in(device_g, g)
        backend.update(device_p, device_g, device_m, device_v, 0, size, device_state, OPTIMIZERS[optimizer])
        backend.advance(device_state)
        p, m, v = oracle.update(p, g, m, v, 0, size, state, optimizer)
        state = oracle.advance(state)
    device.close(device_p, p, f"{optimizer}: parameters after {steps} steps", tolerance)
    device.close(device_m, m, f"{optimizer}: first moment", 10 * tolerance)
    device.close(device_v, v, f"{optimizer}: second moment", tolerance)
    np.testing.assert_allclose(device.get(device_state), state, rtol=1e-13, err_msg="state")

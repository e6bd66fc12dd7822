"""Mistakes written into the CUDA kernels' own text: the contract's tests, on the emulated device, see every one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from nicecp.kernels import cuda_source
from nicecp.kernels.cuda_backend import CudaBackend
from tests.emulated import build
from tests.emulated.driver import EmulatedDriver
from tests.kernels import checks, test_contract, test_philox, test_update

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.compiler() is None, reason=build.MISSING),
]

Gate = Callable[[Any], None]


def adam(backend: Any) -> None:
    checks.check_update(backend, "float64", "adam", 1025, 3, 1e-13, **test_update.ADAM)


def rmsprop(backend: Any) -> None:
    checks.check_update(backend, "float64", "rmsprop", 1025, 3, 1e-13, **test_update.RMSPROP)


def loss(backend: Any, n: int = 1000) -> None:
    test_contract.test_loss(backend, n, 33)


load = partial(checks.check_load_batch, dtype="float64", data_type=np.uint8, n=33, d=31)
logit = partial(checks.check_logit, dtype="float64", n=33, k=31, margin=0.05)
gather = partial(checks.check_gather, out_type="float64", source_type="float32", n=33, k=3)
dense = partial(checks.check_dense_backward, dtype="float64", relu=True, wanted=(True, True, True))
bias = partial(checks.check_dense_forward, dtype="float64", n=33, i=5, relu=True)
scored = partial(checks.check_scale_prior_forward, dtype="float64", n=33, prior="logistic", aliased=False)
slope = partial(checks.check_scale_prior_backward, dtype="float64", n=33, d=33, prior="logistic", aliased=False)
factor = partial(checks.check_factor_forward, dtype="float64", n=33, k=1025, law="affine", sign=-1)
factor_back = partial(checks.check_factor_backward, dtype="float64", n=33, k=31, law="affine")
spline = partial(checks.check_spline_forward, dtype="float64", n=33, k=5, sign=1)
spline_inverse = partial(checks.check_spline_forward, dtype="float64", n=33, k=40, sign=-1, first=False)
spline_back = partial(checks.check_spline_backward, dtype="float64", n=33, k=5)
splines_out = partial(test_contract.test_splines_far_out, dtype="float64")

# unit, what is replaced, by what, and the gates of which at least one must fail in one of the schedules
MUTANTS: dict[str, tuple[str, str, str, list[Gate]]] = {
    "row sum without its first barrier": ("coupling", "    __syncthreads();  // the last row's parts have been read\n",
        "", [factor]),
    "row sum without its second barrier": ("coupling",
        "part[threadIdx.x / 32] = value;\n    __syncthreads();", "part[threadIdx.x / 32] = value;", [factor]),
    "row sum without its last warp": ("coupling", "w < THREADS / 32", "w < THREADS / 32 - 1", [factor]),
    "warp sum without its last step": ("scaling", "step > 0; step /= 2", "step > 1; step /= 2",
        [partial(scored, d=33)]),
    "column sums without a barrier": ("dense", "half /= 2) {\n        __syncthreads();", "half /= 2) {",
        [partial(dense, n=33, i=31, o=17)]),
    "column sums of one lane too few": ("scaling", "t < half * COLUMNS", "t < half * COLUMNS - 1", [slope]),
    "a pack too many": ("coupling", "const int64 packs = size / N;", "const int64 packs = (size + N - 1) / N;",
        [partial(checks.check_couple, dtype="float64", n=1, k=513, sign=1, aliased=False)]),
    "no tail": ("coupling", "if (t < size) y[t]", "if (t < size - 1) y[t]",
        [partial(checks.check_couple, dtype="float64", n=1, k=513, sign=1, aliased=False)]),
    "couple without its sign": ("coupling", "value.at[k] += sign * other.at[k]", "value.at[k] += other.at[k]",
        [partial(checks.check_couple, dtype="float64", n=33, k=4, sign=-1, aliased=False)]),
    "no stride over the grid": ("coupling", "t < packs; t += all_threads()", "t < packs; t += packs",
        [partial(checks.check_couple, dtype="float64", n=1000, k=33, sign=1, aliased=False)]),
    "bias of the wrong column": ("dense", "b + place(t, o / N).column * N", "b + place(t, o / N).column",
        [partial(bias, o=6)]),
    "ReLU the wrong way": ("dense", "value < real(0) ? real(0)", "value > real(0) ? real(0)", [partial(bias, o=5)]),
    "ReLU that hides NaN": ("dense", "value < real(0) ? real(0) : value", "value > real(0) ? value : real(0)",
        [partial(test_contract.test_dense_forward_keeps_nan, dtype="float64")]),
    "mask of what is negative only": ("dense", "active.at[k] <= real(0)", "active.at[k] < real(0)",
        [partial(dense, n=33, i=31, o=17)]),
    "bias gradient of unmasked slopes": ("dense", "sum.at[k] += slope.at[k]", "sum.at[k] += dy[i * o + c + k] * 0 + 1",
        [partial(dense, n=33, i=31, o=17)]),
    "one row lane left out": ("dense", "for (int64 i = lane; i < n", "for (int64 i = lane + 1; i < n",
        [partial(dense, n=33, i=31, o=17)]),
    "factor without its bound": ("coupling", "u * (2.0 / FACTOR_BOUND)", "u", [factor]),
    "factor inverse that does not invert": ("coupling", "(value - shift) * exp(-a)", "(value - shift) * exp(a)",
        [factor]),
    "log-det without its sign": ("coupling", "total = sign * row_sum(total)", "total = row_sum(total)", [factor]),
    "log-det begun anew": ("coupling", "first ? total : log_det[i] + total", "total", [partial(factor, first=False)]),
    "factor gradient without log-det": ("coupling", "through * x[t] + dlog_det[at.row]", "through * x[t]",
        [factor_back]),
    "factor gradient without 1 - tanh^2": ("coupling", "* (1.0 - part * part)", "", [factor_back]),
    "bins without their least size": ("spline", "start + SMALLEST + share(shares, b)", "start + share(shares, b)",
        [spline]),
    "softmax that overflows": ("spline", "top = other > top ? other : top;", "top = 0.0;", [splines_out]),
    "the bin before": ("spline", "value >= start : b <= at", "value > start + 0.1 : b <= at", [spline]),
    "inner slopes one knot late": ("spline", "slopes[static_cast<int64>(at - 1) * k]",
        "slopes[static_cast<int64>(at) * k]", [spline]),
    "an end with a slope": ("spline", "at < SPLINE_BINS - 1 ? slopes[static_cast<int64>(at) * k] : real(0)",
        "slopes[static_cast<int64>(at < SPLINE_BINS - 1 ? at : at - 1) * k]", [spline]),
    "slopes without a bound": ("spline", "(u > SPLINE_STEEP ? SPLINE_STEEP : u)", "u", [splines_out]),
    "no tails": ("spline", "if (!(fabs(value) < SPLINE_BOUND)) {  // NaN, too", "if (value != value) {", [spline]),
    "the other root": ("spline", "linear + sqrt(under", "linear - sqrt(under", [spline_inverse]),
    "spline's log-det without its sign": ("spline", "total = sign * row_sum(total)", "total = row_sum(total)",
        [spline_inverse]),
    "spline's log-det begun anew": ("spline", "first ? total : log_det[i] + total", "total", [spline_inverse]),
    "spline's gradient outside": ("spline", "d[static_cast<int64>(p) * k] = real(0);", "{}", [spline_back]),
    "spline's gradient without log-det": ("spline", "up_log = dlog_det[where.row]", "up_log = 0.0", [spline_back]),
    "starts that do not move": ("spline", "b < at ? by_start", "b < at ? 0.0", [spline_back]),
    "softmax's gradient without its mean": ("spline", "(gradient - total)", "gradient", [spline_back]),
    "slopes' gradients exchanged": ("spline", "j == bin.at ? by_right", "j == bin.at ? by_left", [spline_back]),
    "slopes' gradients without softplus": ("spline", "up * (a < 0.0 ? e : 1.0) / (1.0 + e)", "up", [spline_back]),
    "scaling without its log-det": ("scaling", "score.log_det += log_scale;", "", [partial(scored, d=33)]),
    "density without its factor 2": ("scaling", "- 2.0 * log(score.product)", "- log(score.product)",
        [partial(scored, d=33)]),
    "products of factors that are forgotten": ("scaling", "score.total += 2.0 * log(score.product);", "",
        [lambda backend: checks.check_scale_prior_forward(backend, "float64", 3, 40_000, "logistic", False)]),
    "scaling's gradient of twice the argument": ("scaling", "-tanh_half(value)", "-tanh_half(2.0 * value)", [slope]),
    "ds without its log-det": ("scaling", "up * (g * value + 1.0)", "up * (g * value)", [slope]),
    "inverse of the scaling that scales": ("scaling", "exp(-log_scale)", "exp(log_scale)",
        [partial(checks.check_scale_inverse, dtype="float64", n=33, d=31, aliased=False)]),
    "AdaM without bias correction": ("update", "sqrt(v) * rule.root", "sqrt(v)", [adam]),
    "AdaM that climbs": ("update", "p -= rule.rate * m", "p += rule.rate * m", [adam]),
    "RMSProp without its floor": ("update", "(root > rule.epsilon ? root : rule.epsilon)", "root", [rmsprop]),
    "update without its tail": ("update", "at < size; at += all_threads()", "at < size - 1; at += all_threads()",
        [adam]),
    "update from the first element": ("update", "p += offset, g += offset", "p += offset, g += 0",
        [partial(test_update.test_update_of_ranges_is_the_update_of_the_whole, dtype="float64", optimizer="adam",
                 size=200)]),
    "bad gradients that move": ("update", "if (!is_finite(gradient.at[k]))", "if (false)",
        [partial(test_update.test_gradients_that_are_not_finite_move_nothing, dtype="float64", optimizer="adam",
                 size=33)]),
    "bad gradients that nobody hears of": ("update", "state[SLOT_BAD_GRADIENT] = 1.0;", "{}",
        [partial(test_update.test_gradients_that_are_not_finite_move_nothing, dtype="float64", optimizer="adam",
                 size=33)]),
    "the wrong power": ("state", "pow(state[SLOT_LAMBDA], t - 1.0)", "pow(state[SLOT_LAMBDA], t)",
        [partial(test_update.test_momentum_of_the_decayed_first_moment, optimizer="adam")]),
    "loss of padding": ("state", "if (w != 0.0) {", "{", [loss]),
    "loss of the first threads' rows": ("state", "i < n; i += THREADS) {", "i < n && i < THREADS; i += THREADS) {",
        [loss]),
    "loss that never skips": ("state", "const bool skip = !isfinite(value);", "const bool skip = false;",
        [partial(test_contract.test_loss_that_is_not_finite_skips, bad=np.nan)]),
    "loss ring without its turn": ("state", "% SLOT_RING_SIZE] = value", "] = value",
        [partial(test_contract.test_loss, n=31, cursor=77)]),
    "rate below its floor": ("state", "fmin(rate, state[SLOT_RATE_FLOOR])", "0.0",
        [partial(test_update.test_advance_decays_the_rate_to_its_floor, rate=1.1e-4, decay=1.25, floor=1e-4,
                 expected=1e-4)]),
    "noise without the row's high bits": ("borders", "static_cast<uint32>(row >> 32)", "0u",
        [partial(load, first_row=2**32, padding=False)]),
    "noise of nine rounds": ("borders", "round < 10", "round < 9", [load]),
    "noise of the wrong half": ("borders", "column % 2 ? word >> 16", "column % 2 == 0 ? word >> 16", [load]),
    "noise of the last block": ("borders", "column / 8 != block", "block < 0", [partial(load, partition="random")]),
    "always the first batch": ("borders", "const int64 first = static_cast<int64>(state[SLOT_CURSOR]) * n;",
        "const int64 first = 0;", [load]),
    "padding with a weight": ("borders", "source < 0 ? 0.0 : 1.0", "1.0", [load]),
    "the last columns left out": ("borders", "(d - d0 + GROUP - 1) / GROUP", "(d - d0) / GROUP", [load]),
    "logit of a wider interval": ("borders", "width = 1.0 - 2.0 * margin", "width = 1.0 - margin", [logit]),
    "logit without its log-det": ("borders", "total -= up + down;", "", [logit]),
    "gather without the cursor": ("borders", "known ? index[first + at.row] : -1;\n        real value",
        "known ? index[at.row] : -1;\n        real value", [gather]),
    "columns from the first on": ("borders", "x[at.row * x_width + x_start", "x[at.row * x_width",
        [partial(checks.check_copy_columns, dtype="float64", n=33, widths=(7, 5), starts=(2, 1), count=4)]),
    "join where split was": ("borders", "x[at.row * d + order[at.column]] = first", "x[at.row * d + at.column] = first",
        [partial(checks.check_split_join, dtype="float64", n=33, d=31)]),
    "halves permuted within themselves": ("borders", "from < d0 ? x0[at.row * d0 + from]",
        "at.column < d0 ? x0[at.row * d0 + from % d0]", [partial(checks.check_permute, dtype="float64", n=33, d=31)]),
    "the second half from the wrong place": ("borders", "x1[at.row * (d - d0) + from - d0]",
        "x1[at.row * d0 + from - d0]", [partial(checks.check_permute, dtype="float64", n=33, d=31)]),
    "a permutation the other way": ("borders", "const int64 from = index[at.column];",
        "int64 from = 0;\n        while (index[from] != at.column) ++from;",
        [partial(checks.check_permute, dtype="float64", n=33, d=31)]),
    "uniforms with a bit too many": ("random", "half_word(words, c) * 0x1p-16", "(half_word(words, c) | 1) * 0x1p-16",
        [partial(test_philox.test_uniform_bits_are_exact, dtype="float64", n=31, k=33)]),
    "normals of half the angle": ("random", "sincospi(2.0 * v,", "sincospi(v,",
        [partial(test_philox.test_normal_and_logistic_follow_the_formula, fill="fill_normal", dtype="float64", n=31,
                 k=33)]),
    "logistic of one number": ("random", "log(v / (1.0 - v))", "log(u / (1.0 - u))",
        [partial(test_philox.test_normal_and_logistic_follow_the_formula, fill="fill_logistic", dtype="float64", n=31,
                 k=33)]),
}  # fmt: skip
SCHEDULES = (0, 1)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_in_a_kernel_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topic, old, new, gates = MUTANTS[mutant]
    unit = f"{topic}_f64"
    text = cuda_source.text(unit)
    assert old in text, "the kernels no longer have this text"
    for gate in gates:
        for schedule in SCHEDULES:
            gate(backend=CudaBackend(EmulatedDriver(schedule=schedule)))  # type: ignore[call-arg]
    broken = build.build(text.replace(old, new), cuda_source.kernels(unit), flush=False)
    good = build.unit

    def unit_with_the_mistake(name: str) -> ctypes.CDLL:
        return broken if name == unit else good(name)

    monkeypatch.setattr(build, "unit", unit_with_the_mistake)
    assert any(fails(gate, schedule) for gate in gates for schedule in SCHEDULES), "no test notices"


def fails(gate: Gate, schedule: int) -> bool:
    try:
        gate(backend=CudaBackend(EmulatedDriver(schedule=schedule)))  # type: ignore[call-arg]
    except AssertionError:
        return True
    return False

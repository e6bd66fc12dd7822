"""The gates of the kernel contract: each must refuse kernels that are broken on purpose, or it shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from nicecp.kernels.backend import Backend, Slot
from tests.kernels import checks, test_contract, test_philox, test_update
from tests.mutants import (
    SPOIL,
    Change,
    Mutant,
    always_adds,
    refuses,
    without_log_det,
    without_log_det_gradient,
    without_mask,
)


def spoil_argument(position: int, spoil: Callable[[Any], Any]) -> Change:
    def change(original: Change, *args: Any) -> None:
        original(*args)
        args[position][...] = spoil(args[position])

    return change


def lose_last_row(position: int) -> Change:
    """The off-by-one of a loop that ends too early."""

    def change(original: Change, *args: Any) -> None:
        before = args[position][-1:].copy()
        original(*args)
        args[position][-1:] = before

    return change


def adam(backend: Any) -> None:
    checks.check_update(backend, "float64", "adam", 33, 5, 1e-13, **{**test_update.ADAM, "LAMBDA": 0.9})


def rmsprop(backend: Any) -> None:
    checks.check_update(backend, "float64", "rmsprop", 33, 5, 1e-13, **test_update.RMSPROP)


def loss(backend: Any, bad: float = 0.0, cursor: int = 33) -> None:
    weight = np.ones(33)
    weight[-3:] = 0
    checks.check_loss(backend, 33, np.linspace(-9, -4, 33) + bad, weight, cursor)


def load(backend: Any, **options: Any) -> None:
    checks.check_load_batch(backend, "float64", np.uint8, 33, 9, **options)


KERNEL_GATES: list[tuple[str, tuple[int, ...], Callable[[Any], None]]] = [  # operation, its outputs, its gate
    ("load_batch", (0, 1, 2), partial(load, padding=False)),
    ("split", (0, 1), lambda b: checks.check_split_join(b, "float64", 33, 7, "random")),
    ("join", (0,), lambda b: checks.check_split_join(b, "float64", 33, 7)),
    ("permute", (0, 1), lambda b: checks.check_permute(b, "float32", 33, 7)),
    ("logit_forward", (0, 1), lambda b: checks.check_logit(b, "float32", 33, 7, 0.05)),
    ("gather", (0,), lambda b: checks.check_gather(b, "float32", "float64", 33, 3, padding=False)),
    ("copy_columns", (0,), lambda b: checks.check_copy_columns(b, "float32", 33, (7, 5), (2, 0), 5)),
    ("matmul", (0,), lambda b: checks.check_matmul(b, "float32", 31, 33, 5, False, True)),
    ("dense_forward", (0,), lambda b: checks.check_dense_forward(b, "float32", 31, 33, 5, True)),
    ("dense_backward", (0, 1, 2), lambda b: checks.check_dense_backward(b, "float32", 31, 33, 5, True, (True,) * 3)),
    ("couple", (0,), lambda b: checks.check_couple(b, "float32", 33, 7, -1, True)),
    ("factor_forward", (0, 1), lambda b: checks.check_factor_forward(b, "float32", 33, 7, "affine", 1)),
    ("factor_backward", (0, 1), lambda b: checks.check_factor_backward(b, "float32", 33, 7, "affine")),
    ("spline_forward", (0, 1), lambda b: checks.check_spline_forward(b, "float32", 33, 7, 1)),
    ("spline_backward", (0, 1), lambda b: checks.check_spline_backward(b, "float32", 33, 7)),
    ("accumulate", (0,), lambda b: test_contract.test_accumulate(b)),
    ("scale_prior_forward", (0, 1, 2),
        lambda b: checks.check_scale_prior_forward(b, "float32", 33, 7, "logistic", True)),
    ("scale_prior_backward", (0, 1, 2, 3),
        lambda b: checks.check_scale_prior_backward(b, "float32", 33, 7, "logistic", True)),
    ("scale_inverse", (0, 1), lambda b: checks.check_scale_inverse(b, "float32", 33, 7, True)),
    ("loss", (1,), lambda b: checks.check_loss(b, 33, np.linspace(-9, -4, 33), np.ones(33), 3)),
    ("update", (0, 2, 3), adam),
    ("update", (0, 2, 3), rmsprop),
    ("fill_uniform", (0,), lambda b: test_philox.test_uniform_bits_are_exact(b, "float32", 31, 33)),
    ("fill_normal", (0,),
        lambda b: test_philox.test_normal_and_logistic_follow_the_formula(b, "fill_normal", "float32", 31, 33)),
    ("fill_logistic", (0,),
        lambda b: test_philox.test_normal_and_logistic_follow_the_formula(b, "fill_logistic", "float32", 31, 33)),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "outputs", "gate"), KERNEL_GATES, ids=[entry[0] for entry in KERNEL_GATES])
def test_spoiled_kernels_are_refused(
    one_backend: Backend, operation: str, outputs: tuple[int, ...], gate: Callable[[Any], None]
) -> None:
    """Every output of every operation: zeroed, scaled by 1.01, negated, and without its last row."""
    gate(Mutant(one_backend))
    for position in outputs:
        changes = [spoil_argument(position, spoil) for spoil in SPOIL.values()]
        for change in (*changes, lose_last_row(position)):
            refuses(gate, Mutant(one_backend, **{operation: change}))


def adam_with(mistake: str) -> Change:
    """AdaM as it is often misread."""

    def update(original: Change, p: Any, g: Any, m: Any, v: Any, offset: int, size: int, state: Any, rule: int) -> None:
        t, b1, b2 = state[Slot.STEP] + 1, state[Slot.MOMENTUM], state[Slot.SQUARE_DECAY]
        b1_t = b1 * state[Slot.LAMBDA] ** (t if mistake == "lambda one step late" else t - 1)
        if mistake == "beta2 read as today's":
            b2 = 1 - b2
        m[...] = b1_t * m + (1 - b1_t) * g
        v[...] = b2 * v + (1 - b2) * g**2
        correction = 1 - (b1_t if mistake == "lambda in the bias correction" else b1) ** t
        if mistake == "epsilon before the bias correction":
            p -= state[Slot.RATE] * np.sqrt(1 - b2**t) * (m / correction) / (np.sqrt(v) + state[Slot.EPSILON])
        else:
            p -= state[Slot.RATE] * (m / correction) / (np.sqrt(v / (1 - b2**t)) + state[Slot.EPSILON])

    return update


def without_floor(original: Change, *args: Any) -> None:
    args[6][Slot.EPSILON] *= 0.1
    original(*args)
    args[6][Slot.EPSILON] *= 10


def with_state(position: int, slot: int, value: float) -> Change:
    """The operation reads another value in one slot of the state."""

    def change(original: Change, *args: Any) -> None:
        state, args_ = args[position].copy(), list(args)
        state[slot] = value
        args_[position] = state
        original(*args_)

    return change


def with_argument(position: int, change: Callable[[Any], Any]) -> Change:
    return lambda original, *args: original(*args[:position], change(args[position]), *args[position + 1 :])


def naive_logistic(
    original: Change, logp: Any, h0: Any, h1: Any, x0: Any, x1: Any, s0: Any, s1: Any, prior: int
) -> None:
    h0[...], h1[...] = x0 * np.exp(s0), x1 * np.exp(s1)
    with np.errstate(over="ignore"):
        logp[...] = sum((s - h - 2 * np.log1p(np.exp(-h))).sum(axis=1) for h, s in ((h0, s0), (h1, s1)))


def hides_nan(original: Change, y: Any, *args: Any) -> None:
    original(y, *args)
    np.nan_to_num(y, copy=False)


def without_shift(original: Change, y: Any, log_det: Any, x: Any, m: Any, affine: bool, *args: Any) -> None:
    m = m.copy()
    m[:, m.shape[1] // 2 :] = 0
    original(y, log_det, x, m, affine, *args)


def without_slopes(original: Change, dx: Any, dm: Any, *args: Any) -> None:
    original(dx, dm, *args)
    dm[:, 16 * dx.shape[1] :] = 0


def never_skips(original: Change, state: Any, *args: Any) -> None:
    original(state, *args)
    state[Slot.SKIP] = 0


def no_ring(original: Change, state: Any, *args: Any) -> None:
    ring = state[Slot.LOSS_RING : Slot.LOSS_RING + Slot.RING_SIZE]
    before = ring.copy()
    original(state, *args)
    ring[...] = before


def no_rate_floor(original: Change, state: Any) -> None:
    state[Slot.RATE_FLOOR] = 0
    original(state)


SKIPS = test_update.test_a_loss_that_is_not_finite_leaves_the_parameters_alone
RANGES = partial(
    test_update.test_update_of_ranges_is_the_update_of_the_whole, dtype="float64", optimizer="adam", size=200
)
SUBTLE: dict[str, tuple[str, Change, Callable[[Any], None]]] = {
    **{mistake: ("update", adam_with(mistake), adam) for mistake in (
        "lambda one step late", "beta2 read as today's", "lambda in the bias correction",
        "epsilon before the bias correction")},
    "another floor of the RMS": ("update", without_floor, rmsprop),
    "update although skipped": ("update", with_state(6, Slot.SKIP, 0), partial(SKIPS, optimizer="adam")),
    "update from element 0": ("update", with_argument(4, lambda offset: 0), lambda b: RANGES(b)),
    "update one too many": ("update", with_argument(5, lambda size: size + 1), lambda b: RANGES(b)),
    "every gradient taken for finite": ("update", with_argument(1, np.nan_to_num),
        lambda b: test_update.test_gradients_that_are_not_finite_move_nothing(b, "float64", "adam", 33)),
    "loss of padding": ("loss", with_argument(3, np.ones_like), loss),
    "loss never skips": ("loss", never_skips, partial(loss, bad=np.inf)),
    "no loss ring": ("loss", no_ring, loss),
    "no floor of the rate": ("advance", no_rate_floor,
        lambda b: test_update.test_advance_decays_the_rate_to_its_floor(b, 1.1e-4, 1.25, 1e-4, 1e-4)),
    "noise without the epoch": ("load_batch", with_state(9, Slot.EPOCH, 0), load),
    "always the first batch": ("load_batch", with_state(9, Slot.CURSOR, 0), load),
    "noise without the row's high bits": ("load_batch", with_argument(5, lambda rows: rows % 2**32),
        partial(load, first_row=2**32, padding=False)),
    "noise without the seed's high bits": ("load_batch", with_argument(10, lambda seed: seed % 2**32),
        partial(load, seed=2**33 + 1)),
    "noise without the purpose": ("load_batch", with_argument(11, lambda purpose: 0), load),
    "the order ignored in loading": ("load_batch", with_argument(6, np.sort), partial(load, partition="random")),
    "the order's inverse in loading": ("load_batch", with_argument(6, np.argsort), partial(load, partition="random")),
    "the order ignored in splitting": ("split", with_argument(3, np.sort),
        lambda b: checks.check_split_join(b, "float64", 33, 7, "random")),
    "the order's inverse in joining": ("join", with_argument(3, np.argsort),
        lambda b: checks.check_split_join(b, "float64", 33, 7, "random")),
    "a permutation's inverse": ("permute", with_argument(4, np.argsort),
        lambda b: checks.check_permute(b, "float64", 33, 7)),
    "a permutation that leaves all as it is": ("permute", with_argument(4, np.sort),
        lambda b: checks.check_permute(b, "float64", 33, 7)),
    "logit without its margin": ("logit_forward", with_argument(5, lambda margin: 0.0),
        lambda b: checks.check_logit(b, "float32", 33, 7, 0.05)),
    "logit without its range": ("logit_forward", with_argument(4, np.ones_like),
        lambda b: checks.check_logit(b, "float32", 33, 7, 0.05)),
    "log-det of a logit begun anew": ("logit_forward", with_argument(6, lambda first: True),
        lambda b: checks.check_logit(b, "float32", 33, 7, 0.05, first=False)),
    "gather from the first batch": ("gather", with_state(3, Slot.CURSOR, 0),
        lambda b: checks.check_gather(b, "float64", "float64", 33, 3)),
    "padding is gathered": ("gather", with_argument(2, lambda index: np.maximum(index, 0)),
        lambda b: checks.check_gather(b, "float64", "float64", 33, None)),
    "weights in single precision": ("gather", with_argument(1, lambda source: source.astype(np.float32)),
        lambda b: checks.check_gather(b, "float64", "float64", 33, None)),
    "columns copied to the beginning": ("copy_columns", with_argument(1, lambda start: 0),
        lambda b: checks.check_copy_columns(b, "float64", 33, (7, 5), (2, 1), 4)),
    "columns copied from the beginning": ("copy_columns", with_argument(3, lambda start: 0),
        lambda b: checks.check_copy_columns(b, "float64", 33, (7, 5), (2, 1), 4)),
    "one column too many": ("copy_columns", with_argument(4, lambda count: count + 1),
        lambda b: checks.check_copy_columns(b, "float64", 33, (7, 6), (2, 1), 4)),
    "bias forgotten": ("dense_forward", with_argument(3, np.zeros_like),
        lambda b: checks.check_dense_forward(b, "float32", 31, 33, 5, True)),
    "ReLU forgotten": ("dense_forward", without_mask,
        lambda b: checks.check_dense_forward(b, "float32", 31, 33, 5, True)),
    "ReLU hides NaN": ("dense_forward", hides_nan, lambda b: test_contract.test_dense_forward_keeps_nan(b, "float64")),
    "ReLU mask forgotten": ("dense_backward", without_mask,
        lambda b: checks.check_dense_backward(b, "float32", 31, 33, 5, True, (True, True, True))),
    "couple ignores the sign": ("couple", always_adds, lambda b: checks.check_couple(b, "float32", 33, 7, -1, False)),
    "the inverse of a factor does not invert": ("factor_forward", with_argument(5, lambda sign: 1),
        lambda b: checks.check_factor_forward(b, "float32", 33, 7, "affine", -1)),
    "a factor without its shift": ("factor_forward", without_shift,
        lambda b: checks.check_factor_forward(b, "float32", 33, 7, "affine", 1)),
    "log-det of factors begun anew": ("factor_forward", with_argument(6, lambda first: True),
        lambda b: checks.check_factor_forward(b, "float32", 33, 7, "affine", 1, first=False)),
    "log-det of factors without a gradient": ("factor_backward", with_argument(3, np.zeros_like),
        lambda b: checks.check_factor_backward(b, "float32", 33, 7, "multiplicative")),
    "the inverse of a spline does not invert": ("spline_forward", with_argument(4, lambda sign: 1),
        lambda b: checks.check_spline_forward(b, "float32", 33, 7, -1)),
    "log-det of splines begun anew": ("spline_forward", with_argument(5, lambda first: True),
        lambda b: checks.check_spline_forward(b, "float32", 33, 7, 1, first=False)),
    "log-det of splines without a gradient": ("spline_backward", with_argument(3, np.zeros_like),
        lambda b: checks.check_spline_backward(b, "float32", 33, 7)),
    "slopes of splines without a gradient": ("spline_backward", without_slopes,
        lambda b: checks.check_spline_backward(b, "float32", 33, 7)),
    "logistic density that overflows": ("scale_prior_forward", naive_logistic,
        lambda b: test_contract.test_log_density_far_out(b, "float32", "logistic")),
    "no log-det": ("scale_prior_forward", without_log_det,
        lambda b: checks.check_scale_prior_forward(b, "float32", 33, 7, "gaussian", False)),
    "no log-det in ds": ("scale_prior_backward", without_log_det_gradient,
        lambda b: checks.check_scale_prior_backward(b, "float32", 33, 7, "gaussian", False)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", list(SUBTLE))
def test_subtle_mistakes_in_kernels_are_refused(one_backend: Backend, mutant: str) -> None:
    operation, change, gate = SUBTLE[mutant]
    gate(Mutant(one_backend))
    refuses(gate, Mutant(one_backend, **{operation: change}))

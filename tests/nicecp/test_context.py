"""Flows that are conditioned on a context: gradients, densities, samples, shapes, files, training."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import load
from nicecp.context import Context
from nicecp.errors import CheckpointError
from nicecp.flow import NICE
from nicecp.inpaint import inpaint
from nicecp.kernels.backend import Backend
from nicecp.preprocessing import Dequantize
from nicecp.spec import ModelSpec
from nicecp.testing import check_gradients
from tests import gates, oracle
from tests.mutants import Mutant, refuses

F64 = gates.F64
SCALE = Context(np.array([2.0, -1.0]), np.array([0.5, 3.0]), ("mass", "spin"))
# d, hidden layers of every coupling, which part the first coupling reads, laws in turn, partition
SHAPES: dict[str, tuple[Any, ...]] = {
    "d3-additive": (3, [(4,), (), (4, 3)], 0, ("additive",)),
    "d5-all-laws": (5, [(4,), (), (3, 4), (4,)], 1, ("affine", "multiplicative", "additive")),
    "d3-spline": (3, [(4,), (), (3,)], 1, ("spline", "additive")),
    "d4-permuted": (4, [(4,)] * 3, 0, ("affine", "additive"), (2, 0, 3, 1), {1: (0, 1, 2, 3), 2: (3, 0, 2, 1)}),
}
EACH_SHAPE = pytest.mark.parametrize("shape", list(SHAPES))


def spec_of(shape: str, dtype: str = "float64", prior: str = "logistic", k: int = 2) -> ModelSpec:
    d, hidden, first, laws, *partition = SHAPES[shape]
    return replace(gates.make_spec(d, hidden, prior, dtype, first, laws, *partition), n_context=k)


def make_flow(spec: ModelSpec, backend: Backend | None = None, n: int = 6) -> tuple[NICE, F64, F64]:
    """A flow with drawn parameters behind a standardisation, n rows of data and their contexts, clear of all kinks."""
    parameters = gates.draw_parameters(spec)
    rng = np.random.default_rng(7)
    z = rng.normal(0, 1.5, (300, spec.n_features)).astype(spec.dtype).astype(float)
    c = rng.normal(0, 1.5, (300, spec.n_context)).astype(spec.dtype).astype(float)
    clear = np.flatnonzero(gates.kink_distance(spec, parameters, z, c) > 1e-3)[:n]
    steps = gates.standardize(spec.n_features)
    flow = NICE.from_spec(spec, parameters, steps, context=SCALE, backend=backend)
    return flow, steps[0].inverse(z[clear]), c[clear] * SCALE.std + SCALE.mean


def gate_oracle(flow: NICE, x: F64, c: F64) -> None:
    """Loss, gradients, density and bijection are the oracle's at the scaled context, gradients by complex step."""
    tolerance = gates.COMPLEX_STEP[flow.spec.dtype]
    z, log_det, slope = gates.to_inputs(flow, x)
    given, parameters = (c - SCALE.mean) / SCALE.std, gates.host_parameters(flow)
    expected, dz = oracle.complex_step(flow.spec, parameters, z, given)
    loss, gradients = flow.loss_and_gradients(x, c)
    gates.assert_near(loss, np.array(oracle.mean_loss(flow.spec, parameters, z, given) - log_det), tolerance, "loss")
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        gates.assert_near(gradients[name], value, tolerance, name)
    gates.assert_near(flow.grad_log_prob(x, c), dz * slope, tolerance, "x")
    gates.assert_near(
        flow.log_prob(x, c), oracle.log_prob(flow.spec, parameters, z, given) + log_det, tolerance, "log_prob"
    )
    h, s = oracle.forward(flow.spec, parameters, z, given)
    got, got_log_det = flow.forward(x, c)
    gates.assert_near(got, h, tolerance, "h")
    gates.assert_near(got_log_det, s + np.full(len(x), log_det), tolerance, "log_det")
    latent = np.random.default_rng(5).standard_normal(x.shape)
    back, inverse_log_det = flow.inverse(latent, c)
    z_back = oracle.inverse(flow.spec, parameters, latent, given)
    gates.assert_near(back, flow.preprocessing[0].inverse(z_back), max(tolerance, 5e-12), "inverse(h)")
    gates.assert_near(inverse_log_det, -flow.forward(back, c)[1], max(tolerance, 1e-9), "inverse's log_det")


# --- gradients, densities ------------------------


@EACH_SHAPE
@pytest.mark.parametrize("prior", ["gaussian", "logistic"])
def test_the_oracle_by_complex_step(shape: str, prior: str) -> None:
    spec = spec_of(shape, prior=prior)
    flow, x, c = make_flow(spec)
    z, given = gates.to_inputs(flow, x)[0], (c - SCALE.mean) / SCALE.std
    parameters = gates.draw_parameters(spec)
    by_hand, dx = oracle.gradients(spec, parameters, z, given)
    expected, expected_dx = oracle.complex_step(spec, parameters, z, given)
    for name, value in expected.items():
        gates.assert_near(by_hand[name], value, 1e-12, name)
    gates.assert_near(dx, expected_dx, 1e-12, "x")


@EACH_SHAPE
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_and_density_are_the_oracles(backend: Backend, shape: str, dtype: str) -> None:
    gate_oracle(*make_flow(spec_of(shape, dtype), backend))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("coupling", ["additive", ("affine", "additive")])
@pytest.mark.slow
def test_check_gradients_covers_contexts(dtype: str, coupling: Any) -> None:
    flow = NICE(5, hidden=(6, 4), n_couplings=3, dtype=dtype, seed=3, coupling=coupling, n_context=2)
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(4, 5)), rng.normal(size=(4, 2))
    report = check_gradients(flow, x, c)
    assert 0 < report.error <= 0.5
    assert report.log_det_error < 1e-8
    assert report.directions >= 2 * (flow.n_parameters + flow.n_features)
    assert check_gradients(flow, x[0], c[0]).rows == 1
    assert check_gradients(flow, x).error <= 0.5, "at contexts that it draws"
    with pytest.raises(ValueError, match="got \\(4, 3\\)"):
        check_gradients(flow, x, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at a finite context"):
        check_gradients(flow, x, [1, np.nan])


def change_copies(change: Callable[..., tuple[Any, ...]]) -> Callable[..., None]:
    """copy_columns with other arguments."""
    return lambda original, *args: original(*change(*args))


def forgets_context(original: Any, out: Any, out_start: int, x: Any, x_start: int, count: int) -> None:
    original(out, out_start, x * 0 if out_start else x, x_start, count)


def no_gradient(original: Any, out: Any, out_start: int, x: Any, x_start: int, count: int) -> None:
    if x.shape[1] > out.shape[1]:  # from the gradient by inputs
        out[...] = 0
    else:
        original(out, out_start, x, x_start, count)


def wrong_gradient(original: Any, out: Any, out_start: int, x: Any, x_start: int, count: int) -> None:
    """The last columns of the gradient by inputs, which are the context's, in place of the first."""
    original(out, out_start, x, max(0, x.shape[1] - count) if x.shape[1] > out.shape[1] else x_start, count)


@pytest.mark.parametrize("mistake", [forgets_context, no_gradient, wrong_gradient])
def test_broken_copies_are_refused(one_backend: Backend, mistake: Any) -> None:
    flow, x, c = make_flow(spec_of("d4-permuted"), one_backend)

    def on(backend: Any) -> NICE:
        return NICE.from_spec(flow.spec, flow.parameters(), flow.preprocessing, context=SCALE, backend=backend)

    gate_oracle(on(Mutant(one_backend)), x, c)
    refuses(gate_oracle, on(Mutant(one_backend, copy_columns=mistake)), x, c)
    if mistake is not forgets_context:  # of which log_prob and gradients tell the same story
        refuses(check_gradients, on(Mutant(one_backend, copy_columns=mistake)), x, c, max_checks=30)


def test_spoiled_gradients_by_the_context_s_weights_are_refused(one_backend: Backend) -> None:
    """Only the rows of the first layers that read the context: zeroed, or a hundredth too large."""
    flow, x, c = make_flow(spec_of("d4-permuted"), one_backend)
    for factor in (0.0, 1.01):

        class Spoiled(NICE):
            def loss_and_gradients(self, *args: Any, factor: float = factor) -> Any:
                loss, gradients = super().loss_and_gradients(*args)
                gradients["couplings/1/layers/0/weight"][2:] *= factor
                return loss, gradients

        wrong = Spoiled.from_spec(flow.spec, flow.parameters(), flow.preprocessing, context=SCALE, backend=one_backend)
        refuses(gate_oracle, wrong, x, c)
        refuses(check_gradients, wrong, x, c)


@pytest.mark.parametrize("activations", ["halves", "recompute"])
@pytest.mark.parametrize("shape", ["d5-all-laws", "d3-additive"])
def test_what_is_not_kept_is_computed_again(one_backend: Backend, shape: str, activations: str) -> None:
    flow, x, c = make_flow(spec_of(shape), one_backend)
    z, given = gates.to_inputs(flow, x)[0], (c - SCALE.mean) / SCALE.std
    results = []
    for kind in ("store", activations):
        ws = flow.network.workspace(6, True, kind)
        flat = one_backend.alloc(flow.network.layout.size, np.float64)
        for half, columns in zip(ws.x, flow.spec.columns, strict=True):
            one_backend.copy_in(half, z[:, columns])
        ws.load_context(one_backend, given, slice(6))
        flow.network.forward(ws, flow._views)
        one_backend.copy_in(ws.dlogp, np.full(6, -1 / 6))
        flow.network.backward(ws, flow._views, flow.network.layout.views(flat), want_dx=True)
        assert ws.dx is not None
        results.append([flat.copy(), *(part.copy() for part in ws.dx)])
    for kept, again in zip(*results, strict=True):
        np.testing.assert_allclose(again, kept, rtol=1e-10, atol=1e-12)
        assert np.abs(kept).max() > 1e-3


# --- shapes, odd numbers, messages ------------------------


@pytest.fixture(scope="module")
def flow() -> NICE:
    made, _, _ = make_flow(spec_of("d5-all-laws"))
    return made


X = np.random.default_rng(3).normal(size=(6, 5))
C = np.random.default_rng(4).normal(size=(6, 2)) * 2


def test_contexts_broadcast(flow: NICE) -> None:
    each = flow.log_prob(X, C)
    assert each.shape == (6,)
    for i in range(6):
        assert flow.log_prob(X[i], C[i]) == pytest.approx(each[i], rel=1e-13)
    assert flow.log_prob(X[0], C[0]) == pytest.approx(flow.log_prob(X[0], C[[0]])[0], rel=1e-13)
    one = flow.log_prob(X, C[0])
    np.testing.assert_allclose(one, [flow.log_prob(x, C[0]) for x in X], rtol=1e-13)
    assert np.abs(one - each)[1:].min() > 1e-3
    np.testing.assert_allclose(flow.log_prob(X[0], C), [flow.log_prob(X[0], c) for c in C], rtol=1e-13)
    table = flow.log_prob(X[:, None], C[None])
    assert table.shape == (6, 6)
    np.testing.assert_allclose(np.diagonal(table), each, rtol=1e-13)
    assert flow.grad_log_prob(X[:, None], C).shape == (6, 6, 5)
    np.testing.assert_allclose(flow.grad_log_prob(X[1], C)[2], flow.grad_log_prob(X[1], C[2]), rtol=1e-12)
    assert flow.forward(X[:, None], C)[0].shape == (6, 6, 5)
    assert flow.inverse(X[0], C)[1].shape == (6,)
    assert flow.log_prob(np.zeros((0, 5)), C[0]).shape == (0,)
    assert flow.log_prob(np.zeros((0, 5)), np.zeros((0, 2))).shape == (0,)
    many = np.tile(X, (400, 1)), np.tile(C, (400, 1))
    np.testing.assert_allclose(flow.log_prob(*many), np.tile(each, 400), rtol=1e-13)


def test_a_single_number_is_a_context_of_one() -> None:
    flow = NICE(3, (4,), 3, init="he", n_context=1)
    assert flow.log_prob(X[:, :3], 2.0).shape == (6,)
    np.testing.assert_array_equal(flow.log_prob(X[:, :3], 2), flow.log_prob(X[:, :3], [2.0]))


@pytest.mark.parametrize("call", ["log_prob", "grad_log_prob", "forward", "inverse"])
@pytest.mark.parametrize(
    ("context", "error", "says"),
    [
        (None, ValueError, r"conditioned on 2 numbers \(mass, spin\): pass a context of shape \(2,\) or \(\.\.\., 2\)"),
        (np.zeros(3), ValueError, r"expected a context of shape \(2,\) or \(\.\.\., 2\), got \(3,\)"),
        (1.0, ValueError, r"got \(\)"),
        (np.zeros((4, 2)), ValueError, r"context of shape \(4, 2\) does not go with rows of shape \(6, 5\)"),
        (np.full(2, "a"), TypeError, "real numbers as context"),
        (np.ma.masked_array(np.zeros(2)), TypeError, "masked"),
    ],
)
def test_a_wrong_context_is_one_line(flow: NICE, call: str, context: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        getattr(flow, call)(X, context)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="this flow has no context"):
        getattr(NICE(5, (3,), 3), call)(X, C)


def test_contexts_that_are_not_finite(flow: NICE) -> None:
    """NaN in, NaN out, in their own rows only; samples refuse them."""
    good, c, x = flow.log_prob(X, C), C.copy(), X.copy()
    c[1, 0], c[2], x[2, 0], x[3, 1] = np.nan, np.inf, np.inf, np.inf
    got = flow.log_prob(x, c)
    assert np.isnan(got[[1, 2]]).all()
    assert got[3] == -np.inf
    np.testing.assert_array_equal(got[[0, 4, 5]], good[[0, 4, 5]])
    assert np.isnan(flow.grad_log_prob(X, c)[[1, 2]]).all()
    assert np.isfinite(flow.grad_log_prob(X, c)[[0, 3, 4, 5]]).all()
    assert np.isnan(flow.forward(X, c)[0][1]).all()
    assert np.isnan(flow.inverse(X, c)[0][[1, 2]]).any(axis=1).all()
    with pytest.raises(ValueError, match=r"must be finite, row 1 is \[nan"):
        flow.sample(6, 1, c)


def test_samples(flow: NICE) -> None:
    x, log_prob = flow.sample(40, 9, C[0], return_log_prob=True)
    np.testing.assert_allclose(log_prob, flow.log_prob(x, C[0]), rtol=1e-12)
    assert np.array_equal(flow.sample(10, 9, C[0]), x[:10])
    each = flow.sample(6, 9, C)
    for i in range(6):
        np.testing.assert_allclose(flow.sample(6, 9, C[i])[i], each[i], rtol=1e-12)
    gates.assert_near(flow.forward(each, C)[0], oracle.fill_logistic(9, 4, 0, np.arange(6), 5), 1e-11, "latent")
    assert np.abs(each[1:] - x[1:6]).max() > 1e-2
    with pytest.raises(ValueError, match=r"context of shape \(6, 2\) for 5 samples: expected \(2,\) or \(5, 2\)"):
        flow.sample(5, 1, C)
    with pytest.raises(ValueError, match="pass a context"):
        flow.sample(5, 1)
    u = np.random.default_rng(0).random((3, 5))
    assert np.isfinite(flow.prior_transform(u, C[0])).all()
    assert np.array_equal(flow.logpdf(X, C), flow.log_prob(X, C))
    assert flow.rvs((2, 3), 1, context=C[0]).shape == (2, 3, 5)


def test_arguments() -> None:
    assert NICE(3, (4,), 3, n_context=2, context_names=["a", "b"]).context.names == ("a", "b")  # type: ignore[union-attr]
    for k, names, says in ((-1, None, "n_context must be at least 0"), (0, ["a"], "give n_context too"),
                           (2, ["a"], "has 1 names")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            NICE(3, (4,), 3, n_context=k, context_names=names)
    spec = replace(NICE(3, (4,), 3).spec, n_context=2)
    fresh = NICE.from_spec(spec)
    assert fresh.context is not None
    assert fresh.context.fresh
    with pytest.raises(ValueError, match="needs a Context"):  # parameters without the scale that they go with
        NICE.from_spec(spec, fresh.parameters())
    for mean, std, says in ((np.zeros(2), np.zeros(2), "positive"), (np.zeros(2), np.ones(3), "one shape"),
                            (np.array([np.inf]), np.ones(1), "finite")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Context(mean, std)


def test_inpainting_takes_one_context() -> None:
    spec = replace(gates.make_spec(4, [(5,)] * 3), n_context=2)
    flow = NICE.from_spec(spec, None, (Dequantize(),), init="he", seed=1)
    x, hidden = np.full((2, 4), 0.5), np.array([True, False, True, False])
    painted = inpaint(flow, x, hidden, 5, context=[1.0, 2.0])
    np.testing.assert_allclose(painted.log_prob_after[0], flow.log_prob(painted.result[0], [1, 2]), rtol=1e-12)
    with pytest.raises(ValueError, match="one context for all rows"):
        inpaint(flow, x, hidden, 5, context=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="pass a context"):
        inpaint(flow, x, hidden, 5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_point_for_compiled_code(dtype: str) -> None:
    """njit_log_prob(x, context), and a C function of the point with its context behind it: both take it unscaled."""
    import ctypes

    flow, x, c = make_flow(spec_of("d4-permuted", dtype))
    rows = flow.log_prob(np.tile(x, (500, 1)), np.tile(c, (500, 1)))[:6]
    few = [flow.log_prob(one, given) for one, given in zip(x, c, strict=True)]
    np.testing.assert_allclose(few, rows, rtol=1e-12 if dtype == "float64" else 5e-6)
    compiled, in_c = flow.njit_log_prob(), flow.cfunc().ctypes
    for one, given, expected in zip(x, c, rows, strict=True):
        assert compiled(one, given) == pytest.approx(expected, rel=1e-12 if dtype == "float64" else 5e-6)
        both = np.concatenate([one, given])
        pointer = both.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
        assert in_c(6, pointer) == compiled(one, given)
    assert np.isnan(compiled(x[0], np.array([np.nan, 0])))
    assert np.isnan(flow.log_prob(x[0], [np.nan, 0]))
    again = pickle.loads(pickle.dumps(compiled))
    assert again(x[0], c[0]) == compiled(x[0], c[0])


# --- files ------------------------


def test_files_and_pickles(flow: NICE, tmp_path: Path) -> None:
    expected = flow.log_prob(X, C)
    path = tmp_path / "flow.h5"
    flow.save(path)
    for again in (load(path), NICE.load(path), pickle.loads(pickle.dumps(flow))):
        assert np.array_equal(again.log_prob(X, C), expected)
        assert again.context is not None
        assert again.context.names == ("mass", "spin")
        assert "given 2 numbers (mass, spin)" in repr(again)
    with h5py.File(path) as file:
        assert np.array_equal(file["context/mean"][()], SCALE.mean)
        assert np.array_equal(file["context/std"][()], SCALE.std)
        assert file["context/names"][()].tolist() == [b"mass", b"spin"]
        assert file["model"].attrs["n_context"] == 2
    plain = tmp_path / "plain.h5"
    NICE(3, (4,), 3).save(plain)
    with h5py.File(plain) as file:
        assert "context" not in file, "files without a context are as they always were"


def test_the_reader_in_the_documentation(flow: NICE, tmp_path: Path) -> None:
    flow.save(tmp_path / "flow.h5")
    (code,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(compile(code, "docs/checkpoint.md", "exec"), names)
    np.testing.assert_allclose(names["log_prob"](tmp_path / "flow.h5", X, C), flow.log_prob(X, C), rtol=1e-12)


def test_damaged_scales_are_refused(flow: NICE, tmp_path: Path) -> None:
    from nicecp.schema import model_tree
    from nicecp.store import write_tree

    for number, (name, value, says) in enumerate((
        ("/context/std", np.array([1.0, 0.0]), "std finite and positive"),
        ("/context/mean", np.array([1.0, np.nan]), "not finite"),
        ("/context/mean", np.zeros(3), "should have shape"),
        ("/context/std", None, "is missing"),
        ("/context/more", np.zeros(2), "does not belong there"),
    )):  # fmt: skip
        tree = model_tree(flow.spec, flow.parameters(), flow.preprocessing, flow.info, flow.context)
        if value is None:
            del tree.arrays[name]
        else:
            tree.arrays[name] = value
        write_tree(tmp_path / f"{number}.h5", tree)
        with pytest.raises(CheckpointError, match=says):
            load(tmp_path / f"{number}.h5")
    with pytest.raises(CheckpointError, match="mean: is missing"):
        model_tree(flow.spec, flow.parameters(), flow.preprocessing, flow.info)

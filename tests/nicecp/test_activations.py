"""Depth without memory: what a step keeps changes memory and time, and gradients by rounding at most."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nicecp import fit
from nicecp import train as train_module
from nicecp.checkpoint import load_run, load_state, state_path
from nicecp.errors import TrainingError
from nicecp.flow import NICE
from nicecp.kernels.backend import Backend
from nicecp.network import ACTIVATIONS
from nicecp.plan import cost_of
from nicecp.reconstruction import TOLERANCE, check_reconstruction, reconstruction_error, workspace_bytes
from nicecp.run import Run
from nicecp.spec import ModelSpec, alternating
from tests import gates
from tests.nicecp.runs import go_on, model_bytes, train, write_table

LAWS = {
    "additive": ("additive",),
    "multiplicative": ("multiplicative",),
    "affine": ("affine",),
    "spline": ("spline",),
    "all": ("additive", "affine", "multiplicative"),
}
ROWS = 6
# Relative norm of the flat gradient, recompute against store; measured: below 1e-15 and 2e-7.
ROUNDING = {"float64": 1e-14, "float32": 2e-6}


def gradients(backend: Backend, spec: ModelSpec, activations: str, recorded: bool) -> tuple[Any, ...]:
    """(flat gradient, gradients by the halves, log-densities) of drawn rows."""
    flow = NICE.from_spec(spec, gates.draw_parameters(spec), backend=backend)
    network = flow.network
    views = network.layout.views(flow.flat)
    x = gates.draw_rows(spec, gates.draw_parameters(spec), ROWS)
    ws, flat = network.workspace(ROWS, True, activations), backend.alloc(network.layout.size, spec.dtype)

    def step() -> None:
        network.forward(ws, views)
        network.backward(ws, views, network.layout.views(flat), want_dx=True)

    runnable = backend.record(step) if recorded else step
    for _ in range(2):  # a second time from what the first one left
        backend.copy_in(ws.x[0], x[:, 0::2])
        backend.copy_in(ws.x[1], x[:, 1::2])
        backend.copy_in(ws.dlogp, np.full(ROWS, -1.0 / ROWS))
        runnable()
    assert ws.dx is not None
    return backend.copy_out(flat), *(backend.copy_out(part) for part in ws.dx), backend.copy_out(ws.logp)


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("laws", list(LAWS))
@pytest.mark.slow
def test_gradients(backend: Backend, laws: str, dtype: str, recorded: bool) -> None:
    spec = gates.make_spec(5, [(4,), (), (3, 4), (6, 5, 3), (3,)], "logistic", dtype, 1, LAWS[laws])
    stored = gradients(backend, spec, "store", recorded)
    for array, again in zip(stored, gradients(backend, spec, "halves", recorded), strict=True):
        np.testing.assert_array_equal(again, array)
    *derivatives, logp = gradients(backend, spec, "recompute", recorded)
    np.testing.assert_array_equal(logp, stored[-1])
    for derivative, array in zip(derivatives, stored[:-1], strict=True):
        gates.assert_near(derivative, array.astype(float), ROUNDING[dtype], "a gradient")


def trained(backend: Backend, activations: str, data: Any, laws: tuple[str, ...], by_layer: bool) -> Any:
    """The parameters after two epochs of small steps."""
    spec = gates.make_spec(data.shape[1], [(6, 5), (4,), ()], laws=laws)
    flow = NICE.from_spec(spec, gates.draw_parameters(spec), backend=backend)
    fit(flow, data, epochs=2, batch_size=32, seed=3, activations=activations)
    return backend.copy_out(flow.flat)


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("laws", list(LAWS))
def test_training(backend: Backend, monkeypatch: pytest.MonkeyPatch, laws: str, by_layer: bool) -> None:
    monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", 0 if by_layer else 2**60)
    data = np.random.default_rng(1).normal(size=(200, 4))
    ends = {kind: trained(backend, kind, data, LAWS[laws], by_layer) for kind in ACTIVATIONS}
    np.testing.assert_array_equal(ends["halves"], ends["store"])
    gates.assert_near(ends["recompute"], ends["store"], 1e-10, "parameters")
    fresh = NICE.from_spec(gates.make_spec(4, [(6, 5), (4,), ()], laws=LAWS[laws]), backend=backend)
    assert np.abs(ends["store"] - fresh.flat).max() > 1e-3


# --- memory -----------------------------------------------------------------------------------------------------------


def deep(couplings: int, law: str = "additive") -> ModelSpec:
    return ModelSpec(32, alternating((64, 64), couplings, law), "gaussian", "float32")


@pytest.mark.parametrize("law", ["additive", "affine"])
def test_memory_against_depth(law: str) -> None:
    """recompute: what 4 couplings take, 64 do. halves: one half more for each coupling. store: all of each network."""
    four, many = ({kind: workspace_bytes(deep(k, law), 100, True, kind) for kind in ACTIVATIONS} for k in (4, 64))
    assert many["recompute"] <= 1.15 * four["recompute"]
    assert many["halves"] - four["halves"] == 60 * 100 * 16 * 4
    outputs = 32 if law == "affine" else 0
    assert many["store"] - four["store"] == 60 * 100 * (16 + 128 + outputs) * 4
    assert four["recompute"] < four["halves"] < four["store"]
    costs = {kind: cost_of(deep(64, law), 100, activations=kind) for kind in ACTIVATIONS}
    assert costs["store"].buffer_bytes - costs["recompute"].buffer_bytes == many["store"] - many["recompute"]
    assert costs["recompute"].flops > 1.3 * costs["store"].flops


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_bytes_are_those_that_are_allocated(
    one_backend: Backend, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spec, sizes = gates.make_spec(5, [(4,), (), (3, 4)], laws=LAWS["all"]), []
    alloc = type(one_backend).alloc

    def counted(self: Backend, shape: Any, dtype: Any) -> Any:
        array = alloc(self, shape, dtype)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(type(one_backend), "alloc", counted)
    network = NICE.from_spec(spec, backend=one_backend).network
    sizes.clear()
    network.workspace(7, True, kind)
    assert sum(sizes) == workspace_bytes(spec, 7, True, kind) > 0


# --- the check --------------------------------------------------------------------------------------------------------


def strong(gain: float, couplings: int = 16) -> NICE:
    """A float32 flow whose networks' outputs are ``gain`` times as large as their inputs."""
    spec = ModelSpec(32, alternating((32, 32), couplings), "gaussian", "float32")
    rng, named = np.random.default_rng(0), {}
    for name, shape in spec.parameter_shapes().items():
        scale = np.sqrt(2.0 / shape[0]) if "layers/2" not in name else gain / np.sqrt(shape[0])
        named[name] = (scale * rng.standard_normal(shape) if name.endswith("weight") else np.zeros(shape)).astype("f4")
    return NICE.from_spec(spec, named)


def error_of(flow: NICE) -> float:
    ws = flow.network.workspace(50, True, "recompute")
    rows = np.random.default_rng(1).normal(size=(50, 32))
    flow._load(ws.x, rows)
    return reconstruction_error(flow.network, ws, flow.network.layout.views(flow.flat))


def test_the_error_is_that_of_going_there_and_back() -> None:
    flow = strong(0.5)
    x = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32).astype(float)
    back = flow.inverse(flow.forward(x)[0])[0]
    expected = np.sqrt(((back - x) ** 2).mean() / (x**2).mean())
    assert 1e-8 < expected < 1e-5
    assert error_of(flow) == pytest.approx(expected, rel=0.5)  # forward and back without the scaling's rounding
    assert error_of(flow) < TOLERANCE < error_of(strong(2.0))


def test_too_large_an_error_names_the_remedy() -> None:
    flow = strong(2.0)
    ws = flow.network.workspace(50, True, "recompute")
    flow._load(ws.x, np.random.default_rng(1).normal(size=(50, 32)))
    with pytest.raises(TrainingError, match=r"epoch 7: .* 1e-04 is allowed.*--activations halves"):
        check_reconstruction(flow.network, ws, flow.network.layout.views(flow.flat), 7)
    flow.set_parameters({name: np.full_like(value, np.nan) for name, value in flow.parameters().items()})
    with pytest.raises(TrainingError, match="nan"):
        check_reconstruction(flow.network, ws, flow.network.layout.views(flow.flat), 1)


def test_training_stops_before_a_step_that_would_be_wrong() -> None:
    data = np.random.default_rng(2).normal(size=(300, 32)).astype(np.float32)
    flow = strong(2.0)
    before = flow.parameters()
    with pytest.raises(TrainingError, match="--activations halves"):
        fit(flow, data, epochs=2, standardize=False, activations="recompute")
    for name, value in flow.parameters().items():
        np.testing.assert_array_equal(value, before[name])
    fit(strong(2.0), data, epochs=1, standardize=False, activations="halves")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_record_it_and_may_change_it(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table.h5")
    train(data, tmp_path / "store.h5")
    train(data, tmp_path / "halves.h5", activations="halves")
    assert model_bytes(tmp_path / "halves.h5") == model_bytes(tmp_path / "store.h5")
    record = load_run(tmp_path / "halves.h5")[1]
    assert record is not None
    assert record.config["settings"]["activations"] == "halves"
    with Run.resume(tmp_path / "halves.h5", activations="recompute", epochs=4) as run:
        assert run.trainer.config.activations == run.settings.activations == "recompute"
        assert run.execute().finished
    assert load_run(tmp_path / "halves.h5")[1].config["settings"]["activations"] == "recompute"  # type: ignore[union-attr]
    go_on(tmp_path / "store.h5", epochs=4)
    other, one = (load_state(state_path(tmp_path / name)) for name in ("halves.h5", "store.h5"))
    (*_, recomputed), (*_, stored) = other, one
    same = [np.array_equal(recomputed.parameters[name], value) for name, value in stored.parameters.items()]
    assert not all(same), "the fourth epoch recomputed"
    for name, value in stored.parameters.items():
        np.testing.assert_allclose(recomputed.parameters[name], value, rtol=0, atol=1e-12, err_msg=name)


def test_settings_of_old_runs_store(tmp_path: Path) -> None:
    with Run.start(write_table(tmp_path / "table.h5"), None, threads=1) as run:
        values = run.settings.to_json()
        del values["activations"]
        assert type(run.settings).from_json(values) == dataclasses.replace(run.settings, activations="store")


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table.h5")
    with pytest.raises(ValueError, match="store, halves, recompute, got 'all'"):
        fit(NICE(5, (3,), 3), data, activations="all")
    with pytest.raises(ValueError, match="store, halves, recompute, got 'all'"):
        Run.start(data, None, activations="all")
    with pytest.raises(ValueError, match="store, halves, recompute, got 'all'"):
        NICE(5, (3,), 3).network.workspace(3, True, "all")

"""Couplings and networks of a user's own: the page's code, gradients, training, files, and what is refused."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import nicecp
from nicecp import NICE, registry
from nicecp.checkpoint import load_run
from nicecp.cli.main import main
from nicecp.errors import CheckpointError
from nicecp.kernels.backend import Backend
from nicecp.plan import flops_of
from nicecp.records import DataInfo
from nicecp.schema import model_from_tree, model_tree
from nicecp.spec import ModelSpec, alternating
from nicecp.testing import check_gradients
from nicecp.train import UPDATE_BY_LAYER
from tests import gates
from tests.mutants import refuses
from tests.nicecp.own import EACH, Constant, Ramp, Shift, Stretch, make, registered, rows
from tests.nicecp.runs import go_on, train, write_images, write_table

known = pytest.fixture(autouse=True)(registered)


# --- gradients ------------------------


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("partition", ["odd-even", (4, 1, 0, 2, 3)])
@pytest.mark.slow
def test_gradients_are_right(law: Any, network: str, dtype: str, partition: Any) -> None:
    report = check_gradients(make(law, network, dtype=dtype, partition=partition), rows())
    assert report.error <= 0.5
    assert report.log_det_error < 1e-7


def test_an_architecture_is_enough_for_a_check() -> None:
    report = check_gradients(ModelSpec(4, alternating((6,), 3, "stretch", "ramp")))
    assert report.rows == 6
    assert 0 < report.error <= 0.5


@EACH
def test_the_density_is_that_of_the_functions(one_backend: Backend, law: Any, network: str) -> None:
    """By a pass in NumPy that knows nothing of the library's."""
    flow, x = make(law, network), rows(7)
    named, parts = flow.parameters(), [rows(7)[:, 0::2], rows(7)[:, 1::2]]
    log_det = np.zeros(7)
    for k, c in enumerate(flow.spec.couplings):
        own = {name.split("/", 2)[2]: value for name, value in named.items() if name.startswith(f"couplings/{k}/")}
        read, changed = parts[c.conditions_on], parts[c.transforms]
        if c.network == "mlp":
            m = np.maximum(read @ own["layers/0/weight"] + own["layers/0/bias"], 0)
            m = m @ own["layers/1/weight"] + own["layers/1/bias"]
        else:
            kind: Any = {"ramp": Ramp, "constant": Constant}[c.network]()
            m = kind.forward(read, {name.removeprefix("network/"): value for name, value in own.items()})[0]
        if c.law in ("shift", "stretch"):
            kind = {"shift": Shift, "stretch": Stretch}[c.law]()
            changed, more = kind.forward(changed, m, {name.removeprefix("law/"): value for name, value in own.items()})
        elif c.law == "affine":
            a = 3 * np.tanh(m[:, : changed.shape[1]] / 3)
            changed, more = changed * np.exp(a) + m[:, changed.shape[1] :], a.sum(axis=1)
        else:
            changed, more = changed + m, 0.0
        parts[c.transforms], log_det = changed, log_det + more
    h = np.empty((7, 5))
    h[:, 0::2], h[:, 1::2] = parts
    expected = (-np.abs(h) - 2 * np.log1p(np.exp(-np.abs(h)))).sum(axis=1) + log_det
    gates.assert_near(flow.log_prob(x), expected, 1e-12, "log_prob")
    gates.assert_near(flow.forward(x)[0], h, 1e-12, "h")
    gates.assert_near(flow.inverse(h)[0], x, 1e-12, "x")
    gates.gate_log_det(flow, x)


def spoiled(base: type, method: str, change: Any) -> type:
    """The class with what one method gives changed."""

    def wrong(self: Any, *args: Any) -> Any:
        return change(getattr(base, method)(self, *args))

    return type(
        base.__name__, (base,), {method: wrong, "__module__": base.__module__, "__qualname__": base.__qualname__}
    )


LAW_MISTAKES: dict[str, tuple[str, Any]] = {
    "log-det lost": ("forward", lambda got: (got[0], 0 * got[1])),
    "inverse's log-det sign": ("inverse", lambda got: (got[0], -got[1])),
    "inverse off": ("inverse", lambda got: (1.01 * got[0], got[1])),
    "dx scaled": ("backward", lambda got: (1.01 * got[0], *got[1:])),
    "dm scaled": ("backward", lambda got: (got[0], 1.01 * got[1], got[2])),
    "dm zero": ("backward", lambda got: (got[0], 0 * got[1], got[2])),
}


@pytest.mark.parametrize("mistake", list(LAW_MISTAKES))
@pytest.mark.slow
def test_mistakes_in_a_law_are_found(mistake: str) -> None:
    check_gradients(make("stretch", "mlp"), rows())
    nicecp.register_coupling("stretch", spoiled(Stretch, *LAW_MISTAKES[mistake]))
    refuses(check_gradients, make("stretch", "mlp"), rows())


@pytest.mark.parametrize("name", ["W", "U", "dx"])
@pytest.mark.parametrize("factor", [0, 1.01])
def test_mistakes_in_a_network_are_found(name: str, factor: float) -> None:
    def change(got: Any) -> Any:
        dx, gradients = got
        return (factor * dx, gradients) if name == "dx" else (dx, {**gradients, name: factor * gradients[name]})

    nicecp.register_network("ramp", spoiled(Ramp, "backward", change))
    said = rf"/network/{name}\b" if name != "dx" else "gradient by"
    with pytest.raises(AssertionError, match=said):
        check_gradients(make("additive", "ramp"), rows())


def test_a_mistake_in_a_laws_own_parameter_is_found() -> None:
    wrong = spoiled(Shift, "backward", lambda got: (got[0], got[1], {"scale": 1.01 * got[2]["scale"]}))
    nicecp.register_coupling("shift", wrong)
    with pytest.raises(AssertionError, match=r"couplings/\d/law/scale"):
        check_gradients(make("shift", "mlp"), rows())


@pytest.mark.slow
def test_kinks_that_are_not_told_are_stepped_over() -> None:
    """With them the check passes rows beside kinks; the network's own word is what it goes by."""
    x = rows(40, seed=5)
    flow = make("additive", "ramp")
    weight = flow.parameters()["couplings/0/network/W"]
    x[:, 0::2] -= np.outer(x[:, 0::2] @ weight[:, 0] - 1e-7, weight[:, 0]) / (weight[:, 0] @ weight[:, 0])
    assert np.abs(x[:, 0::2] @ weight[:, 0]).max() < 1e-6
    assert check_gradients(flow, x).left_out > 0
    nicecp.register_network("ramp", spoiled(Ramp, "kinks", lambda got: None))
    refuses(check_gradients, make("additive", "ramp"), x)


# --- training and files ------------------------


@pytest.mark.parametrize(("law", "network"), [("stretch", "ramp"), ("affine", "ramp"), ("shift", "mlp")])
def test_it_learns(law: str, network: str) -> None:
    """And from the second step on as a flow of this kind would: all its arrays move."""
    data = rows(600, 4, 1) @ np.tril(np.ones((4, 4)))
    flow = make(law, network, n_features=4)
    before, began = flow.parameters(), float(np.mean(flow.log_prob(data)))
    record = nicecp.fit(flow, data, epochs=10, batch_size=50, optimizer=nicecp.AdaM(rate=1e-2))
    assert float(np.mean(flow.log_prob(data))) > began + 0.1
    assert record.history[-1].train_log_likelihood > record.history[0].train_log_likelihood
    for name, value in flow.parameters().items():
        assert (value != before[name]).any(), name


@pytest.mark.parametrize("activations", ["store", "halves", "recompute"])
def test_ways_of_keeping_activations_agree(tmp_path: Path, activations: str) -> None:
    data = write_table(tmp_path / "table.h5")
    for name, how in (("a.h5", "store"), ("b.h5", activations)):
        given = {"coupling": ("stretch", "additive"), "network": "ramp", "activations": how, "couplings": 4}
        train(data, tmp_path / name, epochs=2, **given)
    one, other = (load_run(tmp_path / name)[0].parameters() for name in ("a.h5", "b.h5"))
    for key, value in one.items():
        np.testing.assert_allclose(other[key], value, rtol=1e-6, atol=1e-9, err_msg=key)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images.h5")
    given = {"coupling": ("stretch", "shift"), "network": "ramp", "couplings": 4}
    train(data, tmp_path / "whole.h5", epochs=4, **given)
    train(data, tmp_path / "parts.h5", epochs=2, **given)
    go_on(tmp_path / "parts.h5", epochs=4)
    assert model_bytes_of(tmp_path / "parts.h5") == model_bytes_of(tmp_path / "whole.h5")
    with h5py.File(tmp_path / "parts.state.h5") as file:
        assert np.any(file["optimizer/first_moment/couplings/1/law/scale"][()])


def model_bytes_of(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with h5py.File(path) as file:
        file["model"].visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    assert "couplings/0/network/W" in found
    return found


def test_several_threads_and_updates_layer_by_layer(tmp_path: Path) -> None:
    """A flow so large that parts of it are updated as their gradients are ready: the same as with one update."""
    d, width = 64, 600
    data = rows(120, d, 2)
    runs = []
    for threads, size in ((2, UPDATE_BY_LAYER), (1, 2**40)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nicecp.train.UPDATE_BY_LAYER", size)
            flow = NICE(d, (width,), 4, coupling=("shift", "stretch"), network="ramp", seed=1, threads=threads)
            assert flow.n_parameters > UPDATE_BY_LAYER
            nicecp.fit(flow, data, epochs=2, batch_size=50)
            runs.append(flow.parameters())
    for name, value in runs[0].items():
        np.testing.assert_allclose(value, runs[1][name], rtol=1e-9, atol=1e-12, err_msg=name)


@EACH
def test_files_come_back(tmp_path: Path, law: Any, network: str) -> None:
    flow, x = make(law, network, hidden=(6,)), rows(7)
    flow.save(tmp_path / "flow.h5")
    back = nicecp.load(tmp_path / "flow.h5")
    assert back.spec == flow.spec
    np.testing.assert_array_equal(back.log_prob(x), flow.log_prob(x))
    assert back.parameters().keys() == flow.parameters().keys()
    again = pickle.loads(pickle.dumps(flow))
    np.testing.assert_array_equal(again.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize(
    ("law", "network", "says"),
    [
        ("stretch", "mlp", "the coupling 'stretch' is not registered; call nicecp.register_coupling('stretch', ...)"),
        ("additive", "ramp", "the network 'ramp' is not registered; call nicecp.register_network('ramp', ...) before"),
    ],
)
def test_a_file_whose_names_are_not_registered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], law: str, network: str, says: str
) -> None:
    path = tmp_path / "flow.h5"
    make(law, network).save(path)
    registry._laws.clear()
    registry._networks.clear()
    with pytest.raises(CheckpointError) as caught:
        nicecp.load(path)
    assert str(caught.value).startswith(f"{str(path)!r}: /model/couplings/0: ")
    assert says in str(caught.value)
    assert main(["info", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: tree.arrays.pop("/model/couplings/0/law/scale"), "/law/scale: is missing"),
        (
            lambda tree: tree.arrays.update({"/model/couplings/0/law/scale": np.ones(3)}),
            "should have shape (2), has (3)",
        ),
        (lambda tree: tree.arrays.update({"/model/couplings/0/law/more": np.ones(3)}), "does not belong there"),
        (lambda tree: tree.arrays.update({"/model/couplings/0/network/V": np.ones(3)}), "does not belong there"),
        (lambda tree: tree.arrays.pop("/model/couplings/0/hidden"), "/hidden: is missing"),
        (lambda tree: tree.arrays.update({"/model/couplings/0/hidden": np.array([-1])}), "at least 1"),
        (lambda tree: tree.arrays.update({"/model/couplings/0/hidden": np.array([4])}), "should have shape"),
        (lambda tree: tree.arrays.update({"/model/couplings/0/hidden": np.array([], np.int64)}), "'ramp'"),
        (lambda tree: tree.attrs["/model/couplings/0"].update(network="mlp"), "/layers"),
        (lambda tree: tree.attrs["/model/couplings/0"].update(network="os.system"), "'os.system' is not registered"),
    ],
)
def test_odd_files_are_refused(change: Any, says: str) -> None:
    spec = ModelSpec(5, alternating((6,), 3, "shift", "ramp"))
    parameters = NICE.from_spec(spec).parameters()
    tree = model_tree(spec, parameters, (), DataInfo())
    change(tree)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        model_from_tree(tree, "x.h5")


def test_operations_of_registered_networks_are_those_of_their_weights() -> None:
    """Each number of W (3, 7) and U (7, 2) or of W (2, 7) and U (7, 3) is used once a row, as a dense layer's is."""
    forward = 2 * 40 * 2 * (3 * 7 + 7 * 2 + 2 * 7 + 7 * 3)
    assert flops_of(make("additive", "ramp", hidden=(7,)).spec, 40) == (forward, 3 * forward)


def test_no_compiled_function_of_python_code() -> None:
    flow = make("shift", "mlp")
    with pytest.raises(ValueError, match="'shift' are written in Python and have no compiled form"):
        flow.njit_log_prob()
    x = rows(1)
    assert flow.log_prob(x[0]) == pytest.approx(flow.log_prob(rows(3))[0], rel=1e-12)


@EACH
def test_a_context_goes_to_registered_networks_too(law: Any, network: str) -> None:
    """Trained with it, the density depends on it, and its gradients are right."""
    flow = make(law, network, n_context=2)
    x, context = rows(6), rows(6, 2, 9)
    width = flow.spec.layer_sizes(0)[0]
    assert width == 3 + 2
    if network == "constant":
        return
    assert not np.allclose(flow.log_prob(x, context), flow.log_prob(x, context + 1))
    h = flow.forward(x, context)[0]
    np.testing.assert_allclose(flow.inverse(h, context)[0], x, atol=1e-10)
    slope = np.empty_like(x)
    for column in range(5):
        step = 1e-5 * (np.arange(5) == column)
        slope[:, column] = (flow.log_prob(x + step, context) - flow.log_prob(x - step, context)) / 2e-5
    np.testing.assert_allclose(flow.grad_log_prob(x, context), slope, atol=1e-7)

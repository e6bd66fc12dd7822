"""Parts that are drawn anew between couplings: orders, latents in data order, what is kept, files, runs, commands."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import NICE, fit, load
from nicecp.cli.main import main
from nicecp.inpaint import inpaint
from nicecp.kernels.backend import Backend
from nicecp.network import ACTIVATIONS
from nicecp.orders import orders_after, random_order, same_parts
from nicecp.presets import contradiction, resolve
from nicecp.reconstruction import workspace_bytes
from nicecp.spec import ModelSpec, alternating, repartitioned
from tests import gates
from tests.nicecp.runs import SMALL, go_on, model_bytes, train, write_images, write_table
from tests.nicecp.test_checkpoint import documented_log_prob

ORDERS = {1: (3, 0, 4, 2, 1), 3: (1, 2, 0, 4, 3)}


# --- orders ------------------------


@pytest.mark.parametrize("d", [2, 3, 4, 5, 20])
def test_draws_are_the_seeds_and_never_part_the_columns_as_before(d: int) -> None:
    first = random_order(d, 3)
    drawn = list(itertools.islice(orders_after(first, 3), 30))
    assert drawn == list(itertools.islice(orders_after(first, 3), 30))
    assert drawn != list(itertools.islice(orders_after(first, 4), 30))
    for before, after in itertools.pairwise([first, *drawn]):
        assert sorted(after) == list(range(d))
        assert d == 2 or not same_parts(before, after)
    apart = {frozenset(pair): 0 for pair in itertools.combinations(range(d), 2)}
    for order in drawn:
        for one, other in itertools.product(order[: (d + 1) // 2], order[(d + 1) // 2 :]):
            apart[frozenset((one, other))] += 1
    assert min(apart.values()) >= 5, "every pair of columns is parted now and then"


def test_same_parts_whatever_they_are_called() -> None:
    assert same_parts((0, 1, 2, 3), (1, 0, 3, 2))
    assert same_parts((0, 1, 2, 3), (3, 2, 0, 1))
    assert not same_parts((0, 1, 2, 3), (0, 2, 1, 3))
    assert same_parts((0, 1, 2), (1, 0, 2))
    assert not same_parts((0, 1, 2), (2, 1, 0))


def test_which_couplings_have_orders_of_their_own() -> None:
    flow = NICE(5, (4,), 7, seed=9, partition="random", repartition=3)
    first = random_order(5, 9)
    drawn = list(itertools.islice(orders_after(first, 9), 2))
    assert (flow.spec.partition, flow.spec.order) == ("permutation", first)
    assert [c.order for c in flow.spec.couplings] == [None, None, None, drawn[0], None, None, drawn[1]]
    assert flow.spec.latent_order.tolist() == list(drawn[1])
    settings = resolve("a.h5", False, 100, "tabular", None, None, None, seed=9, partition="random", repartition=3,
                       couplings=7, hidden=(4,))  # fmt: skip
    assert settings.model_spec(5).couplings == flow.spec.couplings
    plain = NICE(5, (4,), 7, seed=9)
    assert all(c.order is None for c in plain.spec.couplings)
    assert NICE(5, (4,), 7, seed=9, repartition=7).spec == plain.spec == repartitioned(plain.spec, 0, 9)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"repartition": -1}, ValueError, "repartition must be at least 0, got -1"),
        ({"repartition": 0.5}, TypeError, "repartition must be a whole number, got 0.5"),
    ],
)
def test_wrong_numbers_are_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        NICE(5, (4,), 3, **given)


@pytest.mark.parametrize(
    ("orders", "says"),
    [
        ({0: (0, 1, 2, 3, 4)}, "the first coupling has no order of its own"),
        ({1: (0, 1, 2, 3)}, "each of the 5 columns once, got 4 numbers"),
        ({2: (0, 1, 2, 3, 3)}, "column 3 is 2 times in the partition"),
        ({2: (0, 1, 2, 3, 5)}, "column 5 in the partition is outside 0..4"),
    ],
)
def test_wrong_orders_are_refused(orders: dict[int, tuple[int, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        gates.make_spec(5, [(3,)] * 3, orders=orders)


# --- the bijection ------------------------


@pytest.mark.parametrize("kind", ["forward", "inverse"])
def test_latents_are_in_data_order(one_backend: Backend, kind: str) -> None:
    """Couplings that do nothing leave every feature in its place, scaled by the log-scale of its own number."""
    spec = gates.make_spec(5, [(3,)] * 4, orders=ORDERS)
    named = {name: np.zeros(shape) for name, shape in spec.parameter_shapes().items()}
    named["scaling/log_scale"] = s = np.linspace(-1, 1, 5)
    flow = NICE.from_spec(spec, named, backend=one_backend)
    x = np.random.default_rng(0).normal(size=(3, 5))
    out, log_det = getattr(flow, kind)(x)
    np.testing.assert_allclose(out, x * np.exp(s if kind == "forward" else -s), rtol=1e-14)
    np.testing.assert_allclose(log_det, 0, atol=1e-14)
    for name, value in named.items():
        np.testing.assert_array_equal(flow.parameters()[name], value)


def test_an_order_that_is_the_old_one_changes_no_bit(backend: Backend) -> None:
    plain = gates.make_spec(5, [(4,), (3, 4), (4,)], laws=("affine", "additive"))
    same = replace(plain.couplings[2], order=(0, 2, 4, 1, 3))
    moved = replace(plain, couplings=(*plain.couplings[:2], same))
    parameters, x = gates.draw_parameters(plain), np.random.default_rng(1).normal(size=(7, 5))
    flows = [NICE.from_spec(spec, parameters, backend=backend) for spec in (plain, moved)]
    for name in ("log_prob", "grad_log_prob", "forward", "inverse"):
        found = [getattr(flow, name)(x) for flow in flows]
        for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in found), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(flows[0].sample(5, 1), flows[1].sample(5, 1))


@pytest.mark.parametrize("law", ["additive", "affine"])
def test_what_is_kept_changes_nothing(backend: Backend, law: str) -> None:
    """Training with every kind of activations: the same bits, or for recompute the same but for rounding."""
    spec = gates.make_spec(5, [(6, 5), (4,), (), (3,)], laws=(law,), orders=ORDERS)
    data, ends = np.random.default_rng(1).normal(size=(200, 5)), {}
    for kind in ACTIVATIONS:
        flow = NICE.from_spec(spec, gates.draw_parameters(spec), backend=backend)
        fit(flow, data, epochs=2, batch_size=32, seed=3, activations=kind)
        ends[kind] = backend.copy_out(flow.flat)
    np.testing.assert_array_equal(ends["halves"], ends["store"])
    gates.assert_near(ends["recompute"], ends["store"], 1e-10, "parameters")
    fresh = NICE.from_spec(spec, gates.draw_parameters(spec), backend=backend)
    assert np.abs(ends["store"] - backend.copy_out(fresh.flat)).max() > 1e-3


def test_recomputed_activations_do_not_grow_with_the_number_of_changes() -> None:
    def taken(couplings: int, activations: str, keep: bool = True) -> int:
        spec = repartitioned(ModelSpec(32, alternating((64,), couplings)), 2, 0)
        return workspace_bytes(spec, 100, keep, activations)

    assert taken(64, "recompute") == taken(4, "recompute")
    assert taken(64, "store", keep=False) == taken(4, "store", keep=False)
    halves = 100 * 32 * 8
    assert taken(64, "halves") - taken(4, "halves") == 60 * halves // 2 + 30 * halves


def test_inpainting_hides_data_columns(tmp_path: Path) -> None:
    train(write_images(tmp_path / "images.h5"), tmp_path / "run.h5", epochs=1, repartition=1)
    flow = load(tmp_path / "run.h5")
    x, hidden = np.random.default_rng(1).random((2, 12)), np.arange(12) < 4
    done = inpaint(flow, x, hidden, 3)
    np.testing.assert_array_equal(done.result[0][:, 4:], x[:, 4:])
    assert (done.result[0][:, :4] != x[:, :4]).all()


# --- files ------------------------


@pytest.mark.parametrize("partition", ["odd-even", "random"])
def test_a_saved_flow_keeps_its_orders_and_the_documented_reader_reads_them(tmp_path: Path, partition: str) -> None:
    flow = NICE(5, (4,), 5, "gaussian", coupling=("affine", "additive"), partition=partition, repartition=2, seed=2)
    flow.set_parameters(gates.draw_parameters(flow.spec))
    flow.save(tmp_path / "flow.h5")
    back, x = load(tmp_path / "flow.h5"), np.random.default_rng(1).normal(size=(7, 5))
    assert back.spec == flow.spec
    np.testing.assert_array_equal(back.log_prob(x), flow.log_prob(x))
    np.testing.assert_allclose(documented_log_prob()(tmp_path / "flow.h5", x), flow.log_prob(x), rtol=1e-12)
    with h5py.File(tmp_path / "flow.h5") as file:
        found = {
            k: tuple(file[f"model/couplings/{k}/order"]) for k in range(5) if "order" in file["model/couplings"][str(k)]
        }
    assert found == {k: c.order for k, c in enumerate(flow.spec.couplings) if c.order is not None}
    assert list(found) == [2, 4]


def test_files_without_other_parts_are_as_they_were(tmp_path: Path) -> None:
    train(write_table(tmp_path / "table.h5"), tmp_path / "run.h5", epochs=1, preset="tabular")
    with h5py.File(tmp_path / "run.h5") as file:
        assert b"repartition" not in file["training/config"][()].tobytes()
        assert all("order" not in file[f"model/couplings/{k}"] for k in range(3))


# --- runs ------------------------


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data, given = write_table(tmp_path / "table.h5"), {"repartition": 2, "coupling": ("affine",), "couplings": 5}
    train(data, tmp_path / "whole.h5", epochs=4, **given)
    train(data, tmp_path / "parts.h5", epochs=2, **given)
    go_on(tmp_path / "parts.h5", epochs=4)
    assert model_bytes(tmp_path / "parts.h5") == model_bytes(tmp_path / "whole.h5")
    spec = load(tmp_path / "whole.h5").spec
    assert spec == repartitioned(ModelSpec(5, alternating((6,), 5, "affine"), spec.prior), 2, SMALL["seed"])
    with pytest.raises(ValueError, match="repartition is 2 in the run, 1 was asked for"):
        go_on(tmp_path / "parts.h5", repartition=1)


def test_settings_go_through_json() -> None:
    settings = resolve("a.h5", False, 100, repartition=2)
    assert type(settings).from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert contradiction(settings, repartition=3) == "repartition is 2 in the run, 3 was asked for"
    plain = resolve("a.h5", False, 100, "tabular")
    assert "repartition" not in plain.to_json()
    assert type(plain).from_json(plain.to_json()) == plain
    with pytest.raises(ValueError, match="repartition must be at least 0, got -2"):
        resolve("a.h5", False, 100, repartition=-2)
    with pytest.raises(TypeError, match="repartition should be int"):
        type(plain).from_json({**plain.to_json(), "repartition": "2"})


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "table.h5", rows=200)
    small = ["--epochs", "1", "--threads", "1", "--hidden", "6", "--couplings", "5", "--json"]
    assert main(["train", "--data", "table.h5", *small, "--repartition", "2", "--out", "a.h5"]) == 0
    spec = load("a.h5").spec
    assert [c.order is not None for c in spec.couplings] == [False, False, True, False, True]
    capsys.readouterr()
    assert main(["info", "a.h5"]) == 0
    out = capsys.readouterr().out
    assert "other parts 2 times" in out
    order = spec.couplings[4].order
    assert order is not None
    shown = " ".join(map(str, order[:3])) + r" \| " + " ".join(map(str, order[3:]))
    assert re.search(rf"^ +parts from coupling 4 +{shown}$", out, re.MULTILINE)
    assert main(["info", "a.h5", "--json"]) == 0
    couplings = json.loads(capsys.readouterr().out)["model"]["couplings"]
    assert [coupling["order"] for coupling in couplings] == [c.order and list(c.order) for c in spec.couplings]
    assert main(["train", "--resume", "a.h5", "--repartition", "1"]) == 2
    assert "--repartition is 2 in the run, 1 was asked for" in capsys.readouterr().err
    assert main(["train", "--data", "table.h5", "--repartition", "-1"]) == 2
    assert "--repartition" in capsys.readouterr().err

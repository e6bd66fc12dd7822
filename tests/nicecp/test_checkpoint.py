"""Checkpoints of runs: all of a run comes back, the documented reader agrees, a file of version 1 loads for ever."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import nicecp
from nicecp import checkpoint
from nicecp.checkpoint import load, load_run, load_state, save_run, save_state, state_path
from nicecp.errors import CheckpointError, OutputError
from nicecp.flow import NICE
from nicecp.kernels.backend import Slot
from nicecp.preprocessing import Dequantize, Standardize, Step
from nicecp.records import DataInfo, EpochRecord, Event, Parameters, ResumeState, RunRecord
from nicecp.spec import ModelSpec, alternating
from nicecp.spline import fit_knots
from nicecp.store import encode, read_tree
from nicecp.transforms import Angle, Log, Logit, Quantile, Recorded, Student

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


def numbers(spec: ModelSpec, seed: int) -> Parameters:
    rng = np.random.default_rng(seed)
    return {key: rng.uniform(-1, 1, shape).astype(spec.dtype) for key, shape in spec.parameter_shapes().items()}


def example_flow(**changes: Any) -> NICE:
    spec = ModelSpec(**{"n_features": 5, "couplings": alternating((4, 3), 3), "dtype": "float64", **changes})
    steps = (Standardize(np.array([0.5, -1.0, 3.0, 0.0, 100.0]), np.array([1.0, 2.0, 0.125, 1.0, 25.0])),)
    info = DataInfo(None, ("energy", "größe", "x", "y", ""), ("GeV", "m", "", "", ""), "0123456789abcdef" * 4)
    return NICE.from_spec(spec, numbers(spec, 1), steps, info)


def example_run() -> RunRecord:
    return RunRecord(
        seed=2**64 - 1,
        threads=2,
        config={
            "batch_size": 7,
            "data": "tabelle-ä.h5",
            "optimizer": {"kind": "adam", "rate": 0.001},
            "patience": None,
        },
        versions={"numpy": "2.0.0", "python": "3.11.7"},
        epoch=3,
        best_epoch=2,
        best_valid_log_likelihood=-5.25,
        history=[
            EpochRecord(1, -9.5, math.nan, 0.001, 1.5),
            EpochRecord(2, -6.5, -5.25, 0.0005, 1.25),
            EpochRecord(3, -math.inf, -5.5, 0.00025, 1.0),
        ],
        events=[Event(2, 17, "skipped", "1 step had a loss that is not finite"), Event(3, 30, "note", "ä" * 1500)],
    )


def example_state(spec: ModelSpec) -> ResumeState:
    state = np.zeros(Slot.SIZE)
    state[[Slot.STEP, Slot.EPOCH, Slot.CURSOR, Slot.RATE, Slot.WEIGHT_SUM]] = 42, 4, 5, 0.00025, 35
    state[[Slot.LOSS, Slot.LOG_PROB_SUM, Slot.SKIPPED, Slot.LOSS_RING]] = math.nan, -200.5, 1, math.inf
    return ResumeState(
        parameters=numbers(spec, 2),
        first_moment=numbers(spec, 3),
        second_moment={key: abs(array) for key, array in numbers(spec, 4).items()},
        best_parameters=numbers(spec, 5),
        optimizer="adam",
        hyper={"rate": 1e-3, "momentum": 0.9, "momentum_epoch": 5},
        state=state,
        stale_epochs=1,
        epoch_seconds=0.75,
    )


def same_numbers(got: Parameters, want: Parameters) -> None:
    assert list(got) == list(want)
    for key, array in want.items():
        assert got[key].dtype == array.dtype
        np.testing.assert_array_equal(got[key], array, err_msg=key)


def same_run(got: RunRecord, want: RunRecord) -> None:
    events = [replace(event, message=event.message[:1000]) for event in want.events]
    assert repr(got) == repr(replace(want, events=events))  # by repr, in which NaN equals NaN


# --- round trip -------------------------------------------------------------------------------------------------------


def test_run_round_trip(tmp_path: Path) -> None:
    flow, best, path = example_flow(), numbers(example_flow().spec, 9), tmp_path / "run.h5"
    save_run(path, flow, best, example_run())
    back, run = load_run(path)
    assert run is not None
    same_run(run, example_run())
    same_numbers(back.parameters(), best)
    assert (back.spec, back.info) == (flow.spec, flow.info)
    x = np.random.default_rng(0).normal(size=(4, 5))
    flow.set_parameters(best)
    np.testing.assert_array_equal(load(path).log_prob(x), flow.log_prob(x))
    assert nicecp.load is load


def test_state_round_trip(tmp_path: Path) -> None:
    flow, path = example_flow(dtype="float32"), tmp_path / "run.state.h5"
    want = example_state(flow.spec)
    save_state(path, flow, example_run(), want)
    save_state(path, flow, example_run(), want)  # over the old one
    back, run, state = load_state(path)
    same_run(run, example_run())
    for name in ("parameters", "first_moment", "second_moment", "best_parameters"):
        same_numbers(getattr(state, name), getattr(want, name))
    same_numbers(back.parameters(), want.parameters)
    np.testing.assert_array_equal(state.state, want.state)
    assert (state.optimizer, state.hyper) == (want.optimizer, want.hyper)
    assert (state.stale_epochs, state.epoch_seconds) == (1, 0.75)
    same_numbers(load(path).parameters(), want.parameters)


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    flow, path = example_flow(), tmp_path / "run.h5"
    save_run(path, flow, flow.parameters(), RunRecord())
    run = load_run(path)[1]
    assert run is not None
    same_run(run, RunRecord())


def test_a_flow_saved_alone_has_no_run(tmp_path: Path) -> None:
    path = tmp_path / "flow.h5"
    flow = example_flow()
    flow.save(path)
    back, run = load_run(path)
    assert run is None
    same_numbers(back.parameters(), flow.parameters())
    with pytest.raises(
        CheckpointError, match=r"flow\.h5': holds a model but not the state .*'.*flow\.state\.h5' beside it"
    ):
        load_state(path)
    with pytest.raises(OutputError, match="already exists"):
        flow.save(path)


def test_images_keep_their_shape(tmp_path: Path) -> None:
    spec = ModelSpec(12, alternating((3,), 4), "logistic", "float32")
    flow = NICE.from_spec(spec, None, (Dequantize(-1.0, 1.0),), DataInfo((2, 2, 3)))
    flow.save(tmp_path / "x.h5")
    back = load(tmp_path / "x.h5")
    assert back.info == DataInfo((2, 2, 3))
    assert back.preprocessing == (Dequantize(-1.0, 1.0),)
    assert back.dtype == np.float32


def test_same_run_same_bytes(tmp_path: Path) -> None:
    flow = example_flow()
    for name in ("a", "b"):
        save_state(tmp_path / name, flow, example_run(), example_state(flow.spec))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_backend_that_is_asked_for_is_used(tmp_path: Path, one_backend: Any) -> None:
    example_flow().save(tmp_path / "x.h5")
    assert load(tmp_path / "x.h5", backend=one_backend).backend is one_backend


@pytest.mark.parametrize(
    ("path", "beside"),
    [
        ("run.h5", "run.state.h5"),
        ("a.b/run", "a.b/run.state.h5"),
        (Path("x/run.v2.hdf5"), "x/run.v2.state.hdf5"),
        (".run", ".run.state.h5"),
    ],
)
def test_state_path(path: str | Path, beside: str) -> None:
    assert state_path(path) == beside


# --- the documented reader and the kept files -------------------------------------------------------------------------


@functools.cache
def documented_log_prob() -> Callable[[Any, Any], Any]:
    """The reader in docs/checkpoint.md, run as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpoint.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/checkpoint.md", "exec"), names)
    function: Callable[[Any, Any], Any] = names["log_prob"]
    return function


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_features", [2, 5, 8])
@pytest.mark.parametrize(
    ("law", "partition"),
    [
        ("additive", "odd-even"),
        (("affine", "additive", "multiplicative"), "odd-even"),
        (("multiplicative", "additive"), "halves"),
        (("spline", "affine"), "halves"),
        ("additive", "permutation"),
    ],
)
@pytest.mark.slow
def test_the_documented_reader_gives_the_flow_s_log_prob(
    tmp_path: Path, prior: str, dtype: str, n_features: int, law: str | tuple[str, ...], partition: str
) -> None:
    rng = np.random.default_rng(7)
    order = tuple(rng.permutation(n_features).tolist()) if partition == "permutation" else None
    couplings = (*alternating((6, 4), 3, law), *alternating((), 1, law))
    spec = ModelSpec(n_features, couplings, prior, dtype, partition=partition, order=order)
    steps: list[tuple[Step, ...]] = [
        (),
        (Dequantize(),),
        (Standardize(rng.normal(size=n_features), rng.uniform(0.5, 2, n_features)),) * 2,
        (
            Recorded(np.array([0, 1]), np.array([0.1, 0.2])),
            Quantile.of(np.array([0, 1]), [fit_knots(rng.standard_t(2.0, 400), count) for count in (5, 16)]),
            Logit(np.array([0]), np.array([-30.0]), np.array([40.0])),
            Angle(np.array([1]), np.array([-2.0]), np.array([5.0])),
            Log(np.array([1]), np.array([-40.0])),
            Student(np.array([0, 1]), np.array([2.5, 9.0]), np.array([0.1, 3.0]), np.array([0.5, 2.0])),
        ),
    ]
    for number, preprocessing in enumerate(steps):
        parameters = numbers(spec, number)
        for k, coupling in enumerate(spec.couplings):  # steep splines would show the rounding of float32 enlarged
            last = f"couplings/{k}/layers/{len(coupling.hidden)}"
            if coupling.law == "spline":
                parameters |= {f"{last}/{name}": parameters[f"{last}/{name}"] / 8 for name in ("weight", "bias")}
        flow, path = NICE.from_spec(spec, parameters, preprocessing), tmp_path / f"{number}.h5"
        flow.save(path)
        x = rng.normal(size=(20, n_features))
        want = flow.log_prob(x)
        assert np.ptp(want) > 0.1
        # A float32 flow computes in float32, the reader in float64: 4e-7 of log_prob was the most seen.
        rtol = 2e-6 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(documented_log_prob()(path, x), want, rtol=rtol)


@pytest.mark.parametrize("name", ["v1.h5", "v1.state.h5"])
def test_files_of_version_1_load_for_ever(name: str) -> None:
    expected = json.loads((DATA / "v1.json").read_text())
    x, want = np.array(expected["x"]), np.array(expected["log_prob"][name])
    np.testing.assert_allclose(load(DATA / name).log_prob(x), want, rtol=1e-12)
    np.testing.assert_allclose(documented_log_prob()(DATA / name, x), want, rtol=1e-12)
    flow, run = load_run(DATA / name)
    assert run is not None
    same_run(run, example_run())
    assert flow.spec == ModelSpec(5, alternating((4, 3), 3), "logistic", "float64")
    assert flow.info == example_flow().info
    assert flow.preprocessing[0].arrays()["std"].tolist() == [1.0, 2.0, 0.125, 1.0, 25.0]


def test_the_state_file_of_version_1_loads_for_ever() -> None:
    state, want = load_state(DATA / "v1.state.h5")[2], example_state(example_flow().spec)
    for name in ("parameters", "first_moment", "second_moment", "best_parameters"):
        same_numbers(getattr(state, name), getattr(want, name))
    same_numbers(load(DATA / "v1.h5").parameters(), want.best_parameters)
    np.testing.assert_array_equal(state.state, want.state)
    assert (state.optimizer, state.hyper, state.stale_epochs, state.epoch_seconds) == ("adam", want.hyper, 1, 0.75)


def test_every_name_in_a_state_file_is_on_the_page() -> None:
    page = (ROOT / "docs" / "checkpoint.md").read_text()
    assert f"{Slot.LOSS_RING}-{Slot.SIZE - 1} |" in page
    names: set[str] = set()
    with h5py.File(DATA / "v1.state.h5") as file:

        def note(path: str, member: h5py.Group | h5py.Dataset) -> None:
            names.add(path.rpartition("/")[2])
            names.update(member.attrs)

        file.visititems(note)
        names.update(file.attrs)
    names = {name for name in names if not name.isdigit() and not name.startswith("version_")}
    assert names > {"weight", "log_scale", "seconds", "stale_epochs", "fingerprint"}
    assert {name for name in names if not re.search(rf"\b{name}\b", page)} - {"momentum_epoch"} == set()


# --- what is not written, and what is not read ------------------------------------------------------------------------


def test_brackets_in_a_text_are_no_depth(tmp_path: Path) -> None:
    run, path = replace(example_run(), config={"a": "[" * 100 + '"' + "\\" + "{" * 100}), tmp_path / "x.h5"
    save_run(path, example_flow(), example_flow().parameters(), run)
    back = load_run(path)[1]
    assert back is not None
    assert back.config == run.config


@pytest.mark.parametrize("value", [math.nan, {1, 2}, b"bytes"])
def test_settings_that_are_no_json_are_not_saved(tmp_path: Path, value: Any) -> None:
    run = replace(example_run(), config={"a": value})
    with pytest.raises(CheckpointError, match="its config cannot be written as JSON"):
        save_run(tmp_path / "x.h5", example_flow(), example_flow().parameters(), run)
    assert os.listdir(tmp_path) == []


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    flow = example_flow()
    for change in (
        {"best_epoch": 7},
        {"seed": -1},
        {"config": {"x": "x" * checkpoint.MAX_JSON}},
        {"history": [EpochRecord(1, 0.0, 0.0, math.nan, 0.0)]},
    ):
        with pytest.raises(CheckpointError, match="it is not saved"):
            save_run(tmp_path / "x.h5", flow, flow.parameters(), replace(example_run(), **change))
    state = example_state(flow.spec)
    state.second_moment["scaling/log_scale"][0] = -1
    with pytest.raises(CheckpointError, match=r"x\.state\.h5': /optimizer.*negative elements; it is not saved"):
        save_state(tmp_path / "x.state.h5", flow, example_run(), state)
    assert os.listdir(tmp_path) == []


def test_an_existing_run_is_kept_without_overwrite(tmp_path: Path) -> None:
    path, flow = tmp_path / "run.h5", example_flow()
    save_run(path, flow, flow.parameters(), example_run())
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"already exists; allow it \(--overwrite"):
        save_run(path, flow, numbers(flow.spec, 8), example_run())
    assert path.read_bytes() == before
    save_run(path, flow, numbers(flow.spec, 8), example_run(), overwrite=True)
    assert path.read_bytes() != before


def test_damage_of_a_kept_file_is_refused(tmp_path: Path) -> None:
    data = bytearray((DATA / "v1.h5").read_bytes())
    rng = np.random.default_rng(3)
    for at in rng.integers(0, len(data), 100):
        damaged = data.copy()
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.h5").write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(tmp_path / "x.h5")


def test_a_data_file_is_no_checkpoint(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["train"] = np.zeros((3, 2))
    with pytest.raises(CheckpointError, match=r"data\.h5': not a nicecp checkpoint; expected a file written by"):
        load(tmp_path / "data.h5")
    assert encode(read_tree(DATA / "v1.h5"))[:8] == b"NICECP\r\n"

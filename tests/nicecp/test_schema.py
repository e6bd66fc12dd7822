"""A flow as a tree and back: exact values, and every name, type, shape and bound that is not right is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nicecp import __version__, schema
from nicecp.errors import CheckpointError
from nicecp.preprocessing import Dequantize, Standardize, Step, Triangular, Zca
from nicecp.records import DataInfo, Parameters
from nicecp.schema import model_from_tree, model_tree
from nicecp.spec import CouplingSpec, ModelSpec, alternating
from nicecp.store import Tree, decode, encode, strings

MEAN, STD = np.array([0.5, -1.0, 3.0, 0.0, 1e6]), np.array([1.0, 2.0, 1e-3, 1.0, 1e5])
INFO = DataInfo(None, ("a", "b", "größe", "", "e"), ("m", "", "", "s", "nats"), "0123456789abcdef" * 4)


def numbers(spec: ModelSpec, seed: int = 0) -> Parameters:
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(spec.dtype) for key, shape in spec.parameter_shapes().items()}


def table_spec(**changes: Any) -> ModelSpec:
    couplings = (*alternating((4, 3), 2), CouplingSpec("additive", 1, 0, ()), CouplingSpec("additive", 0, 1, (7,)))
    return ModelSpec(**{"n_features": 5, "couplings": couplings, "prior": "gaussian", "dtype": "float64", **changes})


@functools.cache
def table_bytes() -> bytes:
    spec = table_spec()
    return encode(model_tree(spec, numbers(spec), (Standardize(MEAN, STD),), INFO))


def table() -> Tree:
    """A valid tree, as a file holds it."""
    return decode(table_bytes(), "x")


def test_round_trip_of_a_table() -> None:
    spec = table_spec()
    back, parameters, steps, info = model_from_tree(table(), "x")
    assert back == spec
    assert info == INFO
    assert list(parameters) == list(spec.parameter_shapes())
    for key, array in numbers(spec).items():
        assert parameters[key].dtype == np.float64
        np.testing.assert_array_equal(parameters[key], array)
    (step,) = steps
    assert isinstance(step, Standardize)
    np.testing.assert_array_equal(step.mean, MEAN)
    np.testing.assert_array_equal(step.std, STD)


def test_round_trip_of_images() -> None:
    spec = ModelSpec(6, alternating((3,), 1), "logistic", "float32")
    steps: tuple[Step, ...] = (Dequantize(-1, 1), Standardize(np.zeros(6), np.ones(6)))
    tree = decode(encode(model_tree(spec, numbers(spec), steps, DataInfo((2, 3)))), "x")
    back, parameters, read, info = model_from_tree(tree, "x")
    assert back == spec
    assert info == DataInfo((2, 3))
    assert [step.kind for step in read] == ["dequantize", "standardize"]
    assert read[0] == Dequantize(-1.0, 1.0, 256)
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float32)}


def test_round_trip_of_whitening() -> None:
    spec = ModelSpec(6, alternating((3,), 1), "logistic", "float64")
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    zca = Zca(np.arange(6.0), np.linspace(0, 2, 6), vectors, 0.25)
    lower = Triangular(np.tril(np.ones((6, 6))), np.arange(6.0))
    tree = decode(encode(model_tree(spec, numbers(spec), (zca, lower), DataInfo())), "x")
    assert tree.attrs["/preprocessing/0"] == {"kind": "zca", "regularization": 0.25}
    assert tree.attrs["/preprocessing/1"] == {"kind": "triangular"}
    found = model_from_tree(tree, "x")[2]
    assert [type(step) for step in found] == [Zca, Triangular]
    for step, back in zip((zca, lower), found, strict=True):
        assert back.attrs() == step.attrs()
        for name, values in step.arrays().items():
            np.testing.assert_array_equal(back.arrays()[name], values)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("/preprocessing/0/eigenvectors", 1.001 * np.eye(6), "orthogonal and of length 1"),
        ("/preprocessing/0/eigenvectors", np.eye(6)[:5], "should have shape (6, 6), has (5, 6)"),
        ("/preprocessing/0/eigenvalues", -np.ones(6), "all eigenvalues positive"),
        ("/preprocessing/1/lower", np.ones((6, 6)), "zero above its diagonal"),
        ("/preprocessing/1/lower", np.zeros((6, 6)), "nowhere zero on it"),
        ("/preprocessing/1/bias", np.full(6, np.inf), "is not finite"),
    ],
)
def test_wrong_whitening_is_refused(name: str, values: Any, text: str) -> None:
    spec = ModelSpec(6, alternating((3,), 1), "logistic", "float64")
    steps = (Zca(np.zeros(6), np.ones(6), np.eye(6), 0.5), Triangular(np.eye(6), np.zeros(6)))
    tree = model_tree(spec, numbers(spec), steps, DataInfo())
    tree.arrays[name] = values
    with pytest.raises(CheckpointError) as caught:
        model_from_tree(tree, "run.h5")
    assert text in str(caught.value)


def test_names_and_types_are_those_of_the_page() -> None:
    tree = table()
    assert tree.attrs["/"] == {"format": "nicecp", "format_version": 1, "nicecp_version": __version__}
    assert tree.attrs["/model"] == {
        "n_features": 5,
        "n_context": 0,
        "n_couplings": 4,
        "prior": "gaussian",
        "dtype": "float64",
        "precision": "full",
        "partition": "odd-even",
    }
    assert tree.attrs["/model/couplings/1"] == {"law": "additive", "conditions_on": 1, "transforms": 0}
    assert tree.attrs["/preprocessing/0"] == {"kind": "standardize"}
    assert {path: array.shape for path, array in tree.arrays.items() if "couplings/0" in path} == {
        "/model/couplings/0/layers/0/weight": (3, 4),
        "/model/couplings/0/layers/0/bias": (4,),
        "/model/couplings/0/layers/1/weight": (4, 3),
        "/model/couplings/0/layers/1/bias": (3,),
        "/model/couplings/0/layers/2/weight": (3, 2),
        "/model/couplings/0/layers/2/bias": (2,),
    }
    assert tree.arrays["/model/scaling/log_scale"].shape == (5,)
    assert tree.arrays["/data/columns"].tolist()[2] == "größe".encode()
    assert tree.arrays["/preprocessing/0/mean"].tolist() == MEAN.tolist()


@pytest.mark.parametrize("partition", ["odd-even", "halves", "permutation"])
def test_partitions_come_back(partition: str) -> None:
    order = (4, 0, 3, 1, 2) if partition == "permutation" else None
    spec = ModelSpec(5, alternating((3,), 3), partition=partition, order=order)
    tree = model_tree(spec, numbers(spec), (), DataInfo())
    assert tree.attrs["/model"]["partition"] == partition
    assert ("/model/order" in tree.arrays) == (partition == "permutation")
    assert model_from_tree(tree, "x")[0] == spec


def test_numpy_integers_in_a_spec_are_stored_as_integers() -> None:
    spec = ModelSpec(np.int64(2), (CouplingSpec("additive", np.int32(0), np.int32(1), (np.int64(3),)),))  # type: ignore[arg-type]
    assert model_from_tree(model_tree(spec, numbers(spec), (), DataInfo()), "x")[0] == spec


# --- what is refused --------------------------------------------------------------------------------------------------

Change = Callable[[Tree], object]


def attr(path: str, key: str, value: Any) -> Change:
    return lambda tree: tree.attrs[path].update({key: value})


def array(path: str, value: Any) -> Change:
    return lambda tree: tree.arrays.update({path: np.asarray(value)})


def without(path: str, key: str | None = None) -> Change:
    return lambda tree: tree.arrays.pop(path) if key is None else tree.attrs[path].pop(key)


def permuted(order: Any) -> Change:
    def change(tree: Tree) -> None:
        tree.attrs["/model"]["partition"] = "permutation"
        tree.arrays["/model/order"] = order

    return change


def bad_element(path: str, value: float) -> Change:
    def change(tree: Tree) -> None:
        tree.arrays[path].flat[-1] = value

    return change


WEIGHT, BIAS = "/model/couplings/0/layers/1/weight", "/model/couplings/0/layers/1/bias"

# (what is changed, a part of the message)
WRONG: dict[str, tuple[Change, str]] = {
    "format": (attr("/", "format", "nice"), "'format'"),
    "newer version": (attr("/", "format_version", 2), "written in checkpoint format 2 by a newer nicecp"),
    "version 0": (attr("/", "format_version", 0), "outside 1.."),
    "version as text": (attr("/", "format_version", "1"), "should be int, is str"),
    "version as float": (attr("/", "format_version", 1.0), "should be int, is float"),
    "no program version": (without("/", "nicecp_version"), "'nicecp_version' is missing"),
    "one more attribute at the root": (attr("/", "x", 1), "attribute 'x' of /: does not belong there"),
    "one more attribute of the model": (attr("/model", "x", 1), "does not belong there"),
    "one more attribute of a layer": (attr("/model/couplings/0/layers/0", "x", 1), "does not belong there"),
    "n_features missing": (without("/model", "n_features"), "'n_features' is missing"),
    "n_features 1": (attr("/model", "n_features", 1), "outside 2.."),
    "n_features negative": (attr("/model", "n_features", -5), "outside 2.."),
    "n_features of another flow": (attr("/model", "n_features", 6), "should have shape"),
    "n_features huge": (attr("/model", "n_features", 2**64 - 1), "outside 2.."),
    "n_context": (attr("/model", "n_context", 1), "layers/0/weight: should have shape (4, 4), has (3, 4)"),
    "n_couplings 0": (attr("/model", "n_couplings", 0), "outside 1.."),
    "n_couplings too small": (attr("/model", "n_couplings", 3), "n_couplings = 3"),
    "n_couplings too large": (attr("/model", "n_couplings", 5), "n_couplings = 5"),
    "n_couplings huge": (attr("/model", "n_couplings", 2**40), "outside 1.."),
    "prior": (attr("/model", "prior", "uniform"), "unknown prior 'uniform'"),
    "dtype": (attr("/model", "dtype", "float16"), "'dtype' is 'float16', this nicecp knows float32, float64"),
    "dtype of other arrays": (attr("/model", "dtype", "float32"), "should be float32, is float64"),
    "precision": (attr("/model", "precision", "int4"), "'precision'"),
    "partition": (attr("/model", "partition", "thirds"), "unknown partition 'thirds'"),
    "partition without its order": (attr("/model", "partition", "permutation"), "/model/order: is missing"),
    "order without its partition": (array("/model/order", np.arange(5)), "/model/order: does not belong there"),
    "order too short": (permuted(np.arange(4)), "/model/order: should have shape (5), has (4)"),
    "order of floats": (permuted(np.arange(5.0)), "/model/order: should be int64, is float64"),
    "order with a column twice": (permuted(np.array([0, 1, 2, 2, 4])), "column 2 is 2 times in the partition"),
    "order beyond the columns": (permuted(np.arange(1, 6)), "column 5 in the partition is outside 0..4"),
    "order below the columns": (permuted(np.arange(-1, 4)), "column -1 in the partition is outside 0..4"),
    "parts of a coupling of too few columns": (
        array("/model/couplings/2/order", np.arange(4)),
        "/model/couplings/2/order: should have shape (5), has (4)",
    ),
    "parts of a coupling of floats": (array("/model/couplings/2/order", np.arange(5.0)), "should be int64, is float64"),
    "parts of a coupling with a column twice": (
        array("/model/couplings/2/order", np.array([0, 1, 2, 2, 4])),
        "/model/couplings/2/order: column 2 is 2 times in the partition",
    ),
    "parts of a coupling beyond the columns": (
        array("/model/couplings/3/order", np.arange(1, 6)),
        "/model/couplings/3/order: column 5 in the partition is outside 0..4",
    ),
    "other parts before the first coupling": (
        array("/model/couplings/0/order", np.arange(5)),
        "the first coupling has no order of its own",
    ),
    "more orders than couplings": (array("/model/couplings/4/order", np.arange(5)), "does not hold n_couplings = 4"),
    "several orders of a coupling": (
        array("/model/couplings/1/order", np.tile(np.arange(5), (2, 1))),
        "/model/couplings/1/order: should have shape (5), has (2, 5)",
    ),
    "law": (attr("/model/couplings/0", "law", "cubic"), "the coupling 'cubic' is not registered"),
    "parts alike": (attr("/model/couplings/0", "transforms", 0), "transforms the other"),
    "part 2": (attr("/model/couplings/0", "transforms", 2), "outside 0..1"),
    "parts exchanged": (
        lambda tree: tree.attrs["/model/couplings/0"].update(conditions_on=1, transforms=0),
        "should have shape",
    ),
    "a coupling named otherwise": (
        lambda tree: tree.attrs.update({"/model/couplings/01": {}}),
        "/model/couplings: its groups are not named 0, 1, 2",
    ),
    "a layer more": (array("/model/couplings/0/layers/3/bias", np.zeros(2)), "is missing"),
    "a layer less": (
        lambda tree: (
            [tree.attrs.pop("/model/couplings/0/layers/2")]
            + [tree.arrays.pop(f"/model/couplings/0/layers/2/{name}") for name in ("weight", "bias")]
        ),
        "should have shape",
    ),
    "no bias": (without(BIAS), f"{BIAS}: is missing"),
    "no weight": (without(WEIGHT), f"{WEIGHT}: is missing"),
    "no scaling": (without("/model/scaling/log_scale"), "/model/scaling/log_scale: is missing"),
    "a dataset more": (array("/model/couplings/0/layers/1/gain", np.zeros(3)), "gain: does not belong there"),
    "an empty group more": (lambda tree: tree.attrs.update({"/model/extra": {}}), "/model/extra: does not belong"),
    "an unknown section": (lambda tree: tree.attrs.update({"/more": {}}), "/more: does not belong there"),
    "a dataset at the root": (array("/x", np.zeros(3)), "/x: does not belong there"),
    "weight transposed": (lambda tree: tree.arrays.update({WEIGHT: tree.arrays[WEIGHT].T}), "(4, 3), has (3, 4)"),
    "weight flat": (array(WEIGHT, np.zeros(12)), "should have shape (4, 3), has (12)"),
    "weight of rank 3": (array(WEIGHT, np.zeros((4, 3, 1))), "should have shape"),
    "weight float32": (array(WEIGHT, np.zeros((4, 3), np.float32)), "should be float64, is float32"),
    "weight of integers": (array(WEIGHT, np.zeros((4, 3), np.int64)), "should be float64, is int64"),
    "weight of strings": (array(WEIGHT, np.zeros((4, 3), "S8")), "should be float64"),
    "bias of rank 2": (array(BIAS, np.zeros((3, 1))), "has shape (3, 1)"),
    "bias of rank 0": (array(BIAS, 1.0), "has shape ()"),
    "bias empty": (array(BIAS, np.zeros(0)), "has shape (0)"),
    "bias longer": (array(BIAS, np.zeros(4)), "should have shape (4, 4), has (4, 3)"),
    "weight NaN": (bad_element(WEIGHT, np.nan), f"{WEIGHT}: element (3, 2) is not finite"),
    "bias infinite": (bad_element(BIAS, np.inf), f"{BIAS}: element (2) is not finite"),
    "log_scale infinite": (bad_element("/model/scaling/log_scale", -np.inf), "is not finite"),
    "no preprocessing": (
        lambda tree: (
            [tree.attrs.pop(path) for path in ("/preprocessing", "/preprocessing/0")]
            + [tree.arrays.pop(f"/preprocessing/0/{name}") for name in ("mean", "std")]
        ),
        "/preprocessing: is missing",
    ),
    "step of unknown kind": (attr("/preprocessing/0", "kind", "pickle"), "'kind' is 'pickle'"),
    "step of another kind": (attr("/preprocessing/0", "kind", "dequantize"), "'low' is missing"),
    "step numbered from 1": (lambda tree: tree.attrs.update({"/preprocessing/2": {}}), "are not named"),
    "too many steps": (
        lambda tree: tree.attrs.update({f"/preprocessing/{number}": {} for number in range(65)}),
        "holds 65 steps",
    ),
    "mean too long": (array("/preprocessing/0/mean", np.zeros(6)), "should have shape (5), has (6)"),
    "mean NaN": (bad_element("/preprocessing/0/mean", np.nan), "is not finite"),
    "std 0": (bad_element("/preprocessing/0/std", 0.0), "std finite and positive"),
    "std negative": (bad_element("/preprocessing/0/std", -1.0), "std finite and positive"),
    "attribute of standardize": (attr("/preprocessing/0", "low", 0.0), "does not belong there"),
    "no fingerprint": (without("/data", "fingerprint"), "'fingerprint' is missing"),
    "fingerprint short": (attr("/data", "fingerprint", "abc"), "64 hexadecimal digits"),
    "fingerprint not hexadecimal": (attr("/data", "fingerprint", "g" * 64), "64 hexadecimal digits"),
    "image of another size": (array("/data/image_shape", [2, 3]), "does not have 5 elements"),
    "image of negative sides": (array("/data/image_shape", [-1, -5]), "does not have 5 elements"),
    "image without sides": (array("/data/image_shape", np.zeros(0, np.int64)), "does not have 5 elements"),
    "image of floats": (array("/data/image_shape", [1.0, 5.0]), "should be int64"),
    "too few columns": (array("/data/columns", strings(["a"])), "should have shape (5), has (1)"),
    "columns as numbers": (array("/data/columns", np.zeros(5)), "should be a string"),
    "columns not UTF-8": (array("/data/columns", np.array([b"\xff"] * 5)), "/data/columns: is not UTF-8"),
    "units too many": (array("/data/units", strings(["a"] * 6)), "should have shape (5), has (6)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_and_named(case: str) -> None:
    change, text = WRONG[case]
    tree = table()
    model_from_tree(tree, "run.h5")
    change(tree)
    with pytest.raises(CheckpointError) as caught:
        model_from_tree(tree, "run.h5")
    assert text in str(caught.value)
    assert str(caught.value).startswith("'run.h5': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(table().arrays))
def test_every_dataset_has_one_type_and_one_rank(path: str) -> None:
    for value in (
        table().arrays[path][None],
        table().arrays[path].astype("S3").astype("S2")[..., None],
        np.zeros(3, "f4"),
    ):
        tree = table()
        tree.arrays[path] = value
        with pytest.raises(CheckpointError):
            model_from_tree(tree, "x")


@pytest.mark.parametrize(("path", "key"), [(path, key) for path, values in table().attrs.items() for key in values])
def test_every_attribute_is_needed_and_has_one_type(path: str, key: str) -> None:
    tree = table()
    value = tree.attrs[path].pop(key)
    with pytest.raises(CheckpointError, match=key):
        model_from_tree(tree, "x")
    tree.attrs[path][key] = 0 if isinstance(value, str) else float(value)
    with pytest.raises(CheckpointError, match=key):
        model_from_tree(tree, "x")


def test_dequantize_is_checked() -> None:
    spec = ModelSpec(2, alternating((), 1))
    for low, high, levels in [(1.0, 0.0, 256), (0.0, float("inf"), 256), (0.0, 1.0, 16)]:
        tree = model_tree(spec, numbers(spec), (Dequantize(),), DataInfo())
        tree.attrs["/preprocessing/0"].update(low=low, high=high, levels=levels)
        with pytest.raises(CheckpointError, match="/preprocessing/0"):
            model_from_tree(tree, "x")


def test_other_sections_are_left_to_their_readers() -> None:
    tree = table()
    for section in schema.SECTIONS:
        tree.attrs[f"/{section}"] = {"x": 1}
        tree.arrays[f"/{section}/y"] = np.zeros(3)
    model_from_tree(tree, "x")
    tree.attrs["/trainings"] = {}
    with pytest.raises(CheckpointError, match="/trainings"):
        model_from_tree(tree, "x")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_flow_that_could_not_be_read_again_is_not_saved(bad: float) -> None:
    spec = table_spec()
    parameters = numbers(spec)
    parameters["couplings/3/layers/1/bias"][1] = bad
    with pytest.raises(
        CheckpointError, match=r"^'flow': /model/couplings/3/layers/1/bias: element \(1\) is not finite; it"
    ):
        model_tree(spec, parameters, (), DataInfo())
    with pytest.raises(CheckpointError, match="holds 0 layers"):
        model_tree(spec, {}, (), DataInfo())
    with pytest.raises(CheckpointError, match="does not have 5 elements"):
        model_tree(spec, numbers(spec), (), DataInfo((2, 2)))
    other = table_spec(couplings=(*alternating((9, 3), 2), *table_spec().couplings[2:]))
    with pytest.raises(CheckpointError, match="not those of the architecture"):
        model_tree(spec, numbers(other), (), DataInfo())
    with pytest.raises(CheckpointError, match="should be float64"):
        model_tree(spec, numbers(table_spec(dtype="float32")), (), DataInfo())


def test_names_of_any_length_are_one_line() -> None:
    spec = ModelSpec(2, alternating((), 1))
    with pytest.raises(CheckpointError, match="a text of 40000 bytes"):
        model_tree(spec, numbers(spec), (), DataInfo(columns=("a" * 40000, "b")))

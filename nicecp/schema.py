"""What the groups and datasets of a checkpoint mean: a flow as a tree and back, nothing more and nothing less.

docs/checkpoint.md is the same in words. Every name, type, shape and bound is checked in both directions, so that
nothing is written that could not be read again, and nothing is read that is not exactly what it should be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.context import Context
from nicecp.errors import CheckpointError, about_file
from nicecp.kernels import PRECISIONS
from nicecp.orders import partition_order
from nicecp.preprocessing import Step, step_from
from nicecp.records import DataInfo, Parameters
from nicecp.registry import MLP, is_law, is_network
from nicecp.spec import DTYPES, CouplingSpec, ModelSpec
from nicecp.store import Attribute, Tree, newer, strings
from nicecp.transforms import COLUMN_KINDS, INTEGERS, SHAPES, column_step

FORMAT = "nicecp"
FORMAT_VERSION = 1

MAX_FEATURES = 1 << 24
MAX_COUPLINGS = 1024
MAX_LAYERS = 1024  # of one coupling's network
MAX_WIDTH = 1 << 24
MAX_STEPS = 64  # of preprocessing
MAX_COUNT = 1 << 53  # step and epoch counters also live in float64 arrays

SECTIONS = ("training", "optimizer", "resume", "best", "context")  # read by nicecp.checkpoint

# Attributes (name, type) and arrays (name, rank: (d,) or (d, d)) of each kind of preprocessing step.
_STEPS: dict[str, tuple[dict[str, type], dict[str, int]]] = {
    "dequantize": ({"low": float, "high": float, "levels": int}, {}),
    "standardize": ({}, {"mean": 1, "std": 1}),
    "zca": ({"regularization": float}, {"mean": 1, "eigenvalues": 1, "eigenvectors": 2}),
    "triangular": ({}, {"lower": 2, "bias": 1}),
    "margin-logit": ({"margin": float}, {"low": 1, "high": 1}),
}


class Reader:
    """Takes values out of a tree, each checked, and refuses what is left over at the end."""

    def __init__(self, tree: Tree, name: str | os.PathLike[str], remedy: str = "expected a file of nicecp") -> None:
        self.name = name
        self._remedy = remedy
        self._attrs = {path: dict(attrs) for path, attrs in tree.attrs.items()}
        self._arrays = dict(tree.arrays)
        self._groups: dict[str, set[str]] = {}  # path to names of the groups in it; the root is ""
        for path in [*tree.attrs, *(path.rpartition("/")[0] for path in tree.arrays)]:
            path = path.rstrip("/")
            while path and path not in self._groups:
                self._groups[path] = set()
                path = path.rpartition("/")[0]
        for path in self._groups:
            parent, _, last = path.rpartition("/")
            if parent:
                self._groups[parent].add(last)
        self._used: set[str] = set()  # groups that something was taken from

    def refuse(self, where: str, problem: str) -> CheckpointError:
        return CheckpointError(about_file(self.name, f"{where}: {problem}", self._remedy))

    def has(self, path: str) -> bool:
        return path in self._groups or path in self._arrays

    def members(self, path: str) -> int:
        """Number of groups directly in a group; they must be named 0, 1, 2, ..."""
        names = self._groups.get(path, set())
        if names != {str(number) for number in range(len(names))}:
            raise self.refuse(path, "its groups are not named 0, 1, 2, ...")
        return len(names)

    def group(self, path: str) -> None:
        """A group that must be there, with or without content."""
        if path not in self._groups:
            raise self.refuse(path, "is missing")
        self._used.add(path)

    def attr_names(self, path: str) -> list[str]:
        """Attributes of a group that were not taken yet."""
        return list(self._attrs.get(path, {}))

    def attr(self, path: str, key: str, kind: type) -> Any:
        self._used.add(path)
        value: Attribute | None = self._attrs.get(path, {}).pop(key, None)
        if value is None:
            raise self.refuse(path, f"attribute {key!r} is missing")
        if type(value) is not kind:
            raise self.refuse(path, f"attribute {key!r} should be {kind.__name__}, is {type(value).__name__}")
        return value

    def text(self, path: str, key: str, choices: Collection[str] | None = None) -> str:
        value: str = self.attr(path, key, str)
        if choices is not None and value not in choices:
            problem = f"attribute {key!r} is {value[:40]!r}, this nicecp knows {', '.join(sorted(choices))}"
            raise self.refuse(path, problem)
        return value

    def integer(self, path: str, key: str, low: int, high: int) -> int:
        value: int = self.attr(path, key, int)
        if not low <= value <= high:
            raise self.refuse(path, f"attribute {key!r} is {value}, outside {low}..{high}")
        return value

    def number(self, path: str, key: str, finite: bool = True) -> float:
        value: float = self.attr(path, key, float)
        if finite and not math.isfinite(value):
            raise self.refuse(path, f"attribute {key!r} is {value}")
        return value

    def array(
        self, path: str, dtype: str, shape: Sequence[int | None] | None = None, finite: bool = True
    ) -> NDArray[Any]:
        """A dataset of a dtype ("S" for strings of any width) and shape (None: any length)."""
        array = self._arrays.pop(path, None)
        if array is None:
            raise self.refuse(path, "is missing")
        if array.dtype.kind != "S" if dtype == "S" else array.dtype != np.dtype(dtype):
            raise self.refuse(path, f"should be {'a string' if dtype == 'S' else dtype}, is {array.dtype}")
        if shape is not None and (
            len(shape) != array.ndim
            or any(want is not None and want != got for want, got in zip(shape, array.shape, strict=True))
        ):
            raise self.refuse(path, f"should have shape {_shape_text(shape)}, has {_shape_text(array.shape)}")
        if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise self.refuse(path, f"element {_first_bad(array)} is not finite")
        while "/" in (path := path.rpartition("/")[0]):
            self._used.add(path)
        return array

    def width(self, path: str) -> int:
        """Length of a 1-D dataset that is yet to be taken, at least 1."""
        array = self._arrays.get(path)
        if array is None or array.ndim != 1 or not 1 <= array.shape[0] <= MAX_WIDTH:
            raise self.refuse(path, "is missing" if array is None else f"has shape {_shape_text(array.shape)}")
        return int(array.shape[0])

    def names(self, path: str, count: int | None = None) -> list[str]:
        """A 1-D dataset of strings."""
        try:
            return [item.decode("utf-8") for item in self.array(path, "S", (count,)).tolist()]
        except UnicodeDecodeError as error:
            raise self.refuse(path, "is not UTF-8") from error

    def finish(self, sections: Collection[str] = ()) -> None:
        """All must have been taken, but for what is in these groups of the root."""
        skipped = tuple(f"/{section}" for section in sections)

        def ours(path: str) -> bool:
            return not any(path == skip or path.startswith(skip + "/") for skip in skipped)

        left = [path for path in self._arrays if ours(path)]
        left += [f"attribute {key!r} of {path}" for path, attrs in self._attrs.items() for key in attrs if ours(path)]
        left += [path for path in self._groups.keys() - self._used if ours(path)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise self.refuse(min(left), f"does not belong there{more}")


def _shape_text(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if length is None else str(length) for length in shape) + ")"


def _first_bad(array: NDArray[Any]) -> str:
    first = int(np.flatnonzero(~np.isfinite(array))[0])
    return _shape_text([int(index) for index in np.unravel_index(first, array.shape)])


# --- model ------------------------------------------------------------------------------------------------------------


def model_tree(
    spec: ModelSpec,
    parameters: Parameters,
    preprocessing: Sequence[Step],
    info: DataInfo,
    context: Context | None = None,
) -> Tree:
    """A flow as /model, /preprocessing, /data and /context. CheckpointError for numbers that could not be read again.

    parameters : arrays named and shaped as ``spec.parameter_shapes()``, of the flow's dtype, finite; not copied
    """
    from nicecp import __version__

    tree = Tree()
    root: dict[str, Attribute] = {"format": FORMAT, "format_version": FORMAT_VERSION, "nicecp_version": __version__}
    tree.attrs["/"] = root
    tree.attrs["/model"] = {
        "n_features": int(spec.n_features),
        "n_context": int(spec.n_context),
        "n_couplings": len(spec.couplings),
        "prior": spec.prior,
        "dtype": spec.dtype,
        "precision": spec.precision,
        "partition": spec.partition,
    }
    for k, coupling in enumerate(spec.couplings):
        tree.attrs[f"/model/couplings/{k}"] = {
            "law": coupling.law,
            "conditions_on": int(coupling.conditions_on),
            "transforms": int(coupling.transforms),
        }
        if coupling.network != MLP:
            tree.attrs[f"/model/couplings/{k}"]["network"] = coupling.network
            tree.arrays[f"/model/couplings/{k}/hidden"] = np.array(coupling.hidden, np.int64)
        if coupling.order is not None:
            tree.arrays[f"/model/couplings/{k}/order"] = np.array(coupling.order, np.int64)
    tree.attrs["/preprocessing"] = {}
    for number, step in enumerate(preprocessing):
        group = f"/preprocessing/{number}"
        scalars = {} if step.kind in COLUMN_KINDS else _STEPS[step.kind][0]
        tree.attrs[group] = {"kind": step.kind, **{key: scalars[key](value) for key, value in step.attrs().items()}}
        forms = {key: np.int64 if key in INTEGERS else np.float64 for key in step.arrays()}
        tree.arrays.update({f"{group}/{key}": np.asarray(array, forms[key]) for key, array in step.arrays().items()})
    if spec.order is not None:
        tree.arrays["/model/order"] = np.array(spec.order, np.int64)
    tree.attrs["/data"] = {"fingerprint": info.fingerprint}
    if info.image_shape is not None:
        tree.arrays["/data/image_shape"] = np.array(info.image_shape, np.int64)
    for key, texts in (("columns", info.columns), ("units", info.units)):
        if texts is not None:
            tree.arrays[f"/data/{key}"] = strings(texts)
    if context is not None:
        tree.arrays["/context/mean"], tree.arrays["/context/std"] = context.mean, context.std
        if context.names is not None:
            tree.arrays["/context/names"] = strings(context.names)
    add_parameters(tree, "/model", parameters)
    reader = Reader(tree, "flow", "it is not saved")
    if read_model(reader)[0] != spec:
        raise reader.refuse("/model", "the parameters' shapes are not those of the architecture")
    read_context(reader, spec.n_context)
    reader.finish()
    return tree


def model_from_tree(
    tree: Tree, name: str | os.PathLike[str]
) -> tuple[ModelSpec, Parameters, tuple[Step, ...], DataInfo]:
    """Architecture, parameters, preprocessing and data description of a tree; CheckpointError for anything odd.

    ``name`` is the file in messages. Groups that other readers check (SECTIONS) are left to them.
    """
    reader = Reader(tree, name)
    model = read_model(reader)
    reader.finish(SECTIONS)
    return model


def read_model(reader: Reader) -> tuple[ModelSpec, Parameters, tuple[Step, ...], DataInfo]:
    """As model_from_tree, from a reader that has more to read."""
    if reader.text("/", "format") != FORMAT:
        raise reader.refuse("/", f"attribute 'format' is not {FORMAT!r}")
    version = reader.integer("/", "format_version", 1, MAX_COUNT)
    if version > FORMAT_VERSION:
        raise CheckpointError(newer(reader.name, version, FORMAT_VERSION))
    reader.text("/", "nicecp_version")
    spec = _read_spec(reader)
    parameters = read_parameters(reader, "/model", spec)
    preprocessing = _read_preprocessing(reader, spec.n_features)
    return spec, parameters, preprocessing, _read_data(reader, spec.n_features)


def _read_spec(reader: Reader) -> ModelSpec:
    """The architecture; hidden sizes are the lengths of the biases of all layers but the last."""
    n_features = reader.integer("/model", "n_features", 2, MAX_FEATURES)
    n_context = reader.integer("/model", "n_context", 0, MAX_FEATURES)
    n_couplings = reader.integer("/model", "n_couplings", 1, MAX_COUPLINGS)
    prior, partition = reader.text("/model", "prior"), reader.text("/model", "partition")
    dtype, precision = reader.text("/model", "dtype", DTYPES), reader.text("/model", "precision", PRECISIONS)
    if reader.members("/model/couplings") != n_couplings:
        raise reader.refuse("/model/couplings", f"does not hold n_couplings = {n_couplings} groups")
    couplings = []
    for k in range(n_couplings):
        group = f"/model/couplings/{k}"
        law, network = reader.text(group, "law"), MLP
        if "network" in reader.attr_names(group):
            network = reader.text(group, "network")
        _refuse_unregistered(reader, group, law, network)
        parts = [reader.integer(group, key, 0, 1) for key in ("conditions_on", "transforms")]
        if network == MLP:
            n_layers = reader.members(f"{group}/layers")
            if not 1 <= n_layers <= MAX_LAYERS:
                raise reader.refuse(f"{group}/layers", f"holds {n_layers} layers, expected 1..{MAX_LAYERS}")
            hidden = tuple(reader.width(f"{group}/layers/{j}/bias") for j in range(n_layers - 1))
        else:
            hidden = tuple(reader.array(f"{group}/hidden", "int64", (None,)).tolist())
        order = _read_order(reader, f"{group}/order", n_features) if reader.has(f"{group}/order") else None
        couplings.append(_built(reader, group, CouplingSpec, law, *parts, hidden, network, order))
    order = _read_order(reader, "/model/order", n_features) if partition == "permutation" else None
    arguments = (n_features, tuple(couplings), prior, dtype, n_context, precision, partition, order)
    spec: ModelSpec = _built(reader, "/model", ModelSpec, *arguments)
    return spec


def _read_order(reader: Reader, path: str, n_features: int) -> tuple[int, ...]:
    """A permutation of the columns."""
    order = tuple(reader.array(path, "int64", (n_features,)).tolist())
    _built(reader, path, partition_order, "permutation", n_features, order)
    return order


def _refuse_unregistered(reader: Reader, group: str, law: str, network: str) -> None:
    """A file names what its user registered; it holds no code, and nothing is imported for it."""
    for what, name, known in (("coupling", law, is_law(law)), ("network", network, is_network(network))):
        if not known:
            problem = f"{group}: the {what} {name[:64]!r} is not registered"
            remedy = f"call nicecp.register_{what}({name[:64]!r}, ...) before loading"
            raise CheckpointError(about_file(reader.name, problem, remedy))


def _built(reader: Reader, where: str, make: Any, *arguments: Any) -> Any:
    """What a class makes of checked values; its own refusal, in the file's name."""
    try:
        return make(*arguments)
    except ValueError as error:
        raise reader.refuse(where, str(error)) from error


def read_context(reader: Reader, n_context: int) -> Context | None:
    """The scale of a flow's context, None for a flow without one, which has no such group."""
    if not n_context:
        return None
    mean, std = (reader.array(f"/context/{name}", "float64", (n_context,)) for name in ("mean", "std"))
    names = tuple(reader.names("/context/names", n_context)) if reader.has("/context/names") else None
    context: Context = _built(reader, "/context", Context, mean, std, names)
    return context


def add_parameters(tree: Tree, root: str, parameters: Mapping[str, NDArray[Any]]) -> None:
    """Put arrays named as parameters under a group: root/couplings/K/layers/J/weight ..."""
    tree.arrays.update({f"{root}/{key}": array for key, array in parameters.items()})


def read_parameters(reader: Reader, root: str, spec: ModelSpec) -> Parameters:
    """Arrays named and shaped as the parameters, finite, in the flow's dtype."""
    shapes = spec.parameter_shapes()
    return {key: reader.array(f"{root}/{key}", spec.dtype, shape) for key, shape in shapes.items()}


# --- preprocessing and data -------------------------------------------------------------------------------------------


def _read_preprocessing(reader: Reader, n_features: int) -> tuple[Step, ...]:
    reader.group("/preprocessing")
    count = reader.members("/preprocessing")
    if count > MAX_STEPS:
        raise reader.refuse("/preprocessing", f"holds {count} steps, expected at most {MAX_STEPS}")
    steps = []
    for number in range(count):
        group = f"/preprocessing/{number}"
        kind = reader.text(group, "kind", (*_STEPS, *COLUMN_KINDS))
        if kind in COLUMN_KINDS:
            steps.append(_read_column_step(reader, group, kind, n_features))
            continue
        scalars, arrays = _STEPS[kind]
        attrs = {key: reader.attr(group, key, form) for key, form in scalars.items()}
        values = {key: reader.array(f"{group}/{key}", "float64", (n_features,) * rank) for key, rank in arrays.items()}
        steps.append(_built(reader, group, step_from, kind, attrs, values))
    return tuple(steps)


def _read_column_step(reader: Reader, group: str, kind: str, n_features: int) -> Step:
    """A transform of single columns: m of them, and arrays of m, (m, 2) or as many as all knots."""
    columns = reader.array(f"{group}/columns", "int64", (None,))
    m = len(columns)
    if m and not 0 <= columns.min() <= columns.max() < n_features:
        raise reader.refuse(f"{group}/columns", f"has numbers outside 0..{n_features - 1}")
    values: dict[str, NDArray[Any]] = {"columns": columns}
    shapes: dict[str, tuple[int | None, ...]] = {"m": (m,), "m2": (m, 2), "knots": (None,)}
    for key, form in SHAPES[kind].items():
        values[key] = reader.array(f"{group}/{key}", "int64" if key in INTEGERS else "float64", shapes[form])
    step: Step = _built(reader, group, column_step, kind, values)
    return step


def _read_data(reader: Reader, n_features: int) -> DataInfo:
    fingerprint = reader.text("/data", "fingerprint")
    if len(fingerprint) not in (0, 64) or not set(fingerprint) <= set("0123456789abcdef"):
        raise reader.refuse("/data", "attribute 'fingerprint' should be empty or 64 hexadecimal digits")
    image_shape = None
    if reader.has("/data/image_shape"):
        image_shape = tuple(reader.array("/data/image_shape", "int64", (None,)).tolist())
        if not image_shape or min(image_shape) < 1 or math.prod(image_shape) != n_features:
            raise reader.refuse("/data/image_shape", f"{image_shape} does not have {n_features} elements")
    columns, units = (
        tuple(reader.names(f"/data/{key}", n_features)) if reader.has(f"/data/{key}") else None
        for key in ("columns", "units")
    )
    return DataInfo(image_shape, columns, units, fingerprint)

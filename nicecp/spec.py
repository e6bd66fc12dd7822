"""What a flow is made of, without its numbers: plain values that a checkpoint stores and a flow is built from."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from nicecp.kernels import PRECISIONS
from nicecp.kernels.backend import PRIORS, SPLINE_BINS
from nicecp.orders import PARTITIONS, RANDOM, Order, orders_after, partition_order, random_order
from nicecp.registry import MLP, checked_shapes, law_named, network_named

DTYPES = ("float32", "float64")
# Network outputs for each feature that is changed.
LAWS = {"additive": 1, "multiplicative": 1, "affine": 2, "spline": 3 * SPLINE_BINS - 1}


def whole_number(value: Any, name: str) -> int:
    """A Python int of an integer of any kind; TypeError that names the argument for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def hidden_sizes(hidden: Iterable[Any]) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """What a user gives for hidden layers: sizes that all couplings share, or a sequence of sizes for each."""
    if isinstance(hidden, Iterable) and not isinstance(hidden, str):
        given = tuple(hidden)
        if given and all(isinstance(sizes, Iterable) and not isinstance(sizes, str) for sizes in given):
            return tuple(layer_sizes(sizes) for sizes in given)
        return layer_sizes(given)
    return layer_sizes(hidden)


def layer_sizes(hidden: Iterable[Any]) -> tuple[int, ...]:
    """Sizes of hidden layers; TypeError for a single number or for sizes that are not whole."""
    if isinstance(hidden, str) or not isinstance(hidden, Iterable):
        raise TypeError(f"hidden must be a sequence of layer sizes such as (1000, 1000), got {hidden!r}")
    return tuple(whole_number(size, "a hidden size") for size in hidden)


def dtype_name(dtype: DTypeLike) -> str:
    """'float32' of "float32", np.float32 or np.dtype("float32"); TypeError for what is no dtype, None too."""
    try:
        if dtype is None:
            raise TypeError
        return np.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype must be 'auto', 'float32' or 'float64', got {dtype!r}") from None


def partition_of(partition: Any, n_features: int, seed: int) -> tuple[str, tuple[int, ...] | None]:
    """What a user gives for a partition -> its name and, for a sequence of column numbers or "random", that order.

    Raises TypeError for what is neither a name nor a sequence.
    """
    if isinstance(partition, str):
        return ("permutation", random_order(n_features, seed)) if partition == RANDOM else (partition, None)
    if not isinstance(partition, Iterable):
        names = ", ".join(repr(name) for name in (*PARTITIONS[:-1], RANDOM))
        raise TypeError(f"partition must be {names}, or a sequence of column numbers, got {partition!r}")
    return "permutation", tuple(whole_number(column, "a column number of a partition") for column in partition)


@dataclass(frozen=True)
class CouplingSpec:
    """One coupling: its law, the part its network reads, the part it changes, the network's hidden sizes, its kind.

    Laws beside LAWS, and networks beside "mlp", are those of nicecp.registry. order : a permutation of 0..d-1, of which
    the first half is part 0 from this coupling on; None: the parts are those of the coupling before, of the first
    ModelSpec.partition's.
    """

    law: str
    conditions_on: int
    transforms: int
    hidden: tuple[int, ...]
    network: str = MLP
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            law_named(self.law)
        if self.network != MLP:
            network_named(self.network)
        if {self.conditions_on, self.transforms} != {0, 1}:
            raise ValueError("a coupling conditions on one part (0 or 1) and transforms the other")
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden sizes must be at least 1, got {self.hidden}")


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a flow: everything that its parameters' shapes follow from.

    partition : "odd-even": part 0 is the features with even 0-based index (section 5.1); "halves": the first half;
    "permutation": the first half of ``order``, any permutation of 0..d-1. Part 0 has ceil(d / 2) features, and the
    networks see a part's features in this order. Couplings may have parts of their own (CouplingSpec.order); whatever
    part it is in, each feature stays itself, and its latent is the one of its place. n_context : numbers that every
    network reads behind a part's features.
    """

    n_features: int
    couplings: tuple[CouplingSpec, ...]
    prior: str = "logistic"
    dtype: str = "float64"
    n_context: int = 0
    precision: str = "full"
    partition: str = "odd-even"
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.n_features < 2:
            raise ValueError(f"n_features must be at least 2 (a coupling needs two parts), got {self.n_features}")
        if not self.couplings:
            raise ValueError("a flow needs at least one coupling")
        if self.prior not in PRIORS:
            raise ValueError(f"unknown prior {self.prior!r}: expected one of {', '.join(sorted(PRIORS))}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        for k in range(len(self.couplings)):
            self.own_shapes(k)  # ValueError where a registered one has no parameters of such sizes
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if self.precision == "tf32" and self.dtype != "float32":
            raise ValueError(f"precision tf32 is for float32 flows, this one is {self.dtype}")
        if self.partition not in PARTITIONS[:-1] or self.order is not None:  # nothing of d numbers for the others
            partition_order(self.partition, self.n_features, self.order)
        for k, coupling in enumerate(self.couplings):
            if coupling.order is not None:
                if k == 0:
                    raise ValueError("the first coupling has no order of its own: the partition says its parts")
                partition_order("permutation", self.n_features, coupling.order)
        if self.n_context < 0:
            raise ValueError(f"n_context must be at least 0, got {self.n_context}")

    @property
    def part_sizes(self) -> tuple[int, int]:
        """Number of features in part 0 and part 1."""
        return (self.n_features + 1) // 2, self.n_features // 2

    @cached_property
    def column_order(self) -> Order:
        """(d,) the data columns of part 0 and after them those of part 1, in front of the first coupling; read-only."""
        order = partition_order(self.partition, self.n_features, self.order)
        order.setflags(write=False)
        return order

    @cached_property
    def latent_order(self) -> Order:
        """(d,) the same behind the last coupling: which columns the two halves of a latent belong to."""
        last = next((coupling.order for coupling in reversed(self.couplings) if coupling.order is not None), None)
        return self.column_order if last is None else _fixed(last)

    @cached_property
    def permutations(self) -> tuple[Order | None, ...]:
        """For each coupling how the halves are permuted in front of it, as Backend.permute's index, or None."""
        if all(coupling.order is None for coupling in self.couplings):  # nothing of d numbers
            return (None,) * len(self.couplings)
        found: list[Order | None] = []
        before = self.column_order
        for coupling in self.couplings:
            if coupling.order is None:
                found.append(None)
                continue
            order = _fixed(coupling.order)
            found.append(_fixed(np.argsort(before)[order]))
            before = order
        return tuple(found)

    @property
    def columns(self) -> tuple[slice | Order, slice | Order]:
        """What picks part 0 and part 1 out of data columns: slices, which make views, or column numbers."""
        d0, order = self.part_sizes[0], self.column_order
        if self.partition == "odd-even":
            return slice(0, None, 2), slice(1, None, 2)
        return (slice(0, d0), slice(d0, None)) if self.partition == "halves" else (order[:d0], order[d0:])

    @property
    def latent_columns(self) -> tuple[slice | Order, slice | Order]:
        """The same for latents, and for what belongs to them."""
        d0, order = self.part_sizes[0], self.latent_order
        return self.columns if order is self.column_order else (order[:d0], order[d0:])

    def layer_sizes(self, coupling: int) -> tuple[int, ...]:
        """Sizes of a coupling network's layers: (fan_in, *hidden, fan_out), of a registered one (fan_in, fan_out)."""
        spec = self.couplings[coupling]
        outputs = LAWS[spec.law] if spec.law in LAWS else law_named(spec.law).outputs
        fan_in, fan_out = (
            self.part_sizes[spec.conditions_on] + self.n_context,
            outputs * self.part_sizes[spec.transforms],
        )
        return (fan_in, *(spec.hidden if spec.network == MLP else ()), fan_out)

    def dense_layers(self, coupling: int) -> tuple[tuple[int, int], ...]:
        """(fan_in, fan_out) of each dense layer; none of a registered network."""
        return tuple(pairwise(self.layer_sizes(coupling))) if self.couplings[coupling].network == MLP else ()

    def own_shapes(self, coupling: int) -> dict[str, tuple[int, ...]]:
        """Parameters of a registered network and law: network/NAME, then law/NAME, to shape."""
        spec, sizes = self.couplings[coupling], self.layer_sizes(coupling)
        shapes: dict[str, tuple[int, ...]] = {}
        if spec.network != MLP:
            own = checked_shapes(
                f"network {spec.network!r}", network_named(spec.network), sizes[0], sizes[-1], spec.hidden
            )
            shapes |= {f"network/{name}": shape for name, shape in own.items()}
        if spec.law not in LAWS:
            own = checked_shapes(f"coupling {spec.law!r}", law_named(spec.law), self.part_sizes[spec.transforms])
            shapes |= {f"law/{name}": shape for name, shape in own.items()}
        return shapes

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of the laws and networks that are not built in."""
        names = {c.law for c in self.couplings if c.law not in LAWS}
        return tuple(sorted(names | {c.network for c in self.couplings if c.network != MLP}))

    @property
    def volume_preserving(self) -> bool:
        """Whether the couplings are: log abs det is then sum(log_scale) for every row."""
        return all(coupling.law == "additive" for coupling in self.couplings)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every parameter as users and checkpoints see them, in storage order.

        couplings/K/layers/J/weight (fan_in, fan_out), couplings/K/layers/J/bias (fan_out,), scaling/log_scale (d,); of
        registered ones couplings/K/network/NAME and couplings/K/law/NAME.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for k in range(len(self.couplings)):
            for j, (fan_in, fan_out) in enumerate(self.dense_layers(k)):
                shapes[f"couplings/{k}/layers/{j}/weight"] = (fan_in, fan_out)
                shapes[f"couplings/{k}/layers/{j}/bias"] = (fan_out,)
            shapes |= {f"couplings/{k}/{name}": shape for name, shape in self.own_shapes(k).items()}
        shapes["scaling/log_scale"] = (self.n_features,)
        return shapes

    @property
    def n_parameters(self) -> int:
        total = 0
        for shape in self.parameter_shapes().values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total


def _fixed(order: Iterable[int]) -> Order:
    """As a read-only array."""
    array = np.array(order, np.int64)
    array.setflags(write=False)
    return array


def alternating(
    hidden: tuple[int, ...] | tuple[tuple[int, ...], ...],
    n_couplings: int,
    law: str | tuple[str, ...] = "additive",
    network: str = MLP,
) -> tuple[CouplingSpec, ...]:
    """Couplings that alternate which part they change, the first changing part 1 (section 5.1).

    hidden : sizes of all couplings, or a tuple of sizes for each. law : of all couplings, or a tuple that is gone
    through again and again.

    Raises ValueError where there are not as many tuples of sizes as couplings.
    """
    laws = (law,) if isinstance(law, str) else law
    each = by_coupling(hidden) or (hidden,) * n_couplings
    if len(each) != n_couplings:
        raise ValueError(f"hidden sizes are given for {len(each)} couplings, but there are {n_couplings}")
    return tuple(
        CouplingSpec(laws[k % len(laws)], k % 2, 1 - k % 2, layer_sizes(sizes), network) for k, sizes in enumerate(each)
    )


def by_coupling(hidden: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    """The sizes of each coupling, where a tuple of them is given for each one; empty for sizes that all share."""
    return hidden if hidden and all(isinstance(sizes, tuple) for sizes in hidden) else ()


def spec_of(
    n_features: Any,
    hidden: Iterable[Any],
    n_couplings: Any,
    prior: str,
    dtype: DTypeLike,
    coupling: str | Iterable[str],
    partition: Any,
    network: str = MLP,
    n_context: Any = 0,
    precision: str = "full",
    repartition: Any = 0,
    seed: int = 0,
) -> ModelSpec:
    """The architecture that NICE's arguments of these names describe; TypeError or ValueError where one will not do."""
    sizes = hidden_sizes(hidden)
    count = len(by_coupling(sizes)) or 4 if n_couplings is None else whole_number(n_couplings, "n_couplings")
    couplings = alternating(sizes, count, coupling if isinstance(coupling, str) else tuple(coupling), network)
    d, k, name = whole_number(n_features, "n_features"), whole_number(n_context, "n_context"), dtype_name(dtype)
    spec = ModelSpec(d, couplings, prior, name, k, precision, *partition_of(partition, d, seed))
    return repartitioned(spec, whole_number(repartition, "repartition"), seed)


def repartitioned(spec: ModelSpec, every: int, seed: int) -> ModelSpec:
    """The architecture with parts that the seed draws anew after every so many couplings; 0: as it is."""
    if every < 0:
        raise ValueError(f"repartition must be at least 0, got {every}")
    if every == 0:
        return spec
    orders = orders_after(spec.column_order, seed)
    drawn = [replace(c, order=next(orders)) if k and k % every == 0 else c for k, c in enumerate(spec.couplings)]
    return replace(spec, couplings=tuple(drawn))

"""The flat buffer of parameters: where everything lies in it, and its way to and from named arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nicecp.kernels.backend import ALIGNMENT, Backend, Purpose
from nicecp.params import NORMAL_SCALE, Layout, Range, Views, initial_parameters
from tests import gates, oracle

SPECS = {
    "odd": gates.make_spec(7, [(5, 3), (), (70,)]),
    "two features": gates.make_spec(2, [(1,), (1,), (1,)]),
    "full units": gates.make_spec(64, [(64,), (128, 32)]),  # every array is a multiple of the alignment
}


def spec_of(name: str, dtype: str) -> Any:
    spec = SPECS[name]
    return gates.make_spec(spec.n_features, [c.hidden for c in spec.couplings], dtype=dtype)


def arrays(views: Views) -> Iterator[Any]:
    for layers in views.couplings:
        for weight, bias in layers:
            yield from (weight, bias)
    yield from views.scaling


def span(flat: np.ndarray, array: np.ndarray) -> tuple[int, int]:
    """First and last element (one past) of a view, counted in the flat buffer."""
    first, rest = divmod(array.ctypes.data - flat.ctypes.data, flat.itemsize)
    assert rest == 0
    return first, first + array.size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", list(SPECS))
def test_views_are_aligned_disjoint_and_grouped(one_backend: Backend, name: str, dtype: str) -> None:
    spec = spec_of(name, dtype)
    layout = Layout(spec)
    flat = one_backend.alloc(layout.size, dtype)
    views = layout.views(flat)

    found = list(arrays(views))
    shapes = list(spec.parameter_shapes().values())[:-1] + [(size,) for size in spec.part_sizes]
    assert [array.shape for array in found] == shapes
    assert all(array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous for array in found)
    assert ALIGNMENT == 256
    spans = [span(flat, array) for array in found]
    edges = [0, *(edge for pair in spans for edge in pair), layout.size]
    assert edges == sorted(edges)  # in storage order, none overlaps the next
    assert all(math.prod(shape) == stop - start for shape, (start, stop) in zip(shapes, spans, strict=True))

    def within(part: Range, *inside: Any) -> bool:
        pairs = [span(flat, array) for array in inside]
        return all(part.offset <= start and stop <= part.offset + part.size for start, stop in pairs)

    def cover(parts: list[Range], start: int, stop: int) -> bool:
        """The ranges follow each other from start to stop without a gap."""
        edges = [start, *(part.offset + part.size for part in parts)]
        return [part.offset for part in parts] == edges[:-1] and edges[-1] == stop

    assert cover([*layout.couplings, layout.scaling], 0, layout.size)
    assert within(layout.scaling, *views.scaling)
    for coupling, ranges, layers in zip(layout.couplings, layout.layers, views.couplings, strict=True):
        assert cover(ranges, coupling.offset, coupling.offset + coupling.size)
        for part, pair in zip(ranges, layers, strict=True):
            assert within(part, *pair)


def test_views_share_the_buffer(one_backend: Backend) -> None:
    layout = Layout(SPECS["odd"])
    flat = one_backend.alloc(layout.size, "float64")
    for number, array in enumerate(arrays(layout.views(flat)), 1):
        array[...] = number
    expected = [array.size * number for number, array in enumerate(arrays(layout.views(flat)), 1)]
    assert flat.sum() == sum(expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_named_arrays_there_and_back(one_backend: Backend, dtype: str) -> None:
    spec = spec_of("odd", dtype)
    layout, named = Layout(spec), gates.draw_parameters(spec)
    flat = one_backend.alloc(layout.size, dtype)
    layout.from_host(one_backend, flat, named)
    s = layout.views(flat).scaling
    np.testing.assert_array_equal(s[0], named["scaling/log_scale"][0::2])  # even features first
    np.testing.assert_array_equal(s[1], named["scaling/log_scale"][1::2])

    back = layout.to_host(one_backend, flat)
    assert list(back) == list(spec.parameter_shapes())
    for name, value in named.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == dtype
        back[name][...] = 0
    assert np.abs(flat).sum() == pytest.approx(sum(np.abs(v).sum() for v in named.values()), rel=1e-5)  # copies


def test_names_and_shapes_that_do_not_fit_change_nothing(one_backend: Backend) -> None:
    spec = SPECS["odd"]
    layout, named = Layout(spec), gates.draw_parameters(spec)
    flat = one_backend.alloc(layout.size, "float64")
    missing = {name: value for name, value in named.items() if name != "couplings/1/layers/0/bias"}
    for wrong, says in (
        (missing, "couplings/1/layers/0/bias"),
        ({**named, "couplings/9/layers/0/bias": np.zeros(3)}, "couplings/9/layers/0/bias"),
        ({**named, "scaling/log_scale": np.zeros(6)}, r"scaling/log_scale: expected shape \(7,\), got \(6,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            layout.from_host(one_backend, flat, wrong)
        assert not flat.any()


@pytest.mark.parametrize("init", ["paper", "he", "table"])
def test_initial_values(backend: Backend, init: str) -> None:
    """Weights are Philox's numbers, keyed by the layer's number; the rest is 0. Both dtypes start alike."""
    spec, seed = spec_of("odd", "float64"), 2**63 + 5
    named = initial_parameters(backend, spec, seed, init)
    number = 0
    for name, shape in spec.parameter_shapes().items():
        if not name.endswith("weight"):
            scale = 0.559 if name == "scaling/log_scale" and (init, spec.prior) == ("table", "logistic") else 0.0
            np.testing.assert_array_equal(named[name], np.full(shape, scale))
            continue
        k, j = int(name.split("/")[1]), int(name.split("/")[3])
        hidden = init != "paper" and j < len(spec.couplings[k].hidden)
        bound = math.sqrt(6 / shape[0]) if hidden else 0.01
        uniform = oracle.fill_uniform(seed, Purpose.INIT, number, np.arange(shape[0]), shape[1])
        np.testing.assert_allclose(named[name], bound * (2 * uniform - 1), rtol=0, atol=1e-15)
        number += 1
    for name, value in initial_parameters(backend, spec_of("odd", "float32"), seed, init).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, named[name].astype(np.float32))


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_standard_normal_columns_are_likeliest_at_the_scale_of_tables(prior: str) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)

    def mean(log_scale: float) -> float:
        h = np.exp(log_scale) * nodes
        log_prior = -np.abs(h) - 2 * np.log1p(np.exp(-np.abs(h))) if prior == "logistic" else -0.5 * h * h
        return float(weights @ log_prior / weights.sum() + log_scale)

    best = NORMAL_SCALE[prior]
    assert mean(best) > max(mean(best - 0.01), mean(best + 0.01))


def test_unknown_init(one_backend: Backend) -> None:
    with pytest.raises(ValueError, match="expected 'paper', 'he' or 'table'"):
        initial_parameters(one_backend, SPECS["odd"], 0, "xavier")

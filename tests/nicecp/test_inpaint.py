"""Inpainting: masks, the ascent against a plain re-implementation, reports and files, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nicecp.errors import TrainingError
from nicecp.flow import NICE
from nicecp.inpaint import inpaint
from nicecp.kernels.backend import Purpose
from nicecp.masks import MASKS, named_mask
from nicecp.preprocessing import Dequantize, MarginLogit
from nicecp.records import DataInfo

SHAPE = (6, 4)


def flow_of(
    shape: tuple[int, ...] = SHAPE, low: float = 0.0, high: float = 1.0, steps: bool = True, sharp: float = 0.0
) -> NICE:
    d = int(np.prod(shape))
    spec = dataclasses.replace(NICE(d, (8,), 3).spec, prior="gaussian")
    preprocessing = (Dequantize(low, high),) if steps else ()
    flow = NICE.from_spec(spec, None, preprocessing, DataInfo(image_shape=shape), init="he", seed=2)
    values = flow.parameters()
    values["scaling/log_scale"] = np.linspace(0.5, 1.5, d) + sharp
    flow.set_parameters(values)
    return flow


def images(n: int = 5, low: float = 0.0, high: float = 1.0, d: int = 24) -> Any:
    return low + (high - low) * np.random.default_rng(0).random((n, d))


TOP = np.repeat([True, False], 12)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_papers_masks_of_mnist() -> None:
    """PAPER's list: top, bottom, 0-based 0, 2, 4, ..., left, right, rows 7-20, columns 7-20, 75 % and 90 %."""
    row, column = np.divmod(np.arange(784), 28)
    expected = {
        "top": row < 14,
        "bottom": row >= 14,
        "odd": np.isin(np.arange(784), range(0, 784, 2)),
        "even": np.isin(np.arange(784), range(1, 784, 2)),
        "left": column < 14,
        "right": column >= 14,
        "middle-rows": (row >= 7) & (row <= 20),
        "middle-columns": (column >= 7) & (column <= 20),
    }
    assert (*expected, "random75", "random90") == MASKS
    for name, hidden in expected.items():
        np.testing.assert_array_equal(named_mask(name, (28, 28)), hidden)
    for name, count in (("random75", 588), ("random90", 706)):
        hidden = named_mask(name, (28, 28), 3)
        assert hidden.sum() == count
        np.testing.assert_array_equal(hidden, named_mask(name, (28, 28), 3))
        assert (hidden != named_mask(name, (28, 28), 4)).any()
        assert 250 < hidden[:392].sum() * 588 / count < 340  # spread over the image


def test_masks_hide_all_channels() -> None:
    for name in MASKS:
        hidden = named_mask(name, (5, 4, 3), 1).reshape(5, 4, 3)
        assert (hidden.all(2) == hidden.any(2)).all()
    np.testing.assert_array_equal(named_mask("odd", (5, 4, 3)).reshape(20, 3)[:, 0], np.arange(20) % 2 == 0)
    np.testing.assert_array_equal(
        named_mask("top", (5, 4)) ^ named_mask("bottom", (5, 4)), np.ones(20)
    )  # an odd number of rows: none twice, none left out


@pytest.mark.parametrize(
    ("name", "shape"), [("top", (1, 4)), ("diagonal", (4, 4)), ("top", (4,)), ("top", (2, 2, 2, 2))]
)
def test_refused_masks(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hides nothing|unknown mask|masks are for images"):
        named_mask(name, shape)


# --- the ascent -------------------------------------------------------------------------------------------------------


def plain_text(flow: NICE, x: Any, hidden: Any, iterations: int, seed: int, low: float, high: float) -> Any:
    """PAPER's formula, an image at a time, one chain."""
    out = np.empty_like(x)
    for row, image in enumerate(x):
        now = image.copy()
        start = np.empty((1, len(image)))
        flow.backend.fill_uniform(start, seed, Purpose.INPAINT, 0, row)
        now[hidden] = low + (high - low) * start[0, hidden]
        for i in range(iterations):
            noise = np.empty((1, len(image)))
            flow.backend.fill_normal(noise, seed, Purpose.INPAINT, 2 * (i + 1) + 1, row)
            alpha = 10 / (100 + i)
            moved = now[hidden] + alpha * (flow.grad_log_prob(now)[hidden] + noise[0, hidden])
            now[hidden] = np.minimum(np.maximum(moved, low), high)
        out[row] = now
    return out


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_the_ascent_is_the_papers(low: float, high: float) -> None:
    flow, x = flow_of(low=low, high=high, sharp=1.0), images(3, low, high)
    found = inpaint(flow, x, TOP, 5, seed=5)
    expected = plain_text(flow, x, TOP, 5, 5, low, high)
    np.testing.assert_allclose(found.result[0], expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.result[0][:, ~TOP], x[:, ~TOP])
    np.testing.assert_array_equal(found.start[0][:, ~TOP], x[:, ~TOP])
    assert ((found.result >= low) & (found.result <= high)).all()
    assert np.isin(found.result, [low, high]).any()  # some were projected
    np.testing.assert_allclose(found.log_prob_before[0], flow.log_prob(found.start[0]), rtol=1e-12)
    np.testing.assert_allclose(found.log_prob_after[0], flow.log_prob(found.result[0]), rtol=1e-12)


def test_the_codes_variant() -> None:
    """A hundredth of the gradient, at a fresh dequantization, without projection."""
    flow, x = flow_of(low=-1, high=1), images(2, -1, 1)
    found = inpaint(flow, x, TOP, 1, seed=5, variant="code")
    uniform, normal = np.empty((2, 24)), np.empty((2, 24))
    flow.backend.fill_uniform(uniform, 5, Purpose.INPAINT, 2)
    flow.backend.fill_normal(normal, 5, Purpose.INPAINT, 3)
    start = found.start[0]
    moved = start + 0.1 * (0.01 * flow.grad_log_prob(start + 2 / 256 * (uniform - 0.5)) + normal)
    np.testing.assert_allclose(found.result[0][:, TOP], moved[:, TOP], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(found.result[0][:, ~TOP], x[:, ~TOP])
    assert np.abs(inpaint(flow, x, TOP, 30, seed=5, variant="code").result).max() > 1  # it leaves the box


def test_rows_chains_and_masks_do_not_mix() -> None:
    """One batch for all gives what each gives alone; chains differ; the seed decides everything."""
    flow, x = flow_of(), images(4)
    hidden = np.array([TOP, ~TOP, TOP, TOP])
    both = inpaint(flow, x, hidden, 8, chains=3, seed=1, gradient_scale=0.1)
    alone = inpaint(flow, x[:2], hidden[:2], 8, chains=2, seed=1, gradient_scale=0.1)
    # Products of other sizes round differently: allowed is a thousand times that.
    np.testing.assert_allclose(both.result[:2, :2], alone.result, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(both.start[:2, :2], alone.start)
    assert np.abs(both.start[0] - both.start[1]).max() > 0.5
    assert np.abs(both.result[0] - both.result[1]).max() > 1e-3
    np.testing.assert_array_equal(both.result[:, 1][:, TOP], np.tile(x[1, TOP], (3, 1)))
    np.testing.assert_array_equal(both.result, inpaint(flow, x, hidden, 8, chains=3, seed=1, gradient_scale=0.1).result)
    assert np.abs(both.start - inpaint(flow, x, hidden, 0, chains=3, seed=2).start).max() > 0.5
    np.testing.assert_allclose(both.mean, both.result.mean(0))


def test_the_ascent_finds_a_gaussians_conditional_mode() -> None:
    """Without networks' influence the mode of each hidden value is known: 0, for a Gaussian centred there."""
    spec = NICE(24, (), 3).spec
    flow = NICE.from_spec(dataclasses.replace(spec, prior="gaussian"), info=DataInfo(image_shape=SHAPE))
    values = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    flow.set_parameters(values)
    found = inpaint(flow, images(2), TOP, 3000, box=(-1.0, 1.0), seed=3)
    # alpha_3000 = 0.003, noise of that size against a restoring force of 1: a spread of sqrt(alpha / 2) = 0.04
    assert np.abs(found.result[0][:, TOP]).max() < 0.2
    assert (found.log_prob_after > found.log_prob_before).all()


def test_progress_counts_iterations() -> None:
    seen: list[int] = []
    inpaint(flow_of(), images(1), TOP, 4, progress=seen.append)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.full((2, 24), 1.5)}, r"x\[0, 12\] is 1.5, outside the data's box 0..1"),
        ({"x": np.full((2, 24), np.nan)}, r"x\[0, 12\] is nan"),
        ({"x": np.zeros((2, 23))}, r"expected x of shape \(n, 24\)"),
        ({"hidden": np.zeros(23, bool)}, "expected hidden as bool"),
        ({"hidden": np.ones(24)}, "expected hidden as bool"),
        ({"hidden": np.zeros(24, bool)}, "nothing to fill in"),
        ({"iterations": -1}, "at least 0 iterations"),
        ({"chains": 0}, "at least 0 iterations and 1 chain"),
        ({"variant": "other"}, "text, code"),
        ({"box": (0.0, 2.0)}, "the box of this flow's 8-bit data is 0,1"),
        ({"gradient_scale": 0.0}, "positive and finite"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_refused_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inpaint(flow_of(), **{"x": images(2), "hidden": TOP, "iterations": 1, **change})


def test_floats_need_a_box() -> None:
    flow = flow_of(steps=False)
    with pytest.raises(ValueError, match=r"--box"):
        inpaint(flow, images(2), TOP, 1)
    logit = NICE(24, (8,), 3, preprocessing=[MarginLogit(np.zeros(24), np.ones(24), 0.05)], seed=1)
    result = inpaint(logit, images(2), TOP, 50, gradient_scale=30.0).result  # its range is the box
    assert (result.min(), result.max()) == (0.0, 1.0)
    narrow = inpaint(logit, images(2, 0.2, 0.7), TOP, 50, box=(0.2, 0.7), gradient_scale=30.0).result
    assert (narrow.min(), narrow.max()) == (0.2, 0.7)
    open_ended = NICE(24, (8,), 3, preprocessing=[MarginLogit(np.zeros(24), np.ones(24))])
    with pytest.raises(ValueError, match=r"--box"):
        inpaint(open_ended, images(2), TOP, 1)
    for box in ((1.0, 0.0), (0.0, np.inf)):
        with pytest.raises(ValueError, match="low < high"):
            inpaint(flow, images(2), TOP, 1, box=box)
    result = inpaint(flow, images(2, 0.2, 0.7), TOP, 50, box=(0.2, 0.7), gradient_scale=30.0).result
    assert ((result >= 0.2) & (result <= 0.7)).all()
    assert np.isin(result, [0.2, 0.7]).any()


def test_divergence_is_said() -> None:
    flow = flow_of()
    values = flow.parameters()
    values["scaling/log_scale"] = np.full(24, 20.0)
    flow.set_parameters(values)
    with pytest.raises(TrainingError, match=r"diverged in iteration \d+.*variant 'text'"):
        inpaint(flow, images(2), TOP, 100, variant="code")

"""Training through the driver on CuPy, its graphs on three streams, on the stand-in: in every order the same bits.

The stand-in sees whatever two streams do in no order, whichever order it happens to carry out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp import train as train_module
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.kernels.cuda_calls import Product
from nicecp.kernels.cuda_plan import Plan
from nicecp.preprocessing import Dequantize
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests import gates
from tests.emulated import build
from tests.kernels.fake_order import Race
from tests.kernels.stand_in import stand_in

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

DATA = np.random.default_rng(0).integers(0, 256, (48, 7), np.uint8)


def trained(monkeypatch: pytest.MonkeyPatch, schedule: int, plan: type[Plan] = Plan, steps: int = 4) -> Trainer:
    """Layers are updated one by one, each beside the rest of the backward pass."""
    monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", 0)
    monkeypatch.setattr("nicecp.kernels.cuda_device.Plan", plan)
    spec = gates.make_spec(7, [(5, 4), (3, 3), (4,)], "logistic", "float32", laws=("additive", "affine"))
    flow = NICE.from_spec(spec, preprocessing=(Dequantize(),), seed=5, init="he", backend=stand_in(schedule=schedule))
    split = Split.contiguous(ArraySource(DATA), 0, 48, Purpose.TRAIN_NOISE)
    trainer = Trainer(flow, split, None, TrainConfig(batch_size=16))
    for _ in range(steps):
        trainer.step()
    return trainer


def test_every_order_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [trained(monkeypatch, schedule) for schedule in (0, 1, 2, 3, 4)]
    graph: Any = runs[0].backend.driver.cupy.last_graph  # type: ignore[attr-defined]
    streams = {name for name, _, _ in graph.work}
    assert streams == {"main", "side", "side 1"}
    assert {what for name, what, _ in graph.work if name == "side 1"} == {
        "kernel update_coefficients_f64", "kernel update_adam_f32"}  # fmt: skip
    assert "product" in {what for name, what, _ in graph.work if name == "side"}
    for name in ("p", "m", "v", "state"):
        numbers = [run.backend.copy_out(getattr(run, name)) for run in runs]
        for other in numbers[1:]:
            np.testing.assert_array_equal(numbers[0], other)


class Hasty(Plan):
    """The main stream waits for no block."""

    def _schedule(self) -> None:
        super()._schedule()
        self.waits = [[] for _ in self.waits]


class Careless(Plan):
    """Updates do not wait for their gradients."""

    def _schedule(self) -> None:
        super()._schedule()
        for block in self.blocks:
            block.after.clear()


class Forgetful(Plan):
    """A product does not say that it reads its second factor, so that nobody waits before writing there."""

    def _schedule(self) -> None:
        reads = Product.reads
        try:
            Product.reads = lambda call: [call.a]  # type: ignore[method-assign]
            super()._schedule()
        finally:
            Product.reads = reads  # type: ignore[method-assign]


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("plan", [Hasty, Careless, Forgetful])
def test_a_plan_that_does_not_wait_is_seen_when_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch, plan: type[Plan], schedule: int
) -> None:
    with pytest.raises(Race, match="touch the same memory, and nothing says which comes first"):
        trained(monkeypatch, schedule, plan, steps=1)

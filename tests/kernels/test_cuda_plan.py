"""What becomes of a recorded step: which launches, on which stream, and that nobody reads or writes too early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nicecp import train as train_module
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.kernels.cuda_backend import CudaBackend
from nicecp.kernels.cuda_calls import BiasBackward, BiasForward, Coefficients, Couple, Product, Update
from nicecp.kernels.cuda_driver import Bias, BiasGradient, MaskedBiasGradient, ReluBias
from nicecp.kernels.cuda_plan import MAIN, Plan
from nicecp.preprocessing import Dequantize
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests import gates
from tests.emulated import build
from tests.emulated.driver import EmulatedDriver
from tests.kernels.checks import Device, new_state
from tests.kernels.test_update import ADAM

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

DEVICES = pytest.mark.parametrize("device", [{}, {"epilogues": True}], ids=["plain", "epilogues"])


def step_of(hidden: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, **device: Any) -> tuple[Plan, Trainer]:
    """The plan of a training step on 8-bit rows, and its trainer."""
    monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", 0)
    backend = CudaBackend(EmulatedDriver(**device))
    spec = gates.make_spec(12, hidden, "logistic", "float32")
    flow = NICE.from_spec(spec, preprocessing=(Dequantize(0, 1),), backend=backend)
    data = np.random.default_rng(0).integers(0, 256, (64, 12), np.uint8)
    split = Split.contiguous(ArraySource(data), 0, 64, Purpose.TRAIN_NOISE)
    trainer = Trainer(flow, split, None, TrainConfig(batch_size=16))
    trainer.step()
    return backend.plan(trainer._step), trainer


def test_launches_of_the_mnist_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four couplings of five hidden layers, as the paper's MNIST model: docs/cuda.md says how many launches that is.

    Dense layers make 24 products forward, 24 by the weights and 23 by the layers' inputs.
    """
    hidden = [(5,) * 5] * 4
    plain, _ = step_of(hidden, monkeypatch)
    fused, _ = step_of(hidden, monkeypatch, epilogues=True)
    kinds = Counter(type(call).__name__ for call in plain.calls)
    assert kinds == {"Product": 71, "BiasForward": 20, "BiasBackward": 24, "Couple": 7, "Update": 25,
                     "Coefficients": 1, "Plain": 5}  # fmt: skip
    assert len(plain.calls) == 153
    kinds = Counter(type(call).__name__ for call in fused.calls)
    assert kinds == {"Product": 71, "Couple": 7, "Update": 25, "Coefficients": 1, "Plain": 5}
    assert len(fused.calls) == 109
    critical = [plan.streams.count(MAIN) for plan in (plain, fused)]
    assert critical == [103, 59], "launches on the main stream"
    kinds = Counter(type(call.epilogue).__name__ for call in fused.calls if isinstance(call, Product))
    assert kinds == {"ReluBias": 20, "Bias": 4, "MaskedBiasGradient": 20, "BiasGradient": 4, "NoneType": 23}


@DEVICES
def test_a_graph_launches_what_its_plan_says(device: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, trainer = step_of([(5, 4), (3,), ()], monkeypatch, **device)
    driver = trainer.backend.driver  # type: ignore[attr-defined]
    before = driver.launches
    graph = driver.capture(plan.play)
    assert driver.launches == before
    graph()
    assert driver.launches == before + len(plan.calls)


@DEVICES
def test_weight_gradients_and_updates_run_beside_the_backward_pass(
    device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, trainer = step_of([(5, 4), (3,)], monkeypatch, **device)
    for call, stream in zip(plan.calls, plan.streams, strict=True):
        beside = isinstance(call, (Update, Coefficients)) or (isinstance(call, Product) and call.transpose_a)
        assert (stream != MAIN) == beside
    # the end of the step counts on all updates; the backward pass does not wait for the last one of them
    assert plan.waits[-1] == max(plan.streams)
    waited = [wait for wait in plan.waits if wait]
    assert waited == sorted(waited)
    assert max(waited[:-1], default=0) < max(plan.streams)
    # every parameter once, a layer's weight and bias together
    sizes = [call.size for call in plan.calls if isinstance(call, Update)]
    assert len(sizes) == 6
    assert sum(sizes) == trainer.network.layout.size


class Hasty(Plan):
    """Waits for no side block."""

    def _schedule(self) -> None:
        super()._schedule()
        self.waits = [0] * len(self.waits)


def trained(hasty: bool, late: bool, monkeypatch: pytest.MonkeyPatch) -> bytes:
    if hasty:
        monkeypatch.setattr("nicecp.kernels.cuda_backend.Plan", Hasty)
    _, trainer = step_of([(5, 4), (3, 3), (4,)], monkeypatch, late=late)
    for _ in range(5):
        trainer.step()
    return b"".join(array.tobytes() for array in trainer.resume_state().parameters.values())


def test_a_step_that_does_not_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory is shared by the couplings, so that a gradient must be used before the next one overwrites it."""
    good = trained(False, False, monkeypatch)
    assert trained(False, True, monkeypatch) == good
    assert trained(True, False, monkeypatch) == good, "side blocks that run at once hide it"
    assert trained(True, True, monkeypatch) != good


# --- what is joined, and what is not --------------------------------------------------------------------------------


class Layer:
    """Arrays of a dense layer of 8 rows, 6 inputs, 5 outputs."""

    def __init__(self, backend: CudaBackend) -> None:
        device = Device(backend, "float64", seed=4)
        self.device, self.backend = device, backend
        self.x, self.w, self.b = (
            device.put(device.normal(8, 6)),
            device.put(device.normal(6, 5)),
            device.put(device.normal(5)),
        )
        self.y, self.dy, self.z = device.out(8, 5), device.put(device.normal(8, 5)), device.put(device.normal(8, 5))
        self.dx, self.dw, self.db = device.out(8, 6), device.out(6, 5), device.out(5)
        self.up, self.w2 = device.put(device.normal(8, 4)), device.put(device.normal(5, 4))

    def forward(self, relu: bool = True) -> None:
        self.backend.dense_forward(self.y, self.x, self.w, self.b, relu)

    def backward(self, relu: bool = True) -> None:
        self.backend.dense_backward(self.dx, self.dw, self.db, self.dy, self.y, self.x, self.w, relu)

    def above(self) -> None:
        """The layer above, which gives dy."""
        self.backend.dense_backward(self.dy, None, None, self.up, self.up, self.y, self.w2, False)

    def touch(self, array: Any) -> None:
        self.backend.couple(array, array, array, 1)

    def results(self) -> list[np.ndarray]:
        return [self.device.get(a) for a in (self.y, self.dy, self.z, self.dx, self.dw, self.db)]


SITUATIONS: dict[str, tuple[Callable[[Layer], None], set[type], bool]] = {
    # what is recorded, which epilogues it then has, whether a bias goes into a coupling
    "layers that follow one another": (
        lambda s: (s.forward(), s.above(), s.backward()), {ReluBias, MaskedBiasGradient}, False),
    "y is changed after the mask was made": (
        lambda s: (s.forward(), s.touch(s.y), s.above(), s.backward()), {ReluBias}, False),
    "dy is changed on the way": (
        lambda s: (s.forward(), s.above(), s.touch(s.dy), s.backward()), {ReluBias}, False),
    "dy is not a product": (lambda s: (s.forward(), s.backward()), {ReluBias}, False),
    "y is another layer's": (lambda s: (s.above(), s.backward()), set(), False),
    "a linear layer": (lambda s: (s.forward(False), s.above(), s.backward(False)), {Bias, BiasGradient}, False),
    "a bias for a coupling": (lambda s: (s.forward(False), s.backend.couple(s.z, s.z, s.y, -1)), {Bias}, True),
    "a coupling of something else": (lambda s: (s.forward(False), s.backend.couple(s.y, s.y, s.z, -1)), {Bias}, False),
    "a layer coupled with itself": (lambda s: (s.forward(False), s.backend.couple(s.z, s.y, s.y, -1)), {Bias}, False),
    "a ReLU before a coupling": (lambda s: (s.forward(), s.backend.couple(s.z, s.z, s.y, 1)), {ReluBias}, False),
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
@DEVICES
@pytest.mark.parametrize("late", [False, True])
def test_a_recorded_step_is_its_calls(situation: str, device: dict[str, Any], late: bool) -> None:
    """Bit for bit what the calls do one by one, but for products' own sums of a bias gradient."""
    work, epilogues, into_coupling = SITUATIONS[situation]
    eager, recorded = (Layer(CudaBackend(EmulatedDriver(late=late, **device))) for _ in range(2))
    work(eager)
    before = recorded.results()
    plan = recorded.backend.plan(lambda: work(recorded))
    found = {type(call.epilogue) for call in plan.calls if isinstance(call, Product)} - {type(None)}
    assert found == (epilogues if device else set())
    coupled = any(isinstance(call, Couple) and call.bias is not None for call in plan.calls)
    assert coupled == (into_coupling and not device)
    run = recorded.backend.record(lambda: work(recorded))
    for one, other in zip(recorded.results(), before, strict=True):
        np.testing.assert_array_equal(one, other, "recording carries nothing out")
    run()
    for one, other in zip(recorded.results(), eager.results(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("between", "count"), [("nothing", 1), ("advance", 2), ("loss", 2), ("another optimiser", 2), ("another array", 1)]
)
def test_coefficients_are_computed_anew_when_the_state_changes(between: str, count: int) -> None:
    device = Device(CudaBackend(EmulatedDriver()), "float64")
    backend: Any = device.backend
    p, g, m, v = (device.put(np.ones(64)) for _ in range(4))
    state, other = (device.put(new_state(**ADAM), "float64") for _ in range(2))
    logp, weight, dlogp = (device.put(np.ones(3), "float64") for _ in range(3))

    def step() -> None:
        backend.update(p, g, m, v, 0, 32, state, 0)
        if between == "advance":
            backend.advance(state)
        if between == "loss":
            backend.loss(state, dlogp, logp, weight)
        if between == "another array":
            backend.advance(other)
        backend.update(p, g, m, v, 32, 32, state, 1 if between == "another optimiser" else 0)

    calls = backend.plan(step).calls
    assert sum(isinstance(call, Coefficients) for call in calls) == count
    assert sum(isinstance(call, Update) for call in calls) == (1 if between == "nothing" else 2)


@pytest.mark.parametrize(("ranges", "count"), [([(0, 8), (8, 24)], 1), ([(8, 24), (0, 8)], 1), ([(0, 8), (9, 23)], 2),
                                              ([(0, 8), (16, 8), (8, 8)], 2)])  # fmt: skip
def test_only_ranges_that_adjoin_are_updated_together(ranges: list[tuple[int, int]], count: int) -> None:
    device = Device(CudaBackend(EmulatedDriver()), "float32")
    backend: Any = device.backend
    buffers = [device.put(np.ones(32)) for _ in range(4)]
    state = device.put(new_state(**ADAM), "float64")
    before = device.get(buffers[0])

    def step() -> None:
        for offset, size in ranges:
            backend.update(*buffers, offset, size, state, 0)

    assert sum(isinstance(call, Update) for call in backend.plan(step).calls) == count
    backend.record(step)()
    moved = np.flatnonzero(device.get(buffers[0]) != before)
    assert moved.tolist() == sorted(i for offset, size in ranges for i in range(offset, offset + size))


def test_one_step_at_a_time_and_no_fills_in_it() -> None:
    device = Device(CudaBackend(EmulatedDriver()), "float64")
    backend, x = device.backend, device.out(2, 2)
    with pytest.raises(RuntimeError, match="recorded already"):
        backend.record(lambda: backend.record(lambda: None))  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="not recorded"):
        backend.record(lambda: backend.fill_normal(x, 1, 2, 3))
    backend.fill_normal(x, 1, 2, 3)
    assert not (device.get(x) == 12345).any()


def test_arguments_that_a_kernel_would_run_past_are_refused() -> None:
    device = Device(CudaBackend(EmulatedDriver()), "float64")
    backend, x, wide = device.backend, device.out(4, 3), device.out(4, 6)
    for mistake in (
        lambda: backend.couple(x, x, wide, 1),
        lambda: backend.couple(x, x, device.out(4, 3, dtype="float32"), 1),
        lambda: backend.couple(x, x, wide[:, ::2], 1),
        lambda: backend.split(device.out(4, 2), device.out(4, 2), x),
        lambda: backend.dense_forward(x, wide, device.out(6, 2), device.out(2), True),
        lambda: backend.dense_backward(None, device.out(6, 6), None, x, x, wide, device.out(6, 3), False),
        lambda: backend.matmul(x, wide, wide),
        lambda: backend.update(*[device.out(8)] * 4, 4, 5, device.out(64), 0),
        lambda: backend.loss(device.out(63), x[:, 0].copy(), device.out(4), device.out(4)),
        lambda: backend.factor_forward(x, device.out(4), x, x, True, 1, True),
        lambda: backend.accumulate(device.out(3), device.out(4)),
        lambda: backend.alloc(3, "int32") is None or backend.couple(*[backend.alloc(3, "int32")] * 3, 1),
    ):
        with pytest.raises(ValueError):
            mistake()


def test_bias_calls_stand_alone_without_their_products() -> None:
    """The plan joins what it finds, and leaves the rest as it is."""
    device = Device(CudaBackend(EmulatedDriver(epilogues=True)), "float64")
    y, b = device.out(4, 3), device.out(3)
    plan = Plan(device.backend.driver, [BiasForward(y=y, b=b, relu=True), BiasBackward(dy=y, db=b, y=y, relu=True)])  # type: ignore[attr-defined]
    assert [type(call) for call in plan.calls] == [BiasForward, BiasBackward]

"""Flows on a device whose arrays are not NumPy's: training, scoring, and rows that never pass through the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nicecp.evaluate import Evaluator, evaluate
from nicecp.flow import NICE
from nicecp.inpaint import inpaint
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Backend, Purpose
from nicecp.preprocessing import Dequantize, Standardize, Step, Triangular, Zca
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.testing import check_gradients
from nicecp.train import TrainConfig, Trainer
from tests import gates
from tests.emulated import build
from tests.kernels.fake_arrays import FakeArray
from tests.kernels.fake_order import Access
from tests.kernels.stand_in import stand_in

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

D = 5
SPEC = gates.make_spec(D, [(6,), (6,), (4, 6)], "logistic", "float64", laws=("affine", "additive"))
PARAMETERS = gates.draw_parameters(SPEC)
RNG = np.random.default_rng(1)
X = RNG.normal(size=(11, D))
LOWER = np.tril(RNG.normal(size=(D, D))) + 2 * np.eye(D)
STEPS: dict[str, tuple[Step, ...]] = {
    "none": (),
    "8-bit": (Dequantize(-1, 1),),
    "standardized": (Standardize(RNG.normal(size=D), RNG.uniform(0.5, 2, D)),),
    "zca": (Dequantize(), Zca(RNG.normal(size=D), RNG.uniform(0.5, 2, D), np.linalg.qr(RNG.normal(size=(D, D)))[0])),
    "triangular": (Triangular(LOWER, RNG.normal(size=D)), Standardize(np.ones(D), np.full(D, 2.0))),
}


@pytest.fixture(scope="module")
def device() -> Backend:
    return stand_in()


def flows(device: Backend, steps: str = "standardized", dtype: str = "float64") -> tuple[NICE, NICE]:
    """The same flow on the device and on the CPU."""
    spec = gates.make_spec(D, [(6,), (6,), (4, 6)], "logistic", dtype, laws=("affine", "additive"))
    made = [
        NICE.from_spec(spec, PARAMETERS, STEPS[steps], backend=backend) for backend in (device, get_backend("cpu", 1))
    ]
    return made[0], made[1]


def put(device: Any, host: Any) -> FakeArray:
    """An array of the user's, filled by his stream: not a moment before it is looked at."""
    cupy = device.driver.cupy
    array: FakeArray = cupy.zeros(np.shape(host), np.asarray(host).dtype)
    values, there = np.array(host), array.host
    cupy.launch("fill", lambda: np.copyto(there, values), Access(set(), cupy.spans_of([array])))
    return array


def get(device: Any, array: Any) -> Any:
    """What the user sees who looks at it on his own stream."""
    assert isinstance(array, FakeArray), "the result is not on the device"
    device.driver.cupy.get_current_stream().synchronize()
    return np.array(array.host, subok=False)


@pytest.mark.parametrize("steps", STEPS)
def test_rows_on_the_device_stay_there(device: Any, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = flows(device, steps)
    x, h = put(device, X), put(device, X[:, ::-1])
    there.log_prob(x)  # its numbers are on the device, its passes written down
    there.grad_log_prob(x), there.forward(x), there.inverse(h)
    moved: list[int] = []
    for name in ("to_host", "to_device"):
        right = getattr(type(device.driver), name)
        monkeypatch.setattr(
            type(device.driver), name, lambda self, *a, right=right: moved.append(a[0].size) or right(self, *a)
        )
    logp = there.log_prob(x)
    gradient = there.grad_log_prob(x)
    latent, log_det = there.forward(x)
    back, inverse_log_det = there.inverse(h)
    assert max(moved, default=0) <= D, "rows crossed to the host"
    pairs = [
        (logp, here.log_prob(X)),
        (gradient, here.grad_log_prob(X)),
        (latent, here.forward(X)[0]),
        (log_det, here.forward(X)[1]),
        (back, here.inverse(X[:, ::-1])[0]),
        (inverse_log_det, here.inverse(X[:, ::-1])[1]),
    ]
    for result, expected in pairs:
        np.testing.assert_allclose(get(device, result), expected, rtol=1e-10, atol=1e-10)


def test_numpy_in_gives_numpy_out(device: Any) -> None:
    there, here = flows(device)
    assert type(there.log_prob(X)) is np.ndarray
    np.testing.assert_allclose(there.log_prob(X), here.log_prob(X), rtol=1e-11)
    assert type(there.log_prob(X[0])) is float
    assert type(there.sample(3, 1)) is np.ndarray


def test_shapes_and_kinds(device: Any) -> None:
    there, here = flows(device, dtype="float32")
    assert get(device, there.log_prob(put(device, X[0]))).shape == ()
    several = get(device, there.grad_log_prob(put(device, X[:10].reshape(2, 5, D).astype(np.float32))))
    assert several.shape == (2, 5, D)
    assert several.dtype == np.float32
    np.testing.assert_allclose(several.reshape(10, D), here.grad_log_prob(X[:10]), rtol=1e-4, atol=1e-5)
    whole = get(device, there.log_prob(put(device, np.arange(D)), dtype=np.float32))
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, here.log_prob(np.arange(D)), rtol=1e-5)
    assert get(device, there.log_prob(put(device, X[:0]))).shape == (0,)


def test_more_rows_than_go_into_one_pass(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicecp.arrays.CHUNK", 4)
    there, here = flows(device)
    np.testing.assert_allclose(get(device, there.log_prob(put(device, X))), here.log_prob(X), rtol=1e-11)
    np.testing.assert_allclose(get(device, there.inverse(put(device, X))[0]), here.inverse(X)[0], rtol=1e-10)
    np.testing.assert_allclose(there.sample(9, 5), here.sample(9, 5), rtol=1e-10, atol=1e-12)
    assert np.array_equal(there.sample(5, 5, first=4), there.sample(9, 5)[4:]), "the last passes alone, for a rank"


def test_rows_that_are_not_finite(device: Any) -> None:
    there, here = flows(device)
    x = X.copy()
    x[1, 2], x[3, 0], x[4, 1], x[4, 2] = np.nan, np.inf, np.inf, np.nan
    on_device = put(device, x)
    np.testing.assert_allclose(get(device, there.log_prob(on_device)), here.log_prob(x), rtol=1e-11)
    np.testing.assert_allclose(get(device, there.grad_log_prob(on_device)), here.grad_log_prob(x), rtol=1e-9)
    np.testing.assert_allclose(get(device, there.forward(on_device)[0]), here.forward(x)[0], rtol=1e-10)
    x = np.full((3, D), 1.0)
    x[1] = 1e300
    broken = {**PARAMETERS, "couplings/0/layers/0/weight": PARAMETERS["couplings/0/layers/0/weight"] * 1e300}
    there.set_parameters(broken)
    with pytest.raises(FloatingPointError, match="log_prob of row 1 is not a finite number"):
        there.log_prob(put(device, x))


def test_what_is_refused(device: Any) -> None:
    there, here = flows(device, "8-bit")
    with pytest.raises(TypeError, match="expected dequantized values, got uint8"):
        there.log_prob(put(device, np.zeros((2, D), np.uint8)))
    with pytest.raises(ValueError, match=rf"shape \(\.\.\., {D}\), got \(2, 3\)"):
        there.log_prob(put(device, np.zeros((2, 3))))
    with pytest.raises(TypeError, match="real numbers"):
        there.log_prob(put(device, np.zeros((2, D), complex)))
    with pytest.raises(TypeError, match="Implicit conversion"):
        here.log_prob(put(device, X))


class Curved(Step):
    """A step that is not affine."""

    kind = "curved"
    log_det = 0.0
    affine = False

    def log_det_rows(self, x: Any) -> Any:
        return np.log(np.cosh(x)).sum(axis=1)

    def arrays(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Any) -> Any:
        return np.sinh(x)

    def inverse(self, z: Any) -> Any:
        return np.arcsinh(z)

    def backward(self, dz: Any, x: Any) -> Any:
        return dz * np.cosh(x) + np.tanh(x)


def test_a_step_that_is_not_affine_wants_numpy(device: Any) -> None:
    flow = NICE.from_spec(SPEC, PARAMETERS, (Curved(),), backend=device)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="preprocessing 'curved' is computed on the CPU"):
        flow.log_prob(put(device, X))
    assert np.isfinite(flow.log_prob(X)).all()
    assert flow.sample(2, 1).shape == (2, D)


def test_contexts_and_floors(device: Any) -> None:
    """A context comes from the host: one for all rows, or one for each; where it is NaN, so is the density."""
    spec = gates.make_spec(D, [(6,), (6,), (6,)], "logistic", "float64")
    spec = replace(spec, n_context=2)
    made = [NICE.from_spec(spec, None, (), seed=2, init="he", backend=b) for b in (device, get_backend("cpu", 1))]
    contexts = np.random.default_rng(4).normal(size=(len(X), 2))
    contexts[3, 1] = np.nan
    for context in (contexts[0], contexts):
        there, here = ([flow.log_prob(x, context, floor=-8.0), *flow.forward(x, context)] for flow, x in
                       zip(made, (put(device, X), X), strict=True))  # fmt: skip
        for result, expected in zip(there, here, strict=True):
            np.testing.assert_allclose(get(device, result), expected, rtol=1e-10)
    assert np.nanmin(here[0]) == -8.0, "the floor is reached"
    with pytest.raises(ValueError, match="one, or one for each"):
        made[0].log_prob(put(device, X), contexts[:4])
    np.testing.assert_allclose(made[0].sample(3, 1, contexts[0]), made[1].sample(3, 1, contexts[0]), rtol=1e-10)


def test_training_and_all_that_follows(device: Any) -> None:
    """The same as on the CPU, with validation, the best model kept, a step back, and evaluation."""
    data = np.random.default_rng(2).integers(0, 256, (90, D), np.uint8)
    spec = gates.make_spec(D, [(6,), (6,), (6,)], "logistic", "float64")
    results = []
    for backend in (device, get_backend("cpu", 1)):
        flow = NICE.from_spec(spec, None, (Dequantize(),), seed=3, init="he", backend=backend)
        source = ArraySource(data)
        train, valid = (
            Split.contiguous(source, *rows, purpose)
            for rows, purpose in (((0, 64), Purpose.TRAIN_NOISE), ((64, 90), Purpose.VALID_NOISE))
        )
        trainer = Trainer(flow, train, valid, TrainConfig(epochs=3, batch_size=16))
        record = trainer.run()
        backend.copy_in(trainer.p, np.zeros(trainer.p.shape))
        trainer._recovery._go_back("for this test")
        assert np.array_equal(backend.copy_out(trainer.p), backend.copy_out(trainer.best))
        assert not backend.copy_out(trainer.m).any()
        h = inpaint(flow, np.full((1, D), 0.5), np.arange(D) < 2, 3, seed=1).result
        results.append([evaluate(flow, valid).mean, *(row.valid_log_likelihood for row in record.history),
                        *flow.parameters().values(), h])  # fmt: skip
    for there, here in zip(*results, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-8, atol=1e-10)


def test_gradient_check_on_the_device(device: Any) -> None:
    flow = NICE.from_spec(SPEC, PARAMETERS, STEPS["standardized"], backend=device)
    assert check_gradients(flow, X[:2], max_checks=8).error <= 1


def test_numbers_that_are_not_finite_are_seen(device: Any) -> None:
    array = device.asarray(np.ones(10))
    assert device.is_finite(array)
    device.copy_in(array, np.array([1.0] * 9 + [np.inf]))
    assert not device.is_finite(array)


def test_validation_is_written_down_once(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over the same rows with the same parameters is replayed; other seeds and parameters are not mixed up."""
    data = np.random.default_rng(2).integers(0, 256, (40, D), np.uint8)
    flow = NICE.from_spec(SPEC, PARAMETERS, (Dequantize(),), backend=device)
    recorded: list[object] = []
    right = type(device).record
    monkeypatch.setattr(type(device), "record", lambda self, step: recorded.append(step) or right(self, step))
    evaluator, views = Evaluator(flow, Split.contiguous(ArraySource(data), 0, 40, Purpose.VALID_NOISE)), flow._views
    first, second = (evaluator.run(views, 1, epoch).mean for epoch in (1, 2))
    assert first != second, "every epoch has noise of its own"
    assert len(recorded) == 1
    assert evaluator.run(views, 1, 1).mean == first
    assert evaluator.run(views, 3, 1).mean != first
    zeros = flow.network.layout.views(device.alloc(flow.network.layout.size, "float64"))
    assert evaluator.run(zeros, 3, 1).mean != first
    assert len(recorded) == 3

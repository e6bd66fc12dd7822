"""What only a GPU can show: CuPy, cuBLASLt and graphs. The contract's tests run on it too (tests/conftest.py).

Run by `make test-gpu` and benchmarks/gpu.sh.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp import ranks
from nicecp import train as train_module
from nicecp.doctor import examine
from nicecp.errors import DeviceMemoryError
from nicecp.evaluate import evaluate
from nicecp.flow import NICE
from nicecp.kernels import cuda_nccl, cuda_source, detect, get_backend
from nicecp.kernels.backend import Purpose, Slot
from nicecp.kernels.cuda_driver import Bias, BiasGradient, MaskedBiasGradient, ReluBias
from nicecp.optimizers import AdaM
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize, Standardize
from nicecp.rank_devices import OnDevice
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests import gates

pytestmark = pytest.mark.gpu

D = 20
DATA = np.random.default_rng(1).integers(0, 256, (1000, D), np.uint8)


def trained(
    backend: Any, dtype: str, steps: int = 50, limit: int | None = None, hidden: int = 64, shared: Communicator = ALONE
) -> Trainer:
    spec = gates.make_spec(D, [(hidden, hidden), (hidden,), (hidden, hidden), (hidden,)], "logistic", dtype)
    flow = NICE.from_spec(spec, None, (Dequantize(),), seed=5, init="he", backend=backend)
    split = Split.contiguous(ArraySource(DATA), 0, len(DATA), Purpose.TRAIN_NOISE)
    config = TrainConfig(batch_size=64, optimizer=AdaM(rate=1e-3), seed=7, device_memory_limit=limit)
    trainer = Trainer(flow, split, None, config, communicator=shared)
    for _ in range(steps):
        trainer.step()
    return trainer


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_layer", [True, False])
def test_fifty_steps_are_those_of_the_cpu(gpu: Any, by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", 0 if by_layer else 2**40)
    there, here = trained(gpu, "float64"), trained(get_backend("cpu", 1), "float64")
    for name, value in there.flow.parameters().items():
        gates.assert_near(value, here.flow.parameters()[name], 1e-8, name)
    assert gpu.copy_out(there.state)[Slot.STEP] == 50


def test_a_replayed_graph_gives_the_bits_of_launches(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls, once captured on two streams and once launched one after the other."""
    replayed = trained(gpu, "float32", hidden=256)

    def planned(step: Any) -> Any:
        plan = gpu.plan(step)  # with the epilogues that a capture uses

        def run() -> None:
            plan.play()
            gpu.synchronize()

        return run

    monkeypatch.setattr(type(gpu), "record", lambda self, step: planned(step))
    launched = trained(gpu, "float32", hidden=256)
    for name in ("p", "m", "v", "state"):
        one, other = (gpu.copy_out(getattr(trainer, name)) for trainer in (replayed, launched))
        assert np.array_equal(one, other), name


def test_two_runs_have_the_same_bits(gpu: Any) -> None:
    one, other = (gpu.copy_out(trained(gpu, "float32", hidden=256).p) for _ in range(2))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("captures", [True, False])
def test_one_rank_sums_by_nccl(gpu: Any, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the graph, and between graphs: the numbers of a step without sums."""
    if not getattr(gpu.xp.cuda.nccl, "available", False):
        pytest.skip("CuPy finds no NCCL: pip install nvidia-nccl-cu13")
    monkeypatch.setattr(cuda_nccl, "CAPTURES", 0 if captures else 10**6)
    monkeypatch.setattr(ranks.buckets_of, "__defaults__", (1000,))
    together = trained(gpu, "float64", shared=OnDevice(ALONE, gpu))
    gates.assert_near(gpu.copy_out(together.p), gpu.copy_out(trained(gpu, "float64").p), 1e-10, "parameters")
    assert gpu.copy_out(together.state)[Slot.STEP] == 50


def test_streamed_data_give_the_bits_of_resident_ones(gpu: Any) -> None:
    resident, streamed = trained(gpu, "float32"), trained(gpu, "float32", limit=2 * 3 * 64 * (D + 8))
    assert streamed._feed.streams
    assert np.array_equal(gpu.copy_out(resident.p), gpu.copy_out(streamed.p))


def test_evaluation_is_that_of_the_cpu(gpu: Any) -> None:
    held_out = Split.contiguous(ArraySource(DATA), 0, 300, Purpose.TEST_NOISE)
    flow = trained(gpu, "float64", steps=5).flow
    same = NICE.from_spec(flow.spec, flow.parameters(), flow.preprocessing, backend=get_backend("cpu", 1))
    assert evaluate(flow, held_out).mean == pytest.approx(evaluate(same, held_out).mean, rel=1e-10)


# --- precision --------------------------------------------------------------------------------------------------------


def test_tf32_rounds_factors_and_full_does_not(gpu: Any, tf32: Any) -> None:
    if detect.look().gpus[0].capability < (8, 0):
        pytest.skip("this GPU has no TF32")
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((512, 512)).astype(np.float32) for _ in range(2))
    exact, errors = a.astype(float) @ b, []
    for backend in (gpu, tf32):
        out = backend.alloc((512, 512), np.float32)
        backend.matmul(out, backend.asarray(a), backend.asarray(b))
        errors.append(np.linalg.norm(backend.copy_out(out) - exact) / np.linalg.norm(exact))
    assert errors[0] < 2e-6
    assert 5e-5 < errors[1] < 2e-3, "TF32 rounds to 2^-11 where the GPU has it (compute capability 8.0 and later)"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_epilogues_that_are_offered_compute_what_they_say(gpu: Any, dtype: str) -> None:
    driver, rng = gpu.driver, np.random.default_rng(4)
    n, i, o = 200, 392, 1000
    x, w, b = (rng.standard_normal(shape).astype(dtype) for shape in ((n, i), (i, o), (o,)))
    dx, dw, db = (gpu.asarray(array) for array in (x, w, b))
    out, mask, sums = gpu.alloc((n, o), dtype), driver.relu_mask(n, o), gpu.alloc(o, dtype)
    linear, tolerance = x.astype(float) @ w + b, 1e-5 if dtype == "float32" else 1e-12
    offered = []
    for epilogue, expected in ((Bias(db), linear), (ReluBias(db), np.maximum(linear, 0)),
                               (ReluBias(db, mask), np.maximum(linear, 0))):  # fmt: skip
        if driver.prepare(out, dx, dw, epilogue=epilogue):
            driver.gemm(out, dx, dw, epilogue=epilogue)
            gates.assert_near(gpu.copy_out(out), expected, tolerance, str(type(epilogue)))
            offered.append(epilogue)
    above = rng.standard_normal((n, 50)).astype(dtype)
    v = rng.standard_normal((o, 50)).astype(dtype)
    back = MaskedBiasGradient(mask, sums)
    there, vs = gpu.asarray(above), gpu.asarray(v)
    if len(offered) == 3 and driver.prepare(out, there, vs, transpose_b=True, epilogue=back):
        driver.gemm(out, there, vs, transpose_b=True, epilogue=back)
        expected = np.where(linear > 0, above.astype(float) @ v.T, 0)
        wrong = (np.abs(gpu.copy_out(out) - expected) > 1e-3).sum()
        assert wrong <= 5, "beside a kink a unit may be on or off"
        gates.assert_near(gpu.copy_out(sums), gpu.copy_out(out).astype(float).sum(axis=0), tolerance * 10, "db")
    gradient, dy = gpu.alloc((i, 50), dtype), there
    if driver.prepare(gradient, dx, dy, transpose_a=True, epilogue=BiasGradient(sums[:50])):
        driver.gemm(gradient, dx, dy, transpose_a=True, epilogue=BiasGradient(sums[:50]))
        gates.assert_near(gpu.copy_out(gradient), x.astype(float).T @ above, tolerance, "dw")
        gates.assert_near(gpu.copy_out(sums[:50]), above.astype(float).sum(axis=0), tolerance * 10, "db")
    assert gpu.driver.prepare(out, dx, dw), "a plain product must be there"


# --- arrays of others, memory, compilation ----------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_arrays_on_the_gpu_stay_there(gpu: Any, library: str) -> None:
    cupy = pytest.importorskip("cupy")
    flow = NICE.from_spec(gates.make_spec(D, [(32,)] * 4, "logistic", "float64"), None,
                          (Standardize(np.ones(D), np.full(D, 2.0)),), init="he", seed=1, backend=gpu)  # fmt: skip
    x = np.random.default_rng(5).normal(size=(3000, D))
    if library == "torch":
        torch = pytest.importorskip("torch")
        given = torch.from_numpy(x).cuda() * 1.0
    else:
        given = cupy.asarray(x) * 1.0
    for result, expected in (
        (flow.log_prob(given), flow.log_prob(x)),
        (flow.grad_log_prob(given), flow.grad_log_prob(x)),
        (flow.inverse(given)[0], flow.inverse(x)[0]),
    ):
        assert isinstance(result, cupy.ndarray)
        np.testing.assert_allclose((result * 1.0).get(), expected, rtol=1e-9, atol=1e-9)


def test_running_out_of_memory_says_what_to_lower(gpu: Any) -> None:
    with pytest.raises(DeviceMemoryError, match="lower --batch-size"):
        gpu.alloc(2**46, np.float64)
    assert gpu.copy_out(gpu.asarray(np.arange(3.0))).tolist() == [0, 1, 2], "and goes on"


def test_kernels_use_no_local_memory(gpu: Any) -> None:
    """A kernel that spills registers, or has an array that it indexes, pays for it at every thread."""
    driver = gpu.driver
    spilling = {}
    for unit in cuda_source.UNITS:
        for name in cuda_source.kernels(unit):
            driver.kernel(name)
            size = driver._modules[unit].get_function(name).attributes["local_size_bytes"]
            if size:
                spilling[name] = size
    assert spilling == {}


def test_doctor_finds_all_well() -> None:
    findings = list(examine("cuda"))
    assert [finding.text for finding in findings if finding.problem] == []
    checks = [finding.text for finding in findings if finding.name == "gradients, cuda"]
    assert [text.split(":")[0] for text in checks] == ["float64", "float32", "tf32"]

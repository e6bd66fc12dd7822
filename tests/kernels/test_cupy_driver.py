"""The driver on CuPy, on a stand-in (fake_cupy, fake_lt): what is launched where, what waits for what, what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp.errors import DeviceError, DeviceMemoryError
from nicecp.kernels import cublaslt, cuda_pinned
from nicecp.kernels.cuda_cupy import CupyDriver
from nicecp.kernels.cuda_driver import Bias, BiasGradient, Driver, MaskedBiasGradient, ReluBias
from tests.kernels.driver_setup import Setup
from tests.kernels.fake_cupy import CUDARuntimeError


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(monkeypatch)


def test_it_is_a_driver(setup: Setup) -> None:
    driver: Driver = setup.driver
    assert (driver.name, driver.precision, driver.blocks) == ("Fake GPU", "float32", 32)
    with pytest.raises(ValueError, match="precision must be one of float32, tf32"):
        CupyDriver(setup.cupy, cublaslt.Products(setup.lt), "half")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (1000, 2500)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
def test_numbers_there_and_back(setup: Setup, shape: tuple[int, ...], dtype: str) -> None:
    host = np.random.default_rng(1).integers(0, 256, shape).astype(dtype)
    array = setup.driver.alloc(shape, dtype)
    assert not setup.driver.to_host(array).any(), "memory begins as zeros"
    given = host.copy()
    setup.driver.to_device(array, given)
    given[...] = 0  # before the copy is carried out
    assert np.array_equal(setup.driver.to_host(array), host)


def test_large_copies_go_through_two_blocks_in_turn(setup: Setup) -> None:
    size = 5 * cuda_pinned.BLOCK + 17
    setup.put(np.zeros(size, np.uint8))
    copies = [call for call in setup.cupy.calls if call == ("memcpy 1", "main")]
    assert len(copies) == 6
    assert [call for call in setup.cupy.calls if call[0] == "pinned"] == [("pinned", cuda_pinned.BLOCK)] * 2
    assert [call[0] for call in setup.cupy.calls].count("event.synchronize") == 4, "the first two blocks are free"
    assert ("synchronize", "main") not in setup.cupy.calls


def test_host_reads_after_all_launches_also_the_side_ones(setup: Setup) -> None:
    array = setup.put(np.full(4, 1.0))
    setup.scale(array, 3)
    with setup.driver.side():
        setup.scale(array, 5)
    assert setup.driver.to_host(array).tolist() == [15.0] * 4


def test_views_that_are_not_contiguous_are_read_too(setup: Setup) -> None:
    array = setup.put(np.arange(6.0).reshape(2, 3))
    assert setup.driver.to_host(array[:, 1:]).tolist() == [[1, 2], [4, 5]]
    with pytest.raises(ValueError, match="only C-contiguous"):
        setup.driver.to_device(array[:, 1:], np.zeros((2, 2)))
    with pytest.raises(ValueError, match="cannot copy float32"):
        setup.driver.to_device(array, np.zeros((2, 3), np.float32))


def test_arithmetic_of_cupy_keeps_its_place_among_the_launches(setup: Setup) -> None:
    a, b = setup.put(np.full(3, 1.0)), setup.put(np.zeros(3))
    with setup.driver.side():
        setup.scale(a, 2)
    with setup.driver.arithmetic():
        b[...] = a + a
    setup.scale(a, 2)
    assert setup.driver.to_host(b).tolist() == [4.0] * 3
    assert setup.driver.xp is setup.cupy


def test_arrays_of_others_come_in_and_go_out_in_order(setup: Setup) -> None:
    """What the user's stream has launched comes first, and what it launches later comes after our work."""
    out = setup.driver.result(2, np.float64)
    theirs = setup.cupy.zeros(2, np.float64)
    theirs[...] = 3.0
    ours = setup.driver.borrow(theirs)
    assert ours.data.ptr == theirs.data.ptr
    setup.scale(ours, 5)
    with setup.driver.arithmetic():
        out[...] = ours
    setup.driver.hand_over()
    later = out + out
    assert bool((later - 30.0).any()) is False
    assert ("wait", "user", "main") in setup.cupy.calls


def test_uploads_run_beside_the_work_and_behind_what_came_before(setup: Setup) -> None:
    array = setup.put(np.full(3, 1.0))
    seen = setup.put(np.zeros(3))
    source = setup.driver.pinned(3, np.float64)
    source[:] = 7
    with setup.driver.arithmetic():
        seen[...] = array  # still reads the old numbers
    start = len(setup.cupy.calls)
    token = setup.driver.upload(array, source)
    assert ("memcpy 1", "copy") in setup.cupy.calls[start:]
    setup.driver.uploaded(token)
    source[:] = 0
    setup.driver.wait(token)
    assert ("wait", "main", "copy") in setup.cupy.calls[start:]
    assert setup.driver.to_host(array).tolist() == [7.0] * 3
    assert setup.driver.to_host(seen).tolist() == [1.0] * 3


def test_running_out_of_memory_says_what_to_lower(setup: Setup) -> None:
    setup.cupy.memory = 1000
    with pytest.raises(DeviceMemoryError) as error:
        setup.driver.alloc((100, 20), np.float64)
    message = str(error.value)
    assert "for 16,000 bytes (1,000 of 2,000 are free)" in message
    for remedy in ("--batch-size", "--device-memory-limit", "--device cpu"):
        assert remedy in message
    assert isinstance(error.value, MemoryError)


def test_errors_of_the_gpu_are_device_errors(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise CUDARuntimeError("cudaErrorIllegalAddress:\n an illegal memory access was encountered")

    array = setup.driver.alloc(3, np.float32)
    monkeypatch.setattr(setup.cupy.cuda.runtime, "memcpyAsync", fail)
    with pytest.raises(DeviceError, match="failed to copy to the GPU: cudaErrorIllegalAddress: an illegal"):
        setup.driver.to_device(array, np.zeros(3, np.float32))

    def full(*arguments: Any) -> None:
        raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(setup.cupy.cuda.runtime, "memcpyAsync", full)
    monkeypatch.setattr(setup.cupy.cuda.runtime, "memGetInfo", fail)
    with pytest.raises(DeviceMemoryError, match="not enough memory on the GPU: lower"):
        setup.driver.to_device(array, np.zeros(3, np.float32))


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_unit_is_compiled_once_and_loaded_before_the_launch(setup: Setup) -> None:
    array = setup.put(np.ones(2))
    setup.scale(array, 2)
    setup.scale(array, 2)
    modules = [call for call in setup.cupy.calls if call[0] == "module"]
    assert modules == [("module", "text of unit", ("--std=c++17",), "nvrtc")]
    names = [call[0] for call in setup.cupy.calls]
    assert names.count("load") == 1
    assert names.index("load") < names.index("kernel scale")
    assert ("kernel scale", "main") in setup.cupy.calls


# --- products ---------------------------------------------------------------------------------------------------------


def test_products_and_their_epilogues(setup: Setup) -> None:
    random = np.random.default_rng(2)
    x, w, b = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 6), (6, 130), (130,)))
    driver = setup.driver
    dx, dw, db = setup.put(x), setup.put(w), setup.put(b)
    out, mask = driver.alloc((4, 130), np.float32), driver.relu_mask(4, 130)
    assert mask.nbytes == 4 * 256 // 8
    linear = x @ w + b
    for epilogue, expected in (
        (None, x @ w),
        (Bias(db), linear),
        (ReluBias(db), np.maximum(linear, 0)),
        (ReluBias(db, mask), np.maximum(linear, 0)),
    ):
        assert driver.prepare(out, dx, dw, epilogue=epilogue)
        driver.gemm(out, dx, dw, epilogue=epilogue)
        np.testing.assert_allclose(driver.to_host(out), expected, rtol=1e-4, atol=1e-5)
    sums, back = driver.alloc(130, np.float32), driver.alloc((4, 130), np.float32)
    identity = setup.put(np.eye(130, dtype=np.float32))
    ones = setup.put(np.ones((4, 130), np.float32))
    driver.gemm(back, ones, identity, transpose_b=True, epilogue=MaskedBiasGradient(mask, sums))
    assert np.array_equal(driver.to_host(back), linear > 0)
    assert np.array_equal(driver.to_host(sums), (linear > 0).sum(axis=0))
    gradient = driver.alloc((6, 130), np.float32)
    driver.gemm(gradient, dx, out, transpose_a=True, epilogue=BiasGradient(sums))
    np.testing.assert_allclose(driver.to_host(sums), np.maximum(linear, 0).sum(axis=0), rtol=1e-4, atol=1e-5)
    assert b.tolist() == driver.to_host(db).tolist(), "trying an epilogue must not touch the arrays"


def test_prepare_asks_the_heuristic_and_a_relu_that_hides_nan_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for lt, bias, relu in (
        ({}, True, True),
        ({"declined": (cublaslt.RELU_BIAS,)}, True, False),
        ({"relu_hides_nan": True}, True, False),
    ):
        setup = Setup(monkeypatch, **lt)
        x, out, b = (setup.put(np.ones(shape, np.float32)) for shape in ((2, 2), (2, 2), (2,)))
        found = [setup.driver.prepare(out, x, x, epilogue=epilogue) for epilogue in (Bias(b), ReluBias(b), ReluBias(b))]
        assert found == [bias, relu, relu]
        asked = [call[1][7] for call in setup.lt.calls if call[0] == "heuristic"]
        assert asked == [cublaslt.BIAS, cublaslt.RELU_BIAS], "each kind once"
        assert setup.driver.prepare(setup.put(np.ones((0, 2))), x, x)


def test_a_product_without_an_algorithm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(monkeypatch, declined=(cublaslt.DEFAULT,))
    x = setup.put(np.ones((2, 3)))
    with pytest.raises(DeviceError, match=r"no algorithm for float64 products of \(2, 3\) and \(3, 2\)"):
        setup.driver.gemm(setup.put(np.ones((2, 2))), x, x, transpose_b=True)
    setup.driver.gemm(setup.put(np.ones((0, 2))), x[:0], x, transpose_b=True)


def test_each_stream_has_a_workspace_of_its_own(setup: Setup) -> None:
    x, out = setup.put(np.ones((2, 2))), setup.put(np.ones((2, 2)))
    setup.driver.gemm(out, x, x)
    with setup.driver.side():
        setup.driver.gemm(out, x, x)
    main, side = [call for call in setup.lt.calls if call[0] == "matmul"]
    assert main[-1] != side[-1], "streams"
    assert main[-2] != side[-2], "workspaces"


def test_tf32_is_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(monkeypatch, tf32=True)
    x = setup.put(np.ones((2, 2), np.float32))
    setup.driver.gemm(setup.put(x.host), x, x)
    assert setup.lt.calls[-1][1]["compute"] == cublaslt.COMPUTE_32F_FAST_TF32
    assert setup.driver.precision == "tf32"

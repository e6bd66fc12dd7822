"""The emulation of CUDA catches what it is there for: each planted bug is seen, and the same without it passes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nicecp.kernels.cuda_driver import Bias
from tests.emulated import build
from tests.emulated.build import EmulatedKernel, EmulationError
from tests.emulated.driver import EmulatedDriver
from tests.emulated.memory import guarded

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

TEXT = (build.HERE / "planted.cu").read_text()
NAMES = re.findall(r"^PLANTED\((\w+)\)", TEXT, re.MULTILINE)
SCHEDULES = [0, 1, 2, 7]
X = np.random.default_rng(0).normal(size=64).astype(np.float32)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.build(TEXT, NAMES, flush=True)


def run(library: ctypes.CDLL, name: str, schedule: int, blocks: int = 1) -> np.ndarray:
    """What the kernel makes of X, in memory that it does not share."""
    x, y = guarded(64, np.float32), guarded(64, np.float32)
    x[:] = X
    EmulatedKernel(library, name)((blocks,), (64,), (x, y), schedule)
    for array in (x, y):
        array.check(name)
    return np.array(y)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_kernel_without_a_mistake_passes(library: ctypes.CDLL, schedule: int) -> None:
    np.testing.assert_array_equal(run(library, "reversed", schedule, blocks=3), X[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("early_exit", "a barrier that not all threads reach"),
        ("divergent_barrier", "different barriers"),
        ("partial_shuffle", "not all lanes"),
        ("write_behind", "behind an array was written"),
        ("write_far", "memory outside of an array"),
        ("read_before", "memory outside of an array"),
    ],
)
def test_what_a_gpu_would_not_forgive_is_an_error(library: ctypes.CDLL, name: str, message: str, schedule: int) -> None:
    with pytest.raises(EmulationError, match=message):
        run(library, name, schedule)
    np.testing.assert_array_equal(run(library, "reversed", schedule), X[::-1])  # the next launch is a good one


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["reversed_without_barrier", "uninitialised_shared", "read_behind"])
def test_what_has_no_value_yet_is_nan(library: ctypes.CDLL, name: str, schedule: int) -> None:
    assert np.isnan(run(library, name, schedule)).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_memory_is_a_blocks_own(library: ctypes.CDLL, schedule: int) -> None:
    assert np.isnan(run(library, "shared_of_the_last_block", schedule, blocks=2)).all()


def test_a_race_within_a_block_shows_in_another_order(library: ctypes.CDLL) -> None:
    expected = np.concatenate([[0], X[:-1]])
    np.testing.assert_array_equal(run(library, "shifted_without_barrier", 0), expected)
    assert np.isnan(run(library, "shifted_without_barrier", 1)).any()
    sums = {run(library, "sum_in_any_order", schedule)[0] for schedule in SCHEDULES}
    assert len(sums) > 1


def test_a_race_between_blocks_shows_in_another_order(library: ctypes.CDLL) -> None:
    forward, backward = (run(library, "race_of_blocks", schedule, blocks=3) for schedule in (0, 1))
    np.testing.assert_array_equal(forward, X + 2)
    np.testing.assert_array_equal(backward, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, y: (x,), "takes 2 arguments, not 1"),
        (lambda x, y: (x, np.float32(1)), "argument 1 is a float32"),
        (lambda x, y: (x, 1.0), "argument 1 is a float"),
        (lambda x, y: (x, guarded(64, np.float64)), "argument 1 is float64"),
        (lambda x, y: (x, y[::2]), "argument 1 is not contiguous"),
    ],
)
def test_arguments_have_exactly_the_parameters_types(
    library: ctypes.CDLL, arguments: Callable[[Any, Any], tuple[Any, ...]], message: str
) -> None:
    with pytest.raises(EmulationError, match=message):
        EmulatedKernel(library, "reversed")((1,), (64,), arguments(guarded(64, np.float32), guarded(64, np.float32)))


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_every_planted_kernel_is_used(name: str) -> None:
    with open(__file__, encoding="utf-8") as source:
        assert f'"{name}"' in source.read()


def test_a_source_that_is_no_cuda_is_refused() -> None:
    with pytest.raises(EmulationError, match="g\\+\\+ refuses"):
        build.build('extern "C" __global__ void broken(float* x) { undeclared(x); }', ["broken"], flush=False)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1024, 5000])
def test_memory_is_aligned_zero_and_ends_at_a_wall(size: int) -> None:
    array = guarded(size, np.float32)
    assert array.ctypes.data % 256 == 0
    assert not array.any()
    assert (array.ctypes.data + array.nbytes + len(array.behind)) % 4096 == 0
    assert array[size // 2 :].reshape(-1).behind is array.behind, "views are of the same memory"
    array.check("nobody")


# --- the driver -------------------------------------------------------------------------------------------------------


def add_one(driver: EmulatedDriver, y: Any, one: Any) -> None:
    driver.kernel("couple_f64")((1,), (256,), (y, y, one, np.int64(y.size), np.int32(1)))


@pytest.mark.parametrize("late", [False, True])
def test_side_blocks_run_when_they_are_waited_for_at_the_latest(late: bool) -> None:
    driver = EmulatedDriver(late=late)
    one, a, b = (driver.alloc(4, np.float64) for _ in range(3))
    one[:] = 1
    with driver.side() as first:
        add_one(driver, a, one)
    with driver.side() as second:
        add_one(driver, b, one)
    assert (a[0], b[0]) == ((0, 0) if late else (1, 1))
    driver.wait(first)
    assert (a[0], b[0]) == ((1, 0) if late else (1, 1))
    driver.wait(second)
    assert (a[0], b[0]) == (1, 1)
    with driver.side():
        add_one(driver, a, one)
    assert driver.to_host(a)[0] == 2


def test_a_capture_carries_nothing_out_and_replays_everything() -> None:
    driver = EmulatedDriver(late=True)
    one, a = driver.alloc(4, np.float64), driver.alloc(4, np.float64)
    one[:] = 1
    driver.kernel("couple_f64")

    def step() -> None:
        add_one(driver, a, one)
        with driver.side():
            add_one(driver, a, one)

    graph = driver.capture(step)
    assert a[0] == 0
    graph()
    assert a[0] == 2
    graph()
    assert a[0] == 4


@pytest.mark.parametrize(
    ("forbidden", "message"),
    [
        (lambda d, x: d.alloc(4, np.float32), "allocated during a capture"),
        (lambda d, x: d.to_host(x), "the host waits during a capture"),
        (lambda d, x: d.kernel("advance_f64"), "compiled during a capture"),
        (lambda d, x: d.gemm(x, x, x), "was not prepared"),
        (lambda d, x: d.capture(lambda: None), "begins during a capture"),
    ],
)
def test_what_a_capture_cannot_hold_is_an_error(forbidden: Callable[[Any, Any], Any], message: str) -> None:
    driver = EmulatedDriver()
    x = driver.alloc((2, 2), np.float64)
    with pytest.raises(EmulationError, match=message):
        driver.capture(lambda: forbidden(driver, x))
    driver.capture(lambda: None)()


def test_host_arrays_and_unknown_epilogues_are_errors() -> None:
    driver = EmulatedDriver()
    x = driver.alloc((2, 2), np.float64)
    with pytest.raises(EmulationError, match="a host array"):
        add_one(driver, np.zeros(4), x)
    with pytest.raises(EmulationError, match="a host array"):
        driver.gemm(x, x, np.eye(2))
    assert not driver.prepare(x, x, x, epilogue=Bias(x[0]))
    with pytest.raises(EmulationError, match="not prepared"):
        driver.gemm(x, x, x, epilogue=Bias(x[0]))

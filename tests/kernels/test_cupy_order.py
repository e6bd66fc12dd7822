"""The driver on CuPy: side streams, what waits for what, and capture, on a stand-in that sees what is in no order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp.errors import DeviceError, DeviceMemoryError
from nicecp.kernels.cuda_driver import Lanes
from nicecp.kernels.cuda_streams import Streams
from tests.kernels.driver_setup import Setup
from tests.kernels.fake_cupy import CUDARuntimeError
from tests.kernels.fake_order import Race


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(monkeypatch)


# --- order and capture ------------------------------------------------------------------------------------------------


def test_a_side_block_runs_behind_what_came_before_and_beside_what_follows(setup: Setup) -> None:
    array, other = setup.put(np.full(2, 1.0)), setup.put(np.full(2, 1.0))
    setup.scale(array, 1)  # compiled
    start = len(setup.cupy.calls)
    setup.scale(array, 2)
    with setup.driver.side() as token:
        setup.scale(array, 3)
        with pytest.raises(RuntimeError, match="not nested"), setup.driver.side():
            pass
        with pytest.raises(RuntimeError, match="where it begins"):
            setup.driver.wait(token)
    setup.scale(other, 5)
    setup.driver.wait(token)
    setup.scale(array, 7)
    assert setup.names(start) == [
        ("kernel scale", "main"),
        ("record", "main"),
        ("wait", "side", "main"),
        ("kernel scale", "side"),
        ("record", "side"),
        ("kernel scale", "main"),
        ("wait", "main", "side"),
        ("kernel scale", "main"),
    ]
    assert setup.driver.to_host(array).tolist() == [42.0] * 2
    assert setup.names()[-1][0] != "wait", "what was waited for is not waited for again"


def step_of(setup: Setup, array: Any, product: Any, x: Any) -> Any:
    def step() -> None:
        setup.scale(array, 2)
        with setup.driver.side():
            setup.driver.gemm(product, x, x)
        setup.scale(array, 3)

    return step


def test_a_captured_step_is_carried_out_only_when_replayed(setup: Setup) -> None:
    array, x, product = setup.put(np.full(2, 1.0)), setup.put(np.eye(2) * 2), setup.put(np.zeros((2, 2)))
    setup.scale(array, 1)
    assert setup.driver.prepare(product, x, x)
    start = len(setup.cupy.calls)
    replay = setup.driver.capture(step_of(setup, array, product, x))
    names = setup.names(start)
    assert names[0] == ("begin_capture", "main")
    assert names[-3:] == [("wait", "main", "side"), ("end_capture", "main"), ("upload graph", "main")]
    assert setup.driver.to_host(array).tolist() == [1.0] * 2
    assert not setup.driver.to_host(product).any()
    for count in (1, 2):
        replay()
        setup.driver.synchronize()
        assert setup.driver.to_host(array).tolist() == [6.0**count] * 2
    assert np.array_equal(setup.driver.to_host(product), np.eye(2) * 4)
    start = len(setup.cupy.calls)
    with setup.driver.side():
        setup.scale(array, 1)
    replay()
    assert setup.names(start)[-2:] == [("wait", "main", "side"), ("launch graph", "main")]


def test_what_would_break_a_capture_is_refused(setup: Setup) -> None:
    x, out = setup.put(np.eye(2)), setup.put(np.zeros((2, 2)))
    for step, message in (
        (lambda: setup.driver.alloc(3, np.float32), "memory was asked for while a step is captured"),
        (lambda: setup.driver.prepare(out, x, x), "was not made ready"),
        (lambda: setup.driver.gemm(out, x, x), "was not made ready"),
        (lambda: setup.driver.arithmetic().__enter__(), "is not captured"),
        (lambda: setup.driver.capture(lambda: None), "being captured already"),
    ):
        with pytest.raises(RuntimeError, match=message):
            setup.driver.capture(step)
        assert setup.cupy.capturing is None
    setup.driver.gemm(out, x, x)  # the driver is as it was before
    assert np.array_equal(setup.driver.to_host(out), np.eye(2))


def test_a_step_that_fails_in_a_side_block_leaves_the_driver_usable(setup: Setup) -> None:
    array = setup.put(np.full(2, 1.0))

    def step() -> None:
        with setup.driver.side():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        setup.driver.capture(step)
    with setup.driver.side():
        setup.scale(array, 4)
    assert setup.driver.to_host(array).tolist() == [4.0] * 2


def test_a_graph_that_cannot_be_made_is_a_device_error(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr("tests.kernels.fake_cupy.Stream.end_capture", fail)
    with pytest.raises(DeviceMemoryError, match="--batch-size"):
        setup.driver.capture(lambda: None)
    assert not setup.driver._streams.capturing


# --- two side streams, and what comes before what ---------------------------------------------------------------------


def test_two_lanes_run_beside_each_other_and_wait_for_what_they_are_told(setup: Setup) -> None:
    driver = setup.driver
    assert isinstance(driver, Lanes)
    assert driver.lanes == 2
    first, second = (setup.put(np.full(2, 1.0)) for _ in range(2))
    setup.scale(first, 1)  # compiled
    start = len(setup.cupy.calls)
    with driver.side(0) as gradient:
        setup.scale(first, 2)
    with driver.side(1, [gradient]) as update:
        setup.scale(first, 3)
    with driver.side(0):
        setup.scale(second, 5)
    driver.wait(update)
    setup.scale(first, 7)
    assert setup.names(start) == [
        ("record", "main"), ("wait", "side", "main"), ("kernel scale", "side"), ("record", "side"),
        ("record", "main"), ("wait", "side 1", "main"), ("wait", "side 1", "side"), ("kernel scale", "side 1"),
        ("record", "side 1"),
        ("record", "main"), ("wait", "side", "main"), ("kernel scale", "side"), ("record", "side"),
        ("wait", "main", "side 1"), ("kernel scale", "main"),
    ]  # fmt: skip
    assert driver.to_host(first).tolist() == [42.0] * 2
    assert driver.to_host(second).tolist() == [5.0] * 2
    for lane in (-1, 2):
        with pytest.raises(ValueError, match="there are 2 lanes"), driver.side(lane):
            pass


def test_lanes_are_captured_and_joined_before_the_capture_ends(setup: Setup) -> None:
    """Also one that the step never waits for, and one that follows another lane alone."""
    arrays = [setup.put(np.full(2, 1.0)) for _ in range(3)]
    setup.scale(arrays[0], 1)

    def step() -> None:
        with setup.driver.side(0) as first:
            setup.scale(arrays[0], 2)
        with setup.driver.side(1, [first]):
            setup.scale(arrays[0], 3)
            setup.scale(arrays[1], 5)
        setup.scale(arrays[2], 7)

    start = len(setup.cupy.calls)
    replay = setup.driver.capture(step)
    names = setup.names(start)
    assert names[-4:-2] == [("wait", "main", "side"), ("wait", "main", "side 1")]
    for schedule in (0, 1, 2, 3):
        setup.cupy.schedule = schedule
        replay()
    assert [setup.driver.to_host(array).tolist()[0] for array in arrays] == [6.0**4, 5.0**4, 7.0**4]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("mistake", ["main does not wait", "a lane does not wait", "an early token", "none"])
def test_work_that_meets_in_no_order_is_seen(setup: Setup, mistake: str, captured: bool) -> None:
    """Whatever the order in which it happens to be carried out."""
    array, driver = setup.put(np.full(2, 1.0)), setup.driver
    setup.scale(array, 1)

    def step() -> None:
        with driver.side(0) as first:
            setup.scale(array, 2)
        with driver.side(0) as second:
            setup.scale(array, 2)
        waits_for = {"a lane does not wait": [], "an early token": [first]}.get(mistake, [second])
        with driver.side(1, waits_for) as last:
            setup.scale(array, 3)
        if mistake != "main does not wait":
            driver.wait(last)
        setup.scale(array, 5)

    def carried_out() -> None:
        if captured:
            driver.capture(step)()
        else:
            step()

    if mistake == "none":
        carried_out()
        assert driver.to_host(array).tolist() == [60.0] * 2
        return
    with pytest.raises(Race, match="kernel scale and kernel scale touch the same memory"):
        carried_out()


def test_a_side_stream_that_is_not_joined_spoils_the_capture(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    array = setup.put(np.full(2, 1.0))
    setup.scale(array, 1)

    def step() -> None:
        with setup.driver.side(1):
            setup.scale(array, 2)

    monkeypatch.setattr(Streams, "join", lambda self: None)
    with pytest.raises(DeviceError, match="StreamCaptureUnjoined"):
        setup.driver.capture(step)


def test_products_beside_each_other_share_no_workspace(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    x, outs = setup.put(np.eye(2)), [setup.put(np.zeros((2, 2))) for _ in range(3)]
    assert setup.driver.prepare(outs[0], x, x)

    def step() -> None:
        for lane in (0, 1):
            with setup.driver.side(lane):
                setup.driver.gemm(outs[lane], x, x)
        setup.driver.gemm(outs[2], x, x)

    setup.driver.capture(step)()
    assert len({call[-2] for call in setup.lt.calls[-3:]}) == 3
    same = setup.driver._workspaces[setup.driver._streams.main.ptr]
    monkeypatch.setattr(setup.driver, "_workspace", lambda stream: same)
    with pytest.raises(Race, match="product and product"):
        setup.driver.capture(step)


def test_a_graph_needs_somebody_who_keeps_its_arrays(setup: Setup) -> None:
    kept, lost = setup.put(np.full(2, 1.0)), [setup.put(np.full(2, 1.0))]
    setup.scale(kept, 1)
    replay = setup.driver.capture(lambda: [setup.scale(array, 2) for array in (kept, *lost)] and None)
    replay()
    lost.clear()
    with pytest.raises(AssertionError, match="memory that it works on was given back"):
        replay()


def test_memory_that_is_given_back_too_early_is_seen(setup: Setup) -> None:
    """It goes to what the stream that had allocated it launches next, while a side stream still works on it."""
    kept = setup.put(np.full(2, 1.0))
    setup.scale(kept, 1)
    array = setup.put(np.full(2, 1.0))
    with setup.driver.side() as token:
        setup.scale(array, 2)
    del array
    with pytest.raises(Race, match="what is allocated next and kernel scale"):
        setup.scale(kept, 1)
    array = setup.put(np.full(2, 1.0))
    with setup.driver.side() as token:
        setup.scale(array, 2)
    setup.driver.wait(token)
    del array
    setup.scale(kept, 1)

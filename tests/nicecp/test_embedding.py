"""The library inside other programs: their threads, processes, memory, logs and odd arguments."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from nicecp import fit, load
from nicecp.flow import NICE
from tests import gates

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 10**6
D = 64


@pytest.fixture(scope="module")
def trained() -> NICE:
    """A flow on two threads whose pool and BLAS have been used; wide enough for two slices of random numbers."""
    flow = NICE(D, (40,), 3, threads=2)
    fit(flow, rows(400), epochs=1, batch_size=100)
    return flow


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def rows(n: int, d: int = D, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=(n, d))


# --- threads and processes ------------------------------------------------------------------------------------------

BLAS = """
import os, sys, threading, time
import scipy.linalg  # with a BLAS of its own, which the library loads sooner or later
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
import nicecp

def blas():
    return sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas")

def check(what):
    assert blas() == before, f"{what}: {blas()} instead of {before}"

def reaped(child, what):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"{what}: the child ended with {status}"
            return
        time.sleep(0.01)
    os.kill(child, 9)
    raise AssertionError(f"{what}: the child hangs")

def in_child(what, work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(what, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    reaped(child, what)

threadpool_limits(3, user_api="blas")
before = blas()
assert before and all(count == 3 for _, count in before), before
x = np.random.default_rng(0).normal(size=(3000, 8))
one, two = nicecp.NICE(8, (30,), 3, threads=1), nicecp.NICE(8, (30,), 3, threads=2)
free = nicecp.NICE(8, (30,), 3)

for flow in (one, two, free):
    flow.log_prob(x)
    check("log_prob")
with one.backend.computing():
    assert all(count == 1 for _, count in blas()), blas()
nicecp.fit(one, x, epochs=1)
check("fit")

def score():
    for _ in range(15):
        flow.log_prob(x)

for crowd in ([two] * 4, [one, two, one, two]):
    callers = []
    for flow in crowd:
        callers.append(threading.Thread(target=lambda flow=flow: [flow.log_prob(x) for _ in range(15)]))
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    check("calls from four threads")

for fail in (lambda: one.log_prob(x[:, :3]), lambda: nicecp.fit(one, x, callbacks=[lambda record: 1 / 0])):
    try:
        fail()
    except (ValueError, ZeroDivisionError):
        check("an error")
    else:
        raise AssertionError("no error")
try:
    with two.backend.computing():
        with one.backend.computing():
            raise KeyError
except KeyError:
    check("an error inside")

def work():
    check("a fresh child")
    for _ in range(2):
        one.log_prob(x)
        check("a child")

in_child("fork", work)
with two.backend.computing():
    with two.backend.computing():
        in_child("fork inside", lambda: two.log_prob(x))
check("after a fork inside")

stop = threading.Event()
def busy():
    while not stop.is_set():
        two.log_prob(x[:50])
callers = [threading.Thread(target=busy) for _ in range(2)]
for caller in callers:
    caller.start()
for _ in range(10):
    in_child("fork beside busy threads", lambda: two.log_prob(x[:50]))
stop.set()
for caller in callers:
    caller.join()
check("the end")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks in the middle of things")
def test_blas_has_its_threads_back() -> None:
    """BLAS has one number of threads for the whole process: whoever embeds the library finds theirs unchanged."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLAS], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_may_leave_the_block_that_it_was_forked_in(trained: NICE) -> None:
    """Its later calls hold the number of threads that was asked for, and give it back, as its parent's do."""

    def limits() -> list[Any]:
        return sorted((p["filepath"], p["num_threads"]) for p in threadpool_info() if p["user_api"] == "blas")

    with threadpool_limits(3, user_api="blas"):
        before = limits()
        with trained.backend.computing():
            child = os.fork()
        if child == 0:
            try:
                fine = limits() == before
                for _ in range(2):
                    trained.log_prob(rows(5))
                    fine &= limits() == before
                os._exit(0 if fine else 1)
            finally:
                os._exit(2)
        assert limits() == before
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_from_four_threads_are_the_serial_ones(trained: NICE) -> None:
    parts = [rows(1500, seed=seed) for seed in range(4)]
    expected = [trained.log_prob(part) for part in parts]
    found: list[list[Any]] = [[] for _ in parts]

    def call(number: int) -> None:
        for _ in range(5):
            found[number].append(trained.log_prob(parts[number]))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=300)
    for one, results in zip(expected, found, strict=True):
        assert len(results) == 5
        for result in results:
            np.testing.assert_array_equal(result, one)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_give_the_same_bits(trained: NICE, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    x = rows(1500)
    expected, sample = trained.log_prob(x), trained.sample(1500, 7)
    with multiprocessing.get_context(method).Pool(2) as pool:
        scores = [pool.apply_async(trained.log_prob, (x,)) for _ in range(4)]
        draws = [pool.apply_async(trained.sample, (1500, 7)) for _ in range(2)]
        for result in scores:
            np.testing.assert_array_equal(result.get(timeout=300), expected)
        for result in draws:
            np.testing.assert_array_equal(result.get(timeout=300), sample)
    np.testing.assert_array_equal(trained.log_prob(x), expected)


# --- pickling -------------------------------------------------------------------------------------------------------


def test_a_pickle_is_about_the_weights() -> None:
    flow = NICE(20, (100, 100), 3, seed=5, init="he")
    flow.log_prob(rows(3000, 20))  # buffers of calls are not part of the flow
    size, weights = len(pickle.dumps(flow)), flow.n_parameters * flow.dtype.itemsize
    assert weights <= size < 1.02 * weights + 4096
    twin = pickle.loads(pickle.dumps(flow))
    np.testing.assert_array_equal(twin.log_prob(rows(10, 20)), flow.log_prob(rows(10, 20)))
    assert (twin.spec, twin.seed, twin.init) == (flow.spec, flow.seed, flow.init)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("float64", "float64")])
def test_an_open_dtype_stays_open_in_a_pickle(dtype: str, expected: str) -> None:
    flow = pickle.loads(pickle.dumps(NICE(6, (4,), 3, dtype=dtype)))
    assert flow.dtype == np.float64
    fit(flow, np.random.default_rng(0).integers(0, 256, (40, 6), np.uint8), epochs=1)
    assert flow.dtype == expected
    again = pickle.loads(pickle.dumps(flow))
    assert again.dtype == expected
    assert again.preprocessing == flow.preprocessing


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], Any]) -> float:
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    kept = call()
    peak = tracemalloc.get_traced_memory()[1] - before
    del kept
    return peak


@pytest.mark.parametrize("standardized", [False, True])
def test_memory_of_a_call_is_bounded(tracing: None, standardized: bool) -> None:
    n, d = 100_000, 50
    flow = NICE(d, (16,), 3, threads=1, preprocessing=gates.standardize(d) if standardized else ())
    x = np.zeros((n, d))
    x[::2] = 1.0
    assert peak_of(lambda: flow.log_prob(x)) < 0.3 * x.nbytes + 30 * MEGABYTE
    assert peak_of(lambda: flow.log_prob(x[:, ::-1])) < 0.3 * x.nbytes + 30 * MEGABYTE  # not contiguous
    assert peak_of(lambda: flow.sample(n, 1)) < 1.6 * x.nbytes + 30 * MEGABYTE


# --- manners --------------------------------------------------------------------------------------------------------


def test_the_library_prints_nothing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flow = NICE(4, (4,), 2)
    logging.getLogger("nicecp").addHandler(handler := logging.NullHandler())
    try:
        fit(flow, rows(60, 4), epochs=3, patience=1)
    finally:
        logging.getLogger("nicecp").removeHandler(handler)
    flow.save(tmp_path / "a.h5")
    twin = load(tmp_path / "a.h5")
    np.testing.assert_array_equal(twin.sample(5, 3), flow.sample(5, 3))
    twin.forward(twin.inverse(rows(5, 4))[0])
    twin.grad_log_prob(rows(5, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("n_couplings", "warned"), [(1, True), (2, True), (3, False)])
def test_too_few_couplings_are_logged(caplog: pytest.LogCaptureFixture, n_couplings: int, warned: bool) -> None:
    with caplog.at_level(logging.WARNING, "nicecp"), warnings.catch_warnings():
        warnings.simplefilter("error")
        NICE(4, (4,), n_couplings)
    messages = [record.getMessage() for record in caplog.records if record.name == "nicecp"]
    assert messages == [message for message in messages if f"{n_couplings} coupling" in message]
    assert len(messages) == warned


def test_no_rows(trained: NICE) -> None:
    none = np.empty((0, D))
    assert trained.log_prob(none).shape == (0,)
    assert trained.grad_log_prob(none).shape == (0, D)
    assert trained.sample(0).shape == (0, D)
    for result, log_det in (trained.forward(none), trained.inverse(none)):
        assert (result.shape, log_det.shape) == ((0, D), (0,))
    assert trained.log_prob(np.empty((2, 0, D))).shape == (2, 0)


def test_rows_that_are_not_finite_have_no_latent(trained: NICE) -> None:
    """Of 1100 rows, more than are handled at once."""
    x = rows(1100)
    expected, bad = trained.forward(x)[0], [3, 4, 1099]
    x[3, 2], x[4, 0], x[1099, 5] = np.nan, np.inf, -np.inf
    h, _ = trained.forward(x)
    assert np.isnan(h[bad]).all()
    fine = np.setdiff1d(np.arange(1100), bad)
    np.testing.assert_array_equal(h[fine], expected[fine])
    assert np.isnan(trained.forward(x[3])[0]).all()
    assert np.isnan(trained.grad_log_prob(x)[bad]).all()
    np.testing.assert_array_equal(trained.log_prob(x)[bad], [np.nan, -np.inf, -np.inf])


@pytest.mark.parametrize(
    "make",
    [
        lambda: NICE(4, "64"),  # type: ignore[arg-type]
        lambda: NICE(4, (2.9,)),  # type: ignore[arg-type]
        lambda: NICE(4, ("64",)),  # type: ignore[arg-type]
        lambda: NICE(4.7, (4,)),  # type: ignore[arg-type]
        lambda: NICE(4, (4,), 3.5),  # type: ignore[arg-type]
        lambda: NICE(4, (4,)).sample(3, 1.5),  # type: ignore[arg-type]
        lambda: NICE(4, (4,)).sample(3, "1"),  # type: ignore[arg-type]
        lambda: NICE(4, (4,)).sample(2.5),  # type: ignore[arg-type]
    ],
)
def test_numbers_that_are_not_whole_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        make()


def test_whole_numbers_of_other_types_are_taken() -> None:
    flow = NICE(np.int64(4), [np.int32(5), 6], np.uint8(3))  # type: ignore[arg-type, list-item]
    assert flow.spec == NICE(4, (5, 6), 3).spec
    np.testing.assert_array_equal(flow.sample(np.int16(2), np.uint64(2**64 - 1)), flow.sample(2, 2**64 - 1))  # type: ignore[arg-type]


# --- properties -----------------------------------------------------------------------------------------------------

FLOWS = st.builds(
    lambda d, hidden, couplings, prior, seed, standardized: gates.make_flow(
        gates.make_spec(d, [hidden] * couplings, prior), None, seed, gates.standardize(d) if standardized else ()
    )[0],
    st.integers(2, 7),
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 4),
    st.sampled_from(["logistic", "gaussian"]),
    st.integers(0, 2**32),
    st.booleans(),
)
FEW = settings(max_examples=20, derandomize=True, deadline=None, database=None)


@FEW
@given(FLOWS, st.integers(1, 30), st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_inverse_undoes_the_flow(flow: NICE, n: int, seed: int, size: float) -> None:
    x = size * rows(n, flow.n_features, seed)
    h, log_det = flow.forward(x)
    back, inverse_log_det = flow.inverse(h)
    reach = max(1.0, np.abs(x).max(), np.abs(h).max())  # rounding is that of the largest number on the way
    np.testing.assert_allclose(back, x, rtol=1e-12, atol=1e-12 * reach)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-12, atol=1e-14)


@FEW
@given(FLOWS, st.integers(2, 40), st.integers(0, 2**32), st.data())
def test_rows_do_not_know_each_other(flow: NICE, n: int, seed: int, data: st.DataObject) -> None:
    """log_prob of a row is the same in every batch and order."""
    x = rows(n, flow.n_features, seed)
    whole, order = flow.log_prob(x), np.random.default_rng(seed).permutation(n)
    cut = data.draw(st.integers(0, n))
    parts = np.concatenate([flow.log_prob(x[:cut]), flow.log_prob(x[cut:])])
    for other in (flow.log_prob(x[order])[np.argsort(order)], parts, [flow.log_prob(row) for row in x]):
        np.testing.assert_allclose(other, whole, rtol=1e-12, atol=1e-12)

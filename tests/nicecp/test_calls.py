"""Passes that a flow keeps: they follow its parameters, are never shared by two threads, and do not pile up."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from nicecp import calls
from nicecp.flow import NICE
from tests.nicecp.test_embedding import rows


def make(seed: int = 0) -> NICE:
    flow = NICE(5, (7, 6), 3, init="he", seed=seed, threads=1)
    flow._few = 0  # few rows are not scored one by one, but as many are
    return flow


def everything(flow: NICE, x: Any) -> list[Any]:
    return [flow.log_prob(x), flow.grad_log_prob(x), flow.forward(x)[0], flow.inverse(x)[0]]


def kept(flow: NICE) -> list[calls.Call]:
    return [call for spare in flow._calls._spare.values() for call in spare]


@pytest.mark.parametrize("n", [1, 2, 70])
def test_a_kept_pass_follows_the_parameters(n: int) -> None:
    flow, other, x = make(), make(1), rows(n, 5)
    everything(flow, x)
    before = kept(flow)
    assert len(before) == 4
    flow.set_parameters(other.parameters())
    for found, expected in zip(everything(flow, x), everything(other, x), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {id(call) for call in kept(flow)} == {id(call) for call in before}, "the passes were written down again"


def test_passes_of_one_row_and_of_many_agree() -> None:
    """One row goes through sums of its own instead of BLAS."""
    flow, x = make(), rows(40, 5)
    for whole, alone in zip(everything(flow, x), zip(*(everything(flow, row) for row in x), strict=True), strict=True):
        np.testing.assert_allclose(np.array(alone), whole, rtol=1e-12, atol=1e-13)


def test_two_threads_have_passes_of_their_own() -> None:
    flow = make()
    parts = [rows(3, 5, seed) for seed in range(4)]
    expected = [everything(flow, part) for part in parts]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(100):
            for found, one in zip(everything(flow, parts[number]), expected[number], strict=True):
                if not np.array_equal(found, one):
                    wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=300)
    assert wrong == []
    with flow._calls.borrow("density", 3) as one, flow._calls.borrow("density", 3) as two:
        assert one.ws is not two.ws


def test_passes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make()
    for n in range(1, 3 * calls.KEPT):
        flow.log_prob(rows(n, 5))
        assert 1 <= len(kept(flow)) <= calls.KEPT
    monkeypatch.setattr(calls, "KEPT_BYTES", {"cpu": 0})
    flow = make()
    flow.log_prob(rows(2, 5))
    assert kept(flow) == []


def test_a_pass_that_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make()

    def fail(self: Any, source: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(flow.backend), "copy_out", fail)
    with pytest.raises(MemoryError):
        flow.log_prob(rows(2, 5))
    assert kept(flow) == []

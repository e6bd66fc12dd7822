"""Rows of a small flow, scored a block at a time without BLAS."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp import native
from tests import gates
from tests.nicecp.test_point import CASES, D, make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [8, 16, 33, 1000])
@pytest.mark.slow
def test_blocks_of_rows_have_the_log_densities_of_the_oracle(case: str, n: int) -> None:
    flow, x, expected = make(**CASES[case])
    x, expected = np.resize(x, (n, x.shape[1])), np.resize(expected, n)
    tolerance = 5e-6 if flow.spec.dtype == "float32" else 1e-12
    points = native.Points(flow.spec, flow._views, flow.preprocessing)
    gates.assert_near(points.log_prob(x, None, None), expected, tolerance, "log_prob")
    np.testing.assert_array_equal(points.log_prob(np.asfortranarray(x), None, None), points.log_prob(x, None, None))


def test_more_rows_than_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x, expected = make()
    monkeypatch.setattr(native, "PART", 16)
    x, expected = np.resize(x, (100, D)), np.resize(expected, 100)
    np.testing.assert_allclose(flow.log_prob(np.asfortranarray(x)), expected, rtol=1e-12)


def test_rows_of_a_block_do_not_know_each_other() -> None:
    flow, x, _ = make(steps=gates.standardize(D), dtype="float32")
    x = np.resize(x, (70, D))
    expected = flow.log_prob(x)
    x[3, 1], x[40, 0], x[69, 4], x[68, 2] = np.nan, np.inf, -np.inf, 1e60
    found = flow.log_prob(x)
    np.testing.assert_array_equal(found[[3, 40, 69, 68]], [np.nan, -np.inf, -np.inf, -np.inf])
    fine = np.setdiff1d(np.arange(70), [3, 40, 69, 68])
    np.testing.assert_array_equal(found[fine], expected[fine])

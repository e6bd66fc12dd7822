"""Properties of small flows: log-determinants, dtypes, the order of rows (round trip, batches: test_embedding)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nicecp.flow import NICE
from tests.nicecp.test_embedding import FEW, FLOWS, rows


@FEW
@given(FLOWS, st.integers(0, 2**32))
def test_the_log_determinant_is_that_of_the_jacobian(flow: NICE, seed: int) -> None:
    """By central differences; away from the kinks of ReLU the map is linear, so that they are exact."""
    d = flow.n_features
    x = rows(1, d, seed)
    step = 1e-6
    ends = np.concatenate([x + step * np.eye(d), x - step * np.eye(d)])
    h, log_det = flow.forward(ends)
    jacobian = ((h[:d] - h[d:]) / (2 * step)).T
    sign, expected = np.linalg.slogdet(jacobian)
    assert sign == 1
    np.testing.assert_allclose(flow.forward(x)[1], expected, atol=1e-6)
    np.testing.assert_array_equal(log_det, np.full(2 * d, log_det[0]))  # NICE's does not depend on x


@FEW
@given(FLOWS, st.integers(1, 20), st.integers(0, 2**32))
def test_a_flow_of_single_precision_agrees_with_that_of_double(flow: NICE, n: int, seed: int) -> None:
    x = rows(n, flow.n_features, seed)
    twin = NICE.from_spec(
        replace(flow.spec, dtype="float32"),
        {name: value.astype(np.float32) for name, value in flow.parameters().items()},
        flow.preprocessing,
    )
    expected, found = flow.log_prob(x), twin.log_prob(x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(expected).max())))
    for kind in (np.float32, np.float64):
        np.testing.assert_allclose(
            flow.log_prob(x.astype(kind)), flow.log_prob(x.astype(kind).astype(float)), rtol=1e-12
        )


@FEW
@given(FLOWS, st.integers(2, 30), st.integers(0, 2**32))
def test_the_order_of_rows_is_that_of_the_results(flow: NICE, n: int, seed: int) -> None:
    x = rows(n, flow.n_features, seed)
    order = np.random.default_rng(seed).permutation(n)
    for call in (lambda part: flow.forward(part)[0], lambda part: flow.inverse(part)[0], flow.grad_log_prob):
        np.testing.assert_allclose(call(x[order]), call(x)[order], rtol=1e-10, atol=1e-10)

"""Training with a context: a known conditional, seeds, resuming, and data that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import AdaM, fit
from nicecp.checkpoint import load_run
from nicecp.data import DataSpec, open_splits
from nicecp.errors import DataError
from nicecp.flow import NICE
from nicecp.plan import cost_of_run
from nicecp.presets import resolve
from tests.gates import F64
from tests.nicecp.runs import StopAt, go_on, model_bytes, train

MAP = np.array([[1.0, 0.5], [-0.7, 0.2], [0.3, -0.4]])
FACTOR = np.array([[1.0, 0, 0], [0.5, 0.8, 0], [-0.3, 0.2, 0.6]])


def linear(n: int, seed: int = 0) -> tuple[F64, F64, F64]:
    """x ~ N(A c, L L^T), contexts c of other means and scales; and the log-density of each row : (n,)."""
    rng = np.random.default_rng(seed)
    c, noise = rng.normal(size=(n, 2)) * [1, 3] + [0, 5], rng.normal(size=(n, 3))
    log_prob = -0.5 * (noise**2 + np.log(2 * np.pi)).sum(axis=1) - np.log(np.diagonal(FACTOR)).sum()
    return c @ MAP.T + noise @ FACTOR.T, c, log_prob


def test_a_known_conditional_is_learned() -> None:
    """Mean, covariance and log-likelihood of p(x | c), at contexts that were not trained on.

    Measured: 0.005 nats off, means within 0.05, covariances within 0.1.
    """
    x, c, _ = linear(8000)
    flow = NICE(3, (32,), 4, "gaussian", coupling="affine", init="he", seed=1, n_context=2, threads=1)
    fit(flow, x, context=c, epochs=40, optimizer=AdaM(rate=5e-3), valid_fraction=0.1)
    assert flow.context is not None
    np.testing.assert_allclose(flow.context.mean, c.mean(axis=0), atol=0.1)
    test, given, log_prob = linear(4000, seed=1)
    assert (log_prob - flow.log_prob(test, given)).mean() < 0.03
    for at in ([0.0, 5.0], [1.0, 2.0]):
        drawn = flow.sample(20_000, 1, at)
        np.testing.assert_allclose(drawn.mean(axis=0), MAP @ at, atol=0.12)
        np.testing.assert_allclose(np.cov(drawn.T), FACTOR @ FACTOR.T, atol=0.2)
    alone = NICE(3, (32,), 4, "gaussian", coupling="affine", init="he", seed=1, threads=1)
    fit(alone, x, epochs=10, optimizer=AdaM(rate=5e-3))
    gain = flow.log_prob(test, given).mean() - alone.log_prob(test).mean()
    assert gain > 0.5, "the context is worth more than half a nat here"


def test_the_same_seed_gives_the_same_flow_and_a_flow_keeps_its_scale() -> None:
    x, c, _ = linear(600)

    def fitted() -> NICE:
        flow = NICE(3, (8,), 3, seed=2, n_context=2, context_names=["u", "v"], threads=1)
        fit(flow, x, context=c, epochs=2, seed=5)
        return flow

    first, second = fitted(), fitted()
    for name, value in first.parameters().items():
        assert np.array_equal(value, second.parameters()[name])
    before = first.context
    fit(first, x, context=10 * c, epochs=1)
    assert first.context is before, "parameters that have learned go with the scale that they learned with"


def test_a_constant_column_of_context_is_left_as_it_is() -> None:
    x, c, _ = linear(300)
    c[:, 1] = 1e6
    flow = NICE(3, (8,), 3, n_context=2, threads=1)
    fit(flow, x, context=c, epochs=1)
    assert flow.context is not None
    assert (flow.context.mean[1], flow.context.std[1]) == (1e6, 1.0)


def write(path: Path) -> str:
    x, c, _ = linear(600)
    with h5py.File(path, "w") as file:
        file["train"], file["ctx"] = x, c
        file["test"], file["ctx_test"] = x[:50], c[:50]
    return str(path)


@pytest.mark.parametrize("step", [3, 20])
def test_resumed_is_uninterrupted(tmp_path: Path, step: int) -> None:
    data = DataSpec(write(tmp_path / "t.h5"), "/ctx")
    train(data, tmp_path / "whole.h5")
    train(data, tmp_path / "part.h5", [StopAt(step, lambda trainer: trainer.request_stop())])
    outcome = go_on(tmp_path / "part.h5")
    assert outcome.finished
    assert model_bytes(tmp_path / "part.h5") == model_bytes(tmp_path / "whole.h5")
    flow, record = load_run(tmp_path / "part.h5")
    assert record is not None
    assert record.config["context"] == "/ctx"
    assert flow.n_context == 2
    assert outcome.test is not None


def test_data_with_another_context_are_refused(tmp_path: Path) -> None:
    x, c, _ = linear(300)
    flow = NICE(3, (8,), 3, n_context=2, context_names=["u", "v"], threads=1)
    for context, says in (
        (None, r"have no context, but the flow is conditioned on 2 numbers \(u, v\)"),
        (c[:, :1], "its context has 1 columns"),
        (c[:10], "context of 10 rows for 300 rows"),
    ):
        with pytest.raises(DataError, match=says):
            fit(flow, x, context=context, epochs=1)
    with pytest.raises(DataError, match="the flow has none"):
        fit(NICE(3, (8,), 3, threads=1), x, context=c, epochs=1)
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file["train"] = np.hstack([x, c])
        file["train"].attrs["columns"] = ["x", "y", "z", "u", "v"]
    with pytest.raises(DataError, match="its context is v, u, but the flow"):
        fit(flow, str(path), context="v,u", epochs=1)
    fit(flow, str(path), context="u,v", epochs=1)
    assert flow.names == ("x", "y", "z")


def test_contexts_and_weights_count_among_the_data_in_memory() -> None:
    """Here and on the device, 8 bytes for a number: the plan of a dry run, and limits on memory, need to know."""
    x, settings = np.zeros((600, 4)), resolve("x.h5", False, 1000)
    with open_splits(x) as plain, open_splits(DataSpec(x, np.ones((600, 2)), np.ones(600))) as whole:
        costs = [cost_of_run(settings, splits).data_bytes for splits in (plain, whole)]
    assert costs == [600 * 4 * 8, 600 * 4 * 8 + 2 * 600 * 8 * 3]


def test_the_code_in_the_documentation() -> None:
    """Every block of docs/conditional.md, one after the other."""
    page = Path(__file__).parents[2] / "docs" / "conditional.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(code) == 2
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, str(page), "exec"), names)
    assert names["samples"].shape == (1000, 3)
    assert np.abs(names["back"] - names["x"][:5]).max() < 1e-9
    assert names["record"].epoch == 5

"""Weights of rows: the split, statistics, losses and gradients, evaluation, and what is said about them."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nicecp import AdaM, fit
from nicecp.beside import Beside, effective_rows
from nicecp.data import column_stats, open_splits
from nicecp.data_spec import DataSpec
from nicecp.evaluate import evaluate
from nicecp.extras import FEW, fit_context
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.preprocessing import Dequantize
from nicecp.presented import mean_log_det
from nicecp.sources import ArraySource
from nicecp.split import Split, held_by_weight
from nicecp.train import TrainConfig, Trainer
from nicecp.transforms import Log
from nicecp.whitening import fit_approximate, moments
from tests import gates

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 3)) * [1, 2, 3] + [0, 1, 2]
COUNTS = RNG.integers(1, 5, 300)
WEIGHTS = RNG.exponential(size=3000)
WEIGHTS[::7] = 0
TABLE = RNG.normal(size=(3000, 2))


def new_flow(**options: Any) -> NICE:
    return NICE(3, (6,), 3, init="he", seed=1, threads=1, **options)


# --- the split ------------------------


@pytest.mark.parametrize("fraction", [Fraction(1, 6), Fraction(1, 2), 0.01])
def test_the_split_holds_the_fraction_of_the_weight(fraction: Any) -> None:
    source = Beside(ArraySource(TABLE), weight=WEIGHTS)
    rest, held = (Split.weighted(source, fraction, 3, member, Purpose.TRAIN_NOISE) for member in (False, True))
    assert sorted([*rest.rows(), *held.rows()]) == np.flatnonzero(WEIGHTS).tolist(), "rows of weight 0 in neither"
    share = WEIGHTS[held.rows()].sum() / WEIGHTS.sum()
    assert abs(share - float(fraction)) * WEIGHTS.sum() <= WEIGHTS.max() / 2 * (1 + 1e-12)
    assert len(rest) + len(held) == (WEIGHTS > 0).sum()
    for split in (rest, held):
        rows = np.concatenate([split.rows_of_block(block) for block in range(split.n_blocks)])
        assert np.array_equal(rows, split.rows())
        data, numbers = split.load()
        assert np.array_equal(data, TABLE[rows])
        assert np.array_equal(numbers, rows)
        assert split.weights is not None
        np.testing.assert_allclose(split.weights / split.weights[0], WEIGHTS[rows] / WEIGHTS[rows[0]], rtol=1e-14)
    assert held.describe()["weighted"] == 1


def test_other_weights_are_other_data_and_another_scale_is_not() -> None:
    """By this a run that goes on, and an evaluation, know the rows of the run again."""
    sources = [ArraySource(TABLE), *(Beside(ArraySource(TABLE), weight=w) for w in (WEIGHTS, 4 * WEIGHTS, WEIGHTS**2))]
    none, one, scaled, other = (source.fingerprint() for source in sources)
    assert one == scaled
    assert len({none, one, other}) == 3


def test_the_split_depends_on_the_seed_and_not_on_the_scale() -> None:
    def held(weights: Any, seed: int = 3) -> list[int]:
        source = Beside(ArraySource(TABLE), weight=weights)
        return Split.weighted(source, 1 / 6, seed, True, Purpose.VALID_NOISE).rows().tolist()

    first = held(WEIGHTS)
    assert held(WEIGHTS) == first
    assert held(WEIGHTS, 4) != first
    whole = np.tile([1, 2, 3], 1000)  # sums of which meet the share exactly
    for scale in (1 / 3, 1e-200, 7.3, 1e200):
        assert held(WEIGHTS * scale) == first
        assert held(whole * scale) == held(whole)
    # In random order: heavy rows are held out as often as light ones.
    rows, heavy = np.array(held(whole)), np.arange(3000) % 3 == 2
    assert 0.25 < heavy[rows].mean() < 0.42


def test_how_many_rows_come_nearest() -> None:
    assert held_by_weight(np.ones(12), Fraction(1, 6)) == 2
    assert held_by_weight(np.ones(10), Fraction(1, 6)) == 2, "1.67 of them"
    assert held_by_weight(np.ones(10), Fraction(0)) == 0
    assert held_by_weight(np.array([0.9, 0.05, 0.05]), Fraction(1, 6)) == 0
    assert held_by_weight(np.array([0.05, 0.9, 0.05]), Fraction(1, 6)) == 1
    assert held_by_weight(np.array([0.3, 0.7]), Fraction(1, 6)) == 1


def test_the_last_images_validate_by_weight() -> None:
    images = np.random.default_rng(1).integers(0, 256, (60, 4), dtype=np.uint8)
    weights = np.ones(60)
    weights[:30], weights[5] = 3, 0
    with open_splits(DataSpec(images, weights=weights), 1 / 4) as splits:
        assert splits.valid is not None
        assert splits.valid.rows().tolist() == list(range(31, 60)), "29 of 117, and not 15 rows"
        assert splits.train.rows().tolist() == [row for row in range(31) if row != 5]
    with open_splits(DataSpec(images, weights=np.where(np.arange(60) == 59, 1.0, 0.0)), 1 / 4) as splits:
        assert splits.valid is None, "one row cannot do both"
        assert splits.train.rows().tolist() == [59]


def test_the_head_of_a_split() -> None:
    source = Beside(ArraySource(TABLE), weight=WEIGHTS)
    split = Split.weighted(source, 1 / 3, 1, False, Purpose.TRAIN_NOISE)
    assert split.head(1).rows().tolist() == split.rows_of_block(0).tolist()
    assert len(split.head(3000)) == len(split)


# --- statistics ------------------------


def weighted_and_repeated() -> tuple[Split, Split]:
    weighted = Beside(ArraySource(X), weight=COUNTS)
    repeated = ArraySource(np.repeat(X, COUNTS, axis=0))
    return (Split.contiguous(weighted, 0, 300, Purpose.TRAIN_NOISE),
            Split.contiguous(repeated, 0, repeated.n_rows, Purpose.TRAIN_NOISE))  # fmt: skip


def test_statistics_are_those_of_repeated_rows() -> None:
    weighted, repeated = weighted_and_repeated()
    ours, theirs = column_stats(weighted), column_stats(repeated)
    for name in ("mean", "std", "low", "high"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-13)
    for got, expected in zip(moments(weighted), moments(repeated), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    big = Beside(ArraySource(TABLE), weight=WEIGHTS)
    stats = column_stats(Split.contiguous(big, 0, 3000, Purpose.TRAIN_NOISE))
    mean = np.average(TABLE, axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(stats.std**2, np.average((TABLE - mean) ** 2, axis=0, weights=WEIGHTS), rtol=1e-12)
    assert stats.count == (WEIGHTS > 0).sum()


def test_the_scale_of_a_context_is_that_of_repeated_rows() -> None:
    context = np.random.default_rng(7).normal(size=(300, 2)) * [1, 30]
    context[:, 0] += COUNTS  # heavy rows are not like the others
    found = [
        fit_context(Split.contiguous(source, 0, source.n_rows, Purpose.TRAIN_NOISE))
        for source in (
            Beside(ArraySource(X), context, COUNTS),
            Beside(ArraySource(np.repeat(X, COUNTS, axis=0)), np.repeat(context, COUNTS, axis=0)),
        )
    ]
    for name in ("mean", "std"):
        np.testing.assert_allclose(getattr(found[0], name), getattr(found[1], name), rtol=1e-12)


def test_log_determinants_of_transforms_are_averaged_by_weight() -> None:
    """What the training likelihood of a flow behind transforms has in it beside the network's part."""
    steps = (Log(np.array([0]), np.array([-9.0])),)
    weighted, repeated = (mean_log_det(split, steps, 0) for split in weighted_and_repeated())
    expected = np.average(-np.log(X[:, 0] + 9), weights=COUNTS)
    assert [weighted, repeated] == pytest.approx([expected, expected], rel=1e-12)
    assert abs(expected + np.log(X[:, 0] + 9).mean()) > 1e-4


def test_a_learned_whitening_is_that_of_repeated_rows(one_backend: Any) -> None:
    """To the accuracy of stochastic descent, which unweighted rows are far from."""
    mixed = X @ np.array([[1, 0.9, 0], [0, 1, 0.5], [0, 0, 1]])
    weights = np.where(mixed[:, 0] > 0, 10.0, 1.0)
    split = Split.contiguous(Beside(ArraySource(mixed), weight=weights), 0, 300, Purpose.TRAIN_NOISE)
    plain = Split.contiguous(ArraySource(mixed), 0, 300, Purpose.TRAIN_NOISE)
    step, other = (fit_approximate(one, backend=one_backend, epochs=60, batch_size=100).step for one in (split, plain))
    mean, covariance = moments(split)

    def gap(step: Any) -> float:
        return float(np.abs(step.lower @ covariance @ step.lower.T - np.eye(3)).max()
                     + np.abs(step.lower @ mean + step.bias).max())  # fmt: skip

    assert gap(step) < 0.3 < gap(other)


# --- losses and gradients ------------------------


def test_integer_weights_are_repeated_rows() -> None:
    flow, _ = gates.make_flow(gates.make_spec(3, [(5,), (4,), (5,)], laws=("affine", "additive")))
    x = X[:40]
    loss, gradients = flow.loss_and_gradients(x, sample_weight=COUNTS[:40])
    expected_loss, expected = flow.loss_and_gradients(np.repeat(x, COUNTS[:40], axis=0))
    assert loss == pytest.approx(expected_loss, rel=1e-13)
    for name, value in expected.items():
        gates.assert_near(gradients[name], value, 1e-12, name)
    unweighted = flow.loss_and_gradients(x)[1]
    assert any(
        np.linalg.norm(unweighted[name] - value) > 1e-3 * np.linalg.norm(value) for name, value in expected.items()
    )


@pytest.mark.parametrize("scale", [2.0**40, 1 / 3])
def test_the_scale_of_weights_does_nothing(scale: float) -> None:
    flow, _ = gates.make_flow(gates.make_spec(3, [(5,), (4,), (5,)]))
    loss, gradients = flow.loss_and_gradients(X, sample_weight=COUNTS)
    again, others = flow.loss_and_gradients(X, sample_weight=COUNTS * scale)
    assert again == pytest.approx(loss, rel=1e-13)
    for name, value in gradients.items():
        gates.assert_near(others[name], value, 1e-12, name)
    runs = []
    for weights in (COUNTS * 1.0, COUNTS * scale):
        fitted = new_flow()
        record = fit(fitted, X, sample_weight=weights, epochs=3, batch_size=32, valid_fraction=0.2)
        runs.append((fitted.parameters(), record.best_valid_log_likelihood))
    exact = scale == 2.0**40
    assert runs[1][1] == pytest.approx(runs[0][1], rel=0 if exact else 1e-12, abs=0)
    for name, value in runs[0][0].items():
        if exact:
            assert np.array_equal(runs[1][0][name], value), "a power of two changes no bit"
        else:
            np.testing.assert_allclose(runs[1][0][name], value, rtol=1e-10, atol=1e-12)


def test_full_batches_train_as_repeated_rows_do() -> None:
    """One batch for all: the same steps, but for the order of sums."""
    results = []
    for split in weighted_and_repeated():
        flow = new_flow()
        Trainer(flow, split, None, TrainConfig(epochs=5, batch_size=len(split), optimizer=AdaM(rate=1e-2))).run()
        results.append(flow.parameters())
    fresh = new_flow().parameters()
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=1e-9, atol=1e-11)
    assert max(np.abs(results[0][name] - fresh[name]).max() for name in fresh) > 1e-2


def test_rows_of_weight_0_are_as_good_as_not_there() -> None:
    junk = np.full((100, 3), 1e300)
    junk[:, 1] *= RNG.random(100)
    runs = []
    for data, weights in ((X, COUNTS), (np.vstack([X, junk]), np.concatenate([COUNTS, np.zeros(100, int)]))):
        flow = new_flow()
        record = fit(flow, data, sample_weight=weights, epochs=3, batch_size=32, seed=2)
        runs.append((flow.parameters(), record.history[-1].train_log_likelihood, record.best_valid_log_likelihood))
    assert runs[0][1:] == runs[1][1:]
    for name, value in runs[0][0].items():
        assert np.array_equal(runs[1][0][name], value)


def test_weights_change_what_is_learned() -> None:
    """The weighted sample's mean, not the sample's."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4000, 2))
    weights = np.exp(1.5 * x[:, 0] - 1.5**2 / 2)  # of N((1.5, 0), 1)
    flow = NICE(2, (16,), 4, "gaussian", init="he", seed=1, threads=1)
    fit(flow, x, sample_weight=weights, epochs=30, optimizer=AdaM(rate=3e-3))
    mean = flow.sample(20_000, 1).mean(axis=0)
    np.testing.assert_allclose(mean, [1.5, 0], atol=0.15)


# --- evaluation ------------------------


@pytest.mark.parametrize("eight_bit", [False, True])
def test_evaluation_is_weighted(eight_bit: bool) -> None:
    """1500 rows: the last batch is padded."""
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 256, (1500, 3), dtype=np.uint8) if eight_bit else rng.normal(size=(1500, 3))
    weights = rng.exponential(size=1500)
    weights[3] = 0
    flow = NICE.from_spec(new_flow().spec, None, (Dequantize(),) if eight_bit else (), init="he", seed=3)
    plain = Split.contiguous(ArraySource(rows), 0, 1500, Purpose.TEST_NOISE)
    from nicecp.evaluate import Evaluator

    values = Evaluator(flow, plain).row_log_probs(flow._views, 0, 0)
    got = evaluate(flow, Split.contiguous(Beside(ArraySource(rows), weight=weights), 0, 1500, Purpose.TEST_NOISE))
    used = weights > 0
    mean = np.average(values, weights=weights)
    assert got.rows == 1499
    assert got.mean == pytest.approx(mean, rel=1e-12)
    assert got.minimum == values[used].min()
    w, gap = weights[used], values[used] - mean
    assert got.standard_error == pytest.approx(np.sqrt(1499 / 1498 * ((w * gap) ** 2).sum()) / w.sum(), rel=1e-12)
    assert got.effective_rows == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-12)
    assert (got.bits_per_dim is not None) == eight_bit
    same = evaluate(flow, Split.contiguous(Beside(ArraySource(rows), weight=np.full(1500, 5.0)), 0, 1500, 2))
    alone = evaluate(flow, plain)
    assert same.mean == pytest.approx(alone.mean, rel=1e-13)
    assert same.standard_error == pytest.approx(alone.standard_error, rel=1e-12)
    assert alone.effective_rows is None


def test_the_history_s_means_are_weighted() -> None:
    """One batch a epoch and a rate of next to nothing: the epoch's mean is the evaluation's."""
    weights = np.linspace(1, 9, 300)
    flow = new_flow()
    record = fit(flow, X, sample_weight=weights, epochs=1, batch_size=240, valid_fraction=0.2,
                 optimizer=AdaM(rate=1e-300))  # fmt: skip
    with open_splits(DataSpec(X, weights=weights), 0.2) as splits:
        assert splits.valid is not None
        assert record.best_valid_log_likelihood == pytest.approx(evaluate(flow, splits.valid).mean, rel=1e-12)


# --- what is said ------------------------


def test_few_effective_rows_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nicecp")
    few = np.where(np.arange(300) < 5, 1.0, 1e-9)
    flow = new_flow()
    record = fit(flow, X, sample_weight=few, epochs=1, batch_size=16)
    said = [event.message for event in record.events if event.kind == "weights"]
    assert len(said) == 1
    assert "Kish's effective sample size" in said[0]
    assert f"few beside {flow.n_parameters:,} parameters" in said[0]
    assert said[0] in caplog.text
    caplog.clear()
    assert effective_rows(COUNTS.astype(float)) > FEW * flow.n_parameters
    record = fit(new_flow(), X, sample_weight=COUNTS, epochs=1, batch_size=16)
    assert not [event for event in record.events if event.kind == "weights"]
    assert not caplog.text

"""Several ranks: their training is one rank's to rounding, and what they decide they decide together."""

from __future__ import annotations

import itertools
import logging
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import fit, ranks
from nicecp.beside import DataSpec
from nicecp.checkpoint import load_run, load_state, state_path
from nicecp.errors import DataError, TrainingError
from nicecp.evaluate import Evaluator
from nicecp.flow import CHUNK, NICE
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Purpose, Slot
from nicecp.optimizers import AdaM, RMSProp
from nicecp.parallel import ALONE, Communicator
from nicecp.params import Layout, Range
from nicecp.plan import time_steps
from nicecp.preprocessing import Dequantize
from nicecp.run import Run
from nicecp.samples import draw
from nicecp.score_file import row_scores
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import Callback, TrainConfig, Trainer
from tests import gates
from tests.nicecp.crews import Member, together
from tests.nicecp.runs import SMALL, StopAt, go_on, train, write_table

TABLE = np.random.default_rng(4).normal(size=(700, 5))
BYTES = np.random.default_rng(3).integers(0, 256, (700, 5), np.uint8)
STEPS = 50
# Relative norm of the parameters after 50 float64 steps; measured: below 2e-16.
EQUAL = 1e-12


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sums in a step, although the flows are small."""
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 400)
    monkeypatch.setattr(ranks.buckets_of, "__defaults__", (400,))


def trainer_of(communicator: Communicator, data: Any = TABLE, threads: int = 1, **config: Any) -> Trainer:
    laws, orders = ("additive", "affine", "multiplicative"), {2: (3, 0, 1, 4, 2)}
    spec = gates.make_spec(5, [(6, 5), (4,), (), (3,)], laws=laws, orders=orders)
    steps = (Dequantize(-1, 1),) if data.dtype == np.uint8 else ()
    flow = NICE.from_spec(spec, gates.draw_parameters(spec), steps, backend=get_backend("cpu", threads))
    split = Split.contiguous(ArraySource(data), 0, 600, Purpose.TRAIN_NOISE)
    valid = Split.contiguous(ArraySource(data), 600, len(data), Purpose.VALID_NOISE)
    settings = {"batch_size": 24, "seed": 5, "optimizer": AdaM(rate=3e-3)} | config
    return Trainer(flow, split, valid, TrainConfig(**settings), communicator=communicator)


def after(communicator: Communicator, steps: int, **given: Any) -> tuple[Any, Any]:
    """(parameters, state) after so many steps."""
    trainer = trainer_of(communicator, **given)
    with trainer.backend.computing():
        for _ in range(steps):
            trainer.step()
    return trainer.p.copy(), trainer.state.copy()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("activations", ["store", "recompute"])
@pytest.mark.parametrize(("data", "optimizer"), [(TABLE, AdaM(rate=3e-3)), (BYTES, RMSProp(rate=1e-3))])
def test_fifty_steps_are_those_of_one_rank(data: Any, optimizer: Any, activations: str, size: int) -> None:
    given = {"data": data, "optimizer": optimizer, "activations": activations}
    alone, state = after(ALONE, STEPS, **given)
    start = after(ALONE, 0, **given)[0]
    assert np.linalg.norm(alone - start) > 0.01 * np.linalg.norm(start)
    crew = together(size, lambda rank: after(rank, STEPS, **given))
    for parameters, other in crew:
        gates.assert_near(parameters, alone, EQUAL, "parameters")
        np.testing.assert_array_equal(parameters, crew[0][0])
        gates.assert_near(other, state, EQUAL, "the state")
        np.testing.assert_array_equal(other, crew[0][1])


def test_two_threads_in_every_rank() -> None:
    alone = after(ALONE, 5, threads=2)[0]
    for parameters, _ in together(2, lambda rank: after(rank, 5, threads=2)):
        gates.assert_near(parameters, alone, EQUAL, "parameters")


def test_whole_runs_end_alike(caplog: pytest.LogCaptureFixture) -> None:
    """Epochs, validation, the best model; every epoch's checksum is in the log."""
    one = trainer_of(ALONE, epochs=3)
    one.run()

    def run(rank: Member) -> Trainer:
        trainer = trainer_of(rank, epochs=3)
        trainer.run()
        return trainer

    with caplog.at_level(logging.INFO, "nicecp"):
        crew = together(2, run)
    sums = [record.message for record in caplog.records if "checksum" in record.message]
    assert len(sums) == 6
    assert len(set(sums)) == 3
    for trainer in crew:
        gates.assert_near(trainer.p, one.p, EQUAL, "parameters")
        assert trainer.record.best_epoch == one.record.best_epoch
        for mine, its in zip(trainer.record.history, one.record.history, strict=True):
            assert mine.train_log_likelihood == pytest.approx(its.train_log_likelihood, rel=EQUAL)
            assert mine.valid_log_likelihood == pytest.approx(its.valid_log_likelihood, rel=EQUAL)


def test_ranks_that_differ_are_noticed() -> None:
    class Flip(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.communicator.rank == 1 and trainer.position == 3:
                trainer.p[7] = np.nextafter(trainer.p[7], 1)

    def run(rank: Member) -> None:
        trainer = trainer_of(rank, epochs=2)
        trainer.callbacks = [Flip()]
        trainer.run()

    with pytest.raises(TrainingError, match="rank 1 does not hold the same parameters as rank 0"):
        together(2, run)


def test_a_bad_loss_on_one_rank_is_everybodys() -> None:
    """A row that overflows is one rank's; all skip that step, and their parameters stay alike."""
    data = TABLE.copy()
    data[17] = 1e308

    def run(communicator: Communicator) -> Trainer:
        trainer = trainer_of(communicator, data=data, epochs=2)
        with np.errstate(all="ignore"):
            trainer.run()
        return trainer

    one = run(ALONE)
    assert one.state[Slot.SKIPPED] == 2
    for trainer in together(3, run):
        assert trainer.record.events == one.record.events
        assert trainer.state[Slot.SKIPPED] == 2
        gates.assert_near(trainer.p, one.p, EQUAL, "parameters")


def test_sums_are_begun_before_the_backward_pass_is_over() -> None:
    def run(rank: Member, prompt: bool) -> tuple[Member, bytes]:
        rank.prompt, trainer = prompt, trainer_of(rank)
        trainer.step()
        return rank, trainer.p.tobytes()

    late, prompt = (together(2, partial(run, prompt=prompt)) for prompt in (False, True))
    assert {bits for _, bits in late} == {bits for _, bits in prompt}, "updates begin with the first sum that is done"
    for member, _ in [*late, *prompt]:
        assert member.sums[0] == 2 * 24 + 2  # log-densities, weights, requests to stop
        assert len(member.sums) == 1 + 4, "one for every coupling"
        assert member.polls == 4, "the oldest sum is looked at after every part of the backward pass"


# --- shares -----------------------------------------------------------------------------------------------------------


def test_buckets_cover_the_flat_buffer_once() -> None:
    layout = Layout(gates.make_spec(6, [(9, 9), (), (3,), (20, 20), (2,)]))
    for least in (1, 500, 1000, 3000, 10**6):
        buckets = ranks.buckets_of(layout, 8, least)
        assert [k for b in buckets for k in range(b.last, b.first - 1, -1)] == [4, 3, 2, 1, 0]
        assert buckets[0].range.offset + buckets[0].range.size == layout.size
        assert buckets[-1].range.offset == 0
        for above, below in itertools.pairwise(buckets):
            assert below.range.offset + below.range.size == above.range.offset
            assert above.range.offset == layout.couplings[above.first].offset
            assert above.range.size * 8 >= least
    assert len(ranks.buckets_of(layout, 8, 1)) == 5
    assert ranks.buckets_of(layout, 8, 10**9) == [ranks.Bucket(0, 4, Range(0, layout.size))]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_rows_of_a_batch_are_shared_evenly(size: int) -> None:
    shares = together(size, lambda rank: ranks.own_rows(7, rank))
    assert [row for share in shares for row in share] == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_rows() -> None:
    with pytest.raises(ValueError, match=r"^3 ranks are more than the 2 rows of a batch: use at most 2"):
        together(3, lambda rank: trainer_of(rank, batch_size=2))


@pytest.mark.parametrize("batch", [7, 64, 100, 1000])
@pytest.mark.parametrize("size", [2, 3])
def test_scoring_is_shared(batch: int, size: int) -> None:
    """The same bits as by one rank, on all ranks."""

    def score(communicator: Communicator) -> Any:
        trainer = trainer_of(communicator, BYTES)
        evaluator = Evaluator(trainer.flow, trainer.train_split, batch, communicator)
        return evaluator.row_log_probs(trainer.views, 3, 1), evaluator.row_log_probs(trainer.views, 3, 2)

    one = score(ALONE)
    assert np.isfinite(one).all()
    assert (one[0] != one[1]).all()
    for other in together(size, score):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("n", [1, CHUNK, 2 * CHUNK + 5])
def test_drawing_is_shared(n: int) -> None:
    def rows(communicator: Communicator) -> Any:
        return draw(trainer_of(communicator).flow, n, 11, None, communicator)

    first, *others = together(3, rows)
    np.testing.assert_array_equal(first, trainer_of(ALONE).flow.sample(n, 11))
    assert others == [None, None]


# --- runs -------------------------------------------------------------------------------------------------------------


def shared_run(
    data: str, out: Path, size: int, callbacks: dict[int, Callback] | None = None, **given: Any
) -> list[Any]:
    """train of tests.nicecp.runs by so many ranks; callbacks by rank."""

    def run(rank: Member) -> Any:
        mine = (callbacks or {}).get(rank.rank)
        with Run.start(data, out, **{**SMALL, "epochs": 3, "communicator": rank}) as run:
            return run.execute([] if mine is None else [mine])

    return together(size, run)


def test_rank_0_writes_what_one_rank_would(tmp_path: Path) -> None:
    data = write_table(tmp_path / "table.h5")
    one, several = tmp_path / "one.h5", tmp_path / "several.h5"
    alone = train(data, one)
    outcomes = shared_run(data, several, 2)
    for outcome in outcomes:
        assert outcome.finished
        for part in ("train", "valid", "test"):
            assert getattr(outcome, part).mean == pytest.approx(getattr(alone, part).mean, rel=1e-10)
    flow, record = load_run(several)
    gates.assert_near(flow.flat, load_run(one)[0].flat.astype(float), 1e-10, "parameters")
    assert record is not None
    assert record.versions["ranks"] == "2"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("asker", [0, 1])
def test_one_rank_is_asked_to_stop_and_all_do(tmp_path: Path, asker: int) -> None:
    """And the run goes on with other numbers of ranks."""
    data, whole, out = write_table(tmp_path / "table.h5"), tmp_path / "whole.h5", tmp_path / "run.h5"
    train(data, whole)
    stop = StopAt(20, lambda trainer: trainer.request_stop(signal.SIGTERM))
    outcomes = shared_run(data, out, 2, {asker: stop})
    assert [(outcome.finished, outcome.stopped_by) for outcome in outcomes] == [(False, signal.SIGTERM)] * 2
    assert int(load_state(state_path(out))[2].state[Slot.STEP]) == 21, "after the step in which all heard of it"

    def resume(rank: Member) -> Any:
        with Run.resume(out, communicator=rank) as run:
            return run.execute([StopAt(5, Trainer.request_stop)])

    assert [outcome.finished for outcome in together(3, resume)] == [False] * 3
    assert go_on(out).finished
    gates.assert_near(load_run(out)[0].flat, load_run(whole)[0].flat.astype(float), 1e-10, "parameters")
    events = [event.message for event in load_run(out)[1].events if event.kind == "resumed"]  # type: ignore[union-attr]
    assert [("ranks 2 -> 3" in event, "ranks 3 -> 1" in event) for event in events] == [(True, False), (False, True)]


def test_a_signal_before_the_first_step_has_its_number_on_all_ranks(tmp_path: Path) -> None:
    """It comes when the trainer is there and its loop has not begun, on a rank that does not report."""

    def run(rank: Member) -> Any:
        with Run.start(
            write_table(tmp_path / f"{rank.rank}.h5"), tmp_path / "run.h5", **SMALL, communicator=rank
        ) as run:
            if rank.rank == 1:
                run.stopped_by = int(signal.SIGTERM)
            return run.execute()

    outcomes = together(2, run)
    assert [(outcome.finished, outcome.stopped_by) for outcome in outcomes] == [(False, signal.SIGTERM)] * 2


def test_what_rank_0_finds_wrong_all_raise(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(500, 4))
    data[:, 2] = 1

    def run(rank: Member) -> str:
        with pytest.raises(DataError, match="constant") as caught:
            Run.start(data, tmp_path / "run.h5", threads=1, communicator=rank)
        return str(caught.value)

    assert len(set(together(2, run))) == 1
    assert list(tmp_path.iterdir()) == []


def test_fit_with_ranks() -> None:
    def fitted(communicator: Communicator) -> Any:
        flow = NICE(5, (6,), 3, seed=1, threads=1)
        record = fit(flow, TABLE, epochs=2, communicator=communicator)
        return flow.flat.copy(), record.history[-1].valid_log_likelihood

    one = fitted(ALONE)
    for flat, valid in together(2, fitted):
        gates.assert_near(flat, one[0], EQUAL, "parameters")
        assert math.isclose(valid, one[1], rel_tol=EQUAL)


def test_a_plan_makes_the_same_steps_on_all_ranks() -> None:
    def steps(rank: Member) -> int:
        trainer = trainer_of(rank)
        time_steps(trainer, seconds=0.05 * rank.rank)
        return int(trainer.state[Slot.STEP])

    assert together(3, steps) == [4, 4, 4]


def test_ranks_score_in_rounds() -> None:
    """In blocks of which there are not as many as a multiple of the ranks."""
    flow = trainer_of(ALONE).flow
    source, step = ArraySource(TABLE[:, :5]), 130

    def blocks(communicator: Communicator) -> list[tuple[int, Any]]:
        return list(row_scores(flow, source, 0, communicator=communicator, step=step))

    one = np.concatenate([values for _, values in blocks(ALONE)])
    first, *others = together(4, blocks)
    assert [start for start, _ in first] == [0, 4 * step]
    np.testing.assert_array_equal(np.concatenate([values for _, values in first]), one)
    assert others == [[], [], []]


def test_weighted_rows_with_a_context(tmp_path: Path) -> None:
    """A rank's rows bring their own context, and the loss is the mean over the weights of all ranks' rows."""
    rng = np.random.default_rng(6)
    with h5py.File(tmp_path / "table.h5", "w") as file:
        file["train"] = rng.normal(size=(600, 4))
        file["weight"], file["given"] = rng.uniform(0.1, 3, 600), rng.normal(size=(600, 2))
    spec = DataSpec(str(tmp_path / "table.h5"), "/given", "/weight")

    def run(communicator: Communicator) -> Any:
        path = tmp_path / f"run{communicator.size}.h5"
        with Run.start(spec, path, **{**SMALL, "epochs": 2, "communicator": communicator}) as run:
            outcome = run.execute()
            flow = run.trainer.flow
            drawn = draw(flow, 2 * CHUNK + 1, 3, rng_context, communicator)
            return flow.flat.copy(), outcome.valid.mean, drawn

    rng_context = rng.normal(size=(2 * CHUNK + 1, 2))
    flat, valid, drawn = run(ALONE)
    for rank, (its, mean, rows) in enumerate(together(2, run)):
        gates.assert_near(its, flat, EQUAL, "parameters")
        assert mean == pytest.approx(valid, rel=EQUAL)
        assert (rows is None) == (rank > 0)
        if rows is not None:
            np.testing.assert_allclose(rows, drawn, rtol=1e-9)

"""A limit on memory: fewer rows are kept, the process stays below it, and what cannot fit is said in one line."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import pytest

from nicecp.cli.options import byte_size
from nicecp.evaluate import BATCH, READ_ROWS
from nicecp.flow import NICE
from nicecp.memory import RESERVE, Rows, resident_bytes, rows_within
from nicecp.plan import Cost
from nicecp.run import Run
from nicecp.score_file import score_file
from nicecp.scoring import score
from nicecp.split import BLOCK, SHUFFLE_WINDOW
from tests.nicecp.crews import Member, together
from tests.nicecp.runs import SMALL, model_bytes, train, write_table

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
COST = Cost(n_parameters=1000, flops=1, parameter_bytes=40_000, buffer_bytes=10_000, data_bytes=0)
FEATURES, ROWS = 256, 60_000  # 59 MiB of float32


def test_more_memory_is_more_rows() -> None:
    before = Rows(0, 0)
    for limit in (280 * MIB, 400 * MIB, 1000 * MIB, 3000 * MIB, 10**12):
        rows = rows_within(limit, 100 * MIB, COST, 200, 4096)
        assert before.window < rows.window or before == Rows(SHUFFLE_WINDOW, READ_ROWS) or limit == 10**12
        assert BATCH <= before.scored <= rows.scored or before.scored == 0
        kept = 2 * (rows.window + 4 * 200) * 4096 + 2 * rows.scored * 4096
        assert 100 * MIB + RESERVE + kept < limit
        before = rows
    assert before == Rows(SHUFFLE_WINDOW, READ_ROWS)


def test_page_locked_memory_leaves_fewer_rows() -> None:
    """And the message about a limit that is too small says what lowers it."""
    pinned = replace(COST, pinned_bytes=300 * MIB)
    rows = [rows_within(1000 * MIB, 100 * MIB, cost, 200, 4096) for cost in (COST, pinned)]
    assert rows[0] == rows_within(1300 * MIB, 100 * MIB, pinned, 200, 4096)
    assert rows[1].window < rows[0].window
    with pytest.raises(ValueError, match=r"of 200 rows and 300.0 MiB of page-locked memory \(--device-memory-limit\)"):
        rows_within(400 * MIB, 100 * MIB, pinned, 200, 4096)


@pytest.mark.parametrize("batch", [10, 5000])
def test_the_least_limit_is_the_one_that_is_named(batch: int) -> None:
    with pytest.raises(ValueError, match=f"least .* MiB for this model and a batch of {batch} r"):
        rows_within(10 * MIB, 100 * MIB, COST, batch, 4096)
    low, high = 100 * MIB, 10_000 * MIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            rows_within(middle, 100 * MIB, COST, batch, 4096)
            high = middle
        except ValueError:
            low = middle
    assert rows_within(high, 100 * MIB, COST, batch, 4096).window == max(batch, BLOCK)


def test_a_process_knows_its_size() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 50 * MIB) as block:  # fresh pages: an array may get memory that was freed before
        np.frombuffer(block, np.uint8)[...] = 1
        assert 45 * MIB < resident_bytes() - before < 60 * MIB
    assert 30 * MIB < before < 4000 * MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 2**32),
        ("4g", 2**32),
        ("500MB", 500_000_000),
        ("1.5 k", 1536),
        ("2TiB", 2**41),
        ("123", 123),
        ("64b", 64),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert byte_size(text) == expected


@pytest.mark.parametrize("text", ["", "4 G B", "GiB", "-1", "0", "1e9", "4iB", "9999999TB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size such as 4GiB"):
        byte_size(text)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_limit_chooses_the_window_and_resuming_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_table(tmp_path / "table.h5", rows=6000), tmp_path / "run.h5"
    given = {**SMALL, "preset": "tabular"}  # at a constant rate, so that a run can be extended to the same bits
    monkeypatch.setattr("nicecp.memory.resident_bytes", lambda: 100 * MIB)
    least = 2**62
    with pytest.raises(ValueError, match=r"^memory_limit must be at least"):
        Run.start(data, out, **given, memory_limit=100 * MIB)
    assert list(tmp_path.iterdir()) == [tmp_path / "table.h5"]
    for limit in range(220 * MIB, 280 * MIB, 2**16):
        try:
            with Run.start(data, None, **given, memory_limit=limit) as run:
                least, limit = limit, limit + 2**18
                assert run.settings.window == run.trainer.reader.window == run.trainer.config.window
                assert BLOCK <= run.settings.window < 5000
                assert not run.trainer.reader.resident
            break
        except ValueError:
            continue
    train(data, out, epochs=2, preset="tabular", memory_limit=limit)
    with Run.resume(out, epochs=3) as run:
        assert BLOCK < run.settings.window < 5000
        run.execute()
    with pytest.raises(ValueError, match=r"^memory_limit must be at least .* for the run's windows of"):
        Run.resume(out, epochs=4, memory_limit=least)
    train(data, tmp_path / "whole.h5", epochs=3, preset="tabular", memory_limit=limit)
    assert model_bytes(out) == model_bytes(tmp_path / "whole.h5")
    train(data, tmp_path / "plain.h5", epochs=3, preset="tabular")
    assert model_bytes(out) != model_bytes(tmp_path / "plain.h5"), "rows are shuffled in smaller windows"
    plain = score(tmp_path / "plain.h5", data, "train")
    limited = score(tmp_path / "plain.h5", data, "train", memory_limit=limit)
    assert replace(limited, evaluation=plain.evaluation) == plain
    assert limited.evaluation == plain.evaluation
    with pytest.raises(ValueError, match=r"^memory_limit must be at least .* for this flow"):
        score(tmp_path / "plain.h5", data, "train", memory_limit=100 * MIB)


CHILD = """
import sys
from nicecp.cli.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
found = [next(line for line in lines if line.startswith(name)).split()[1] for name in ("VmHWM:", "VmPeak:")]
print("peak", *found)
sys.exit(code)
"""


def child(words: list[str], folder: Path, address_space: int | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which may have so many bytes of address space (RLIMIT_AS)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *words]
    limit = None
    if address_space is not None:
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, (address_space, address_space))
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=limit
    )


def peaks_of(words: list[str], folder: Path, address_space: int | None = None) -> tuple[int, int]:
    """Peaks of resident memory and of address space, bytes."""
    done = child(words, folder, address_space)
    assert done.returncode == 0, done.stderr
    resident, space = done.stdout.rpartition("peak ")[2].split()
    return 1024 * int(resident), 1024 * int(space)


def write_rows(path: Path, factor: int) -> None:
    """A file of so many times the same rows."""
    with h5py.File(path, "w") as file:
        rows = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
        dataset = file.create_dataset("train", (factor * ROWS, FEATURES), np.float32)
        for i in range(factor):
            dataset[i * ROWS : (i + 1) * ROWS] = rows


OPTIONS = [
    *("--preset", "tabular", "--transform", "none", "--hidden", "16", "--couplings", "3", "--epochs", "2"),
    *("--threads", "1", "--valid-fraction", "0.1"),
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the peak of one process")
def test_a_process_stays_below_its_limit(tmp_path: Path) -> None:
    """Data of one, two and four times the memory left for them."""
    limit = 300 * MIB
    peaks: dict[str, list[int]] = {"train": [], "evaluate": []}
    for factor in (1, 2, 4):
        name = f"rows{factor}.h5"
        write_rows(tmp_path / name, factor)
        bound = ["--data", name, "--memory-limit", "300MiB"]
        peaks_of(["train", *bound, "--out", "warm.h5", "--overwrite", *OPTIONS], tmp_path)  # compiles
        peaks["train"].append(peaks_of(["train", *bound, "--out", f"run{factor}.h5", *OPTIONS], tmp_path)[0])
        peaks["evaluate"].append(peaks_of(["evaluate", f"run{factor}.h5", "--threads", "1", *bound], tmp_path)[0])
    for values in peaks.values():
        assert max(values) < limit
        assert max(values) - min(values) < 0.1 * limit


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the address space of a process")
def test_a_limit_that_the_system_enforces(tmp_path: Path) -> None:
    """With the address space that a run took on a small file (RLIMIT_AS), one on four times as many rows gets on.

    Without --memory-limit it does not: the test would notice a limit that changes nothing.
    """
    few, many = tmp_path / "few.h5", tmp_path / "many.h5"
    write_rows(few, 2)
    write_rows(many, 8)
    bound = ["--memory-limit", "280MiB"]
    start = ["train", "--overwrite", "--out", "run.h5", *OPTIONS, "--epochs", "1"]
    peaks_of([*start, *bound, "--data", "few.h5"], tmp_path)  # compiles
    _, space = peaks_of([*start, *bound, "--data", "few.h5"], tmp_path)
    space += 16 * MIB  # 8 bytes for every row that is scored, and what threads happen to take
    peaks_of([*start, *bound, "--data", "many.h5"], tmp_path, space)
    peaks_of(["evaluate", "run.h5", "--threads", "1", *bound, "--data", "many.h5"], tmp_path, space)
    done = child([*start, "--data", "many.h5"], tmp_path, space)
    assert done.returncode == 2
    assert done.stderr.startswith("nicecp: error: not enough memory")
    assert done.stderr.count("\n") == 1


def test_too_small_a_limit_is_one_line(tmp_path: Path) -> None:
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    write_table(tmp_path / "table.h5")
    words = ["train", "--data", "table.h5", "--memory-limit", "20MiB", "--out", "run.h5"]
    command = [sys.executable, "-m", "nicecp", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nicecp: error: --memory-limit must be at least ")
    assert done.stderr.endswith("for this model and a batch of 32 rows, got 20.0 MiB\n")
    assert [path.name for path in tmp_path.iterdir()] == ["table.h5"]


def test_a_memory_limit_gives_all_ranks_the_same_windows_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they differ in what they have in memory, from which both follow."""
    data, sizes = write_table(tmp_path / "table.h5"), count(100, 10)

    def limited(limit: Any, settings: Any, splits: Any, resumed: bool = False) -> Any:
        return replace(settings, window=next(sizes)), 100

    monkeypatch.setattr("nicecp.run.within", limited)

    def window(rank: Member) -> int:
        with Run.start(data, None, **SMALL, communicator=rank) as run:
            return run.trainer.reader.window

    assert len(set(together(3, window))) == 1
    table = np.random.default_rng(0).normal(size=(700, 5))
    NICE(5, (8,), 3, threads=1).save(tmp_path / "flow.h5")
    score_file(tmp_path / "flow.h5", table, tmp_path / "alone.h5")
    monkeypatch.setattr("nicecp.score_file.block_within", lambda *arguments: next(sizes))
    together(3, lambda rank: score_file(tmp_path / "flow.h5", table, tmp_path / "s.h5", communicator=rank))
    with h5py.File(tmp_path / "alone.h5") as alone, h5py.File(tmp_path / "s.h5") as several:
        np.testing.assert_allclose(several["log_prob"][()], alone["log_prob"][()], rtol=1e-12)

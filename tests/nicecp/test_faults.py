"""Calls of the system that fail: a small library, loaded before all others, lets write, fsync, close or rename fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load

COMPILER = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
ROOT = Path(__file__).resolve().parents[2]

# Fails from the n-th call on that is about one of our temporary files, or about the folder (fsync alone).
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int calls;
static int ours(const char *what, int fd, const char *path) {
    const char *call = getenv("FAIL_CALL");
    char link[64], name[4096] = "";
    struct stat status;
    if (!call || strcmp(call, what)) return 0;
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (readlink(link, name, sizeof name - 1) < 0) return 0;
        path = name;
    }
    if (getenv("FAIL_FOLDER")) {
        if (fd < 0 || fstat(fd, &status) || !S_ISDIR(status.st_mode)) return 0;
    } else if (!strstr(path, "/.nicecp-")) return 0;
    if (++calls < atoi(getenv("FAIL_AT"))) return 0;
    errno = atoi(getenv("FAIL_ERRNO"));
    return 1;
}
ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (ours("write", fd, 0)) return -1;
    /* a little at a time, so that there is a second call to fail */
    return real(fd, data, getenv("FAIL_CALL") && size > 4096 && ours("none", -1, "") == 0 ? 4096 : size);
}
int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return ours("fsync", fd, 0) ? -1 : real(fd);
}
int close(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "close");
    int fail = ours("close", fd, 0), number = errno, done = real(fd);
    if (!fail) return done;
    errno = number;
    return -1;
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return ours("rename", -1, from) ? -1 : real(from, to);
}
"""

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C compiler and Linux's LD_PRELOAD and /proc"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    assert COMPILER is not None
    command = [COMPILER, "-shared", "-fPIC", "-o", str(folder / "shim.so"), str(folder / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder / "shim.so")


def run(folder: Path, words: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | extra | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nicecp", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


TRAIN = ["train", "--data", "t.h5", "--hidden", "8", "--couplings", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with h5py.File(folder / "t.h5", "w") as file:
        file["train"] = np.random.default_rng(0).normal(size=(300, 4))
    assert run(folder, [*TRAIN, "--epochs", "1"]).returncode == 0
    return folder


FAULTS = [
    ("write", 28, 1, "No space left on device); free some space"),
    ("write", 5, 2, "Input/output error); check the folder"),
    ("write", 122, 2, "Disk quota exceeded); free some space"),
    ("fsync", 5, 1, "Input/output error); check the folder"),
    ("close", 5, 1, "Input/output error); check the folder"),
    ("close", 122, 1, "Disk quota exceeded); free some space"),
    ("rename", 13, 1, "Permission denied); check the folder"),
    ("rename", 28, 1, "No space left on device); free some space"),
]


@pytest.mark.parametrize(("call", "number", "nth", "words"), FAULTS)
@pytest.mark.parametrize("what", ["train", "sample", "csv"])
@pytest.mark.slow
def test_one_clear_error_and_the_old_files_as_they_were(
    shim: str, run_folder: Path, tmp_path: Path, call: str, number: int, nth: int, words: str, what: str
) -> None:
    folder = tmp_path / "f"
    shutil.copytree(run_folder, folder)
    (folder / "s.h5").write_bytes(b"precious")
    (folder / "c.csv").write_text("1,2\n3,4\n" * 2000)
    commands = {
        "train": ["train", "--resume", "run.h5", "--epochs", "2"],
        "sample": ["sample", "run.h5", "-n", "500", "--out", "s.h5", "--overwrite"],
        "csv": ["data", "csv", "c.csv", "--out", "s.h5", "--overwrite"],
    }
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"LD_PRELOAD": shim, "FAIL_CALL": call, "FAIL_ERRNO": str(number), "FAIL_AT": str(nth)}
    done = run(folder, commands[what], **extra)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("nicecp: warning")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nicecp: error: 'run.state.h5': " if what == "train" else "nicecp: error: 's.h5': ")
    assert words in lines[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_folder_that_cannot_be_synced_is_an_error_and_the_new_file_is_whole(
    shim: str, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    shutil.copytree(run_folder, folder)
    extra = {"LD_PRELOAD": shim, "FAIL_CALL": "fsync", "FAIL_ERRNO": "5", "FAIL_AT": "1", "FAIL_FOLDER": "1"}
    done = run(folder, ["train", "--resume", "run.h5", "--epochs", "2"], **extra)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Input/output error" in done.stderr
    load(folder / "run.h5")
    assert sorted(path.name for path in folder.iterdir()) == ["run.h5", "run.state.h5", "t.h5"]
    assert run(folder, ["train", "--resume", "run.h5", "--epochs", "2"]).returncode == 0


def test_a_run_that_could_not_save_once_goes_on(shim: str, run_folder: Path, tmp_path: Path) -> None:
    """A checkpoint on the way that fails is a warning; the disk stays full here, so that the end is an error."""
    folder = tmp_path / "f"
    shutil.copytree(run_folder, folder)
    words = ["train", "--resume", "run.h5", "--epochs", "3", "--checkpoint-every", "1e"]
    done = run(folder, words, LD_PRELOAD=shim, FAIL_CALL="write", FAIL_ERRNO="28", FAIL_AT="1")
    assert done.returncode == 2
    assert "training goes on; the next checkpoint may succeed" in done.stderr
    assert done.stderr.count("nicecp: error: ") == 1

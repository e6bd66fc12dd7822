"""The look in a child process: hangs and crashes of HDF5 are refusals, and nothing else changes."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py._objects import phil

from nicecp import probe
from nicecp.checkpoint import load
from nicecp.data import open_source, open_splits
from nicecp.errors import CheckpointError, DataError
from nicecp.flow import NICE
from nicecp.hdf5_chunks import Chunks, lzf_length
from nicecp.hdf5_open import plugins_off
from nicecp.store import Tree, write_tree
from tests.data_files import TABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> str:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["train"] = TABLE
        file["train"].attrs["columns"] = ["a", "b", "c"]  # of variable length: they lie in a heap
    return str(tmp_path / "x.h5")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every child that was started."""
    started: list[Any] = []
    start = probe._start

    def note(*arguments: Any) -> Any:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(probe, "_start", note)
    return started


def hanging(path: str) -> None:
    """The heap of the texts says that an object in it takes no space: HDF5 looks for the next one for ever."""
    data = bytearray(Path(path).read_bytes())
    heap = data.index(b"GCOL")
    for at in range(heap + 16, heap + 16 + 3 * 24, 24):
        struct.pack_into("<HHIQ", data, at, 0xFFFF, 0, 0, 2**64 - 16)
    Path(path).write_bytes(data)


def test_a_file_that_hangs_hdf5_is_refused_in_time(path: str) -> None:
    hanging(path)
    alone = [sys.executable, "-c", "import h5py, sys; print(h5py.File(sys.argv[1])['train'].attrs['columns'])", path]
    with pytest.raises(subprocess.TimeoutExpired):  # it does hang
        subprocess.run(alone, timeout=3, capture_output=True, check=False)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"x\.h5': the file is damaged or made to hang its reader .*h5repack"):
        open_splits(path)
    assert time.monotonic() - began < 20  # 2 on a machine with nothing else to do


@pytest.mark.parametrize(("number", "words"), [(signal.SIGSEGV, "crashed HDF5: SIGSEGV"), (signal.SIGKILL, "to hang")])
def test_a_child_that_dies_is_a_refusal(path: str, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    monkeypatch.setattr(probe, "_CODE", f"import os; os.kill(os.getpid(), {int(number)})")
    for _ in range(2):  # it is not remembered as one that has passed
        with pytest.raises(DataError, match=words):
            open_source(path)


def test_too_much_memory_is_a_refusal(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CODE", f"import os; os._exit({probe.TOO_MUCH_MEMORY})")
    with pytest.raises(DataError, match="takes more than 2 GiB"):
        open_source(path)


def test_a_child_that_waits_for_ever_is_a_refusal(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CODE", "import time; time.sleep(99)")
    monkeypatch.setattr(probe, "WALL_SECONDS", 0.3)
    with pytest.raises(DataError, match="made to hang"):
        open_source(path)


def test_a_file_is_looked_at_once_while_it_stays_the_same(path: str, children: list[Any]) -> None:
    for _ in range(3):
        open_splits(path).close()
        open_source(path + ":/train").close()
        open_source(path, "test").close()
    assert len(children) == 1
    assert children[0].returncode == 0
    os.utime(path, ns=(1, 1))
    open_splits(path).close()
    assert len(children) == 2


@pytest.mark.parametrize("executable", ["/usr/bin/some-host", "", "/no/such/python"])
def test_where_no_python_can_be_started_there_is_a_warning(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, executable: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert open_source(path).n_rows == 60
    assert "without a look at it in another process" in caplog.text


def test_a_child_whose_imports_fail_is_a_warning(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probe, "_CODE", "import no_such_module")
    assert open_source(path).n_rows == 60
    assert "could not be started" in caplog.text


def test_names_and_folders_of_any_kind(tmp_path: Path, children: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"odd \xff\n'\".h5")
    monkeypatch.chdir(tmp_path)
    with h5py.File(name, "w") as file:
        file["g/été"] = TABLE
    assert open_source(name + ":/g/été").n_rows == 60
    assert [child.returncode for child in children] == [0]


def test_texts_that_claim_gigabytes(path: str, children: list[Any]) -> None:
    """A heap of texts that says it is 4 GiB long: HDF5 sets as much aside before it sees that the file is shorter."""
    data = bytearray(Path(path).read_bytes())
    struct.pack_into("<Q", data, data.index(b"GCOL") + 8, 2**32)
    Path(path).write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=re.escape("the file is damaged (an attribute of its data cannot be read)")):
        open_source(path)
    assert [child.returncode for child in children] == [probe.UNREADABLE]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**18, "KiB"


def test_an_attribute_that_cannot_be_read_is_an_error_without_the_look_too(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(Path(path).read_bytes())
    struct.pack_into("<Q", data, data.index(b"GCOL") + 8, 2**20)
    Path(path).write_bytes(data)
    monkeypatch.setattr(probe, "_enabled", [False])
    with pytest.raises(DataError, match=r"x\.h5': its attribute 'columns' cannot be read \(.*\); copy or download"):
        open_source(path)


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_hdf5_finds_no_plugins_while_we_read_and_all_of_them_after() -> None:
    def paths() -> list[bytes]:
        return [h5py.h5pl.get(number) for number in range(h5py.h5pl.size())]

    h5py.h5pl.append(b"/somewhere/else")
    try:
        before = paths()
        with plugins_off():
            assert paths() == []
            with plugins_off():
                pass
            assert paths() == []
        assert paths() == before
    finally:
        h5py.h5pl.remove(h5py.h5pl.size() - 1)


RACE = """
import contextlib, sys, threading, time
import h5py, numpy as np
from nicecp.hdf5_open import plugins_off

with h5py.File(sys.argv[1], "w") as file:
    file.create_dataset("x", data=np.arange(1e5), chunks=(1000,), compression="gzip")

def read():
    with h5py.File(sys.argv[1], "r") as file:
        assert file["x"][...].sum() == 99999 * 5e4

def switch():
    with plugins_off():
        pass

def again(work):
    try:
        while time.monotonic() < end:
            work()
    except BaseException as error:
        failed.append(error)

end, failed = time.monotonic() + 2, []
threads = [threading.Thread(target=again, args=(work,)) for work in (read, switch, switch)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
"""


def test_plugins_are_switched_while_another_thread_reads(tmp_path: Path) -> None:
    """HDF5 may be called by one thread at a time, and h5py releases the interpreter's lock while it reads."""
    command = [sys.executable, "-X", "faulthandler", "-c", RACE, str(tmp_path / "x.h5")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.parametrize("call", ["plugins", "chunk"])
def test_other_threads_calls_of_hdf5_are_waited_for(call: str, tmp_path: Path) -> None:
    held, begun, ended, let_go = (threading.Event() for _ in range(4))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=np.arange(10.0), chunks=(5,), compression="gzip")

        def hold() -> None:
            with phil:
                held.set()
                let_go.wait(60)

        chunks = Chunks(file["x"].id, (10,), (5,), np.dtype(np.float64))

        def work() -> None:
            begun.set()
            if call == "plugins":
                with plugins_off():
                    pass
            else:
                chunks._dataset = Unlocked()
                chunks._raw((0,))
            ended.set()

        threads = [threading.Thread(target=task, daemon=True) for task in (hold, work)]
        threads[0].start()
        assert held.wait(60)
        threads[1].start()
        assert begun.wait(60)
        waited = not ended.wait(0.2)
        let_go.set()
        assert ended.wait(60)
        assert waited
        for thread in threads:
            thread.join()


class Unlocked:
    """read_direct_chunk as in h5py before 3.16: without its lock."""

    @staticmethod
    def read_direct_chunk(offset: tuple[int, ...]) -> tuple[int, bytes]:
        return 0, b""


@pytest.mark.skipif(sys.platform != "linux", reason="shared objects are made as on Linux")
def test_an_unknown_filter_loads_nothing(tmp_path: Path) -> None:
    """A filter of the file loads every shared object on HDF5_PLUGIN_PATH; here one that writes a file when loaded."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "plugins").mkdir()
    mark = tmp_path / "loaded"
    source = f'#include <stdio.h>\n__attribute__((constructor)) static void f(void) {{ fopen("{mark}", "w"); }}\n'
    (tmp_path / "p.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "plugins/libp.so"), str(tmp_path / "p.c")]
    subprocess.run(command, check=True)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((8, 4))
    creation.set_filter(32_001, h5py.h5z.FLAG_OPTIONAL, (1,))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple((8, 4))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"train", h5py.h5t.NATIVE_DOUBLE, space, creation))
        dataset.id.write_direct_chunk((0, 0), bytes(256))
    environment = os.environ | {"HDF5_PLUGIN_PATH": str(tmp_path / "plugins"), "PYTHONPATH": str(ROOT)}
    plain = "import h5py, sys; h5py.File(sys.argv[1])['train'][...]"
    words = [str(tmp_path / "x.h5")]
    subprocess.run([sys.executable, "-c", plain, *words], env=environment, capture_output=True, check=False)
    assert mark.exists(), "the trap does not work"
    mark.unlink()
    command = [sys.executable, "-m", "nicecp", "info", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "HDF5 filter 32001" in done.stdout + done.stderr
    assert not mark.exists()


def test_files_are_never_opened_to_be_changed(path: str) -> None:
    """Not by us, in no mode; and what is read is still the same file."""
    modes = re.compile(r"""h5py\.File\([^)]*["'](a|r\+|w-|x)["']""")
    for folder in ("nicecp", "cli", "kernels"):
        for module in (ROOT / folder).glob("*.py"):
            assert not modes.search(module.read_text()), module
    before = os.stat(path).st_mtime_ns, Path(path).read_bytes()
    os.chmod(path, 0o444)
    with open_splits(path) as splits:
        splits.train.load()
    assert (os.stat(path).st_mtime_ns, Path(path).read_bytes()) == before


# --- LZF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noise", "zeros", "ramp", "mixed", "text"])
@pytest.mark.parametrize("size", [33, 4096, 100_000])
def test_the_length_of_lzf(tmp_path: Path, kind: str, size: int) -> None:
    """Of streams that h5py wrote."""
    rng = np.random.default_rng(size)
    values = {
        "noise": rng.integers(0, 256, size),
        "zeros": np.zeros(size),
        "ramp": np.arange(size) // 7,
        "mixed": np.where(rng.random(size) < 0.1, rng.integers(0, 256, size), 7),
        "text": np.resize(np.frombuffer(b"the quick brown fox ", np.uint8), size),
    }[kind].astype(np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, chunks=(size,), compression="lzf")
        mask, raw = dataset.id.read_direct_chunk((0,))
    if mask == 0:
        assert lzf_length(raw) == size
        assert lzf_length(raw[:-1]) != size
    else:
        assert kind == "noise"  # nothing to be gained


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_other_peoples_checkpoints_are_looked_at_once(tmp_path: Path, children: list[Any]) -> None:
    path = tmp_path / "x.h5"
    NICE(4, (4,), 3).save(path)
    load(path)
    assert children == []  # written by ourselves
    os.utime(path, ns=(1, 1))
    load(path)
    load(path)
    assert [child.returncode for child in children] == [0]


def test_a_checkpoint_whose_child_hangs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    NICE(4, (4,), 3).save(path)
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(probe, "_CODE", "import time; time.sleep(99)")
    monkeypatch.setattr(probe, "WALL_SECONDS", 0.3)
    with pytest.raises(CheckpointError, match=r"x\.h5': its HDF5 part cannot be read in time"):
        load(path)


def test_names_of_members_cannot_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_tree(path, Tree({"/": {"a\x1b[31m\n": 1}}, {"/we\nird": np.zeros(3)}))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).isprintable()

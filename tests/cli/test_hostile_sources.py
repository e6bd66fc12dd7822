"""`nicecp data` on files that would hang, crash or fill memory, and long or unprintable words in messages."""

from __future__ import annotations

import gzip
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from nicecp import fetch, matlab_files
from nicecp.cli.main import main
from tests.cli.test_published import write_cifar, write_mnist


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matlab(*elements: bytes) -> bytes:
    """A MATLAB 5 file: 116 bytes of text, 8 of an offset, the version, and the byte order."""
    return b"made by a test".ljust(116) + bytes(8) + struct.pack("<H", 0x0100) + b"IM" + b"".join(elements)


def matrix(name: str, kind: int, shape: tuple[int, ...], rest: bytes = b"") -> bytes:
    flags = element(6, struct.pack("<II", kind, 0))
    dims = element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, flags + dims + element(1, name.encode()) + rest)


def nested_cells(folder: Path) -> str:
    """In SciPy's reader each level is one of the stack, which ends the process."""
    head = matrix("", 1, (1, 1))[8:]
    deep = b"".join(struct.pack("<II", 14, (level + 1) * (len(head) + 8) - 8) + head for level in range(49_999, -1, -1))
    numbers = [matrix(name, 9, (8, 1), element(2, bytes(8))) for name in ("folds", "labs_ex")]
    (folder / "TFD_48x48.mat").write_bytes(matlab(matrix("images", 1, (1, 1), deep), *numbers))
    return "TFD_48x48.mat"


def negative_sizes(folder: Path) -> str:
    images = matrix("images", 9, (-1, 48, 48), element(2, bytes(8 * 48 * 48)))
    others = [matrix(name, 9, (8, 1), element(2, bytes(8))) for name in ("folds", "labs_ex")]
    (folder / "TFD_48x48.mat").write_bytes(matlab(images, *others))
    return "TFD_48x48.mat"


def matlab_bomb(folder: Path) -> str:
    (folder / "TFD_48x48.mat").write_bytes(matlab(element(15, zlib.compress(bytes(2**26), 9))))
    return "TFD_48x48.mat"


def matlab_lie(folder: Path) -> str:
    arrays = {"images": np.zeros((8, 48, 48), np.uint8), "folds": np.ones((8, 5)), "labs_ex": {"a": 1}}
    savemat(folder / "TFD_48x48.mat", arrays)
    return "TFD_48x48.mat"


def fifo_among_batches(folder: Path) -> str:
    write_cifar(folder / "cifar")
    (folder / "cifar" / "test_batch.bin").unlink()
    os.mkfifo(folder / "cifar" / "test_batch.bin")
    return "cifar"


def sparse_batch(folder: Path) -> str:
    write_cifar(folder / "cifar")
    os.truncate(folder / "cifar" / "data_batch_3.bin", 3073 * 10_001)
    return "cifar"


def zip_bomb(folder: Path) -> str:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data_batch_1.bin", bytes(2**26))
    return "x.zip"


def tar_bomb(folder: Path) -> str:
    (folder / "data_batch_1.bin").write_bytes(bytes(2**26))
    with tarfile.open(folder / "x.tar.gz", "w:gz") as file:
        file.add(folder / "data_batch_1.bin", "data_batch_1.bin")
    return "x.tar.gz"


def many_members(folder: Path) -> str:
    with tarfile.open(folder / "x.tar", "w") as file:
        for number in range(6):
            file.addfile(tarfile.TarInfo(f"x{number}"))
    return "x.tar"


def gzip_bomb(folder: Path) -> str:
    (folder / "x.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"\n" * 2**24, mtime=0))
    return "x.csv.gz"


def idx_bomb(folder: Path) -> str:
    write_mnist(folder / "mnist")
    bomb = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**20, 4, 5) + bytes(20 * 2**20)
    (folder / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bomb, mtime=0))
    return "mnist"


@pytest.mark.parametrize(
    ("kind", "make", "words"),
    [
        ("tfd", nested_cells, "its arrays are not numbers"),
        ("tfd", negative_sizes, "its 'images' of (-1, 48, 48) cannot be in it"),
        ("tfd", matlab_bomb, "it unpacks to more than 11 MiB"),
        ("tfd", matlab_lie, "its arrays are not numbers"),
        ("cifar10", fifo_among_batches, "test_batch.bin': it is not a regular file"),
        ("cifar10", sparse_batch, "data_batch_3.bin': 30733073 bytes are not 1 to 10000 rows of 3073"),
        ("cifar10", zip_bomb, "'data_batch_1.bin' is larger than 20 MiB"),
        ("cifar10", tar_bomb, "'data_batch_1.bin' is larger than 20 MiB"),
        ("cifar10", many_members, "it has more than 5 members"),
        ("csv", gzip_bomb, "it unpacks to more than 11 MiB, 200 times its size and more"),
        ("idx", idx_bomb, "it unpacks to more than 11 MiB"),
        ("mnist", idx_bomb, "it unpacks to more than 11 MiB"),
    ],
)
def test_hostile_sources(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    make: Callable[[Path], str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 5)
    assert main(["data", kind, make(tmp_path), "--out", "out.h5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not os.path.exists("out.h5")


def test_files_that_pack_as_pictures_do_are_read(tmp_path: Path) -> None:
    """What is packed by MATLAB, in blocks, is counted and read: the count ends where the element does."""
    rng = np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 9, (700, 48, 48), np.uint8), "folds": np.ones((700, 5)), "n": np.zeros(9)}
    savemat(tmp_path / "x.mat", arrays, do_compression=True)
    found = matlab_files.read_matlab(str(tmp_path / "x.mat"), ("images", "folds"))
    np.testing.assert_array_equal(found["images"], arrays["images"])
    np.testing.assert_array_equal(found["folds"], arrays["folds"])


def test_a_message_has_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "x" * 5000, "--out", "y.h5"]) == 2
    error = capsys.readouterr().err
    assert len(error) < 1100
    assert error.startswith("nicecp: error: 'xxx")
    assert "check the path" in error


def test_no_control_characters_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,5\n")
    assert main(["data", "csv", str(tmp_path / "x.csv"), "--dataset", "\x1b[2J", "--out", str(tmp_path / "y.h5")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2J 2x2" in out
    with h5py.File(tmp_path / "y.h5") as file:
        assert list(file) == ["\x1b[2J"]

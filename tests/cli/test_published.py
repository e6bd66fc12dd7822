"""`nicecp data mnist|cifar10|svhn|tfd` on small files of the official formats: folders, archives, URLs, refusals."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from nicecp import fetch
from nicecp.cli.main import main
from nicecp.data import open_splits

RNG = np.random.default_rng(5)


def idx(array: Any) -> bytes:
    """yann.lecun.com/exdb/mnist: 0, 0, 8 (bytes), rank, sizes, numbers."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


MNIST = {name: RNG.integers(0, 256, (n, 4, 5), np.uint8) for name, n in (("train", 7), ("t10k", 3))}
MNIST_LABELS = {name: RNG.integers(0, 10, len(images), np.uint8) for name, images in MNIST.items()}
CIFAR = {k: (RNG.integers(0, 10, 4, np.uint8), RNG.integers(0, 256, (4, 3, 32, 32), np.uint8)) for k in range(6)}


def write_mnist(folder: Path, packed: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    for name in MNIST:
        for kind, array in (("images-idx3", MNIST[name]), ("labels-idx1", MNIST_LABELS[name])):
            data = idx(array)
            path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)


def write_cifar(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for k, (labels, images) in CIFAR.items():
        rows = np.concatenate([labels[:, None], images.reshape(4, -1)], axis=1)
        (folder / (f"data_batch_{k + 1}.bin" if k < 5 else "test_batch.bin")).write_bytes(rows.tobytes())


def svhn(n: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (32, 32, 3, n), np.uint8), rng.integers(1, 11, (n, 1)).astype(np.uint8)


def packed(folder: Path, archive: Path) -> Path:
    """The folder in an archive, below a folder of its name."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.iterdir()):
                file.write(path, f"{folder.name}/{path.name}")
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
            tar.add(folder, folder.name)
    return archive


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The folder served by HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    thread.join()
    http.server_close()


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    before = sorted(os.listdir())
    assert main(["data", *words, "--out", "out.h5"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    for part in parts:
        assert part in shown.err
    assert sorted(os.listdir()) == before


# --- MNIST ------------------------------------------------------------------------------------------------------------


def check_mnist(path: str) -> None:
    with h5py.File(path) as file:
        for role, name in (("train", "train"), ("test", "t10k")):
            np.testing.assert_array_equal(file[role][()], MNIST[name].reshape(-1, 20))
            np.testing.assert_array_equal(file[f"{role}_labels"][()], MNIST_LABELS[name])
        np.testing.assert_array_equal(file.attrs["image_shape"], [4, 5])
    open_splits(path).close()


@pytest.mark.parametrize("form", ["folder", "plain", "dotted", "m.tar.gz", "m.tar", "m.zip"])
def test_mnist(folder: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    write_mnist(folder / "raw", packed=form != "plain")
    source = "raw"
    if form.startswith("m."):
        source = packed(folder / "raw", folder / form).name
    if form == "dotted":  # as some archives have it
        for path in list((folder / "raw").iterdir()):
            path.with_name(path.name.replace("-idx", ".idx")[:-3]).write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    assert main(["data", "mnist", source, "--out", "m.h5"]) == 0
    assert capsys.readouterr().out == "m.h5: train 7x20, train_labels 7, test 3x20, test_labels 3\n"
    check_mnist("m.h5")


def test_mnist_from_urls(folder: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(folder / "raw")
    packed(folder / "raw", folder / "m.tar.gz")
    for number, address in enumerate((f"{server}/raw/", f"{server}/m.tar.gz")):
        assert main(["data", "mnist", address, "--out", f"{number}.h5"]) == 0
        check_mnist(f"{number}.h5")
    capsys.readouterr()
    refused(["mnist", f"{server}/none/"], capsys, f"'{server}/none/': it holds none of the files of this data set")
    refused(["cifar10", f"{server}/none.zip"], capsys, f"'{server}/none.zip': the server answers 404", "give the file")


def test_without_a_network(folder: Path, capsys: pytest.CaptureFixture[str], server: str) -> None:
    port = int(server.rpartition(":")[2])
    closed = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    port = closed.server_address[1]
    closed.server_close()
    address = f"http://127.0.0.1:{port}/mnist/"
    refused(["mnist", address], capsys, f"'{address}train-images-idx3-ubyte.gz': it cannot be downloaded", "refused")
    refused(["mnist", "ftp://example.org/mnist"], capsys, "only http and https")
    refused(["mnist", "http://nowhere.invalid/mnist"], capsys, "it cannot be downloaded", "check the address")


def test_a_connection_that_ends_early(
    folder: Path, server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: Any, source: Any, target: Any) -> None:
        target.write(source.read(20))

    write_mnist(folder / "raw")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", short)
    refused(["mnist", f"{server}/raw"], capsys, "train-images-idx3-ubyte.gz")


def test_checksums(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of the published size; compressed ones by their content."""
    write_mnist(folder / "raw")
    data = idx(MNIST["train"])
    right = {"train-images-idx3-ubyte": (len(data), hashlib.md5(data).hexdigest())}
    monkeypatch.setattr(fetch, "CHECKSUMS", right)
    assert main(["data", "mnist", "raw", "--out", "m.h5"]) == 0
    assert "as published, by checksum: train-images-idx3-ubyte.gz\n" in capsys.readouterr().out
    monkeypatch.setattr(fetch, "CHECKSUMS", {"train-images-idx3-ubyte": (len(data), "0" * 32)})
    refused(["mnist", "raw"], capsys, "train-images-idx3-ubyte.gz", "the published one 000000", "download it again")
    write_cifar(folder / "c")
    archive = packed(folder / "c", folder / "cifar-10-binary.tar.gz").read_bytes()
    monkeypatch.setattr(fetch, "CHECKSUMS", {"cifar-10-binary.tar.gz": (len(archive), "1" * 32)})
    refused(["cifar10", "cifar-10-binary.tar.gz"], capsys, "the published one 111111")


def test_the_published_checksums_of_mnist_are_those_of_the_data(real_mnist: Path) -> None:
    with h5py.File(real_mnist) as file:
        for role, name in (("train", "train"), ("test", "t10k")):
            images, labels = file[role][()], file[f"{role}_labels"][()]
            for array, stem in ((images.reshape(-1, 28, 28), "images-idx3"), (labels, "labels-idx1")):
                data = idx(array.astype(np.uint8))
                found = len(data), hashlib.md5(data).hexdigest()
                assert found == fetch.CHECKSUMS[f"{name}-{stem}-ubyte"]


@pytest.fixture
def real_mnist() -> Path:
    path = Path(os.environ.get("NICECP_DATA", ""), "mnist.h5")
    if not path.is_file():
        pytest.skip("NICECP_DATA does not name the folder with the real data sets")
    return path


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "c.tar.gz", "c.zip"])
def test_cifar10(folder: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    write_cifar(folder / "cifar-10-batches-bin")
    source = "." if form == "folder" else packed(folder / "cifar-10-batches-bin", folder / form).name
    assert main(["data", "cifar10", source, "--out", "c.h5"]) == 0
    with h5py.File("c.h5") as file:
        assert file["train"].shape == (20, 3072)
        # Plane by plane in the batches, RGB by pixel in the file: row 3 of batch 2, pixel (5, 7).
        pixel = file["train"][7].reshape(32, 32, 3)[5, 7]
        np.testing.assert_array_equal(pixel, CIFAR[1][1][3, :, 5, 7])
        np.testing.assert_array_equal(file["test"][2].reshape(32, 32, 3), CIFAR[5][1][2].transpose(1, 2, 0))
        np.testing.assert_array_equal(file["train_labels"][()], np.concatenate([CIFAR[k][0] for k in range(5)]))
        np.testing.assert_array_equal(file["test_labels"][()], CIFAR[5][0])
        np.testing.assert_array_equal(file.attrs["image_shape"], [32, 32, 3])


class Bomb:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_pickles_are_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "py").mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / "py" / name).write_bytes(pickle.dumps(Bomb()))
    packed(folder / "py", folder / "cifar-10-python.tar.gz")
    for source in ("py", "cifar-10-python.tar.gz"):
        refused(["cifar10", source], capsys, f"'{source}': these are CIFAR-10's Python batches", "cifar-10-binary.tar")
    assert not Path("exploded").exists()


def test_refused_batches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(folder / "c")
    third = folder / "c" / "data_batch_3.bin"
    whole = third.read_bytes()
    third.write_bytes(whole[:-1])
    refused(["cifar10", "c"], capsys, "data_batch_3.bin", "12291 bytes are not 1 to 10000 rows of 3073")
    third.write_bytes(b"\x0b" + whole[1:])
    refused(["cifar10", "c"], capsys, "data_batch_3.bin", "it has the label 11")
    third.unlink()
    refused(["cifar10", "c"], capsys, "'c': 'data_batch_3.bin' is missing")
    refused(["cifar10", "nothing.tar.gz"], capsys, "'nothing.tar.gz': ")
    Path("bad.tar.gz").write_bytes(gzip.compress(b"no archive" * 100)[:60])
    refused(["cifar10", "bad.tar.gz"], capsys, "'bad.tar.gz': the archive is damaged")
    Path("empty").mkdir()
    refused(["cifar10", "empty"], capsys, "'empty': it holds none of the files of this data set", "data_batch_1.bin")


def test_archives_cannot_write_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links and paths in an archive are not followed: members are read under their names alone."""
    write_cifar(folder / "c")
    (folder / "work").mkdir()
    with tarfile.open("evil.tar", "w") as tar:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for path in sorted((folder / "c").iterdir()):
            info = tarfile.TarInfo(f"../../{path.name}")
            data = path.read_bytes()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    before = sorted(os.listdir("..")), sorted(os.listdir())
    assert main(["data", "cifar10", "evil.tar", "--out", "work/c.h5"]) == 0
    assert before == (sorted(os.listdir("..")), sorted(os.listdir()))
    with h5py.File("work/c.h5") as file:
        np.testing.assert_array_equal(file["train_labels"][:4], CIFAR[0][0])


# --- SVHN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["clean", "code"])
def test_svhn(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    monkeypatch.setattr("nicecp.published.SVHN_VALID", {"train": 2, "extra": 1})
    parts = {name: svhn(n, seed) for seed, (name, n) in enumerate((("train", 60), ("test", 5), ("extra", 40)))}
    for name, (x, y) in parts.items():
        savemat(f"{name}_32x32.mat", {"X": x, "y": y}, do_compression=name == "extra")
    assert main(["data", "svhn", ".", "--split", split, "--out", "s.h5"]) == 0
    images = {name: x.transpose(3, 0, 1, 2).reshape(-1, 3072) for name, (x, _) in parts.items()}
    labels = {name: y.ravel() % 10 for name, (_, y) in parts.items()}  # 10 is the digit 0
    held = {
        name: np.sort(np.concatenate([np.flatnonzero(labels[name] == k)[:count] for k in range(10)]))
        for name, count in (("train", 2), ("extra", 1))
    }
    rest = {name: np.setdiff1d(np.arange(len(labels[name])), held[name]) for name in held}
    with h5py.File("s.h5") as file:
        valid = np.concatenate([images[name][held[name]] for name in ("train", "extra")])
        np.testing.assert_array_equal(file["valid"][()], valid)
        if split == "code":
            np.testing.assert_array_equal(file["train"][()], images["train"])
            np.testing.assert_array_equal(file["train_labels"][()], labels["train"])
        else:
            train = np.concatenate([images[name][rest[name]] for name in ("train", "extra")])
            np.testing.assert_array_equal(file["train"][()], train)
            expected = np.concatenate([labels[name][rest[name]] for name in ("train", "extra")])
            np.testing.assert_array_equal(file["train_labels"][()], expected)
        np.testing.assert_array_equal(file["test"][()], images["test"])
        np.testing.assert_array_equal(file["test_labels"][()], labels["test"])
        assert 0 in file["train_labels"][()]
        assert 10 not in file["train_labels"][()]
    with open_splits("s.h5") as splits:
        assert splits.valid is not None
        assert len(splits.valid) == 30
        assert splits.train.source.info.image_shape == (32, 32, 3)


def test_refused_matlab_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = svhn(6, 0)
    savemat("train_32x32.mat", {"X": x, "y": y})
    refused(["svhn", "."], capsys, "'.': 'test_32x32.mat' is missing")
    savemat("test_32x32.mat", {"X": x[:8], "y": y})
    refused(["svhn", "."], capsys, "test_32x32.mat", "X is (8, 32, 3, 6) of uint8")
    savemat("test_32x32.mat", {"X": x})
    refused(["svhn", "."], capsys, "test_32x32.mat", "it has no array of numbers 'y'")
    savemat("test_32x32.mat", {"X": "text", "y": y})
    refused(["svhn", "."], capsys, "test_32x32.mat", "its arrays are not numbers")
    data = Path("train_32x32.mat").read_bytes()
    broken = {
        "it has no array of numbers 'y'": data[:300],
        "MATLAB 5 file, or damaged": b"no MATLAB at all",
        "it is empty (0 bytes)": b"",
    }
    for problem, content in broken.items():
        Path("test_32x32.mat").write_bytes(content)
        refused(["svhn", "."], capsys, "test_32x32.mat", problem)
    with h5py.File("test_32x32.mat", "w", userblock_size=512) as file:  # as MATLAB 7.3 writes them
        file["X"] = x
    head = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    with open("test_32x32.mat", "r+b") as raw:
        raw.write(head)
    refused(["svhn", "."], capsys, "test_32x32.mat", "it is a MATLAB 7.3 file; save it by MATLAB with -v7")


# --- TFD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [0, 1])
def test_tfd(folder: Path, capsys: pytest.CaptureFixture[str], fold: int) -> None:
    rng = np.random.default_rng(9)
    images = rng.integers(0, 256, (30, 48, 48), np.uint8)
    folds = rng.integers(0, 4, (30, 5)).astype(np.uint8)
    labels = np.where(folds[:, 0] == 0, -1, 3).astype(np.int16)[:, None]
    savemat("TFD_48x48.mat", {"images": images, "folds": folds, "labs_ex": labels, "labs_id": labels})
    assert main(["data", "tfd", "TFD_48x48.mat", "--fold", str(fold), "--out", "t.h5"]) == 0
    with h5py.File("t.h5") as file:
        for role, numbers in (("train", (0, 1)), ("valid", (2,)), ("test", (3,))):
            chosen = np.isin(folds[:, fold], numbers)
            np.testing.assert_array_equal(file[role][()], images[chosen].reshape(-1, 2304))
            np.testing.assert_array_equal(file[f"{role}_labels"][()], labels.ravel()[chosen])
        np.testing.assert_array_equal(file.attrs["image_shape"], [48, 48])
    capsys.readouterr()
    refused(["tfd", ".", "--fold", "5"], capsys, "TFD_48x48.mat", "there is no fold 5", "--fold")
    savemat("TFD_48x48.mat", {"images": images[:, :40], "folds": folds, "labs_ex": labels})
    refused(["tfd", "."], capsys, "images are (30, 40, 48) of uint8")


def test_an_existing_output_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(folder / "raw")
    Path("out.h5").write_bytes(b"mine")
    refused(["mnist", "raw"], capsys, "'out.h5': already exists")
    assert Path("out.h5").read_bytes() == b"mine"
    assert main(["data", "mnist", "raw", "--out", "out.h5", "--overwrite"]) == 0
    check_mnist("out.h5")

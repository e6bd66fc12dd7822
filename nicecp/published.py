"""The paper's data sets from their official files to the HDF5 layout that training reads.

MNIST from idx files, CIFAR-10 from its binary batches, SVHN and TFD from MATLAB files. Python's pickled batches are
refused, since reading them would run code.
"""

from __future__ import annotations

import os
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nicecp.convert import Written, idx_to_hdf5, new_dataset, new_file
from nicecp.errors import DataError, about_file
from nicecp.fetch import local_files, stem_of
from nicecp.matlab_files import read_matlab

StrPath = str | os.PathLike[str]
Bytes = NDArray[np.uint8]

_MNIST = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
MNIST_FILES = (*(f"{name}.gz" for name in _MNIST), *_MNIST, *(name.replace("-idx", ".idx") for name in _MNIST))
CIFAR10_FILES = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")
CIFAR10_PICKLED = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat")
TFD_FILES = ("TFD_48x48.mat",)

_CIFAR_ROW = 1 + 3 * 32 * 32  # bytes
_CIFAR_ROWS = 10_000  # in a batch
SVHN_VALID = {"train": 400, "extra": 200}  # of each class, the first ones in file order
SVHN_SPLITS = ("clean", "code")
_ROWS = 4096  # converted at a time


def mnist_to_hdf5(source: StrPath, path: StrPath, overwrite: bool = False) -> Written:
    """MNIST's four idx files (also .gz) from a folder, an archive or a URL -> train, test and their labels.

    Raises DataError: see local_files, verify and nicecp.convert.idx_to_hdf5.
    """
    with local_files(os.fspath(source), MNIST_FILES, MNIST_FILES) as files:
        stems: dict[str, str] = {}  # a file that is there packed and unpacked counts once
        for name, where in files.paths.items():
            stems.setdefault(stem_of(name), where)
        missing = [name for name in _MNIST if name not in stems and "images" in name]
        if missing:
            raise DataError(about_file(source, f"{missing[0]!r} is missing", "give MNIST's files together"))
        written = idx_to_hdf5([stems[name] for name in _MNIST if name in stems], path, overwrite)
        written.verified = files.verified
    return written


def cifar10_to_hdf5(source: StrPath, path: StrPath, overwrite: bool = False) -> Written:
    """CIFAR-10's binary version -> train, test (n, 3072) as rows, columns, RGB, and their labels.

    The archive cifar-10-binary.tar.gz, a folder with data_batch_1.bin, ..., test_batch.bin, or a URL. Every row is a
    label and 3 x 32 x 32 bytes, plane by plane. Source: www.cs.toronto.edu/~kriz/cifar.html.

    Raises DataError, also for the Python version, whose pickles are not read.
    """
    name = os.fspath(source)
    with local_files(name, (*CIFAR10_FILES, *CIFAR10_PICKLED), CIFAR10_PICKLED) as given:
        files = given.paths
        if not any(file in files for file in CIFAR10_FILES):
            problem = "these are CIFAR-10's Python batches, pickles that would run code"
            raise DataError(about_file(name, problem, "give the binary version, cifar-10-binary.tar.gz"))
        missing = [file for file in CIFAR10_FILES if file not in files]
        if missing:
            raise DataError(about_file(name, f"{missing[0]!r} is missing", "give CIFAR-10's six batches together"))
        result = Written(os.fspath(path), image_shape=(32, 32, 3), verified=given.verified)
        with new_file(result.path, overwrite, list(files.values())) as file:
            for role, parts in (("train", CIFAR10_FILES[:-1]), ("test", CIFAR10_FILES[-1:])):
                batches = [_cifar_batch(files[part]) for part in parts]
                images = np.concatenate([batch[:, 1:] for batch in batches])
                labels = np.concatenate([batch[:, 0] for batch in batches])
                _write(file, result, role, images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)
            file.attrs["image_shape"] = np.array(result.image_shape)
    return result


def _cifar_batch(path: str) -> Bytes:
    """(n, 3073) rows of a binary batch."""
    size = os.path.getsize(path)
    if not size or size % _CIFAR_ROW or size > _CIFAR_ROWS * _CIFAR_ROW:
        problem = f"{size} bytes are not 1 to {_CIFAR_ROWS} rows of {_CIFAR_ROW}"
        raise DataError(about_file(path, problem, "give a binary batch of CIFAR-10, downloaded whole"))
    rows = np.fromfile(path, np.uint8).reshape(-1, _CIFAR_ROW)
    if rows[:, 0].max() > 9:
        raise DataError(
            about_file(path, f"it has the label {rows[:, 0].max()}", "give CIFAR-10, whose labels are 0..9")
        )
    return rows


def svhn_to_hdf5(source: StrPath, path: StrPath, overwrite: bool = False, split: str = "clean") -> Written:
    """SVHN's cropped digits (train_32x32.mat, test_32x32.mat, extra_32x32.mat) -> train, valid, test and labels 0..9.

    split : "clean" or "code"
        valid is the first 400 images of each class of the training file and the first 200 of each class of the extra
        one. clean: all the others of both files are trained on. code, as the authors' file: the whole original training
        file is, with which valid overlaps. Without an extra file valid has the training file's part alone.

    MATLAB files are read whole: a converted extra file needs 1.6 GB of memory. Raises DataError.
    """
    if split not in SVHN_SPLITS:
        raise ValueError(f"split must be one of {', '.join(SVHN_SPLITS)}, got {split!r}")
    with local_files(os.fspath(source), SVHN_FILES, ("extra_32x32.mat",)) as given:
        files = given.paths
        for name in SVHN_FILES[:2]:
            if name not in files:
                raise DataError(about_file(source, f"{name!r} is missing", "give SVHN's .mat files of cropped digits"))
        result = Written(os.fspath(path), image_shape=(32, 32, 3), verified=given.verified)
        with new_file(result.path, overwrite, list(files.values())) as file:
            _write(file, result, "test", *_svhn(files["test_32x32.mat"]))
            images, labels = _svhn(files["train_32x32.mat"])
            train, valid = [(images, labels)], []
            chosen = _first_of_each(labels, SVHN_VALID["train"])
            valid.append((images[chosen], labels[chosen]))
            if split == "clean":
                train = [(images[~chosen], labels[~chosen])]
            if "extra_32x32.mat" in files:
                images, labels = _svhn(files["extra_32x32.mat"])
                chosen = _first_of_each(labels, SVHN_VALID["extra"])
                valid.append((images[chosen], labels[chosen]))
                if split == "clean":
                    train.append((images[~chosen], labels[~chosen]))
            for role, parts in (("train", train), ("valid", valid)):
                joined = np.concatenate([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
                _write(file, result, role, joined, np.concatenate([part[1] for part in parts]))
            file.attrs["image_shape"] = np.array(result.image_shape)
    return result


def _svhn(path: str) -> tuple[Bytes, Bytes]:
    """X (32, 32, 3, n) and y (n, 1) of a file, in which 10 is the digit 0 -> (n, 32, 32, 3) and (n,)."""
    found = read_matlab(path, ("X", "y"))
    images, labels = found["X"], found["y"].ravel()
    if (
        images.ndim != 4
        or images.shape[:3] != (32, 32, 3)
        or images.dtype != np.uint8
        or len(labels) != images.shape[3]
    ):
        problem = f"X is {images.shape} of {images.dtype} and y has {len(labels)} labels"
        raise DataError(about_file(path, problem, "give SVHN's cropped digits: X (32, 32, 3, n) of uint8, y (n, 1)"))
    return images.transpose(3, 0, 1, 2), (labels % 10).astype(np.uint8)


def _first_of_each(labels: Bytes, count: int) -> NDArray[np.bool_]:
    """(n,) True for the first ``count`` rows of every label."""
    chosen = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[:count]] = True
    return chosen


def tfd_to_hdf5(source: StrPath, path: StrPath, overwrite: bool = False, fold: int = 0) -> Written:
    """The Toronto Face Database's TFD_48x48.mat -> train, valid, test (n, 2304) and their expression labels.

    ``images`` (n, 48, 48) are parted by column ``fold`` of ``folds``: 0 (no labels) and 1 are trained on, 2 is valid,
    3 test. Labels are ``labs_ex``, -1 where there is none. Raises DataError.
    """
    with local_files(os.fspath(source), TFD_FILES) as given:
        where = next(iter(given.paths.values()))
        found = read_matlab(where, ("images", "folds", "labs_ex"))
        images, folds, labels = found["images"], found["folds"], found["labs_ex"].ravel()
        n = len(images)
        if images.ndim != 3 or images.shape[1:] != (48, 48) or images.dtype != np.uint8 or len(labels) != n:
            problem = f"images are {images.shape} of {images.dtype} and there are {len(labels)} labels"
            raise DataError(about_file(where, problem, "give TFD_48x48.mat: images (n, 48, 48) of uint8"))
        if folds.ndim != 2 or len(folds) != n or not 0 <= fold < folds.shape[1]:
            raise DataError(
                about_file(where, f"folds are {folds.shape}, there is no fold {fold}", "choose another --fold")
            )
        column = folds[:, fold]
        result = Written(os.fspath(path), image_shape=(48, 48))
        with new_file(result.path, overwrite, [where]) as file:
            for role, numbers in (("train", (0, 1)), ("valid", (2,)), ("test", (3,))):
                chosen = np.isin(column, numbers)
                if chosen.any():
                    _write(file, result, role, images[chosen], labels[chosen].astype(np.int16))
            if "train" not in result.shapes:
                raise DataError(about_file(where, f"fold {fold} has no training images", "choose another --fold"))
            file.attrs["image_shape"] = np.array(result.image_shape)
    return result


def _write(file: h5py.File, result: Written, role: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
    """images : (n, h, w[, c]) uint8 -> role (n, h * w * c), and role_labels (n,)."""
    n, width = len(images), int(np.prod(images.shape[1:]))
    if n == 0:
        raise DataError(about_file(result.path, f"there would be no {role} images", "give the official files"))
    out = new_dataset(file, role, (n, width), "uint8", compress=True)
    for start in range(0, n, _ROWS):
        out[start : start + _ROWS] = images[start : start + _ROWS].reshape(-1, width)
    new_dataset(file, role + "_labels", labels.shape, labels.dtype.name, compress=True)[...] = labels
    result.shapes |= {role: (n, width), role + "_labels": labels.shape}

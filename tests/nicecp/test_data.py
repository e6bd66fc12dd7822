"""Data files: which dataset is taken, what is refused and in which words, splits, statistics, fingerprints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from nicecp import sources
from nicecp.data import ArraySource, check_constant, column_stats, open_source, open_splits
from nicecp.errors import DataError
from nicecp.hdf5_data import HDF5Source
from nicecp.kernels.backend import Purpose
from nicecp.split import Split
from tests.data_files import IMAGES, LABELS, TABLE, maker, refused


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    return maker(tmp_path)


# --- which dataset --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datasets", "train", "valid", "test"),
    [
        ({"train": TABLE, "data": TABLE, "labels": LABELS}, "train", None, None),
        ({"x_train": TABLE, "y_train": LABELS, "x_test": TABLE, "y_test": LABELS}, "x_train", None, "x_test"),
        ({"images": TABLE, "data": TABLE, "valid": TABLE}, "images", "valid", None),
        ({"data": TABLE, "other": TABLE, "x_valid": TABLE, "test": TABLE}, "data", "x_valid", "test"),
        ({"foo": TABLE, "labels": LABELS, "train": LABELS}, "foo", None, None),
        ({"foo": TABLE, "test": TABLE}, "foo", None, "test"),
        ({"a__b__c": TABLE, "a__labels": LABELS, "a__b__test": TABLE}, "a/b/c", None, "a/b/test"),
    ],
)
def test_the_choice_of_datasets(
    make: Callable[..., str], datasets: dict[str, Any], train: str, valid: str | None, test: str | None
) -> None:
    path = make(**datasets)
    with open_splits(path, valid_fraction=0) as splits:
        assert splits.train.source.name == f"{path}:/{train}"
        assert (splits.valid and splits.valid.source.name) == (valid and f"{path}:/{valid}")
        assert (splits.test and splits.test.source.name) == (test and f"{path}:/{test}")
        assert splits.train.purpose == Purpose.TRAIN_NOISE
        assert splits.valid is None or splits.valid.purpose == Purpose.VALID_NOISE
        assert splits.test is None or splits.test.purpose == Purpose.TEST_NOISE
    assert open_source(path, "test").name == f"{path}:/{test or train}"


def test_an_explicit_dataset_brings_its_companions_only_with_a_training_name(make: Callable[..., str]) -> None:
    path = make(train=TABLE, extra=TABLE, test=TABLE, valid=TABLE, g__train=TABLE, g__test=TABLE)
    with open_splits(path + ":/extra") as splits:
        assert splits.train.source.name == f"{path}:/extra"
        assert splits.test is None
        assert len(splits.train) == 50
    with open_splits(path + ":/train") as splits:
        assert splits.test is not None
        assert splits.valid is not None
        assert splits.valid.source.name == f"{path}:/valid"
    for spec in (path + ":/g/train", path + ":/g", path + ":/g//./train/"):
        with open_splits(spec) as splits:
            assert splits.train.source.name == f"{path}:/g/train"
            assert splits.test is not None
            assert splits.test.source.name == f"{path}:/g/test"
    for role in ("train", "valid", "test"):
        assert open_source(path + ":/extra", role).name == f"{path}:/extra"


def test_ambiguity_lists_the_candidates_with_shapes(make: Callable[..., str]) -> None:
    path = make(a=TABLE, g__b=IMAGES, labels=LABELS)
    message = refused(path, "'/a' float32 (60, 3)", "'/g/b' uint8 (60, 12)", f"'{path}:/a'")
    assert "labels" not in message


def test_a_wrong_name_suggests_a_right_one(make: Callable[..., str]) -> None:
    path = make(train=TABLE, g__other=IMAGES)
    refused(path + ":/trian", "no dataset '/trian'", f"did you mean '{path}:/train'?", "'/g/other' uint8 (60, 12)")
    refused(path + ":/zzz", "no dataset '/zzz'", "'/train' float32 (60, 3)", "'/g/other'")
    refused(path + ":/train/deeper", "no dataset '/train/deeper'")
    refused(path, "no valid dataset", role="valid")


def test_only_test_data_can_be_evaluated_but_not_trained_on_in_silence(make: Callable[..., str]) -> None:
    path = make(test=TABLE, other=LABELS)
    assert open_source(path, "test").name == f"{path}:/test"


def test_valid_and_test_must_be_like_train(make: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"4 columns and .*train' has 3"):
        open_splits(make(train=TABLE, test=np.zeros((5, 4), np.float32)))
    with pytest.raises(DataError, match=r"holds uint8 and .*train' holds float32"):
        open_splits(make(train=TABLE, valid=np.zeros((5, 3), np.uint8)))


def test_named_validation_rows_are_used_even_without_a_fraction(make: Callable[..., str]) -> None:
    with open_splits(make(train=IMAGES, valid=IMAGES[:7]), valid_fraction=0.5) as splits:
        assert len(splits.train) == 60
        assert splits.valid is not None
        assert len(splits.valid) == 7


def test_images_take_the_last_sixth_and_tables_a_keyed_one(make: Callable[..., str]) -> None:
    with open_splits(make(train=IMAGES)) as splits:
        assert splits.valid is not None
        np.testing.assert_array_equal(splits.train.load()[0], IMAGES[:50])
        np.testing.assert_array_equal(splits.valid.load()[0], IMAGES[50:])
        np.testing.assert_array_equal(splits.valid.load()[1], np.arange(50, 60))
    path = make(train=TABLE)
    with open_splits(path, seed=3) as splits, open_splits(path, seed=4) as others:
        assert splits.valid is not None
        assert others.valid is not None
        train, valid = splits.train.load()[1], splits.valid.load()[1]
        assert len(valid) == 10
        np.testing.assert_array_equal(np.sort(np.concatenate([train, valid])), np.arange(60))
        np.testing.assert_array_equal(splits.valid.load()[0], TABLE[valid])
        assert set(valid) != set(others.valid.load()[1])
        assert set(valid) != set(range(50, 60))
    with open_splits(path, valid_fraction=0) as splits:
        assert splits.valid is None
    assert open_splits(TABLE[:5]).valid is None  # a sixth of five rows is none
    with pytest.raises(ValueError, match="fraction"):
        open_splits(TABLE, valid_fraction=1.0)


# --- numbers and their description ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (np.arange(12, dtype=np.uint8), np.uint8),
        (np.arange(12, dtype=">f4") / 3, np.float32),
        (np.arange(12, dtype=">f8") / 3, np.float64),
        (np.arange(12, dtype=np.float16) / 3, np.float64),
        (np.arange(12, dtype=">i2") - 5, np.float64),
        (np.arange(12, dtype=np.uint64) + 2**40, np.float64),
        (np.arange(12, dtype=np.int32), np.float64),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_types(make: Callable[..., str], stored: NDArray[Any], dtype: Any, in_file: bool) -> None:
    stored = stored.reshape(4, 3)
    source = open_source(make(train=stored) if in_file else stored)
    assert source.dtype == dtype
    assert source.is_image8 == (dtype == np.uint8)
    block = source.read(1, 3)
    assert block.dtype == np.dtype(dtype)
    assert block.flags.c_contiguous
    np.testing.assert_array_equal(block, stored[1:3].astype(dtype))
    assert source.read(2, 2).shape == (0, 3)
    with pytest.raises(ValueError, match="rows 0 to 5"):
        source.read(0, 5)


@pytest.mark.parametrize("in_file", [True, False])
def test_signed_bytes_keep_their_order(make: Callable[..., str], in_file: bool) -> None:
    stored = np.array([[-128, -1], [0, 127]], np.int8)
    block = open_source(make(train=stored) if in_file else stored).read(0, 2)
    assert block.dtype == np.uint8
    assert block.tolist() == [[0, 127], [128, 255]]


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 4, 3), (4, 3)), ((5, 4, 3, 1), (4, 3)), ((5, 2, 2, 3), (2, 2, 3)), ((5, 12), None)]
)
def test_higher_ranks_are_flattened_and_remembered(
    make: Callable[..., str], shape: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    values = np.arange(60, dtype=np.uint8).reshape(shape)
    for spec in (make(train=values), values):
        source = open_source(spec)
        assert (source.n_rows, source.n_features, source.info.image_shape) == (5, 12, expected)
        np.testing.assert_array_equal(source.read(0, 5), values.reshape(5, 12))


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        (np.array([3, 4]), (3, 4)),
        (np.array([3, 4, 1], np.uint8), (3, 4)),
        (np.array([2, 2, 3]), (2, 2, 3)),
        (np.array([3, 5]), None),
        (np.array([12]), None),
        (np.array([-3, -4]), None),
        (np.array([3.0, 4.0]), None),
        (12, None),
        ("3x4", None),
        (np.zeros(5000, np.int64), None),
    ],
)
@pytest.mark.parametrize("on_dataset", [True, False])
def test_image_shape_attribute(make: Callable[..., str], attribute: Any, expected: Any, on_dataset: bool) -> None:
    path = make(train=IMAGES)
    with h5py.File(path, "a") as file:
        (file["train"] if on_dataset else file).attrs["image_shape"] = attribute
    assert open_source(path).info.image_shape == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["x", "y", "größe"], ("x", "y", "größe")),
        (np.array([b"x", b"y", b"gr\xc3\xb6\xc3\x9fe"]), ("x", "y", "größe")),
        (["x", "y"], None),
        (np.array([1, 2, 3]), None),
        ("x,y,z", None),
    ],
)
def test_column_names_and_units(make: Callable[..., str], columns: Any, expected: Any) -> None:
    path = make(train=TABLE)
    with h5py.File(path, "a") as file:
        file.attrs["columns"] = columns
        file["train"].attrs["units"] = columns
    info = open_source(path).info
    assert info.columns == expected
    assert info.units == expected


def test_fingerprints_follow_the_numbers_and_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, values: NDArray[Any], **options: Any) -> str:
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("train", data=values, **options)
        with HDF5Source(tmp_path / name, "train") as source:
            return source.fingerprint()

    values = np.random.default_rng(0).normal(size=(5000, 4))
    reference = ArraySource(values).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", reference)
    assert written("a.h5", values) == written("b.h5", values, chunks=(7, 2), compression="gzip") == reference
    assert ArraySource(values.astype(np.float32)).fingerprint() != reference
    assert ArraySource(values.reshape(2500, 8)).fingerprint() != reference
    for row in (0, 2500, 4999):
        changed = values.copy()
        changed[row, 3] += 1e-9
        assert ArraySource(changed).fingerprint() != reference
    # larger data: as many bytes of samples, the ends among them
    monkeypatch.setattr(sources, "FINGERPRINT_BYTES", 64 * 32 * 10)
    large = ArraySource(values)
    read: list[tuple[int, int]] = []
    original = large.read
    monkeypatch.setattr(large, "read", lambda a, b: read.append((a, b)) or original(a, b))  # type: ignore[func-returns-value]
    sampled = large.fingerprint()
    assert sum(b - a for a, b in read) == 640
    assert (read[0][0], read[-1][1]) == (0, 5000)
    changed = values.copy()
    changed[4999, 0] = 0
    assert ArraySource(changed).fingerprint() != sampled


# --- arrays ---------------------------------------------------------------------------------------------


def test_arrays_that_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="integers or floats, got an array of dtype bool"):
        open_source(np.zeros((3, 2), bool))
    with pytest.raises(TypeError, match="object"):
        open_source(np.array([[None, 1]]))
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        open_source(np.zeros(3))
    with pytest.raises(DataError, match="no rows"):
        open_source(np.zeros((0, 3)))
    with pytest.raises(DataError, match="one column"):
        open_source(np.zeros((3, 1)))
    with pytest.raises(DataError, match="image_shape"):
        ArraySource(np.zeros((3, 4)), image_shape=(3, 2))
    with pytest.raises(DataError, match="2 column names for 3 columns"):
        ArraySource(np.zeros((3, 3)), columns=["a", "b"])
    with pytest.raises(ValueError, match="role"):
        open_source(np.zeros((3, 3)), "evaluation")


def test_arrays_are_not_copied() -> None:
    source = open_source(TABLE)
    assert np.shares_memory(source.read(0, 60), TABLE)
    assert open_source(source) is source


# --- statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [True, False])
def test_statistics_agree_with_numpy(member: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300_000, 3)) * (1.0, 1e-3, 1e5) + (1e6, 5.0, 0.0)
    split = Split.keyed(ArraySource(values), 1 / 6, 0, member, Purpose.TRAIN_NOISE)
    stats = column_stats(split)
    chosen = values[split.load()[1]]
    assert stats.count == len(chosen)
    np.testing.assert_allclose(stats.mean, chosen.mean(0), rtol=1e-13, atol=1e-7)
    np.testing.assert_allclose(stats.std, chosen.std(0), rtol=1e-10)
    np.testing.assert_array_equal(stats.low, chosen.min(0))
    np.testing.assert_array_equal(stats.high, chosen.max(0))


def test_constant_columns_are_named() -> None:
    values = np.stack([np.arange(5000.0), np.full(5000, 0.1), np.full(5000, -7.0)], axis=1)
    source = ArraySource(values, columns=["a", "b", "c"])
    split = Split.contiguous(source, 0, 5000, Purpose.TRAIN_NOISE)
    stats = column_stats(split)
    assert stats.std[1] == stats.std[2] == 0
    assert stats.mean[1] == 0.1
    with pytest.raises(DataError, match=r"constant columns .*: 1 \('b'\), 2 \('c'\); .*--allow-constant"):
        check_constant(stats, split)
    assert check_constant(stats, split, allow=True) == (1, 2)
    varied = Split.contiguous(ArraySource(values[:, :1].repeat(2, 1)), 0, 5000, Purpose.TRAIN_NOISE)
    assert check_constant(column_stats(varied), varied) == ()


@pytest.mark.parametrize("column", [[1e308, -1e308, 1e308], [1e-200, 2e-200, 3e-200]])
def test_spreads_beyond_float64_are_refused(column: list[float]) -> None:
    values = np.stack([np.arange(3.0), column], axis=1)
    with pytest.raises(DataError, match="column 1 spans"):
        column_stats(Split.contiguous(ArraySource(values), 0, 3, Purpose.TRAIN_NOISE))


# --- the demo and real files ----------------------------------------------------------------------------


def test_the_demo() -> None:
    with open_splits("demo") as splits:
        assert splits.valid is not None
        assert splits.test is not None
        assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [10_000, 2_000, 2_000]
        assert splits.train.source.info.image_shape == (28, 28)
        train, test = splits.train.load()[0], splits.test.load()[0]
        assert not (test[:, None] == train[None, :5]).all(axis=2).any()
        np.testing.assert_array_equal(open_source("demo", "test").read(0, 2000), test)
    refused("demo", "no valid dataset", role="valid")


REAL = {
    "mnist": ((28, 28), 784, 50_000, 10_000, 10_000),
    "cifar10": ((32, 32, 3), 3072, 41_667, 8_333, 9_980),
    "faces48": ((48, 48), 2304, 2_500, 500, 500),
    "magic": (None, 10, 14_265, 2_853, 1_902),
    "cms_zmumu": (None, 8, 7_938, 1_587, 1_058),
    "sdss_dr14": (None, 8, 7_500, 1_500, 1_000),
    "protein_casp": (None, 9, 34_298, 6_859, 4_573),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    folder = os.environ.get("NICECP_DATA")
    if not folder:
        pytest.skip("NICECP_DATA does not name the folder with the real data sets")
    with open_splits(Path(folder) / f"{name}.h5") as splits:
        assert splits.valid is not None
        assert splits.test is not None
        source = splits.train.source
        found = (source.info.image_shape, source.n_features, len(splits.train), len(splits.valid), len(splits.test))
        assert found == REAL[name]
        assert (source.info.columns is None) == source.is_image8
        if not source.is_image8:
            assert check_constant(column_stats(splits.train), splits.train) == ()

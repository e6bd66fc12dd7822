"""`nicecp evaluate`, `sample`, `info` and `data`: their files are opened again and the numbers compared."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load, load_run
from nicecp.cli.main import main
from nicecp.cli.training import short_time
from nicecp.digits import draw_digits
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.records import DataInfo
from tests.nicecp.test_images import decode_png

SMALL = ["--hidden", "6", "--couplings", "3", "--batch-size", "20", "--threads", "1", "--epochs", "2"]
SHAPES = {"table.h5": (240, 5), "images.h5": (240, 3, 4), "colour.h5": (240, 2, 2, 3)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run on each."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(3)
    for name, shape in SHAPES.items():
        with h5py.File(folder / name, "w") as file:
            for part, n in (("train", shape[0]), ("test", 33)):
                if name == "table.h5":
                    file[part] = rng.normal(size=(n, 5)) * [1, 10, 0.1, 3, 5] + 2
                    file[part].attrs["columns"] = [f"c{i}" for i in range(5)]
                else:
                    file[part] = rng.integers(0, 256, (n, *shape[1:]), dtype=np.uint8)
        extra = ["--range", "-1,1"] if name == "colour.h5" else []
        out = folder / f"run-{name}"
        assert main(["train", "--data", str(folder / name), "--out", str(out), "--seed", "5", *extra, *SMALL]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(trained)
    capsys.readouterr()
    return trained


def result(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def dequantized(
    flow: NICE,
    levels: np.ndarray,
    seed: int,
    purpose: int,
    first_row: int = 0,
    epoch: int = 0,
    low: float = 0.0,
    width: float = 1.0,
) -> Any:
    """low + width (k + u) / 256 with the noise that the random numbers' contract gives these rows."""
    rows = levels.reshape(len(levels), -1)
    noise = np.empty(rows.shape)
    flow.backend.fill_uniform(noise, seed, purpose, epoch, first_row)
    return low + width * (rows + noise) / 256


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(["evaluate", "run-table.h5", "--data", "table.h5"], capsys)
    with h5py.File("table.h5") as file:
        log_prob = load("run-table.h5").log_prob(file["test"][()])
    assert found["mean"] == pytest.approx(log_prob.mean(), rel=1e-12)
    assert found["standard_error"] == pytest.approx(log_prob.std(ddof=1) / np.sqrt(33), rel=1e-12)
    assert found["minimum"] == pytest.approx(log_prob.min(), rel=1e-12)
    assert (found["rows"], found["dataset"], found["bits_per_dim"]) == (33, "table.h5:/test", None)


@pytest.mark.parametrize(("name", "low", "width"), [("images.h5", 0.0, 1.0), ("colour.h5", -1.0, 2.0)])
@pytest.mark.parametrize("seed", [5, 6])
def test_evaluate_images(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, low: float, width: float, seed: int
) -> None:
    words = [] if seed == 5 else ["--seed", str(seed)]  # the run's own seed by default
    found = result(["evaluate", f"run-{name}", "--data", name, *words], capsys)
    flow = load(f"run-{name}")
    with h5py.File(name) as file:
        x = dequantized(flow, file["test"][()], seed, Purpose.TEST_NOISE, low=low, width=width)
    log_prob = flow.log_prob(x)
    assert found["mean"] == pytest.approx(log_prob.mean(), rel=1e-6)  # float32 flow
    d = 12
    # PAPER: bits/dim = -(LL - D log(256 / width)) / (D log 2)
    assert found["bits_per_dim"] == pytest.approx((d * np.log(256 / width) - found["mean"]) / (d * np.log(2)))


@pytest.mark.parametrize(("part", "first", "last"), [("train", 0, 200), ("valid", 200, 240)])
def test_evaluate_the_runs_own_rows(
    folder: Path, capsys: pytest.CaptureFixture[str], part: str, first: int, last: int
) -> None:
    flow, record = load_run("run-images.h5")
    assert record is not None
    found = result(["evaluate", "run-images.h5", "--data", "images.h5", "--split", part], capsys)
    # Each validation of a run has noise of its own: that of the best epoch is repeated.
    purpose, epoch = (Purpose.TRAIN_NOISE, 0) if part == "train" else (Purpose.VALID_NOISE, record.best_epoch)
    with h5py.File("images.h5") as file:
        x = dequantized(flow, file["train"][first:last], 5, purpose, first, epoch)
    assert found["mean"] == pytest.approx(flow.log_prob(x).mean(), rel=1e-6)
    assert found["rows"] == last - first
    if part == "valid":
        assert found["mean"] == pytest.approx(record.best_valid_log_likelihood, rel=1e-12)


def test_evaluate_keyed_validation_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table has no noise: the recorded validation log-likelihood comes again."""
    found = result(["evaluate", "run-table.h5", "--data", "table.h5", "--split", "valid"], capsys)
    record = load_run("run-table.h5")[1]
    assert found["mean"] == pytest.approx(record.best_valid_log_likelihood, rel=1e-12)  # type: ignore[union-attr]
    assert (found["rows"], "held out by seed 5" in found["rows_used"]) == (40, True)


def test_evaluate_chooses_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("table.h5") as file, h5py.File("bare.h5", "w") as bare, h5py.File("other.h5", "w") as other:
        bare["train"] = file["train"][()]
        other["train"] = file["train"][()] + 1
        other["valid"] = file["test"][:7]
    cases = [
        ("table.h5", "auto", 33),  # the test dataset
        ("table.h5:/train", "auto", 240),  # the dataset that is named
        ("table.h5", "train", 200),  # the run's own rows
        ("bare.h5", "auto", 40),  # the same numbers in another file, no test dataset: the run's validation rows
        ("bare.h5:/train", "auto", 240),
        ("other.h5", "auto", 240),  # not the run's data
        ("other.h5", "valid", 7),
        ("other.h5", "train", 240),
    ]
    for data, part, rows in cases:
        found = result(["evaluate", "run-table.h5", "--data", data, "--split", part], capsys)
        assert found["rows"] == rows, (data, part)
    with h5py.File("table.h5") as file:
        expected = load("run-table.h5").log_prob(file["train"][()]).mean()
    found = result(["evaluate", "run-table.h5", "--data", "table.h5:/train"], capsys)
    assert found["mean"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("data", ["bare.h5", "table.h5:/train", "lonely.h5"])
def test_the_training_rows_are_no_test_set(folder: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    with h5py.File("table.h5") as file, h5py.File("bare.h5", "w") as bare, h5py.File("lonely.h5", "w") as lonely:
        bare["train"] = file["train"][()] + 1  # not the run's data, but not test data either
        bare["more"] = file["test"][()]
        lonely["test"] = file["train"][()]  # under whatever name
    assert main(["evaluate", "run-table.h5", "--data", data, "--split", "test"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    name = data.partition(":")[0]
    assert captured.err.startswith(f"nicecp: error: {name!r}: ")
    assert ("it has no test dataset" if data == "bare.h5" else "is what the flow was trained on") in captured.err
    for words in ("FILE.h5:/NAME", "/test" if data == "lonely.h5" else "/train", "--split"):
        assert words in captured.err
    result(["evaluate", "run-table.h5", "--data", data], capsys)  # auto says which rows it took


def test_the_test_rows_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("table.h5") as file, h5py.File("only.h5", "w") as only:
        only["test"] = file["test"][()]
    for data in ("table.h5", "only.h5", "table.h5:/test"):
        assert result(["evaluate", "run-table.h5", "--data", data, "--split", "test"], capsys)["rows"] == 33


def test_evaluate_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(["evaluate", "run-images.h5", "--data", "images.h5"], capsys)
    assert main(["evaluate", "run-images.h5", "--data", "images.h5"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{found['mean']:.4f} +- {found['standard_error']:.2g} nats per row, ")
    assert f"{found['bits_per_dim']:.4g} bits/dim (33 rows)" in first
    assert second == "on all 33 rows of images.h5:/test"


# --- sample -----------------------------------------------------------------------------------------------------------


def test_sample_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.h5"
    assert main(["sample", "run-table.h5", "-n", "30", "--seed", "9", "--out", str(out)]) == 0
    assert "30 samples of 5 features, seed 9" in capsys.readouterr().out
    with h5py.File(out) as file:
        assert list(file) == ["samples"]
        samples, attrs = file["samples"][()], dict(file["samples"].attrs)
    np.testing.assert_array_equal(samples, load("run-table.h5").sample(30, 9))
    assert samples.dtype == np.float64
    assert [name.decode() for name in attrs["columns"]] == ["c0", "c1", "c2", "c3", "c4"]
    assert attrs["seed"] == 9
    assert result(["evaluate", "run-table.h5", "--data", str(out)], capsys)["rows"] == 30


def test_a_wide_table_with_long_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names take more than the 64 KiB that attributes of older HDF5 formats may have; info lists the first."""
    names, run, out = (
        tuple(f"a long name for column {i:04d}" for i in range(3000)),
        tmp_path / "w.h5",
        tmp_path / "x.h5",
    )
    flow = NICE(3000, (2,), 3, threads=1)
    flow.info = DataInfo(columns=names)
    flow.save(run)
    assert main(["sample", str(run), "-n", "2", "--out", str(out)]) == 0
    with h5py.File(out) as file:
        assert tuple(name.decode() for name in file["samples"].attrs["columns"]) == names
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    assert f"  columns        {', '.join(names[:24])} and 2,976 more\n" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "low", "high"), [("images.h5", 0.0, 1.0), ("colour.h5", -1.0, 1.0)])
def test_sample_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, low: float, high: float
) -> None:
    shape = SHAPES[name][1:]
    assert main(["sample", f"run-{name}", "-n", "7", "--out", str(tmp_path / "x.h5")]) == 0
    drawn = load(f"run-{name}").sample(7, 0)
    with h5py.File(tmp_path / "x.h5") as file:
        samples, images = file["samples"][()], file["images"][()]
    np.testing.assert_array_equal(samples, drawn.astype(np.float32))
    expected = np.clip(np.floor((drawn - low) / (high - low) * 256), 0, 255).reshape(7, *shape)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected)
    words = ["sample", f"run-{name}", "-n", "7", "--out", str(tmp_path / "x.png"), "--columns-of-grid", "4"]
    assert main(words) == 0
    picture = decode_png((tmp_path / "x.png").read_bytes())
    height, width = shape[:2]
    assert picture.shape[:2] == (2 * (height + 2) + 2, 4 * (width + 2) + 2)
    top, left = 2 + (height + 2), 2 + 2 * (width + 2)  # the image in row 1, column 2
    np.testing.assert_array_equal(picture[top : top + height, left : left + width], expected[6])
    before = (tmp_path / "x.png").read_bytes()
    assert main(words) == 2  # it exists now
    assert main([*words, "--overwrite", "--seed", "1"]) == 0
    assert (tmp_path / "x.png").read_bytes() != before
    capsys.readouterr()
    assert result(["evaluate", f"run-{name}", "--data", str(tmp_path / "x.h5")], capsys)["rows"] == 7


def test_sample_pictures_of_floats_and_of_odd_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = NICE(12, (4,), 3).spec
    NICE.from_spec(spec, info=DataInfo(image_shape=(3, 4))).save("floats.h5")
    assert main(["sample", "floats.h5", "-n", "1", "--out", "x.png"]) == 0
    pixels = decode_png(Path("x.png").read_bytes())[2:5, 2:6]
    assert (pixels.min(), pixels.max()) == (0, 255)
    NICE.from_spec(spec, info=DataInfo(image_shape=(3, 2, 2))).save("odd.h5")
    assert main(["sample", "odd.h5", "--out", "y.png"]) == 2
    assert "(3, 2, 2)" in capsys.readouterr().err
    assert not Path("y.png").exists()


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(["info", "run-images.h5"], capsys)
    flow, record = load_run("run-images.h5")
    assert record is not None
    assert found["model"]["n_parameters"] == flow.n_parameters
    one = {"law": "additive", "conditions_on": 1, "transforms": 0, "hidden": [6], "network": "mlp", "order": None}
    assert found["model"]["couplings"][1] == one
    assert found["model"]["image_shape"] == [3, 4]
    assert found["model"]["preprocessing"] == [{"kind": "dequantize", "low": 0.0, "high": 1.0, "levels": 256}]
    assert found["training"]["best_epoch"] == record.best_epoch
    assert [row["valid_log_likelihood"] for row in found["training"]["history"]] == [
        row.valid_log_likelihood for row in record.history
    ]
    assert main(["info", "run-images.state.h5", "--history", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{record.history[-1].valid_log_likelihood:.2f}" in text
    assert f"{flow.n_parameters:,} parameters" in text
    assert sum(line.strip().startswith(("1  ", "2  ")) for line in text.splitlines()) == 1


def test_info_of_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(["info", "images.h5"], capsys)
    assert [one["path"] for one in found["datasets"]] == ["/test", "/train"]
    assert (found["n_features"], found["eight_bit"], found["image_shape"]) == (12, True, [3, 4])
    assert [found["use"][name]["rows"] for name in ("train", "valid", "test")] == [200, 40, 33]
    assert main(["info", "table.h5"]) == 0
    text = capsys.readouterr().out
    assert "c0, c1, c2, c3, c4" in text
    assert "tests on" in text


def test_info_of_data_that_cannot_be_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with h5py.File("two.h5", "w") as file:
        file["a"], file["b"] = np.zeros((4, 3)), np.zeros((5, 3))
    found = result(["info", "two.h5"], capsys)
    assert len(found["datasets"]) == 2
    assert "choose one" in found["problem"]
    assert main(["info", "two.h5"]) == 0
    assert "cannot use it as it is" in capsys.readouterr().out


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.h5"
    assert main(["data", "demo", "--out", str(out)]) == 0
    assert "train 12000x784" in capsys.readouterr().out
    with h5py.File(out) as file:
        np.testing.assert_array_equal(file["train"][:20], draw_digits(20)[0].reshape(20, -1))
    assert main(["data", "demo", "--out", str(out)]) == 2


def test_data_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with gzip.open("t.csv.gz", "wt") as file:
        file.write("1;2\n3;4.5\n5;6\n")
    words = ["data", "csv", "t.csv.gz", "--out", "t.h5", "--delimiter", "semicolon", "--no-header", "--dataset", "data"]
    assert main(words) == 0
    assert capsys.readouterr().out == "t.h5: data 3x2\n"
    with h5py.File("t.h5") as file:
        np.testing.assert_array_equal(file["data"], [[1, 2], [3, 4.5], [5, 6]])
    Path("h.txt").write_text("a b\n1 2\n3 4\n")
    assert main(["data", "csv", "h.txt", "--out", "h.h5", "--delimiter", "space", "--header"]) == 0
    with h5py.File("h.h5") as file:
        assert [name.decode() for name in file["train"].attrs["columns"]] == ["a", "b"]


def test_data_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8)
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        Path(name).write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 3, 4) + pixels.tobytes())
    assert main(["data", "idx", "train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "--out", "i.h5"]) == 0
    assert "train 2x12, test 2x12" in capsys.readouterr().out
    with h5py.File("i.h5") as file:
        np.testing.assert_array_equal(file["test"], pixels.reshape(2, 12))
    assert main(["data", "idx", ".", "--out", "j.h5"]) == 0
    with h5py.File("j.h5") as file:
        assert sorted(file) == ["test", "train"]
        np.testing.assert_array_equal(file["train"], pixels.reshape(2, 12))


def test_no_history(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count, rows in (("0", 0), ("1", 1), ("9", 2)):
        found = result(["info", "run-table.h5", "--history", count], capsys)
        assert len(found["training"]["history"]) == rows


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12.3 ms"), (2.718, "2.72 s"), (300.0, "5 min 00 s")])
def test_short_times(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


def test_one_epoch_is_singular(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.h5"
    assert main(["train", "--data", "table.h5", "--out", str(out), *SMALL, "--epochs", "1"]) == 0
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1 epochs" not in shown
    assert "1 epoch;" in shown
    assert "? left" not in shown

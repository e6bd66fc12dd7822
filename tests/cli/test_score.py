"""`nicecp score`: its file is opened again and compared with the flow itself, its figures are read as pictures."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.special import logsumexp

from nicecp import NICE, load
from nicecp.beside import Beside
from nicecp.cli.main import main
from nicecp.data_spec import DataSpec
from nicecp.errors import DataError
from nicecp.kernels.backend import Purpose
from nicecp.preprocessing import Dequantize, Standardize
from nicecp.score_file import Scored, row_scores, score_file
from nicecp.score_plots import compare, distances, latent, worst, write_plots
from nicecp.sources import ArraySource

N, D = 3000, 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A flow of a table and one of images, each beside data; of the table's rows some are no numbers."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    shift = Standardize(np.arange(D) * 1.0, np.full(D, 2.0))
    NICE(D, (8,), 3, "gaussian", coupling="affine", init="he", preprocessing=[shift], threads=1).save("table-run.h5")
    images = NICE(6, (8,), 3, dtype="float32", init="he", preprocessing=[Dequantize(-1.0, 1.0)], threads=1)
    # Steep, so that noise matters.
    images.set_parameters(images.parameters() | {"scaling/log_scale": np.full(6, 4.0)})
    images.save("image-run.h5")
    with h5py.File("table.h5", "w") as file:
        x = rng.normal(size=(N, D)) * 2 + np.arange(D)
        file["clean"] = x
        x[[3, 1700], [0, 3]] = np.nan
        x[[5, 6, 2999], 1] = [np.inf, -np.inf, np.inf]
        file["test"] = x
        file["train"] = x[:10]
    with h5py.File("images.h5", "w") as file:
        file["train"] = rng.integers(0, 256, (50, 2, 3), dtype=np.uint8)
    return tmp_path


def scored(*words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["score", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_row_has_its_log_density(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scored("table-run.h5", "--data", "table.h5", "--out", "s.h5", capsys=capsys)
    with h5py.File("table.h5") as file, h5py.File("s.h5") as out:
        assert list(out) == ["log_prob"]
        values, attrs = out["log_prob"][()], dict(out["log_prob"].attrs)
        np.testing.assert_array_equal(values, load("table-run.h5").log_prob(file["test"][()]))
    assert (values.dtype, attrs["data"], attrs["unit"]) == (np.float64, b"table.h5:/test", b"nats")
    assert (attrs["checkpoint"], attrs["seed"], attrs["draws"]) == (b"table-run.h5", 0, 1)
    assert np.flatnonzero(np.isnan(values)).tolist() == [3, 1700]
    assert np.flatnonzero(np.isneginf(values)).tolist() == [5, 6, 2999]
    finite = values[np.isfinite(values)]
    assert (found["rows"], found["nan"], found["outside"]) == (N, 2, 3)
    assert found["mean"] == pytest.approx(finite.mean(), rel=1e-12)
    assert found["standard_error"] == pytest.approx(finite.std(ddof=1) / np.sqrt(len(finite)), rel=1e-10)
    assert (found["minimum"], found["minimum_row"]) == (finite.min(), int(np.argmin(np.where(
        np.isfinite(values), values, np.inf))))  # fmt: skip


def test_what_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "table-run.h5", "--data", "table.h5", "--out", "s.h5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "s.h5: log-densities of 3,000 rows of table.h5:/test"
    assert lines[1].startswith("mean ")
    assert lines[2:] == [
        "2 rows with NaN: log-density NaN",
        "3 rows infinite or outside the flow's support: log-density -inf",
    ]
    assert main(["score", "table-run.h5", "--data", "table.h5:/clean", "--out", "t.h5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_draws_of_noise_are_averaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of densities, not of their logarithms; the first draw is that of `nicecp evaluate`."""
    words = ["image-run.h5", "--data", "images.h5", "--seed", "7"]
    one = scored(*words, "--out", "1.h5", capsys=capsys)
    assert main(["evaluate", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(one["mean"], rel=1e-6)  # a float32 flow
    three = scored(*words, "--out", "3.h5", "--draws", "3", capsys=capsys)
    flow = load("image-run.h5")
    with h5py.File("images.h5") as file, h5py.File("3.h5") as out:
        pixels, values = file["train"][()].reshape(50, 6), out["log_prob"][()]
    every = []
    for draw in range(3):
        noise = np.empty((50, 6))
        flow.backend.fill_uniform(noise, 7, Purpose.TEST_NOISE, draw)
        every.append(flow.log_prob(-1 + 2 * (pixels + noise) / 256))
    np.testing.assert_allclose(values, logsumexp(every, axis=0) - np.log(3), rtol=1e-12)
    assert np.abs(values - np.mean(every, axis=0)).max() > 1e-3
    assert three["draws"] == 3
    with pytest.raises(ValueError, match="draws are for 8-bit data"):
        score_file("table-run.h5", "table.h5", "no.h5", draws=2)
    assert not Path("no.h5").exists()


def test_contexts_go_with_their_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x, context = rng.normal(size=(30, D)), rng.normal(size=(30, 2))
    flow = NICE(D, (8,), 3, coupling="affine", init="he", n_context=2, threads=1)
    flow.save("context-run.h5")
    monkeypatch.setattr("nicecp.score_file._BLOCK_ROWS", 7)
    score_file("context-run.h5", DataSpec(x, context), "s.h5")
    with h5py.File("s.h5") as out:
        np.testing.assert_allclose(out["log_prob"][()], flow.log_prob(x, context), rtol=1e-12)
    with pytest.raises(DataError, match="no context"):
        score_file("context-run.h5", x, "t.h5")
    weight = np.zeros(30)
    weight[[4, 9]] = 1.0
    found = compare(flow, Beside(ArraySource(x), context, weight), seed=3)
    np.testing.assert_allclose(found.log_prob, flow.log_prob(x[[4, 9]], context[[4, 9]]), rtol=1e-12)
    drawn = [flow.sample(2, 3, context[[a, b]]) for a in (4, 9) for b in (4, 9)]
    assert any(np.array_equal(found.samples, one) for one in drawn)


def test_weights_weigh_the_mean_and_the_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.random.default_rng(2).exponential(size=N)
    with h5py.File("table.h5", "r+") as file:
        file["w"] = weight
    words = ["table-run.h5", "--data", "table.h5", "--weights", "/w", "--overwrite"]
    found = scored(*words, "--out", "s.h5", "--plot", "figures", capsys=capsys)
    assert "figures/weights.png" in found["figures"]
    with h5py.File("s.h5") as out:
        values = out["log_prob"][()]
    kept = np.isfinite(values)
    mean = np.average(values[kept], weights=weight[kept])
    assert found["mean"] == pytest.approx(mean, rel=1e-12)
    assert abs(mean - values[kept].mean()) > 1e-3
    # A ratio of two sums over rows (Cochran 1977, section 6.3).
    n, gaps = kept.sum(), weight[kept] * (values[kept] - mean)
    assert found["standard_error"] == pytest.approx(np.sqrt(n / (n - 1) * (gaps**2).sum()) / weight[kept].sum())


def test_rows_and_columns_are_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("table.h5", "r+") as file:
        file["wide"] = np.hstack([file["clean"][()], np.zeros((N, 1))])
    words = ["--data", "table.h5:/wide", "--columns", "3,2,1,0", "--select", "100:150"]
    found = scored("table-run.h5", *words, "--out", "s.h5", "--plot", "page.pdf", capsys=capsys)
    assert (found["rows"], found["figures"]) == (50, ["page.pdf"])
    with h5py.File("table.h5") as file, h5py.File("s.h5") as out:
        expected = load("table-run.h5").log_prob(file["clean"][100:150][:, ::-1])
        np.testing.assert_allclose(out["log_prob"][()], expected, rtol=1e-12)


def test_columns_of_other_data_are_found_by_name_as_evaluate_finds_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a range of rows that the run was trained on says nothing about the rows that are scored."""
    x = np.random.default_rng(6).normal(size=(200, D)) * [1, 2, 3, 4]
    with h5py.File("named.h5", "w") as file:
        for name, order in (("train", [0, 1, 2, 3]), ("other", [2, 0, 3, 1])):
            file[name] = x[:, order]
            file[name].attrs["columns"] = np.array([b"abcd"[i : i + 1] for i in order])
    words = ["--select", "20:180", "--epochs", "1", "--hidden", "8", "--threads", "1"]
    assert main(["train", "--data", "named.h5", "--out", "n.h5", *words]) == 0
    for data in ("named.h5:/other", "named.h5:/train"):
        capsys.readouterr()
        found = scored("n.h5", "--data", data, "--out", "s.h5", "--overwrite", "--plot", "f.png", capsys=capsys)
        with h5py.File("s.h5") as out:
            np.testing.assert_allclose(out["log_prob"][()], load("n.h5").log_prob(x), rtol=1e-12)
        assert main(["evaluate", "n.h5", "--data", data, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(found["mean"], rel=1e-12)


def test_recorded_columns_get_their_noise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in training: a value recorded in steps stands for an interval."""
    x = np.round(np.random.default_rng(5).normal(size=(400, D)), 1)
    with h5py.File("recorded.h5", "w") as file:
        file["train"], file["test"] = x, x[:50]
    words = ["--transform", "*=recorded(0.1)", "--epochs", "1", "--hidden", "8", "--threads", "1"]
    assert main(["train", "--data", "recorded.h5", "--out", "r.h5", *words]) == 0
    capsys.readouterr()
    one = scored("r.h5", "--data", "recorded.h5", "--out", "1.h5", capsys=capsys)
    assert main(["evaluate", "r.h5", "--data", "recorded.h5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(one["mean"], rel=1e-9)
    assert scored("r.h5", "--data", "recorded.h5", "--out", "3.h5", "--draws", "3", capsys=capsys)["draws"] == 3
    with h5py.File("1.h5") as first, h5py.File("3.h5") as three:
        assert np.abs(first["log_prob"][()] - three["log_prob"][()]).max() > 1e-4


def test_blocks_join_without_a_seam(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise belongs to the row's number, statistics are merged: the size of the blocks leaves no trace."""
    whole = score_file("image-run.h5", "images.h5", "whole.h5", draws=2)
    table = score_file("table-run.h5", "table.h5", "table-whole.h5")
    monkeypatch.setattr("nicecp.score_file._BLOCK_ROWS", 7)
    seen: list[tuple[int, int]] = []
    parts = score_file("image-run.h5", "images.h5", "parts.h5", draws=2, progress=lambda *at: seen.append(at))
    assert (seen[0], seen[-1], len(seen)) == ((7, 50), (50, 50), 8)
    table_parts = score_file("table-run.h5", "table.h5", "table-parts.h5")
    for one, other, tolerance in (("whole.h5", "parts.h5", 1e-5), ("table-whole.h5", "table-parts.h5", 1e-12)):
        with h5py.File(one) as a, h5py.File(other) as b:
            np.testing.assert_allclose(a["log_prob"][()], b["log_prob"][()], rtol=tolerance)
    for one, other in ((whole, parts), (table, table_parts)):
        assert other.mean == pytest.approx(one.mean, rel=1e-6)
        assert other.standard_error == pytest.approx(one.standard_error, rel=1e-5)
        assert (other.nan, other.outside, other.minimum_row) == (one.nan, one.outside, one.minimum_row)


def test_statistics_of_rows_without_numbers() -> None:
    nothing = Scored("x", 0, 1)
    nothing.add(np.array([np.nan, -np.inf]))
    assert (nothing.finite, nothing.minimum_row) == (0, -1)
    assert np.isnan([nothing.mean, nothing.standard_error]).all()
    nothing.add(np.array([-3.0]))
    assert (nothing.mean, nothing.minimum, nothing.minimum_row) == (-3.0, -3.0, 2)
    assert np.isnan(nothing.standard_error)
    nothing.add(np.array([-1e300]))
    assert (nothing.minimum_row, nothing.standard_error) == (3, np.inf)
    weighted = Scored("x", 0, 1)
    weighted.add(np.array([-1.0, -2.0]), np.zeros(2))
    weighted.add(np.array([-1.0, -4.0]), np.array([1.0, 2.0]))
    assert (weighted.mean, weighted.minimum) == (-3.0, -4.0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicecp.score_file._BLOCK_ROWS", 4096)
    monkeypatch.setattr("nicecp.convert._IN_MEMORY", 2**16)
    with h5py.File("large.h5", "w") as file:
        for name, n in (("a", 20_000), ("b", 120_000)):
            file.create_dataset(name, (n, D), "f8", chunks=(4096, D))[...] = 1.0
    peaks = {}
    for name in "aab":  # the first run warms up
        tracemalloc.start()
        score_file("table-run.h5", f"large.h5:/{name}", "s.h5", overwrite=True)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # The second has 3.2 MB more rows, and 0.8 MB more of results.
    assert peaks["b"] < peaks["a"] + 4e5


def test_a_row_that_overflows_is_named_and_nothing_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("table.h5", "r+") as file:
        file["clean"][1234, 2] = 1e300
        file["clean"][2000, 2] = 1e300
    assert main(["score", "table-run.h5", "--data", "table.h5:/clean", "--out", "s.h5"]) == 2
    assert "'table.h5:/clean': the log-density of row 1234 is not finite" in capsys.readouterr().err
    assert not Path("s.h5").exists()
    assert [path.name for path in Path().iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["table-run.h5", "--data", "images.h5", "--out", "s.h5"], ["'images.h5:/train'", "6 columns", "4 features"]),
        (["image-run.h5", "--data", "images.h5", "--out", "s.txt"], ["'s.txt'", ".h5"]),
        (["image-run.h5", "--data", "images.h5", "--out", "images.h5", "--overwrite"], ["'images.h5'", "inputs"]),
        (["image-run.h5", "--data", "images.h5", "--out", "image-run.h5"], ["'image-run.h5'", "inputs"]),
        (["image-run.h5", "--data", "images.h5", "--out", "table.h5"], ["'table.h5'", "already exists"]),
        (["table-run.h5", "--data", "table.h5", "--out", "s.h5", "--draws", "2"], ["8-bit", "'table.h5:/test'"]),
        (["table-run.h5", "--data", "table.h5", "--out", "s.h5", "--plot", "table.h5"], ["'table.h5'", "folder"]),
        (["table-run.h5", "--data", "table.h5", "--out", "s.h5", "--plot", "no/p.png"], ["'no/p.png'", "folder"]),
        (["table-run.h5", "--data", "table.h5", "--out", "s.h5", "--plot", "./s.h5"], ["'./s.h5'", "another file"]),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    before = sorted(path.name for path in Path().iterdir())
    assert main(["score", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert sorted(path.name for path in Path().iterdir()) == before


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_in_a_folder_or_on_one_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table-run.h5", "--data", "table.h5", "--overwrite"]
    found = scored(*words, "--out", "s.h5", "--plot", "figures", capsys=capsys)
    names = [f"figures/{name}.png" for name in ("corner", "latent", "log-density")]
    assert found["figures"] == names
    scored(*words, "--out", "s.h5", "--plot", "page.png", capsys=capsys)
    for name in [*names, "page.png"]:
        assert imread(name)[..., :3].std() > 0.05, name
    scored(*words, "--out", "s.h5", "--plot", "figures", capsys=capsys)
    assert main(["score", *words[:3], "--out", "t.h5", "--plot", "figures"]) == 2
    assert "'figures/corner.png': already exists" in capsys.readouterr().err
    assert not Path("t.h5").exists()


@pytest.mark.slow
def test_figures_of_images_and_of_weights(folder: Path) -> None:
    flow, x = load("table-run.h5"), np.random.default_rng(0).normal(size=(200, D))
    weighted = compare(flow, Beside(ArraySource(x, columns=tuple("abcd")), weight=np.arange(200)), rows=100)
    assert weighted.names == ("a", "b", "c", "d")
    assert [Path(name).name for name in write_plots(weighted, "w")] == [
        "corner.png", "latent.png", "log-density.png", "weights.png"
    ]  # fmt: skip
    with h5py.File("images.h5") as file:
        source = ArraySource(file["train"][()].reshape(50, 6))
    images = compare(load("image-run.h5"), source, seed=7)
    # The rows carry the noise that they are scored with.
    expected = next(row_scores(load("image-run.h5"), source, 7))[1]
    np.testing.assert_array_equal(images.log_prob, expected)
    assert write_plots(images, "page.svg") == ["page.svg"]


def test_what_is_compared(folder: Path) -> None:
    flow = load("table-run.h5")
    with h5py.File("table.h5") as file:
        x = file["test"][()]
    weight = np.ones(N)
    weight[:100] = 0
    found = compare(flow, Beside(ArraySource(file_rows(x)), weight=weight), rows=500)
    # 50 runs of ten neighbours from the first row to the last, of which some weigh nothing and one is infinite.
    assert 400 < len(found.data) < 500
    assert np.isfinite(found.data).all()
    assert (found.data[-1] == x[-2]).all()
    assert not (found.data[:, None] == x[None, :100]).all(axis=2).any()
    np.testing.assert_array_equal(found.latent, flow.forward(found.data)[0])
    np.testing.assert_array_equal(found.samples, flow.sample(len(found.data), 0))
    with pytest.raises(DataError, match="of 2 rows 1 can be drawn"):
        compare(flow, Beside(ArraySource(x[10:12]), weight=[0, 1]))


def file_rows(x: Any) -> Any:
    """The array as a source would read it from a file: with NaN in it."""
    return np.array(x)


def test_the_worst_columns_are_found() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(500, 5)), rng.normal(size=(800, 5))
    first[:, 3] += 2
    found = distances(first, second)
    from scipy.stats import ks_2samp

    expected = [ks_2samp(first[:, k], second[:, k]).statistic for k in range(5)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert worst(found, 1).tolist() == [3]
    # Weights count as repetitions.
    weight = rng.integers(0, 4, 500)
    np.testing.assert_allclose(
        distances(first, second, weight.astype(float)), distances(first.repeat(weight, axis=0), second), atol=1e-12
    )


def test_latent_quantiles_of_true_samples_lie_on_the_line(folder: Path) -> None:
    """Rows of weight 1 drawn from the flow follow the prior; those with other weights do not."""
    from nicecp.plot import new_figure

    flow = load("table-run.h5")
    x = flow.sample(4000, 3)
    tilt = np.exp(flow.forward(x)[0][:, 0] / 4)  # by a factor of h_0 its distribution moves to the right
    for weight, moved in ((None, 0.0), (tilt, 1.0)):
        figure = new_figure(6, 6)
        latent(figure, compare(flow, Beside(ArraySource(x), weight=weight)))
        expected, found = (line.get_data()[1] for line in figure.axes[0].lines)
        middle = np.abs(expected) < 2
        shift = float(np.mean((found - expected)[middle]))
        assert (abs(shift) < 0.15) == (moved == 0.0)

"""Figures: the numbers behind them, what is drawn, files, refusals."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nicecp import plot
from nicecp.checkpoint import save_run
from nicecp.cli.main import main
from nicecp.errors import MissingExtra, OutputError
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.preprocessing import Dequantize
from nicecp.records import DataInfo, EpochRecord, RunRecord
from tests.nicecp.test_images import decode_png

COLOUR = (4, 5, 3)
GREY = (6, 10)


def flow_of(shape: tuple[int, ...] | None, prior: str = "logistic", d: int = 60) -> NICE:
    """A flow on images with a spread spectrum."""
    spec = dataclasses.replace(NICE(d, (8,), 3).spec, prior=prior)
    flow = NICE.from_spec(spec, None, (Dequantize(),) if shape else (), DataInfo(image_shape=shape), init="he", seed=2)
    values = flow.parameters()
    values["scaling/log_scale"] = np.random.default_rng(3).normal(size=d) + 2
    flow.set_parameters(values)
    return flow


def record_of(epochs: int, best: int, valid: bool = True) -> RunRecord:
    rows = [EpochRecord(e, -90.0 / e, -100.0 / e if valid else math.nan, 1e-3, 1.0) for e in range(1, epochs + 1)]
    return RunRecord(epoch=epochs, best_epoch=best, best_valid_log_likelihood=-100.0 / best, history=rows)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, shape in (("colour.h5", COLOUR), ("grey.h5", GREY), ("table.h5", None)):
        flow = flow_of(shape)
        save_run(name, flow, flow.parameters(), record_of(7, 5))
    flow_of(GREY).save("bare.h5")
    return tmp_path


def test_spectrum_is_the_inverse_of_the_scaling() -> None:
    flow = flow_of(None)
    sigma = plot.spectrum(flow)
    log_scale = flow.parameters()["scaling/log_scale"]
    assert (np.diff(sigma) <= 0).all()
    np.testing.assert_allclose(sigma, sorted(1 / np.exp(log_scale), reverse=True), rtol=1e-12)


@pytest.mark.parametrize(("prior", "variance"), [("logistic", np.pi**2 / 3), ("gaussian", 1.0)])
def test_the_sphere(prior: str, variance: float) -> None:
    flow = flow_of(None, prior)
    h = plot.sphere(flow, 4, 7, radius=0.5, seed=1)
    assert h.shape == (4, 7, 60)
    # All points have one length, that of half a typical latent ...
    np.testing.assert_allclose(np.linalg.norm(h, axis=-1), 0.5 * np.sqrt(60 * variance), rtol=1e-12)
    # ... and lie in three dimensions, not in fewer.
    singular = np.linalg.svd(h.reshape(-1, 60), compute_uv=False)
    assert singular[2] > 1.0
    assert singular[3] < 1e-12
    # Azimuth: opposite columns (of an even number) have opposite parts across the axis; polar angle: rows mirror.
    h = plot.sphere(flow, 4, 8, seed=1)
    axis = h[0].mean(0)
    np.testing.assert_allclose(h[:, 0] + h[:, 4], 2 * h.mean(1), atol=1e-12)
    np.testing.assert_allclose(h[0].mean(0), -h[3].mean(0), atol=1e-12)
    polar = np.arccos(h[:, 3] @ axis / np.linalg.norm(axis) / np.linalg.norm(h[0, 0]))
    np.testing.assert_allclose(polar, np.pi * (np.arange(4) + 0.5) / 4, rtol=1e-9)
    typical = np.linalg.norm(flow.forward(flow.sample(500, 3))[0], axis=1)
    assert np.linalg.norm(h[0, 0]) == pytest.approx(typical.mean(), rel=0.03)  # 500 draws differ by under 1 %


def test_all_rotations_are_equally_likely() -> None:
    """Gram-Schmidt of Gaussian vectors: each axis leans towards the vector that it comes from."""
    flow = flow_of(None)
    drawn = flow.backend.alloc((3, 60), np.float64)
    for seed in range(5):
        flow.backend.fill_normal(drawn, seed, Purpose.SAMPLE, 1)
        h = plot.sphere(flow, 2, 4, seed=seed)
        axes = h[0, 0] - h[0, 2], h[0, 1] - h[0, 3], h[0].sum(0)  # x, y and z of the sphere
        for i, axis in enumerate(axes):
            assert np.dot(axis, drawn[i]) > 0
            np.testing.assert_allclose(axis @ drawn[:i].T, 0, atol=1e-9)


def test_the_manifold_depends_on_the_seed_alone() -> None:
    flow = flow_of(GREY)
    x = plot.manifold(flow, 3, 4, seed=1)
    np.testing.assert_array_equal(x, plot.manifold(flow, 3, 4, seed=1))
    np.testing.assert_allclose(flow.forward(x)[0], plot.sphere(flow, 3, 4, seed=1), atol=1e-9)
    assert np.abs(x - plot.manifold(flow, 3, 4, seed=2)).max() > 0.01
    # Other random numbers than those of the samples of that seed.
    assert np.abs(np.corrcoef(plot.sphere(flow, 3, 4, seed=1)[0, 0], flow.forward(flow.sample(1, 1))[0])[0, 1]) < 0.9


@pytest.mark.parametrize("bad", [{"rows": 0}, {"columns": 0}, {"radius": 0.0}, {"radius": math.inf}])
def test_refused_spheres(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive radius"):
        plot.sphere(flow_of(None), **{"rows": 2, "columns": 2, **bad})
    with pytest.raises(ValueError, match="this flow has 2"):
        plot.sphere(NICE(2, (3,), 3), 2, 2)


def test_pictures_hold_the_images() -> None:
    """The picture drawn is the grid of the samples' bytes, in colour where the images are."""
    for shape in (GREY, COLOUR):
        flow = flow_of(shape)
        shown = np.asarray(plot.samples_figure(flow, 6, 4, 3).axes[0].images[0].get_array())
        assert shown.shape == (2 * (shape[0] + 2) + 2, 3 * (shape[1] + 2) + 2, *shape[2:])
        expected = np.clip(np.floor(flow.sample(6, 4)[4].reshape(shape) * 256), 0, 255)
        top, left = 2 + shape[0] + 2, 2 + shape[1] + 2
        np.testing.assert_array_equal(shown[top : top + shape[0], left : left + shape[1]], expected)
        shown = np.asarray(plot.manifold_figure(flow, 2, 3, seed=5).axes[0].images[0].get_array())
        last = np.clip(np.floor(plot.manifold(flow, 2, 3, seed=5)[1, 2].reshape(shape) * 256), 0, 255)
        np.testing.assert_array_equal(shown[-1 - shape[0] : -1, -1 - shape[1] : -1], last)


def test_the_curve_shows_train_validation_and_the_best_epoch() -> None:
    axes = plot.curve_figure(record_of(7, 5)).axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    np.testing.assert_allclose(lines["train"], [(e, -90.0 / e) for e in range(1, 8)])
    np.testing.assert_allclose(lines["validation"], [(e, -100.0 / e) for e in range(1, 8)])
    (best,) = (label for label in lines if label.startswith("best epoch 5: -20.00"))
    np.testing.assert_array_equal(lines[best][:, 0], [5, 5])
    without = plot.curve_figure(dataclasses.replace(record_of(3, 3, False), best_valid_log_likelihood=math.nan)).axes[0]
    labels = [str(line.get_label()) for line in without.lines]
    assert labels == ["train", "best epoch 3"]


def test_the_spectrum_figure() -> None:
    flow = flow_of(None)
    for log in (False, True):
        axes = plot.spectrum_figure(flow, log).axes[0]
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), plot.spectrum(flow))
        assert axes.get_yscale() == ("log" if log else "linear")


@pytest.mark.parametrize(
    "words",
    [
        ["samples", "colour.h5", "-n", "5", "--columns", "2"],
        ["spectrum", "table.h5"],
        ["manifold", "grey.h5", "--grid", "2x3", "--seed", "4", "--radius", "0.7"],
        ["curve", "table.h5", "--dpi", "60"],
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_files(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], suffix: str) -> None:
    out = f"x{suffix}"
    assert main(["plot", *words, "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}: {words[0]} of {words[1]}\n"
    first = Path(out).read_bytes()
    if suffix == ".png":
        picture = decode_png_any(first)
        assert len(np.unique(picture)) > 2
    else:
        assert first.startswith(b"%PDF" if suffix == ".pdf" else b"<?xml")
    assert main(["plot", *words, "--out", out]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["plot", *words, "--out", out, "--overwrite"]) == 0
    assert Path(out).read_bytes() == first
    assert sorted(os.listdir()) == sorted(["colour.h5", "grey.h5", "table.h5", "bare.h5", out])


def decode_png_any(data: bytes) -> Any:
    """matplotlib's own pictures are RGBA, which our decoder does not know."""
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(data))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["samples", "table.h5", "--out", "x.png"], "'table.h5': its data have no image shape; draw its spectrum"),
        (["manifold", "table.h5", "--out", "x.png"], "'table.h5': its data have no image shape; draw its spectrum"),
        (["curve", "bare.h5", "--out", "x.png"], "'bare.h5': it has no record of a finished epoch; draw the curve"),
        (["spectrum", "grey.h5", "--out", "x.jpg"], "'x.jpg': unknown kind of figure; name it .png, .pdf, .svg"),
        (["spectrum", "none.h5", "--out", "x.png"], "'none.h5': "),
        (["spectrum", "grey.h5", "--out", "no/x.png"], "'no/x.png': its folder cannot be written"),
        (["manifold", "grey.h5", "--out", "x.png", "--grid", "12"], "'12' is not ROWSxCOLUMNS"),
        (["samples", "grey.h5", "--out", "x.png", "-n", "999999999999"], "not enough memory"),
    ],
)
def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["plot", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not Path("x.png").exists()
    assert not Path("x.jpg").exists()


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "spectrum", "grey.h5", "--out", "x.png"]) == 2
    message = "figures need matplotlib, which is not installed; pip install 'nicecp[plot]'"
    assert capsys.readouterr().err == f"nicecp: error: {message}\n"
    with pytest.raises(MissingExtra, match="nicecp"):
        plot.samples_figure(flow_of(GREY))
    assert main(["sample", "grey.h5", "-n", "2", "--out", "x.png"]) == 0  # drawn without it
    assert decode_png(Path("x.png").read_bytes()).shape == (6 + 4, 2 * (10 + 2) + 2)


def test_unknown_figures(folder: Path) -> None:
    with pytest.raises(ValueError, match="samples, spectrum, manifold, curve"):
        plot.plot("histogram", "grey.h5", "x.png")
    Path("x.png").symlink_to("grey.h5")
    with pytest.raises(OutputError, match="one of the inputs"):
        plot.plot("spectrum", "grey.h5", "x.png", overwrite=True)

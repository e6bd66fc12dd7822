"""`nicecp inpaint` and `nicecp plot inpainting`: files, reports, refusals, interrupts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load
from nicecp.cli.main import main
from nicecp.data import open_source, open_splits
from nicecp.flow import NICE
from nicecp.inpaint import inpaint
from nicecp.inpainting import inpaint_images
from nicecp.masks import MASKS, named_mask
from nicecp.plot import inpainting_figure
from tests.nicecp.test_images import decode_png
from tests.nicecp.test_inpaint import SHAPE, flow_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    with h5py.File("images.h5", "w") as file:
        file["train"] = rng.integers(0, 256, (50, *SHAPE), np.uint8)
        file["test"] = rng.integers(0, 256, (9, *SHAPE), np.uint8)
    with h5py.File("colour.h5", "w") as file:
        file["train"] = rng.integers(0, 256, (9, 4, 2, 3), np.uint8)
    with h5py.File("floats.h5", "w") as file:
        file["train"] = rng.random((9, *SHAPE))
        file["wild"] = np.where(np.arange(24) == 7, 1.25, 0.5) * np.ones((3, 1))
    source = open_source("images.h5")
    flow = flow_of()
    flow.info = dataclasses.replace(flow.info, fingerprint=source.fingerprint())
    source.close()
    flow.save("flow.h5")
    flow_of((4, 2, 3)).save("flow-colour.h5")
    flow_of(steps=False).save("flow-floats.h5")
    NICE(24, (4,), 3).save("flow-table.h5")
    with h5py.File("mask.h5", "w") as file:
        file["hidden"] = np.eye(6, 4, dtype=np.uint8)
    return tmp_path


QUICK = ["--iterations", "6", "-n", "3"]


def test_a_file_of_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inpaint", "flow.h5", "--data", "images.h5", *QUICK, "--first", "2", "--seed", "4", "--chains", "2"]
    assert main([*words, "--mask", "all", "--out", "x.h5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["mask"] for entry in report["masks"]] == list(MASKS)
    with h5py.File("x.h5") as file, h5py.File("images.h5") as data:
        found = {name: file[name][()] for name in file}
        attrs = dict(file.attrs)
        original = (data["test"][2:5].reshape(3, 24) + 0.5) / 256
        fill = (data["train"][:42].mean(0).reshape(24) + 0.5) / 256  # the last sixth validates
    assert found["result"].shape == (10, 2, 3, 24)
    np.testing.assert_array_equal(found["original"], original)
    assert [name.decode() for name in found["masks"]] == list(MASKS)
    assert (attrs["iterations"], attrs["first"], attrs["seed"]) == (6, 2, 4)
    flow = load("flow.h5")
    hidden = np.array([named_mask(name, SHAPE, 4) for name in MASKS])
    np.testing.assert_array_equal(found["hidden"], hidden)
    again = inpaint(flow, np.tile(original, (10, 1)), np.repeat(hidden, 3, 0), 6, chains=2, seed=4)
    np.testing.assert_array_equal(found["result"][:, 1], again.result[1].reshape(10, 3, 24))
    np.testing.assert_array_equal(found["start"][:, 1], again.start[1].reshape(10, 3, 24))
    np.testing.assert_array_equal(
        found["result_images"], np.clip(np.floor(found["result"] * 256), 0, 255).reshape(10, 2, 3, *SHAPE)
    )
    for k, entry in enumerate(report["masks"]):
        at = hidden[k]
        np.testing.assert_allclose(found["log_prob_after"][k], flow.log_prob(found["result"][k]))
        np.testing.assert_allclose(entry["log_prob_before"], flow.log_prob(found["start"][k]).mean(1))
        np.testing.assert_allclose(entry["log_prob_after"], found["log_prob_after"][k].mean(1))
        off = found["result"][k].mean(0)[:, at] - original[:, at]
        assert entry["error_of_mean"] == pytest.approx((off**2).mean())
        assert entry["error_of_one_chain"] == pytest.approx(((found["result"][k] - original)[..., at] ** 2).mean())
        assert entry["error_of_training_mean"] == pytest.approx(((fill - original)[:, at] ** 2).mean())


def test_the_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inpaint", "flow.h5", "--data", "images.h5", *QUICK, "--chains", "1"]
    assert main([*words, "--out", "x.png"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in MASKS)
    picture = decode_png(Path("x.png").read_bytes())
    block = (10 * (6 + 2) + 2, 3 * (4 + 2) + 2)
    assert picture.shape == (block[0], 3 * block[1])
    with h5py.File("images.h5") as data:
        first = data["test"][0]
    np.testing.assert_array_equal(picture[2:8, 2:6], first)
    start = picture[2:8, block[1] + 2 : block[1] + 6]
    result = picture[2:8, 2 * block[1] + 2 : 2 * block[1] + 6]
    np.testing.assert_array_equal(start[3:], first[3:])  # top hidden
    np.testing.assert_array_equal(result[3:], first[3:])
    assert (start[:3] != first[:3]).any()
    assert (result[:3] != start[:3]).any()
    assert main([*words, "--out", "y.png", "--mask", "mask.h5"]) == 0
    picture = decode_png(Path("y.png").read_bytes())
    assert picture.shape == (3 * (6 + 4), block[1])
    seen = np.eye(6, 4) == 0
    np.testing.assert_array_equal(picture[22:28, 2:6][seen], first[seen])
    assert (picture[22:28, 2:6] != first)[~seen].any()


def test_chains_are_listed_for_one_mask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inpaint", "flow.h5", "--data", "images.h5", "--mask", "top", *QUICK, "--out", "x.h5"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n  chain ") == 16
    assert "mean of 16" in out
    with h5py.File("x.h5") as file:
        before, after = (file[f"log_prob_{when}"][0, 15].mean() for when in ("before", "after"))
    assert f"  chain 15: {before:.2f} -> {after:.2f}\n" in out


def test_colour_and_floats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mask", "odd", "--chains", "2", *QUICK]
    assert main(["inpaint", "flow-colour.h5", "--data", "colour.h5", *words, "--out", "c.png"]) == 0
    assert decode_png(Path("c.png").read_bytes()).shape == (4 * (4 + 4), 3 * (2 + 2) + 2, 3)
    # Values in data space for a flow of 8-bit data.
    assert main(["inpaint", "flow.h5", "--data", "floats.h5:/train", *words, "--out", "f.h5", "--json"]) == 0
    with h5py.File("f.h5") as file, h5py.File("floats.h5") as data:
        np.testing.assert_allclose(file["original"][()], data["train"][:3].reshape(3, 24))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["masks"][0]["error_of_training_mean"] is None
    words += ["--box", "0,1", "--out", "g.h5"]
    assert main(["inpaint", "flow-floats.h5", "--data", "floats.h5:/train", *words]) == 0


def test_the_training_mean_is_that_of_the_run_s_rows_and_a_logit_s_range_is_the_box(folder: Path) -> None:
    """Floats in 0..1, of which half validate: those that the run drew by its own seed."""
    small = ["--hidden", "4", "--couplings", "3", "--epochs", "1", "--threads", "1"]
    with h5py.File("floats.h5", "r+") as file:
        file["many/train"] = x = np.random.default_rng(5).random((60, *SHAPE))
    words = ["--data", "floats.h5:/many", "--logit", "0.05", "--range", "0,1", "--valid-fraction", "0.5", "--seed", "7"]
    assert main(["train", *words, *small, "--out", "run.h5"]) == 0
    painted = inpaint_images("run.h5", "floats.h5:/many", "top", iterations=5, n=3)
    with open_splits("floats.h5:/many", 0.5, 7) as splits:
        rows = splits.train.rows()
    np.testing.assert_allclose(painted.fill, x[rows].reshape(30, 24).mean(axis=0))
    hidden = painted.result[..., painted.hidden[0]]
    assert 0 <= hidden.min() < hidden.max() <= 1


def test_plot_inpainting(folder: Path) -> None:
    words = ["plot", "inpainting", "flow.h5", "--data", "images.h5", *QUICK, "--chains", "2", "--out", "x.png"]
    assert main(words) == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 2
    painted = inpaint_images("flow.h5", "images.h5", "all", iterations=2, n=3, chains=2)
    axes = inpainting_figure(painted).axes
    assert [one.get_title() for one in axes] == ["original", "initial state", "result", "mean of 2 chains"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(MASKS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flow-table.h5", "--data", "images.h5"], "'flow-table.h5': its data have no image shape; inpainting is for"),
        (["flow.h5", "--data", "floats.h5:/wild"], "row 0, column 7 is 1.25, outside the data's box 0..1; give"),
        (["flow-floats.h5", "--data", "floats.h5:/train"], "--box"),
        (["flow-floats.h5", "--data", "images.h5"], "8-bit data, but the flow was trained on float data"),
        (["flow.h5", "--data", "images.h5", "--first", "7"], "images 7 to 9 are not among the 9 of"),
        (["flow.h5", "--data", "images.h5", "--mask", "diagonal"], "unknown mask 'diagonal': expected one of top, "),
        (["flow.h5", "--data", "images.h5", "--mask", "none.h5"], "'none.h5': "),
        (
            ["flow.h5", "--data", "images.h5", "--mask", "wrong.h5"],
            "shape (4, 6), images of this flow (6, 4)",
        ),
        (["flow.h5", "--data", "images.h5", "--mask", "grey.h5"], "the mask holds 7; store 0 (seen) and 1 (hidden)"),
        (["flow.h5", "--data", "images.h5", "--mask", "empty.h5"], "the mask hides nothing; store 1"),
        (["flow-colour.h5", "--data", "images.h5", "--mask", "mask.h5"], "images of this flow (4, 2, 3)"),
        (
            ["flow.h5", "--data", "images.h5", "--chains", "9999999"],
            "not enough memory (inpainting 3 images",
        ),
    ],
)
@pytest.mark.parametrize("out", ["x.png", "x.h5"])
def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, out: str) -> None:
    for name, values in (("wrong", np.ones((4, 6))), ("grey", np.full((6, 4), 7)), ("empty", np.zeros((6, 4)))):
        with h5py.File(f"{name}.h5", "w") as file:
            file["hidden"] = values.astype(np.uint8)
    before = sorted(os.listdir())
    assert main(["inpaint", *words, *QUICK, "--out", out]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert message in shown.err
    assert sorted(os.listdir()) == before


def test_interrupted(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after some iterations: one line, 130, and the old file as it was."""
    real, calls = NICE.grad_log_prob, []

    def interrupt(self: NICE, *given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *given, **named)

    monkeypatch.setattr(NICE, "grad_log_prob", interrupt)
    Path("x.png").write_bytes(b"old")
    before = sorted(os.listdir())
    words = ["inpaint", "flow.h5", "--data", "images.h5", *QUICK, "--out", "x.png", "--overwrite"]
    assert main(words) == 130
    assert capsys.readouterr().err == "nicecp: error: interrupted\n"
    assert Path("x.png").read_bytes() == b"old"
    assert sorted(os.listdir()) == before

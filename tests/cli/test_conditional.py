"""Contexts and weights on the command line: train, resume, evaluate, sample, info."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load, load_run
from nicecp.cli.main import main

SMALL = ["--hidden", "6", "--couplings", "3", "--batch-size", "50", "--threads", "1", "--epochs", "2"]


def run(*words: str) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """columns.h5: context u, v and weights w are columns; beside.h5: datasets; and a run on each."""
    folder = tmp_path_factory.mktemp("conditional")
    rng = np.random.default_rng(0)
    c = rng.normal(size=(500, 2)) + np.array([3, 0])
    x = c @ np.array([[1.0, 0, 2], [0, 1, 1]]) + 0.3 * rng.normal(size=(500, 3))
    w = rng.exponential(size=500)
    w[::9] = 0
    with h5py.File(folder / "columns.h5", "w") as file:
        file["train"] = np.hstack([x[:, :2], c[:, :1], x[:, 2:], c[:, 1:], w[:, None]])
        file.attrs["columns"] = ["x", "y", "u", "z", "v", "w"]
    with h5py.File(folder / "beside.h5", "w") as file:
        file["train"], file["ctx"], file["w"] = x, c, w
        file["test"], file["ctx_test"], file["w_test"] = x[:60], c[:60], w[:60]
    assert run("train", "--data", folder / "columns.h5", "--context", "u,v", "--weights", "w",
               "--out", folder / "a.h5", *SMALL) == 0  # fmt: skip
    assert run("train", "--data", folder / "beside.h5", "--context", "/ctx", "--weights", f"{folder}/beside.h5:/w",
               "--out", folder / "b.h5", *SMALL) == 0  # fmt: skip
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(trained)
    capsys.readouterr()
    return trained


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error of a command that ends with code 2."""
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_both_ways_of_naming_them_are_the_same_run(folder: Path) -> None:
    columns, beside = load("a.h5"), load("b.h5")
    for name, value in columns.parameters().items():
        assert np.array_equal(beside.parameters()[name], value)
    assert columns.context is not None
    assert beside.context is not None
    assert np.array_equal(columns.context.mean, beside.context.mean)
    assert columns.context.names == ("u", "v")
    assert columns.names == ("x", "y", "z")
    _, record = load_run("b.h5")
    assert record is not None
    assert (record.config["context"], record.config["weights"]) == ("/ctx", "/w"), "so that the file may be moved"


def test_what_training_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "columns.h5", "--context", "u,v", "--weights", "w", "--out", "c.h5", *SMALL) == 0
    said = capsys.readouterr()
    assert "columns.h5:/train, 500 rows of 3 columns" in said.out
    assert "drawn by seed 0, by weight" in said.out
    assert "effective sample size (Kish)" in said.out.split("epoch 1/2")[0], "before training"
    assert "3 features given 2" in said.out
    assert ", weighted, worth " in said.out
    assert "nicecp sample c.h5 -n 100 --context " in said.out
    assert "Kish's effective sample size" not in said.err, "there are enough for so small a flow"
    capsys.readouterr()
    assert run("train", "--data", "columns.h5", "--weights", "w", "--out", "d.h5", "--hidden", "2x64",
               "--threads", "1", "--epochs", "1") == 0  # fmt: skip
    assert "warning: 'columns.h5:/train': the weights make the" in capsys.readouterr().err


def test_evaluation_repeats_the_run_s_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluated(*words: str) -> Any:
        assert run("evaluate", *words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    _, record = load_run("a.h5")
    assert record is not None
    found = evaluated("a.h5", "--data", "columns.h5")
    assert found["mean"] == pytest.approx(record.best_valid_log_likelihood, rel=1e-12)
    assert 0 < found["effective_rows"] < found["rows"]
    test = evaluated("b.h5", "--data", "beside.h5")
    flow = load("b.h5")
    with h5py.File("beside.h5") as file:
        each = flow.log_prob(file["test"][()], file["ctx_test"][()])
        w = file["w_test"][()]
    assert test["mean"] == pytest.approx(np.average(each, weights=w), rel=1e-12)
    assert test["rows"] == (w > 0).sum()
    plain = evaluated("b.h5", "--data", "beside.h5", "--weights", "none")
    assert plain["mean"] == pytest.approx(each.mean(), rel=1e-12)
    assert plain["effective_rows"] is None
    chosen = evaluated("a.h5", "--data", "columns.h5", "--columns", "x,y,z", "--weights", "none")
    with h5py.File("columns.h5") as file:
        rows = file["train"][()]
    assert chosen["mean"] == pytest.approx(load("a.h5").log_prob(rows[:, [0, 1, 3]], rows[:, [2, 4]]).mean(), rel=1e-12)
    with h5py.File("beside.h5") as file:
        other = file["ctx"][:60]
    with h5py.File("other.h5", "w") as file:
        file["rows"], file["given"] = np.zeros((60, 3)), other
    named = evaluated("b.h5", "--data", "other.h5:/rows", "--context", "other.h5:/given", "--weights", "none")
    assert named["mean"] == pytest.approx(flow.log_prob(np.zeros(3), other).mean(), rel=1e-12)


def test_scores_of_every_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", "b.h5", "--data", "beside.h5", "--out", "scores.h5") == 0
    assert run("score", "a.h5", "--data", "columns.h5", "--out", "all.h5") == 0
    flow = load("b.h5")
    with h5py.File("scores.h5") as scores, h5py.File("beside.h5") as file, h5py.File("all.h5") as every:
        np.testing.assert_allclose(
            scores["log_prob"][()], flow.log_prob(file["test"][()], file["ctx_test"][()]), rtol=1e-12
        )
        np.testing.assert_allclose(every["log_prob"][()], flow.log_prob(file["train"][()], file["ctx"][()]), rtol=1e-12)
    capsys.readouterr()
    said = refused(capsys, "score", "b.h5", "--data", "beside.h5", "--context", "none", "--out", "no.h5")
    assert "its rows have no context" in said


def test_figures_are_at_the_rows_contexts(folder: Path) -> None:
    from nicecp.data import DataSpec, open_source
    from nicecp.score_plots import compare

    flow = load("b.h5")
    source = open_source(DataSpec("beside.h5", "/ctx", "/w"))
    compared = compare(flow, source, seed=1)
    source.close()
    assert source.context is not None
    assert source.weight is not None
    at = np.flatnonzero(source.weight)
    weight = source.weight[at]  # contexts of samples are drawn by the rows' weights
    drawn = at[np.random.default_rng(1).choice(len(at), len(at), p=weight / weight.sum())]
    np.testing.assert_allclose(compared.samples, flow.sample(len(at), 1, source.context[drawn]), rtol=1e-12)
    np.testing.assert_allclose(compared.log_prob, flow.log_prob(compared.data, source.context[at]), rtol=1e-12)


def test_resuming_finds_them_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "columns.h5", "--context", "u,v", "--weights", "w", "--preset", "tabular"]
    assert run("train", *options, "--out", "whole.h5", *SMALL[:-1], "4") == 0
    assert run("train", *options, "--out", "part.h5", *SMALL) == 0
    assert run("train", "--resume", "part.h5", "--epochs", "4") == 0
    for name, value in load("whole.h5").parameters().items():
        assert np.array_equal(load("part.h5").parameters()[name], value)
    capsys.readouterr()
    said = refused(capsys, "train", "--resume", "part.h5", "--weights", "none")
    assert "5 columns" not in said
    assert "--weights" in said or "columns" in said


def test_samples_at_a_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = load("a.h5")
    assert run("sample", "a.h5", "-n", "7", "--seed", "3", "--context", "1,-0.5", "--out", "one.h5") == 0
    with h5py.File("one.h5") as file:
        assert np.array_equal(file["samples"][()], flow.sample(7, 3, [1, -0.5]))
        assert np.array_equal(file["context"][()], np.tile([1, -0.5], (7, 1)))
        assert file["context"].attrs["columns"].tolist() == [b"u", b"v"]
    assert run("sample", "a.h5", "--context", "beside.h5:/ctx_test", "--out", "each.h5") == 0
    with h5py.File("each.h5") as file, h5py.File("beside.h5") as source:
        assert np.array_equal(file["samples"][()], flow.sample(60, 0, source["ctx_test"][()]))
        assert np.array_equal(file["context"][()], source["ctx_test"][()])
    capsys.readouterr()
    said = refused(capsys, "sample", "a.h5", "--out", "no.h5")
    assert "conditioned on 2 numbers (u, v): pass a context of shape (2,) or (..., 2) (--context)" in said
    assert "expected a context of shape (2,)" in refused(capsys, "sample", "a.h5", "--context", "1", "--out", "no.h5")
    assert "for 5 samples" in refused(
        capsys, "sample", "a.h5", "-n", "5", "--context", "beside.h5:/ctx", "--out", "no.h5"
    )
    assert "neither numbers such as 0.5,1" in refused(
        capsys, "sample", "a.h5", "--context", "one,two", "--out", "no.h5"
    )
    assert "neither numbers" in refused(capsys, "sample", "a.h5", "--context", "nan,1", "--out", "no.h5")
    assert not Path("no.h5").exists()


def test_files_of_contexts_and_weights_are_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("beside.h5") as source, h5py.File("apart.h5", "w") as file:
        file["ctx"], file["w"] = source["ctx_test"][()], source["w_test"][()]
    before = Path("apart.h5").read_bytes()
    out = ("--out", "apart.h5", "--overwrite")
    rows = ("--data", "beside.h5:/test", "--context", "apart.h5:/ctx")
    weights = ("--data", "beside.h5:/test", "--context", "/ctx_test", "--weights", "apart.h5:/w")
    for words in (
        ("train", *rows, *SMALL, *out),
        ("train", *weights, *SMALL, *out),
        ("score", "b.h5", *rows, "--weights", "none", *out),
        ("score", "b.h5", *weights, *out),
        ("score", "b.h5", *rows, "--weights", "none", "--out", "s.h5", "--plot", "apart.png", "--overwrite"),
        ("sample", "b.h5", "--context", "apart.h5:/ctx", *out),
    ):
        if "--plot" in words:
            os.link("apart.h5", "apart.png")
        assert "it is one of the inputs; choose another name" in refused(capsys, *words)
        assert Path("apart.h5").read_bytes() == before


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "a.h5") == 0
    said = capsys.readouterr().out
    assert re.search(r"context +2 numbers: u \(mean [23]\.\d+, std [01]\.\d+\), v \(mean ", said)
    assert re.search("context from +u,v\n", said)
    assert re.search("weights from +w\n", said)
    assert run("info", "a.h5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["context"]["names"] == ["u", "v"]
    assert found["model"]["n_features"] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--data", "columns.h5", "--context", "q"), "no column 'q' for --context; its columns are x, y, u"),
        (("train", "--data", "columns.h5", "--weights", "x"), "the weight of row"),
        (("train", "--data", "beside.h5", "--context", "/none"), "'beside.h5:/none': no such dataset"),
        (("train", "--data", "demo", "--context", "/ctx"), "demo"),
        (("evaluate", "b.h5", "--data", "beside.h5", "--context", "none"), "its rows have no context, but the flow"),
        (("evaluate", "a.h5", "--data", "columns.h5", "--context", "v,u"), "its context is v, u, but the flow"),
        (("evaluate", "a.h5", "--data", "columns.h5", "--compare"), "no baselines for flows that are conditioned on"),
        (("inpaint", "a.h5", "--data", "beside.h5", "--out", "p.png"), "its data have no image shape"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    out = () if words[0] != "train" else ("--out", "never.h5")
    assert says in refused(capsys, *words, *out)
    assert not Path("never.h5").exists()

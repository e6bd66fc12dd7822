"""`nicecp train`: what it prints, signals and exit codes of a real process, resuming to the same bits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load_run, load_state, save_state, state_path
from nicecp.cli.main import main
from nicecp.presets import Settings
from nicecp.records import Event
from tests.nicecp.runs import model_bytes, write_table

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--hidden", "6", "--couplings", "3", "--batch-size", "20", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with h5py.File("table.h5", "w") as file:
        file["train"] = rng.normal(size=(240, 4))
        file["test"] = rng.normal(size=(30, 4))
    with h5py.File("images.h5", "w") as file:
        file["train"] = rng.integers(0, 256, (240, 3, 4), dtype=np.uint8)
    return tmp_path


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(words) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_lines_in_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(["train", "--data", "table.h5", "--preset", "tabular", "--epochs", "3", *SMALL], capsys)
    lines = [line for line in out.splitlines() if not line.startswith("column ")]
    assert err == ""
    assert lines[0].startswith(
        "data: table.h5:/train, 240 rows of 4 columns, float64; 200 rows to train on, 40 to valid"
    )
    assert "drawn by seed 0" in lines[0]
    assert lines[1].startswith("model: 4 features, 3 couplings, additive with hidden 6, logistic prior, float64, ")
    assert lines[2].startswith("device: cpu, 1 thread, ")
    _, record = load_run("run.h5")  # the default --out
    assert record is not None
    for row, line in zip(record.history, lines[3:6], strict=True):
        found = re.match(r"epoch (\d)/3  train (\S+)  valid (\S+) nats", line)
        assert found is not None
        assert [float(text) for text in found.groups()] == [
            row.epoch,
            round(row.train_log_likelihood, 2),
            round(row.valid_log_likelihood, 2),
        ]
    ending = "\n".join(lines[6:])
    for words in (
        "round trip",
        "best is",
        "run.state.h5",
        "nicecp sample run.h5",
        "nicecp evaluate run.h5",
        "--resume",
        "--preset tabular-spline",
    ):
        assert words in ending
    shown = re.search(r"^  test +(\S+) \+- (\S+) nats per row \(30 rows\)$", out, re.MULTILINE)
    assert shown is not None
    assert run(["evaluate", "run.h5", "--data", "table.h5"], capsys)[0].startswith(f"{shown[1]} +- {shown[2]} nats")


def test_the_commands_at_the_end_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(["train", "--data", "images.h5", "--epochs", "2", *SMALL, "--out", "a b.h5"], capsys)
    commands = out.partition("next:\n")[2].splitlines()
    assert len(commands) == 3
    import shlex

    for line in commands:
        name, *words = shlex.split(line)
        assert name == "nicecp"
        run(words, capsys)
    assert Path("samples.png").read_bytes()[:4] == b"\x89PNG"
    assert load_run("a b.h5")[1].epoch == 4  # type: ignore[union-attr]


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(["train", "--data", "images.h5", "--epochs", "2", "--json", *SMALL], capsys)
    events = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert [event["event"] for event in events] == ["start", "epoch", "epoch", "end"]
    _, record = load_run("run.h5")
    assert record is not None
    assert [event["valid_log_likelihood"] for event in events[1:3]] == [r.valid_log_likelihood for r in record.history]
    assert [event["rows_per_second"] * event["seconds"] for event in events[1:3]] == pytest.approx([200, 200])
    begin, end = events[0], events[-1]
    assert begin["data"] == str(folder / "images.h5")
    assert begin["settings"] == record.config["settings"]
    assert (begin["device"], begin["threads"], begin["resumed_after_epoch"]) == ("cpu", 1, None)
    assert end["finished"]
    assert end["best_valid_log_likelihood"] == record.best_valid_log_likelihood
    assert (end["train"]["rows"], end["valid"]["rows"], end["test"]) == (200, 40, None)
    d, mean = 12, end["valid"]["mean"]
    assert end["valid"]["bits_per_dim"] == pytest.approx((d * np.log(256) - mean) / (d * np.log(2)))
    assert (end["out"], end["state"]) == ("run.h5", "run.state.h5")


def test_json_without_validation_has_no_nan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(["train", "--data", "table.h5", "--valid-fraction", "0", "--epochs", "1", "--json", *SMALL], capsys)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    _, first, end = (json.loads(line, parse_constant=refuse) for line in out.splitlines())
    assert first["valid_log_likelihood"] is None
    assert end["valid"] is None
    assert end["train"]["rows"] == 240


def test_options_reach_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "train --data images.h5 --out x.h5 --preset tabular --epochs 1 --batch-size 10 --hidden 2x5,3 --couplings 2 "
        "--prior gaussian --optimizer rmsprop --lr 0.002 --average 0.9 --rms-floor 0.02 --momentum-start 0.1 "
        "--momentum-end 0.2 --momentum-epoch 3 --rate-decay 1.1 --rate-floor 0.0005 --patience 7 --valid-fraction 0.25 "
        "--seed 18446744073709551615 --dtype float64 --range -1,1 --checkpoint-every 2h --device cpu --threads 1"
    )
    _, err = run(words.split(), capsys)
    assert err.startswith("nicecp: warning: 2 coupling(s)")
    settings = Settings.from_json(load_run("x.h5")[1].config["settings"])  # type: ignore[union-attr]
    optimizer = settings.to_json()["optimizer"]
    assert optimizer == {
        "kind": "rmsprop",
        "rate": 0.002,
        "average": 0.9,
        "floor": 0.02,
        "momentum_start": 0.1,
        "momentum_end": 0.2,
        "momentum_epoch": 3,
        "rate_decay": 1.1,
        "rate_floor": 0.0005,
    }
    assert (settings.preset, settings.hidden, settings.couplings, settings.prior) == (
        "tabular",
        (5, 5, 3),
        2,
        "gaussian",
    )
    assert (settings.batch_size, settings.epochs, settings.patience) == (10, 1, 7)
    assert (settings.valid_fraction, settings.seed, settings.dtype) == (0.25, 2**64 - 1, "float64")
    assert settings.value_range == (-1.0, 1.0)
    words = "train --data table.h5 --out y.h5 --epochs 1 --momentum 0.5 --beta2 0.1 --lam 0.9 --epsilon 0.001"
    run([*words.split(), "--no-standardize", *SMALL], capsys)
    flow, record = load_run("y.h5")
    assert flow.preprocessing == ()
    optimizer = record.config["settings"]["optimizer"]  # type: ignore[union-attr]
    assert [optimizer[name] for name in ("momentum", "beta2", "lam", "epsilon")] == [0.5, 0.1, 0.9, 0.001]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("5min", 300.0), ("2h", 7200.0), ("1.5", 90.0), (" .5 h ", 1800.0)]
)
def test_times(text: str, seconds: float) -> None:
    from nicecp.cli.options import interval

    assert interval(text) == (seconds, None)


@pytest.mark.parametrize(
    ("text", "sizes"), [("1000,1000", (1000, 1000)), ("5x10", (10,) * 5), ("2x64, 32", (64, 64, 32)), ("none", ())]
)
def test_hidden_sizes(text: str, sizes: tuple[int, ...]) -> None:
    from nicecp.cli.options import hidden_sizes

    assert hidden_sizes(text) == sizes


def test_constant_columns_only_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).normal(size=(100, 3))
    rows[:, 1] = 5.0
    with h5py.File("constant.h5", "w") as file:
        file["train"] = rows
    assert main(["train", "--data", "constant.h5", *SMALL]) == 2
    assert "--allow-constant" in capsys.readouterr().err
    run(["train", "--data", "constant.h5", "--allow-constant", "--epochs", "1", *SMALL], capsys)


def test_few_rows_of_many_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What follows from the table's size is said, and no more than twenty columns; info has them all."""
    with h5py.File("wide.h5", "w") as file:
        file["train"] = np.random.default_rng(0).normal(size=(120, 22))
    words = ["train", "--data", "wide.h5", "--hidden", "4", "--epochs", "1", "--threads", "1"]
    out, _ = run(words, capsys)
    lines = out.splitlines()
    assert lines[1].endswith("preset tabular-spline, adam, batches of 32, 1 epoch, weight decay 20, gaussian whitening")
    shown = [line for line in lines if line.startswith("column ")]
    assert (len(shown), shown[-1][:10]) == (20, "column 19:")
    assert "and 2 other columns, which nicecp info run.state.h5 will show" in lines
    out, _ = run(["info", "run.state.h5"], capsys)
    assert out.count("skewness") == 22
    out, _ = run([*words, "--out", "b.h5", "--weight-decay", "0", "--whiten", "none"], capsys)
    assert out.splitlines()[1].endswith("batches of 32, 1 epoch")


def test_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    words = ["train", "--data", "table.h5", "--hidden", "50,60", "--couplings", "4", "--batch-size", "25"]
    words += ["--preset", "tabular", "--dry-run", "--epochs", "9"]
    out, _ = run([*words, "--json"], capsys)
    plan = json.loads(out)
    per_coupling = 2 * 50 + 50 * 60 + 60 * 2
    assert plan["n_parameters"] == 4 * (per_coupling + 50 + 60 + 2) + 4
    assert plan["flops"] == 3 * 4 * 2 * 25 * per_coupling - 2 * 25 * 2 * 50
    assert plan["parameter_bytes"] == 5 * 8 * plan["n_parameters"]
    assert plan["memory_bytes"] > plan["parameter_bytes"] + 240 * 4 * 8
    assert plan["steps_per_epoch"] == 8
    assert plan["seconds"] == pytest.approx(9 * plan["seconds_per_epoch"])
    assert plan["seconds_per_epoch"] > 8 * plan["seconds_per_step"] > 0
    out, _ = run(words, capsys)
    for text in ("parameters", "memory", "GFLOP", "9 epochs"):
        assert text in out
    assert sorted(os.listdir()) == before


def test_laws_of_the_couplings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laws = ["--coupling", "affine,additive", "--repartition", "0"]
    out, _ = run(["train", "--data", "table.h5", "--epochs", "2", *SMALL, *laws], capsys)
    assert "3 couplings, affine with hidden 6, additive with hidden 6 in turn, logistic prior" in out
    flow, record = load_run("run.h5")
    assert [coupling.law for coupling in flow.spec.couplings] == ["affine", "additive", "affine"]
    assert record is not None
    assert record.config["settings"]["coupling"] == ["affine", "additive"]
    run(["train", "--resume", "run.h5", "--epochs", "3", *laws], capsys)
    assert load_run("run.h5")[1].epoch == 3  # type: ignore[union-attr]
    assert main(["train", "--resume", "run.h5", "--coupling", "affine"]) == 2
    assert "--coupling is affine,additive in the run, affine was asked for" in capsys.readouterr().err
    assert main(["train", "--data", "table.h5", "--out", "b.h5", "--coupling", "afine"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "additive, multiplicative, affine, spline, got afine" in err
    assert not Path("b.h5").exists()


def test_a_resumed_run_keeps_its_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the option that was given."""
    run(["train", "--data", "table.h5", "--epochs", "1", *SMALL], capsys)
    for words, expected in (
        (["--lr", "0.1"], "--lr is "),
        (["--rms-floor", "0.1"], "--rms-floor is not a setting in the run"),
        (["--hidden", "7"], "--hidden is 6 in the run, 7 was asked for"),
        (["--batch-size", "7"], "--batch-size is 20 in the run"),
        (["--valid-fraction", "0.5"], "--valid-fraction is "),
        (["--range", "0,2"], "--range is "),
        (["--no-standardize"], "the run standardised its columns (no --no-standardize)"),
        (["--allow-constant"], "the run had no --allow-constant"),
    ):
        assert main(["train", "--resume", "run.h5", *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"nicecp: error: 'run.h5': {expected}")
        assert err.endswith("; leave it out, or start a new run with another --out\n")


def test_options_without_an_effect_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["train", "--data", "images.h5", "--epochs", "1", *SMALL], capsys)
    new = ["train", "--data", "images.h5", "--out", "no.h5"]
    for words, expected in (
        (["train", "--resume", "run.h5", "--overwrite"], "--overwrite is for new runs"),
        ([*new, "--allow-constant"], "leave --allow-constant out"),
        ([*new, "--no-standardize"], "leave --no-standardize out"),
        (["sample", "run.h5", "--out", "no.h5", "--columns-of-grid", "3"], "(--columns-of-grid) are for pictures"),
        (["evaluate", "run.h5", "--data", "images.h5", "--compare", "--memory-limit", "8GiB"], "leave --memory-limit"),
    ):
        assert main(words) == 2
        shown = capsys.readouterr()
        assert expected in shown.err
        assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert not Path("no.h5").exists()


def test_whitened_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps are in both files; a resumed run ends with the same bits; evaluation repeats the run's numbers."""
    for data, kinds, words in (
        ("images.h5", ["dequantize", "zca"], ["--whiten", "zca", "--range", "-1,1"]),
        ("images.h5", ["dequantize", "triangular"], ["--whiten", "approximate"]),
        (
            "table.h5",
            ["standardize", "triangular"],
            ["--preset", "tabular", "--transform", "none", "--whiten", "gaussian", "--regularization", "0.01"],
        ),
    ):
        common = ["train", "--data", data, "--overwrite", *words, *SMALL]
        run([*common, "--out", "whole.h5", "--epochs", "4"], capsys)
        run([*common, "--out", "part.h5", "--epochs", "2"], capsys)
        run(["train", "--resume", "part.h5", "--epochs", "4"], capsys)
        assert model_bytes("part.h5") == model_bytes("whole.h5")
        flow, record = load_run("part.h5")
        assert record is not None
        assert [step.kind for step in flow.preprocessing] == kinds
        out, _ = run(["evaluate", "part.h5", "--data", data, "--split", "valid", "--json"], capsys)
        assert json.loads(out)["mean"] == record.best_valid_log_likelihood
        run(["sample", "part.h5", "-n", "5", "--out", "x.h5", "--overwrite"], capsys)
        with h5py.File("x.h5") as file:
            np.testing.assert_allclose(file["samples"][()], flow.sample(5, 0).astype(flow.dtype))
        if data == "images.h5":
            words = ["--mask", "top", "--iterations", "2", "--overwrite"]
            run(["inpaint", "part.h5", "--data", data, *words, "--out", "x.png"], capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--whiten", "zca", "--transform", "none"],
            "'bad.h5:/train': the covariance of the 50 training rows is singular: some",
        ),
        (["--whiten", "approximate", "--regularization", "1"], "regularization is for whitening by zca or gaussian"),
        (["--preset", "cifar10-code", "--couplings", "3"], "--couplings must be those of the preset 'cifar10-code'"),
    ],
)
def test_refused_whitening(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4))
    with h5py.File("bad.h5", "w") as file:
        file["train"] = np.column_stack([rows, rows.sum(1)])
    assert main(["train", "--data", "bad.h5", *words]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert message in shown.err
    assert not Path("run.h5").exists()


def test_the_plan_of_a_published_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PAPER's depths 1,1,3,3,2,2,1,1 of 2400 units, counted by hand for 12 features in halves of 6."""
    words = ["train", "--data", "images.h5", "--preset", "cifar10-code", "--batch-size", "20", "--dry-run", "--json"]
    out, _ = run(words, capsys)
    plan = json.loads(out)
    sizes = [2 * 6 * 2400 + 2406 + (depth - 1) * (2400 * 2400 + 2400) for depth in (1, 1, 3, 3, 2, 2, 1, 1)]
    assert plan["n_parameters"] == sum(sizes) + 12
    assert plan["settings"]["valid_fraction"] == 0.2
    assert plan["seconds_per_step"] > 0
    products = [2 * 6 * 2400 + (depth - 1) * 2400 * 2400 for depth in (1, 1, 3, 3, 2, 2, 1, 1)]
    assert plan["flops"] == 2 * 20 * (3 * sum(products) - 6 * 2400)
    depths = ["2 additive with hidden 2400", "2 additive with hidden 3x2400", "2 additive with hidden 2x2400"]
    assert f"8 couplings, {', then '.join([*depths, depths[0]])}, parts by halves" in plan["model"]
    small = ["--preset", "cifar10", "--hidden", "8", "--batch-size", "20"]
    out, _ = run(["train", "--data", "images.h5", *small, "--dry-run", "--json"], capsys)
    plan = json.loads(out)
    assert plan["flops"] == 2 * 20 * (3 * 4 * 2 * 6 * 8 - 6 * 8) + 2 * 20 * 12 * 12  # and the whitening's product
    assert not Path("run.h5").exists()


def test_info_shows_the_last_of_many_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run.h5")
    assert (
        main(["train", "--data", write_table(tmp_path / "t.h5"), "--out", out, "--hidden", "4", "--epochs", "1"]) == 0
    )
    flow, record, state = load_state(state_path(out))
    record.events[:] = [Event(1, n, "skipped", f"number {n}") for n in range(250)]
    save_state(state_path(out), flow, record, state)
    capsys.readouterr()
    assert main(["info", state_path(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("skipped: number ") == 100
    assert "250, the last 100 of them:" in shown
    assert "number 249" in shown

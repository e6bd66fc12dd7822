"""Partitions: named ones, drawn ones, those in files, and flows that differ in nothing but their columns' order."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import NICE, fit, load
from nicecp.cli.main import main
from nicecp.cli.train import train as train_command
from nicecp.errors import DataError
from nicecp.orders import partition_order, random_order
from nicecp.partition import order_from_file
from nicecp.preset_table import PRESETS
from nicecp.presets import contradiction, resolve
from nicecp.spec import ModelSpec, alternating
from tests.nicecp.runs import SMALL, go_on, model_bytes, train, write_images, write_table

ORDER = (3, 0, 4, 2, 1)


def test_named_orders() -> None:
    assert partition_order("odd-even", 5).tolist() == [0, 2, 4, 1, 3]
    assert partition_order("halves", 5).tolist() == [0, 1, 2, 3, 4]
    assert partition_order("permutation", 5, ORDER).tolist() == list(ORDER)
    x = np.arange(10).reshape(2, 5)
    for partition, order in (("odd-even", None), ("halves", None), ("permutation", ORDER)):
        spec = ModelSpec(5, alternating((3,), 3), partition=partition, order=order)
        joined = np.concatenate([x[:, columns] for columns in spec.columns], axis=1)
        np.testing.assert_array_equal(joined, x[:, spec.column_order])


def test_a_random_order_is_the_seeds() -> None:
    order = random_order(50, 3)
    assert sorted(order) == list(range(50))
    assert random_order(50, 3) == order
    assert random_order(50, 4) != order
    halves = sum(column < 25 for column in order[:25])
    assert 5 < halves < 20, "neither halves nor their opposite"


def test_a_flow_of_permuted_columns_is_the_same_flow() -> None:
    """Part 0 and part 1 hold the same numbers in the same places: training gives the same bits, but for their names."""
    x = np.random.default_rng(0).normal(size=(300, 5)) * [1, 2, 3, 4, 5]
    moved = np.empty_like(x)
    moved[:, partition_order("odd-even", 5)] = x[:, ORDER]
    flows = [NICE(5, (8,), 3, partition=partition, threads=1) for partition in (ORDER, "odd-even")]
    for flow, data in zip(flows, (x, moved), strict=True):
        fit(flow, data, epochs=3, batch_size=50)
    given, plain = (flow.parameters() for flow in flows)
    for name, value in plain.items():
        if name.startswith("couplings"):
            np.testing.assert_array_equal(given[name], value, err_msg=name)
    s = np.empty(5)
    s[list(ORDER)] = plain["scaling/log_scale"][partition_order("odd-even", 5)]
    np.testing.assert_array_equal(given["scaling/log_scale"], s)
    np.testing.assert_allclose(flows[0].log_prob(x), flows[1].log_prob(moved), rtol=1e-12)


@pytest.mark.parametrize("partition", ["halves", ORDER, np.array(ORDER)])
def test_a_saved_flow_keeps_its_partition(tmp_path: Path, partition: Any) -> None:
    flow = NICE(5, (4,), 3, coupling="affine", partition=partition, init="he", seed=2)
    flow.save(tmp_path / "flow.h5")
    back, x = load(tmp_path / "flow.h5"), np.random.default_rng(1).normal(size=(7, 5))
    assert back.spec == flow.spec
    np.testing.assert_array_equal(back.log_prob(x), flow.log_prob(x))
    assert not np.allclose(NICE(5, (4,), 3, coupling="affine", init="he", seed=2).log_prob(x), flow.log_prob(x))
    np.testing.assert_allclose(back.inverse(back.forward(x)[0])[0], x, atol=1e-12)


@pytest.mark.parametrize(
    ("partition", "error", "says"),
    [
        ("thirds", ValueError, "unknown partition 'thirds': expected one of odd-even, halves, permutation"),
        ("permutation", ValueError, "each of the 5 columns once, got 0 numbers"),
        ((0, 1, 2, 3), ValueError, "each of the 5 columns once, got 4 numbers"),
        ((0, 1, 2, 3, 3), ValueError, "column 3 is 2 times in the partition"),
        ((0, 1, 2, 3, 5), ValueError, "column 5 in the partition is outside 0..4"),
        ((0.5, 1, 2, 3, 4), TypeError, "a column number of a partition must be a whole number, got 0.5"),
        (3, TypeError, "'odd-even', 'halves', 'random', or a sequence of column numbers, got 3"),
    ],
)
def test_wrong_partitions_are_refused(partition: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        NICE(5, (4,), 3, partition=partition)


def test_an_order_without_its_partition_is_refused() -> None:
    with pytest.raises(ValueError, match="'halves' has an order of its own"):
        ModelSpec(5, alternating((3,), 3), partition="halves", order=ORDER)
    for given in ({"partition": "permutation"}, {"order": ORDER, "partition": "halves"}):
        with pytest.raises(ValueError, match="an order belongs to the partition 'permutation'"):
            resolve("a.h5", False, 100, **given)
    with pytest.raises(ValueError, match="partition must be one of odd-even, halves, permutation, random"):
        resolve("a.h5", False, 100, partition="thirds")


def test_the_authors_files_part_their_columns_as_they_do() -> None:
    """Odd and even take turns in MNIST's and TFD's; SVHN's and CIFAR-10's do not reorder."""
    assert {name for name, preset in PRESETS.items() if preset.partition == "halves"} == {"svhn-code", "cifar10-code"}
    assert {preset.partition for preset in PRESETS.values()} == {"odd-even", "halves"}
    spec = resolve("a.h5", True, 100, "cifar10-code").model_spec(3072)
    assert spec.column_order.tolist() == list(range(3072))


# --- files ------------------------


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_orders_in_files(tmp_path: Path) -> None:
    path = tmp_path / "order.txt"
    for text in ("3 0 4 2 1", "3,0,4,2,1\n", "3\n0 # the second\n4, 2\n1\n# 9\n"):
        assert order_from_file(write(path, text)) == ORDER


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3 0 4 2 x", "'x' is no column number"),
        ("1.0 0", "'1.0' is no column number"),
        ("-1 0", "'-1' is no column number"),
        ("", "holds 0 numbers"),
        ("0", "holds 1 numbers"),
        ("0 1 3", "holds 3 numbers, but column 2 is not among them"),
        ("0 1 1", "holds 3 numbers, but column 2 is not among them"),
        ("1 " * 2_000_000, "has more than"),
    ],
)
def test_files_without_an_order_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "order.txt", text)
    with pytest.raises(DataError) as caught:
        order_from_file(path)
    assert str(caught.value).startswith(f"{path!r}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        order_from_file(tmp_path / "none.txt")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(DataError, match="not a regular file"):
            order_from_file(path)


# --- runs ------------------------


@pytest.mark.parametrize("partition", ["halves", "random"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, partition: str) -> None:
    data = write_images(tmp_path / "images.h5")
    train(data, tmp_path / "whole.h5", epochs=4, partition=partition)
    train(data, tmp_path / "parts.h5", epochs=2, partition=partition)
    go_on(tmp_path / "parts.h5", epochs=4)
    assert model_bytes(tmp_path / "parts.h5") == model_bytes(tmp_path / "whole.h5")
    order = load(tmp_path / "whole.h5").spec.order
    assert order == (None if partition == "halves" else random_order(12, SMALL["seed"]))
    with pytest.raises(ValueError, match=f"partition is {partition} in the run, odd-even was asked for"):
        go_on(tmp_path / "parts.h5", partition="odd-even")


def test_orders_take_part_in_the_comparison_of_runs() -> None:
    settings = resolve("a.h5", False, 100, order=ORDER)
    assert settings.partition == "permutation"
    assert contradiction(settings, partition="permutation", order=ORDER) == ""
    assert contradiction(settings, order=ORDER[::-1]) == "order is 3,0,4,2,1 in the run, 1,2,4,0,3 was asked for"
    long = resolve("a.h5", False, 100, order=tuple(range(1000)))
    assert len(contradiction(long, order=ORDER)) < 120


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "table.h5", rows=200)
    write(tmp_path / "order.txt", "3 0 4 2 1")
    small = ["--epochs", "1", "--threads", "1", "--hidden", "6/4,3/none", "--coupling", "affine,additive", "--json"]
    words = ["train", "--data", "table.h5", *small, "--partition-file", "order.txt", "--out"]
    assert main([*words, "a.h5"]) == 0
    spec = load("a.h5").spec
    assert (spec.partition, spec.order) == ("permutation", ORDER)
    assert [(c.law, c.hidden) for c in spec.couplings] == [("affine", (6,)), ("additive", (4, 3)), ("affine", ())]
    capsys.readouterr()
    assert main(["info", "a.h5"]) == 0
    out = capsys.readouterr().out
    assert "parts by permutation" in out
    assert re.search(r"^ +parts +3 0 4 \| 2 1$", out, re.MULTILINE)
    assert main(["info", "a.h5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["order"] == list(ORDER)
    assert main(["train", "--resume", "a.h5", "--partition", "halves"]) == 2
    assert "--partition is permutation in the run, halves was asked for" in capsys.readouterr().err
    for order, says in (("0 1 2", "each of the 5 columns once, got 3 numbers"), ("0 1 2 3 3", "column 4 is not among")):
        write(tmp_path / "order.txt", order)
        assert main([*words, "b.h5"]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert ("--partition-file" in error) or ("'order.txt'" in error)
        assert error.count("\n") == 1
    assert main([*words, "b.h5", "--partition", "halves"]) == 2
    assert "leave one out" in capsys.readouterr().err
    assert not os.path.exists("b.h5")
    write(tmp_path / "order.txt", "3 0 4 2 1")
    assert main([*words, "order.txt", "--overwrite"]) == 2
    assert "would replace its --partition-file 'order.txt'" in capsys.readouterr().err
    assert (tmp_path / "order.txt").read_text() == "3 0 4 2 1"


def test_inpainting_of_halves_hides_data_columns(tmp_path: Path) -> None:
    """The mask is one of pixels: what is seen stays as it is, whatever part its column is in."""
    from nicecp.inpaint import inpaint

    train(write_images(tmp_path / "images.h5"), tmp_path / "run.h5", epochs=1, partition="halves")
    flow = load(tmp_path / "run.h5")
    x, hidden = np.random.default_rng(1).random((2, 12)), np.arange(12) < 4
    done = inpaint(flow, x, hidden, 3)
    np.testing.assert_array_equal(done.result[0][:, 4:], x[:, 4:])
    assert (done.result[0][:, :4] != x[:, :4]).all()
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["model"].attrs["partition"] == b"halves"


def test_the_paper_page_names_what_exists() -> None:
    """Options of commands, presets and arguments of NICE, as docs/paper.md writes them."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "paper.md").read_text()
    known = {option for parameter in train_command.params for option in parameter.opts} | {"--compare"}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= known
    models = re.search(r"`--preset (.*?) \|", page)
    assert models is not None
    assert set(re.findall(r"\w+", models[1])) <= set(PRESETS)
    for argument in ("coupling", "partition", "n_couplings", "prior", "hidden"):
        assert f"{argument}=" in page
        assert argument in inspect.signature(NICE).parameters
    for argument in re.findall(r"`fit\((\w+)=\)`", page):
        assert argument in inspect.signature(fit).parameters

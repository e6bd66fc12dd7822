"""Checkpoints with a right digest in which one thing is wrong: each is refused, in one line that says what."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nicecp import checkpoint
from nicecp.checkpoint import load, load_run, load_state
from nicecp.errors import CheckpointError
from nicecp.kernels.backend import Slot
from nicecp.store import Tree, decode, write_tree

DATA = Path(__file__).resolve().parents[1] / "data"

Change = Callable[[Tree], object]


def attr(path: str, key: str, value: Any) -> Change:
    return lambda tree: tree.attrs[path].update({key: value})


def array(path: str, value: Any) -> Change:
    return lambda tree: tree.arrays.update({path: np.asarray(value)})


def config(text: bytes) -> Change:
    return array("/training/config", np.frombuffer(text, np.uint8))


def slot(number: int, value: float) -> Change:
    def change(tree: Tree) -> None:
        tree.arrays["/resume/state"][number] = value

    return change


def first_row(path: str, value: float) -> Change:
    def change(tree: Tree) -> None:
        tree.arrays[path].flat[0] = value

    return change


MOMENT = "/optimizer/second_moment/couplings/0/layers/0/weight"
WRONG: dict[str, tuple[Change, str]] = {
    "seed negative": (attr("/training", "seed", -1), "outside 0.."),
    "threads 0": (attr("/training", "threads", 0), "outside 1.."),
    "epoch above 32 bits": (attr("/training", "epoch", 2**32), "outside 0.."),
    "best epoch after the last": (attr("/training", "best_epoch", 4), "outside 0..3"),
    "best as text": (attr("/training", "best_valid_log_likelihood", "1"), "should be float"),
    "version as number": (attr("/training", "version_numpy", 2), "should be str"),
    "one more attribute": (attr("/training", "x", 2), "'x' of /training: does not belong there"),
    "one more dataset": (array("/training/x", np.zeros(2)), "/training/x: does not belong there"),
    "one more column": (array("/training/history/x", np.zeros(3)), "/training/history/x: does not belong"),
    "a column less": (lambda tree: tree.arrays.pop("/training/history/seconds"), "seconds: is missing"),
    "a column too short": (array("/training/history/seconds", np.zeros(2)), "should have shape (3), has (2)"),
    "a column of another type": (array("/training/history/epoch", np.zeros(3)), "should be int64, is float64"),
    "history of rank 2": (array("/training/history/epoch", np.zeros((3, 1), np.int64)), "should have shape (any)"),
    "history epoch negative": (first_row("/training/history/epoch", -1), "values outside 0.."),
    "rate NaN": (first_row("/training/history/learning_rate", math.nan), "learning_rate: element (0) is not finite"),
    "event without message": (array("/training/events/message", np.zeros(1, "S3")), "should have shape (2), has (1)"),
    "event step negative": (first_row("/training/events/step", -1), "values outside 0.."),
    "event not UTF-8": (array("/training/events/kind", np.array([b"\xff", b"a"])), "is not UTF-8"),
    "config not JSON": (config(b"{'a': 1}"), "is not JSON"),
    "config empty": (config(b""), "is not JSON"),
    "config not UTF-8": (config(b'{"a": "\xff"}'), "is not JSON"),
    "config NaN": (config(b'{"a": NaN}'), "NaN is not a JSON number"),
    "config a list": (config(b"[1]"), "is not a JSON object"),
    "config too deep": (config(b'{"a":' + b"[" * 32 + b"]" * 32 + b"}"), "nested deeper than 32"),
    "config far too deep": (config(b'{"a":' + b"[" * 500_000), "nested deeper than 32"),
    "config too long": (config(b'{"a": "' + b"x" * (1 << 20) + b'"}'), "at most 1048576"),
    "config with a huge number": (config(b'{"a": ' + b"9" * 10_000 + b"}"), "is not JSON"),
    "optimizer unknown": (attr("/optimizer", "kind", "sgd"), "'kind' is 'sgd', this nicecp knows adam, rmsprop"),
    "step negative": (attr("/optimizer", "step", -1), "outside 0.."),
    "step of another state": (attr("/optimizer", "step", 41), "'step' is 41, /resume/state has 42"),
    "hyper-parameter NaN": (attr("/optimizer", "rate", math.nan), "'rate' is nan"),
    "hyper-parameter as text": (attr("/optimizer", "rate", "fast"), "should be float"),
    "moment missing": (lambda tree: tree.arrays.pop(MOMENT), f"{MOMENT}: is missing"),
    "moment of another shape": (array(MOMENT, np.zeros((4, 3))), "should have shape (3, 4), has (4, 3)"),
    "moment of another type": (array(MOMENT, np.zeros((3, 4), np.float32)), "should be float64"),
    "moment NaN": (first_row(MOMENT, math.nan), "is not finite"),
    "second moment negative": (first_row(MOMENT, -1e-9), "has negative elements"),
    "best missing": (lambda tree: tree.arrays.pop("/best/scaling/log_scale"), "/best/scaling/log_scale: is missing"),
    "best NaN": (first_row("/best/scaling/log_scale", math.nan), "is not finite"),
    "one more array of the best": (array("/best/x", np.zeros(2)), "/best/x: does not belong there"),
    "state too short": (array("/resume/state", np.zeros(63)), "should have shape (64), has (63)"),
    "state float32": (array("/resume/state", np.zeros(64, np.float32)), "should be float64"),
    "cursor negative": (slot(Slot.CURSOR, -1), "element 2 (batches presented) is -1.0"),
    "cursor not whole": (slot(Slot.CURSOR, 0.5), "element 2"),
    "cursor NaN": (slot(Slot.CURSOR, math.nan), "element 2"),
    "epoch infinite": (slot(Slot.EPOCH, math.inf), "element 1"),
    "rate infinite": (slot(Slot.RATE, math.inf), "element 3 (learning rate) is inf"),
    "stale epochs negative": (attr("/resume", "stale_epochs", -1), "outside 0.."),
    "epoch seconds NaN": (attr("/resume", "epoch_seconds", math.nan), "'epoch_seconds' is nan"),
    "state without its optimizer": (
        lambda tree: (
            [tree.attrs.pop(path) for path in list(tree.attrs) if path.startswith("/optimizer")]
            + [tree.arrays.pop(path) for path in list(tree.arrays) if path.startswith("/optimizer")]
        ),
        "/optimizer: attribute 'kind' is missing",
    ),
    "optimizer without its state": (
        lambda tree: (tree.attrs.pop("/resume"), tree.arrays.pop("/resume/state")),
        "does not belong there",
    ),
}


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tree], Any]:
    """Loads a tree as if a file held it."""

    def read(tree: Tree) -> Any:
        monkeypatch.setattr(checkpoint, "read_tree", lambda path: tree)
        return load("run.h5")

    return read


@functools.cache
def kept_bytes() -> bytes:
    return (DATA / "v1.state.h5").read_bytes()


def kept() -> Tree:
    return decode(kept_bytes(), "v1.state.h5")


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_and_named(reading: Callable[[Tree], Any], case: str) -> None:
    change, text = WRONG[case]
    tree = kept()
    change(tree)
    with pytest.raises(CheckpointError) as caught:
        reading(tree)
    assert text in str(caught.value)
    assert str(caught.value).startswith("'run.h5': ")
    assert "\n" not in str(caught.value)


def test_a_right_digest_does_not_help(tmp_path: Path) -> None:
    tree = kept()
    WRONG["one more array of the best"][0](tree)
    write_tree(tmp_path / "x.h5", tree)
    for reader in (load, load_run, load_state):
        with pytest.raises(CheckpointError, match=r"x\.h5': /best/x: does not belong there"):
            reader(tmp_path / "x.h5")  # type: ignore[operator]


def refusal(reading: Callable[[Tree], Any], tree: Tree) -> str:
    """What is said about a tree; empty if it loads."""
    try:
        reading(tree)
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_attribute_is_needed_but_versions_and_settings(reading: Callable[[Tree], Any]) -> None:
    said: dict[str, str] = {}
    for path, attrs in kept().attrs.items():
        for key in attrs:
            tree = kept()
            del tree.attrs[path][key]
            said[f"{path} {key}"] = refusal(reading, tree)
    free = {where for where, text in said.items() if not text}
    assert free == {"/training version_numpy", "/training version_python"} | {
        f"/optimizer {key}" for key in ("rate", "momentum", "momentum_epoch")
    }
    for where in said.keys() - free:
        assert f"{where.split()[0]}: attribute {where.split()[1]!r} is missing" in said[where]


def test_every_dataset_is_needed_but_names_and_units(reading: Callable[[Tree], Any]) -> None:
    said: dict[str, str] = {}
    for path in kept().arrays:
        tree = kept()
        del tree.arrays[path]
        said[path] = refusal(reading, tree)
    assert {path for path, text in said.items() if not text} == {"/data/columns", "/data/units"}

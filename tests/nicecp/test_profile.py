"""The breakdown of a step: every call of the tape is in one part, and their sizes are those of the model."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from nicecp import train as train_module
from nicecp.cli.app import run as command
from nicecp.errors import DeviceError
from nicecp.flow import NICE
from nicecp.kernels import get_backend
from nicecp.kernels import tape as tape_module
from nicecp.kernels.backend import Purpose
from nicecp.kernels.numba_backend import NumbaBackend
from nicecp.kernels.tape import Op
from nicecp.plan import flops_of
from nicecp.preprocessing import Standardize
from nicecp.profile import ALL, PARTS, profile_step
from nicecp.sources import ArraySource
from nicecp.spec import ModelSpec, alternating
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests.mutants import Mutant
from tests.nicecp.runs import write_table

N, D = 40, 6


def make_trainer(laws: tuple[str, ...] = ("additive",), threads: int = 1, activations: str = "store") -> Trainer:
    spec = ModelSpec(D, alternating((7, 5), 4, laws))
    steps = (Standardize(np.zeros(D), np.ones(D)),)
    flow = NICE.from_spec(spec, None, steps, backend=get_backend("cpu", threads))
    data = np.random.default_rng(0).normal(size=(3 * N, D))
    split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
    return Trainer(flow, split, None, TrainConfig(batch_size=N, activations=activations))


def test_every_kind_of_call_is_in_one_part() -> None:
    tree = ast.parse(Path(tape_module.__file__).read_bytes())
    (ops,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Op"]
    names = [ast.unparse(node.targets[0]) for node in ops.body if isinstance(node, ast.Assign)]
    codes = [code for part in PARTS.values() for code in part]
    assert sorted([*codes, Op.BARRIER]) == sorted(getattr(Op, name) for name in names)


@pytest.mark.parametrize("laws", [("additive",), ("affine", "multiplicative"), ("spline",)])
@pytest.mark.parametrize("by_layer", [0, 2**60])
def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch, laws: tuple[str, ...], by_layer: int) -> None:
    monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", by_layer)
    trainer = make_trainer(laws)
    *parts, whole = profile_step(trainer, 0.0)
    assert whole.name == ALL
    assert {part.name for part in parts} == set(PARTS) - {"barriers"}
    assert [part.seconds for part in parts] == sorted((part.seconds for part in parts), reverse=True)
    for name in ("calls", "flops", "bytes"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name) > 0
    assert whole.flops == flops_of(trainer.flow.spec, N)[1]
    assert whole.bytes == 7 * 8 * trainer.network.layout.size
    assert all(part.seconds > 0 for part in (*parts, whole))


def test_recomputing_is_more_forward_products() -> None:
    forward, step = flops_of(make_trainer().flow.spec, N)
    parts = {part.name: part for part in profile_step(make_trainer(activations="recompute"), 0.0)}
    assert parts["products, forward"].flops == 2 * forward
    assert parts["products, backward"].flops == step - forward


def test_threads_meet_at_barriers() -> None:
    parts = {part.name: part for part in profile_step(make_trainer(threads=2), 0.0)}
    assert parts["barriers"].calls > 0


def test_other_devices_have_no_tape() -> None:
    trainer = make_trainer()
    assert isinstance(trainer.backend, NumbaBackend)
    trainer.backend = Mutant(trainer.backend)  # type: ignore[assignment]
    with pytest.raises(DeviceError, match="--device cpu"):
        profile_step(trainer, 0.0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "table.h5")
    monkeypatch.setattr("nicecp.cli.training.PROFILE_SECONDS", 0.0)
    words = ["train", "--data", "table.h5", "--profile", "--hidden", "2x8", "--threads", "1"]
    assert command(words) == 0
    out = capsys.readouterr().out
    assert "products, forward" in out
    assert out.index("products, backward") < out.index(ALL)
    assert command([*words, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert document["event"] == "profile"
    assert document["parts"][-1]["name"] == ALL
    assert [path.name for path in tmp_path.iterdir()] == ["table.h5"], "nothing is written"
    assert command(["train", "--resume", "run.h5", "--profile"]) == 2
    assert "--profile is for new runs" in capsys.readouterr().err

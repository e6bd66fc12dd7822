"""`nicecp train --device cuda` end to end, on the stand-in for a GPU: checkpoints move, precision is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import kernels
from nicecp.checkpoint import load_run
from nicecp.cli.main import main
from nicecp.kernels import detect, get_backend
from nicecp.kernels.cuda_pinned import STAGED
from nicecp.scoring import score
from tests.emulated import build
from tests.kernels.stand_in import stand_in_driver

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

SMALL = ("--hidden", "6", "--couplings", "3", "--batch-size", "16", "--seed", "3", "--preset", "mnist")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, where all goes through nicecp's own driver."""
    monkeypatch.setattr(kernels, "open_driver", stand_in_driver)
    monkeypatch.setattr(detect, "problem", lambda: "")
    for function in (kernels._cuda, kernels._gpu_is_usable):
        function.cache_clear()
    yield
    for function in (kernels._cuda, kernels._gpu_is_usable):
        function.cache_clear()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(1).integers(0, 256, (60, 2, 3), np.uint8)
    with h5py.File("images.h5", "w") as file:
        file["train"], file["test"] = rows[:50], rows[50:]
    return "images.h5"


def train(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["train", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_moves_between_devices(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs there and two here are four of either, and the scores are the same."""
    events = train("--data", data, "--out", "a.h5", "--device", "auto", "--epochs", "2", *SMALL, capsys=capsys)
    assert events[0]["device"] == "cuda"
    assert events[0]["versions"]["gpu"] == "Fake GPU, float32"
    moved = train("--resume", "a.h5", "--device", "cpu", "--epochs", "4", "--threads", "1", capsys=capsys)[-1]
    here = train("--data", data, "--out", "b.h5", "--device", "cpu", "--threads", "1", "--epochs", "4", *SMALL,
                 capsys=capsys)[-1]  # fmt: skip
    back = train("--resume", "b.h5", "--device", "cuda", "--epochs", "5", capsys=capsys)[-1]
    on = train("--resume", "a.h5", "--device", "cpu", "--epochs", "5", "--threads", "1", capsys=capsys)[-1]
    assert moved["test"]["mean"] == pytest.approx(here["test"]["mean"], rel=1e-5)
    assert back["test"]["mean"] == pytest.approx(on["test"]["mean"], rel=1e-5)
    scores = [score("a.h5", data, device=device).evaluation.mean for device in ("cuda", "cpu")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_precision_is_recorded_and_can_be_overridden(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    events = train("--data", data, "--out", "a.h5", "--device", "cuda", "--precision", "tf32", "--epochs", "1", *SMALL,
                   capsys=capsys)  # fmt: skip
    assert events[0]["settings"]["precision"] == "tf32"
    with h5py.File("a.h5") as file:
        assert file["model"].attrs["precision"] in ("tf32", b"tf32")
    backend = get_backend("cuda")
    flow, _ = load_run("a.h5", backend=backend)
    assert flow.backend.driver.precision == "tf32"  # type: ignore[attr-defined]
    flow, _ = load_run("a.h5", backend=backend, precision="full")
    assert flow.backend.driver.precision == "float32"  # type: ignore[attr-defined]
    assert flow.spec.precision == "full"
    for command in (
        ["evaluate", "a.h5", "--data", data],
        ["sample", "a.h5", "-n", "2", "--out", "s.h5", "--overwrite"],
    ):
        for precision in ("full", "tf32"):
            assert main([*command, "--device", "cuda", "--precision", precision]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "a.h5", "--precision", "full"]) == 2
    assert "--precision is tf32 in the run, full was asked for" in capsys.readouterr().err
    assert main(["train", "--resume", "a.h5", "--device", "cpu", "--epochs", "2"]) == 0
    assert "tf32, which is for GPUs: the CPU computes in full precision" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--precision", "tf32"]])
def test_tf32_on_a_cpu_is_refused(data: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", data, "--out", "a.h5", *arguments, *SMALL]) == 2
    assert "precision tf32 is for GPUs" in capsys.readouterr().err
    assert not Path("a.h5").exists()


def test_a_memory_limit_changes_nothing(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [
        train("--data", data, "--out", f"{name}.h5", "--device", "cuda", "--epochs", "2", *limit, *SMALL, capsys=capsys)
        for name, limit in (("a", ()), ("b", ("--device-memory-limit", "500B")))
    ]
    assert ends[0][-1]["test"] == ends[1][-1]["test"]
    assert main(["train", "--data", data, "--out", "c.h5", "--device", "cuda", "--device-memory-limit", "99",
                 *SMALL]) == 2  # fmt: skip
    assert "--device-memory-limit must hold two batches, 448 bytes, got 99" in capsys.readouterr().err


def test_page_locked_memory_is_counted(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a dry run says is what is taken: both blocks, and those of all other copies."""
    arguments = ("--data", data, "--device", "cuda", "--epochs", "1", *SMALL)
    plans = [train("--dry-run", *limit, *arguments, capsys=capsys)[-1] for limit in
             ((), ("--device-memory-limit", "500B"))]  # fmt: skip
    taken = [size for name, *size in get_backend("cuda").driver.cupy.calls if name == "pinned"]  # type: ignore[attr-defined]
    assert plans[0]["pinned_bytes"] == STAGED
    assert plans[1]["pinned_bytes"] == sum(size for (size,) in taken) == STAGED + 2 * 16 * (6 + 8)
    assert plans[1]["memory_bytes"] - plans[0]["memory_bytes"] == 2 * 16 * (6 + 8)
    assert main(["train", *arguments, "--out", "c.h5", "--memory-limit", "1MiB"]) == 2
    assert "--memory-limit must be at least" in capsys.readouterr().err


@pytest.mark.slow  # 13 s of emulated kernels
def test_doctor_checks_gradients_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = detect.Found((13, 0), (detect.Gpu("Fake GPU", 2**34, (9, 0)),), ("cupy-cuda13x 14.2.0",), "13.0", "13.1.1")
    monkeypatch.setattr(detect, "look", lambda: found)
    assert main(["doctor", "--device", "cuda", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    checks = [one["text"].split(";")[0] for one in findings if one["name"] == "gradients, cuda"]
    assert checks == ["float64: right", "float32: right", "tf32: right"]


def test_running_out_of_memory_is_one_line(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "open_driver", lambda precision: stand_in_driver(precision, memory=2**26))
    kernels._cuda.cache_clear()
    arguments = ["train", "--data", data, "--out", "a.h5", "--device", "cuda", *SMALL, "--hidden", "3000,3000"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "not enough memory on the GPU for" in error
    assert "--batch-size" in error
    assert not Path("a.h5").exists()

"""`nicecp doctor`: what it finds, when it says that something is wrong, and its exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

import nicecp.doctor
from nicecp.cli.main import main
from nicecp.doctor import Finding, examine
from nicecp.flow import NICE
from nicecp.kernels import detect

NO_DRIVER = detect.Found(problem="no NVIDIA driver was found (libcuda.so.1): install it")
NO_CUPY = detect.Found(
    (13, 0),
    (detect.Gpu("Fake H200", 2**37, (9, 0)), detect.Gpu("Other", 2**30, (7, 5))),
    problem="CuPy is not installed: pip",
)


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[detect.Found]]:
    """The GPU that there seems to be."""
    world = [NO_DRIVER]
    detect.problem.cache_clear()
    monkeypatch.setattr(detect, "look", lambda: world[0])
    yield world
    detect.problem.cache_clear()


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def test_a_machine_without_a_gpu_is_well() -> None:
    findings = list(examine())
    assert [finding for finding in findings if finding.problem] == []
    (packages,) = named(findings, "packages")
    for name in ("numpy", "numba", "h5py"):
        assert f"{name} {metadata.version(name)}" in packages.text
    assert named(findings, "HDF5")[0].text == h5py.version.hdf5_version
    assert f"of {os.cpu_count()} cores" in named(findings, "CPU")[0].text
    assert named(findings, "GPU")[0].text == NO_DRIVER.problem
    assert "openblas" in named(findings, "BLAS (numpy)")[0].text or named(findings, "BLAS (shared)")
    checks = named(findings, "gradients, cpu")
    assert [check.text.split(";")[0] for check in checks] == ["float64: right", "float32: right"]
    assert named(findings, "gradients, cuda") == []


def test_a_gpu_that_cannot_be_used_is_a_problem_where_there_is_a_driver_or_it_was_asked_for(
    found: list[detect.Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nicecp.doctor, "_gradients", lambda device, kinds: [Finding("checked", device)])
    for world, device, problem, checked in (
        (NO_DRIVER, "all", False, ["cpu"]),
        (NO_DRIVER, "cuda", True, []),
        (NO_CUPY, "all", True, ["cpu"]),
        (NO_CUPY, "cpu", None, ["cpu"]),
    ):
        found[0] = world
        findings = list(examine(device))
        gpu = named(findings, "GPU")
        assert [finding.problem for finding in gpu] == ([] if problem is None else [problem])
        assert [finding.text for finding in named(findings, "checked")] == checked
    assert named(findings, "NVIDIA driver") == []
    findings = list(examine())
    assert named(findings, "NVIDIA driver")[0].text == "for CUDA 13.0"
    assert named(findings, "GPU 0")[0].text == "Fake H200, 128.0 GiB, compute capability 9.0"
    assert "not used" in named(findings, "GPU 1")[0].text
    with pytest.raises(ValueError, match="must be one of all, cpu, cuda"):
        list(examine("tpu"))


def test_a_usable_gpu_is_checked_in_every_precision(found: list[detect.Found], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nicecp.doctor, "_gradients", lambda *given: asked.append(given) or [])
    found[0] = detect.Found((13, 0), NO_CUPY.gpus, ("cupy-cuda13x 14.2.0",), "13.0", "13.1.1")
    findings = list(examine())
    assert asked == [("cpu", ("float64", "float32")), ("cuda", ("float64", "float32", "tf32"))]
    assert (named(findings, "NVRTC")[0].text, named(findings, "cuBLASLt")[0].text) == ("13.0", "13.1.1")
    list(examine("cuda"))
    assert [given[0] for given in asked[2:]] == ["cuda"]


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = NICE.grad_log_prob
    monkeypatch.setattr(NICE, "grad_log_prob", lambda self, x: 1.01 * np.asarray(right(self, x)))
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert out.count("PROBLEM: float") == 2
    assert "gradient by x" in out
    assert out.endswith("2 problems: see above\n")


def test_a_device_that_breaks_when_used_is_a_problem() -> None:
    """Detection says that it can be used, and then it cannot (here there is none)."""
    (finding,) = nicecp.doctor._gradients("cuda", ("float64",))
    assert finding.problem
    assert finding.text.startswith("device 'cuda': no NVIDIA driver was found")


def test_no_cache_folder_and_missing_packages_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicecp.kernels._numba_tape.replay", SimpleNamespace(_cache=None))
    finding = nicecp.doctor._numba_cache()
    assert finding.problem
    assert "NUMBA_CACHE_DIR" in finding.text

    def version(name: str) -> str:
        if name == "tqdm":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert [finding.text for finding in nicecp.doctor._packages() if finding.problem] == [
        "tqdm not installed: reinstall nicecp"
    ]


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["well"] is True
    names = [finding["name"] for finding in told["findings"]]
    for name in ("nicecp", "CPU", "environment", "packages", "HDF5", "Numba cache", "GPU", "gradients, cpu"):
        assert name in names
    assert main(["doctor", "--device", "cuda", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["well"] is False
    assert main(["doctor", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("all is well\n")
    assert main(["doctor", "--help"]) == 0
    assert "nicecp doctor --device cuda && nicecp train" in capsys.readouterr().out

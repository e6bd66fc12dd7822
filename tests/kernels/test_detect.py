"""Why a GPU cannot be used, each reason simulated: a driver library of our own, packages and a CuPy that pretend."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nicecp.kernels import cublaslt, detect
from tests.kernels.fake_lt import FakeLt

# A driver as far as detection asks: its answers come from the environment.
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char *name, int usual) { const char *text = getenv(name); return text ? atoi(text) : usual; }
int cuInit(unsigned int flags) { return number("FAKE_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_VERSION", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = number("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return number("FAKE_GET", 0); }
int cuDeviceGetName(char *name, int length, int device) { strcpy(name, "Fake H200"); return device < 40; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 150754820096; return device < 40; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 75) *value = number("FAKE_MAJOR", 9);
    if (attribute == 76) *value = number("FAKE_MINOR", 0);
    return device < 40;
}
int cuGetErrorString(int code, const char **text) { *text = "words of\nthe driver"; return code == 998; }
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    path = folder / "libfake.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(folder / "driver.c")], check=True)
    return str(path)


class World:
    """What a machine has; by default all that a GPU needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
        self.patch = monkeypatch
        monkeypatch.setattr(detect, "LIBRARY", driver)
        self.distributions("cupy-cuda13x")
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                runtime=SimpleNamespace(getDeviceCount=lambda: 1), nvrtc=SimpleNamespace(getVersion=lambda: (13, 0))
            )
        )
        monkeypatch.setattr(detect, "import_cupy", lambda: self.cupy)
        monkeypatch.setattr(cublaslt, "library", FakeLt)

    def distributions(self, *names: str) -> None:
        self.patch.setattr(detect, "_installed", lambda: tuple(f"{name} 14.2.0" for name in names))

    def driver_says(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self.patch.setenv(f"FAKE_{name}", str(number))

    def no_cupy_import(self) -> None:
        def fail() -> Any:
            raise AssertionError("CuPy was imported")

        self.patch.setattr(detect, "import_cupy", fail)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, driver: str) -> Iterator[World]:
    detect.problem.cache_clear()
    yield World(monkeypatch, driver)
    detect.problem.cache_clear()


def raising(error: Exception) -> Any:
    def call() -> Any:
        raise error

    return call


def test_a_usable_gpu(world: World) -> None:
    world.driver_says(COUNT=2, VERSION=13010)
    found = detect.look()
    assert found.problem == ""
    assert found.driver == (13, 1)
    assert found.gpus == (detect.Gpu("Fake H200", 150_754_820_096, (9, 0)),) * 2
    assert (found.cupy, found.nvrtc, found.cublaslt) == (("cupy-cuda13x 14.2.0",), "13.0", "13.1.1")
    assert detect.problem() == ""
    assert detect.has_driver()


@pytest.mark.parametrize(
    ("numbers", "distributions", "words"),
    [
        ({"INIT": 100}, ("cupy-cuda13x",), ("no GPU that it may use", "CUDA_VISIBLE_DEVICES")),
        ({"COUNT": 0}, ("cupy-cuda13x",), ("no GPU that it may use", "nvidia-smi")),
        ({"INIT": 803}, ("cupy-cuda13x",), ("does not start (error 803, words of the driver)", "nvidia-smi")),
        ({"INIT": 998}, ("cupy-cuda13x",), ("does not start (error 998)",)),
        ({"GET": 3}, ("cupy-cuda13x",), ("does not answer cuDeviceGet (error 3",)),
        ({"VERSION": 11080}, ("cupy-cuda12x",), ("supports CUDA 11.8, 12.0 is needed: update it",)),
        ({"MAJOR": 7, "MINOR": 2}, ("cupy-cuda13x",), ("Fake H200 is too old: compute capability 7.2, 7.5 is needed",)),
        ({}, (), ("CuPy is not installed: pip install 'nicecp[cuda13]'",)),
        ({"VERSION": 12040}, (), ("CuPy is not installed: pip install 'nicecp[cuda12]'",)),
        ({"VERSION": 14000}, (), ("pip install 'nicecp[cuda13]'",)),
        (
            {},
            ("cupy-cuda13x", "cupy-cuda12x"),
            ("cupy-cuda13x and cupy-cuda12x are installed together", "pip uninstall cupy-cuda13x cupy-cuda12x, then"),
        ),
        (
            {"VERSION": 12080},
            ("cupy-cuda13x",),
            ("cupy-cuda13x needs a driver for CUDA 13, this is one for 12.8", "'nicecp[cuda12]'"),
        ),
        ({}, ("cupy-cuda11x",), ("cupy-cuda11x is too old", "'nicecp[cuda13]'")),
    ],
)
def test_each_reason_before_cupy(
    world: World, numbers: dict[str, int], distributions: tuple[str, ...], words: tuple[str, ...]
) -> None:
    world.driver_says(**numbers)
    world.distributions(*distributions)
    world.no_cupy_import()
    problem = detect.look().problem
    for part in words:
        assert part in problem
    assert "\n" not in problem


@pytest.mark.parametrize("numbers", [{}, {"VERSION": 13020}, {"VERSION": 12000}])
@pytest.mark.parametrize("name", ["cupy-cuda12x", "cupy"])
def test_older_cupy_and_other_builds_run_on_newer_drivers(world: World, numbers: dict[str, int], name: str) -> None:
    world.driver_says(**numbers)
    world.distributions(name)
    assert detect.look().problem == ""


def test_no_driver(world: World) -> None:
    world.patch.setattr(detect, "LIBRARY", "libcuda-not-there.so.1")
    world.patch.setattr(detect, "_installed", raising(AssertionError("looked further")))
    world.no_cupy_import()
    found = detect.look()
    assert found.problem.startswith("no NVIDIA driver was found (libcuda-not-there.so.1)")
    assert found.driver is None
    assert not detect.has_driver()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("libcudart.so.13: cannot open"), "does not work (ImportError: libcudart.so.13: cannot open)"),
        (RuntimeError("cudaErrorInsufficientDriver"), "does not work (RuntimeError: cudaErrorInsufficientDriver)"),
    ],
)
def test_a_cupy_that_does_not_work(world: World, error: Exception, words: str) -> None:
    world.patch.setattr(detect, "import_cupy", raising(error))
    found = detect.look()
    assert words in found.problem
    assert found.gpus, "what was found before is kept"
    world.patch.setattr(detect, "import_cupy", lambda: world.cupy)
    world.cupy.cuda.runtime.getDeviceCount = raising(error)
    assert words in detect.look().problem


def test_nvrtc_is_missing(world: World) -> None:
    world.cupy.cuda.nvrtc.getVersion = raising(RuntimeError("Failure finding libnvrtc.so"))
    assert detect.look().problem == ("NVRTC, CUDA's run-time compiler, is missing: pip install 'nicecp[cuda13]'")


def test_cublaslt_is_missing(world: World) -> None:
    world.patch.setattr(cublaslt, "library", raising(OSError("libcublasLt.so was not found")))
    found = detect.look()
    assert found.problem == "cuBLASLt, CUDA's matrix products, is missing: pip install 'nicecp[cuda13]'"
    assert found.nvrtc == "13.0"


def test_the_answer_is_looked_up_once(world: World) -> None:
    assert detect.problem() == ""
    world.driver_says(INIT=100)
    assert detect.problem() == ""


def test_installed_distributions_are_found_by_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("cupy_cuda13x", "14.2.0"), ("cupy_cuda12x", "13.6.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert detect._installed() == ("cupy-cuda13x 14.2.0", "cupy-cuda12x 13.6.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    assert detect._installed() == ()


def test_without_a_driver_nothing_is_imported(driver: str) -> None:
    code = (
        "import sys; from nicecp.kernels import detect; detect.LIBRARY = 'libcuda-not-there.so.1'; "
        "print(bool(detect.problem()), [name for name in ('cupy', 'cuda', 'nicecp.kernels.cublaslt') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True []"


def test_cublaslt_is_looked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA's packages have none: the system's, newest first, else an OSError."""
    tried: list[str] = []

    def load(name: str) -> Any:
        tried.append(name)
        if name != "libcublasLt.so.12":
            raise OSError(name)
        return FakeLt()

    monkeypatch.setitem(sys.modules, "cuda", None)  # importing cuda.pathfinder fails
    monkeypatch.setattr(ctypes, "CDLL", load)
    found = cublaslt.library.__wrapped__()
    assert isinstance(found, FakeLt)
    assert tried == ["libcublasLt.so.13", "libcublasLt.so.12"]
    monkeypatch.setattr(cublaslt, "NAMES", ("libcublasLt.so.13",))
    with pytest.raises(OSError, match="was not found"):
        cublaslt.library.__wrapped__()

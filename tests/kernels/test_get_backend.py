"""Which device one gets, and what is said where it is not the one that was hoped for."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from nicecp import NICE, kernels
from nicecp.errors import DeviceError
from nicecp.kernels import detect, get_backend, with_precision
from nicecp.spec import ModelSpec, alternating


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for function in (kernels._cuda, kernels._gpu_is_usable):
        function.cache_clear()
    yield
    for function in (kernels._cuda, kernels._gpu_is_usable):
        function.cache_clear()


class Opened:
    """Stands for a backend on a GPU."""

    device = "cuda"

    def __init__(self, precision: str) -> None:
        self.driver = type("Driver", (), {"precision": precision})()


def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "problem", lambda: "")
    monkeypatch.setattr(kernels, "open_driver", lambda precision: precision)
    monkeypatch.setattr("nicecp.kernels.cuda_backend.CudaBackend", Opened)


def unusable(monkeypatch: pytest.MonkeyPatch, driver: bool) -> None:
    monkeypatch.setattr(detect, "problem", lambda: "the GPU is too old")
    monkeypatch.setattr(detect, "has_driver", lambda: driver)


def test_cuda_where_there_is_none_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    unusable(monkeypatch, driver=True)
    with pytest.raises(DeviceError, match=r"^device 'cuda': the GPU is too old \(without a GPU: --device cpu\)$"):
        get_backend("cuda")
    with pytest.raises(DeviceError, match="too old"):
        NICE(4, device="cuda")
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        get_backend("gpu")


@pytest.mark.parametrize("driver", [True, False])
def test_auto_without_a_usable_gpu_says_why_once_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, driver: bool
) -> None:
    unusable(monkeypatch, driver)
    with caplog.at_level(logging.DEBUG, "nicecp"):
        assert get_backend("auto", 1).device == "cpu"
        assert get_backend("auto", 1).device == "cpu"
        assert get_backend("cpu", 1).device == "cpu"
    said = ["device auto: computing on the CPU, not on a GPU: the GPU is too old"] if driver else []
    assert [record.getMessage() for record in caplog.records] == said


def test_auto_takes_a_usable_gpu_and_there_is_one_backend_for_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    usable(monkeypatch)
    found = get_backend("auto")
    assert found.device == "cuda"
    assert found is get_backend("cuda")
    assert get_backend("cpu", 1).device == "cpu"
    tf32 = with_precision(found, "tf32")
    assert tf32.driver.precision == "tf32"  # type: ignore[attr-defined]
    assert with_precision(tf32, "tf32") is tf32
    assert with_precision(tf32, "full") is found


def test_a_cpu_computes_in_full_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cpu = get_backend("cpu", 1)
    assert with_precision(cpu, "full") is cpu
    assert caplog.records == []
    assert with_precision(cpu, "tf32") is cpu
    assert "the CPU computes in full precision" in caplog.text
    with pytest.raises(DeviceError, match="use --device cuda"):
        with_precision(cpu, "tf32", required=True)
    with pytest.raises(ValueError, match="one of full, tf32, got 'half'"):
        with_precision(cpu, "half")


def test_tf32_is_for_float32_flows() -> None:
    couplings = alternating((4,), 4)
    assert ModelSpec(4, couplings, dtype="float32", precision="tf32").precision == "tf32"
    with pytest.raises(ValueError, match="tf32 is for float32 flows, this one is float64"):
        ModelSpec(4, couplings, precision="tf32")
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        ModelSpec(4, couplings, precision="half")

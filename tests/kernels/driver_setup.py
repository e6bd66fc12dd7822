"""The driver on CuPy, on the stand-ins for CuPy and cuBLASLt, with one kernel that needs no compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp.kernels import cublaslt, cuda_source
from nicecp.kernels.cuda_cupy import CupyDriver
from tests.kernels.fake_cupy import FakeCupy
from tests.kernels.fake_lt import FakeLt

SCALE = "scale"  # a kernel of these tests: array *= number


class Setup:
    """A driver on the stand-ins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tf32: bool = False, **lt: Any) -> None:
        self.cupy, self.lt = FakeCupy(), FakeLt(**lt)
        self.lt.run = lambda stream, work, access: self.cupy.streams[stream].put("product", work, access)
        self.cupy.run_kernel = self._kernel
        monkeypatch.setattr(cuda_source, "unit_of", lambda name: "unit")
        monkeypatch.setattr(cuda_source, "text", lambda unit: f"text of {unit}")
        self.driver = CupyDriver(self.cupy, cublaslt.Products(self.lt, tf32), "tf32" if tf32 else "float32")

    @staticmethod
    def _kernel(name: str, grid: Any, block: Any, arguments: Any) -> None:
        array, number = arguments
        array[...] *= number

    def put(self, host: Any) -> Any:
        host = np.ascontiguousarray(host)
        array = self.driver.alloc(host.shape, host.dtype)
        self.driver.to_device(array, host)
        return array

    def scale(self, array: Any, number: float) -> None:
        self.driver.kernel(SCALE)((1,), (32,), (array, np.float64(number)))

    def names(self, start: int = 0) -> list[Any]:
        return [call if call[0] in ("wait", "record") else call[:2] for call in self.cupy.calls[start:]]

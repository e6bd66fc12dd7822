"""The real GPU, for the tests that need one."""

from __future__ import annotations

from typing import Any

import pytest

from nicecp.kernels import get_backend, with_precision


@pytest.fixture(scope="session")
def gpu() -> Any:
    return get_backend("cuda")


@pytest.fixture(scope="session")
def tf32(gpu: Any) -> Any:
    return with_precision(gpu, "tf32")

"""Slot numbers written into the kernels' file, so that its compiled code is never older than they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from nicecp.kernels import _numba_layers
from nicecp.kernels.backend import Slot

USED = (
    "STEP", "CURSOR", "RATE", "LOSS", "LOG_PROB_SUM", "WEIGHT_SUM", "SKIP", "MOMENTUM", "SQUARE_DECAY", "LAMBDA",
    "EPSILON", "LOSS_RING", "RING_SIZE",
)  # fmt: skip


def import_anew() -> ModuleType:
    """A second copy of the kernels' module; the first one stays what everybody uses."""
    path = Path(str(_numba_layers.__file__))
    spec = importlib.util.spec_from_file_location("nicecp.kernels._numba_layers_anew", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kernels_agree_with_the_contract() -> None:
    module = import_anew()
    for name in USED:
        assert getattr(module, f"_{name}") == getattr(Slot, name)


@pytest.mark.parametrize("name", USED)
def test_a_changed_slot_is_noticed_at_import(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Slot, name, 63)
    with pytest.raises((AssertionError, ImportError, RuntimeError)):
        import_anew()

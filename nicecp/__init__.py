"""nicecp: NICE normalizing flows for science, without a deep-learning framework.

Names are loaded when first used, so that ``import nicecp`` stays quick: NICE, load, fit, AdaM, RMSProp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nicecp.checkpoint import load
    from nicecp.fitting import fit
    from nicecp.flow import NICE
    from nicecp.optimizers import AdaM, RMSProp

__all__ = ["NICE", "AdaM", "RMSProp", "__version__", "fit", "load"]

_HOMES = {
    "NICE": "nicecp.flow",
    "load": "nicecp.checkpoint",
    "fit": "nicecp.fitting",
    "AdaM": "nicecp.optimizers",
    "RMSProp": "nicecp.optimizers",
    "testing": "",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nicecp' has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(import_module(home), name) if home else import_module(f"nicecp.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

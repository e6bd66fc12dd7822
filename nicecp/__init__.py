"""nicecp: NICE normalizing flows for science, without a deep-learning framework.

Names are loaded when first used, so that ``import nicecp`` stays quick: NICE, load, fit, AdaM, RMSProp,
and what registers couplings and networks of one's own.
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
    from nicecp.registry import CouplingLaw, CouplingNetwork, register_coupling, register_network

__all__ = [
    "NICE",
    "AdaM",
    "CouplingLaw",
    "CouplingNetwork",
    "RMSProp",
    "__version__",
    "fit",
    "load",
    "register_coupling",
    "register_network",
]

_HOMES = {
    "NICE": "nicecp.flow",
    "load": "nicecp.checkpoint",
    "fit": "nicecp.fitting",
    "AdaM": "nicecp.optimizers",
    "RMSProp": "nicecp.optimizers",
    "CouplingLaw": "nicecp.registry",
    "CouplingNetwork": "nicecp.registry",
    "register_coupling": "nicecp.registry",
    "register_network": "nicecp.registry",
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

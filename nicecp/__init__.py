"""nicecp: NICE normalizing flows for science, without a deep-learning framework.

Names are loaded when first used, so that ``import nicecp`` stays quick: NICE, load, fit, fit_preprocessing, AdaM,
RMSProp, what registers couplings and networks of one's own, and with the extra ``sklearn`` NICEDensity.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nicecp.checkpoint import load
    from nicecp.density_estimator import NICEDensity as NICEDensity
    from nicecp.fitting import fit, fit_preprocessing
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
    "fit_preprocessing",
    "load",
    "register_coupling",
    "register_network",
]

_HOMES = {
    "NICE": "nicecp.flow",
    "load": "nicecp.checkpoint",
    "fit": "nicecp.fitting",
    "fit_preprocessing": "nicecp.fitting",
    "AdaM": "nicecp.optimizers",
    "RMSProp": "nicecp.optimizers",
    "CouplingLaw": "nicecp.registry",
    "CouplingNetwork": "nicecp.registry",
    "register_coupling": "nicecp.registry",
    "register_network": "nicecp.registry",
    "testing": "",
}
_BEHIND_EXTRAS = {"NICEDensity": ("nicecp.density_estimator", "sklearn")}  # not in __all__: it may not be there


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _BEHIND_EXTRAS:
        raise AttributeError(f"module 'nicecp' has no attribute {name!r}")
    home = _HOMES[name] if name in _HOMES else _BEHIND_EXTRAS[name][0]
    value = getattr(import_module(home), name) if home else import_module(f"nicecp.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    there = {name for name, (_, package) in _BEHIND_EXTRAS.items() if find_spec(package) is not None}
    return sorted({*globals(), *_HOMES, *there})

"""The case's flow in PyTorch's libraries of flows, each built of the library's own couplings with the case's weights.

``build`` gives a module with ``log_prob(x)`` : (n, d) -> (n,) and ``sample(n)`` -> (n, d). The libraries have no
logistic prior and no diagonal scaling without a shift: these are written here as their users would write them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.cases import Case

NAMES = {"nflows": "nflows", "normflows": "normflows", "zuko": "zuko"}


def columns(name: str, x: NDArray[Any]) -> NDArray[Any]:
    """x : (n, d) in the order of columns in which the library is fastest: normflows halves them at the middle."""
    return np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1) if name == "normflows" else np.ascontiguousarray(x)


def build(name: str, case: Case) -> Any:
    """The flow; the process's default dtype is the case's from here on."""
    torch.set_default_dtype(getattr(torch, case.dtype))
    return {"nflows": _nflows, "normflows": _normflows, "zuko": _zuko}[name](case)


class Net(nn.Sequential):
    """A coupling's network. sign -1: of the library's other direction, in which the shift is subtracted."""

    def __init__(self, case: Case, coupling: int, sign: int = 1) -> None:
        sizes = case.sizes(coupling)
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*layers[:-1])
        give(self, case, coupling, sign)

    def forward(self, x: Any, context: Any = None) -> Any:
        return super().forward(x)


def give(net: nn.Sequential, case: Case, coupling: int, sign: int = 1) -> None:
    """The case's weights to a network's linear layers."""
    linear = [layer for layer in net if hasattr(layer, "weight")]
    for layer, (weight, bias) in zip(linear, case.weights()[coupling], strict=True):
        last = sign if layer is linear[-1] else 1
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(last * weight.T))
            layer.bias.copy_(torch.from_numpy(last * bias))


def logistic(z: Any) -> Any:
    """(n, d) -> (n,): the log-density of the prior."""
    return -(z + 2.0 * nn.functional.softplus(-z)).sum(-1)


def draw(n: int, like: Any) -> Any:
    """(n, d) from the prior, in the dtype of a (d,) tensor."""
    u = torch.rand(n, len(like), dtype=like.dtype).clamp(1e-7, 1 - 1e-7)
    return torch.log(u) - torch.log1p(-u)


def _nflows(case: Case) -> Any:
    from nflows.distributions.base import Distribution
    from nflows.flows.base import Flow
    from nflows.transforms import AdditiveCouplingTransform, CompositeTransform, Transform

    class Scale(Transform):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.zeros(case.features))

        def forward(self, inputs: Any, context: Any = None) -> Any:
            return inputs * self.s.exp(), self.s.sum().expand(len(inputs))

        def inverse(self, inputs: Any, context: Any = None) -> Any:
            return inputs * (-self.s).exp(), -self.s.sum().expand(len(inputs))

    class Logistic(Distribution):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("zero", torch.zeros(case.features))

        def _log_prob(self, inputs: Any, context: Any) -> Any:
            return logistic(inputs)

        def _sample(self, num_samples: int, context: Any) -> Any:
            return draw(num_samples, self.zero)

    steps = [
        AdditiveCouplingTransform(
            [int(column % 2 != k % 2) for column in range(case.features)], lambda i, o, k=k: Net(case, k)
        )
        for k in range(case.couplings)
    ]
    return Flow(CompositeTransform([*steps, Scale()]), Logistic())


def _normflows(case: Case) -> Any:
    from normflows.core import NormalizingFlow
    from normflows.distributions import BaseDistribution
    from normflows.flows import AffineCouplingBlock
    from normflows.flows.base import Flow

    class Scale(Flow):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.zeros(case.features))

        def forward(self, z: Any) -> Any:
            return z * (-self.s).exp(), -self.s.sum()

        def inverse(self, z: Any) -> Any:
            return z * self.s.exp(), self.s.sum()

    class Logistic(BaseDistribution):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("zero", torch.zeros(case.features))

        def forward(self, num_samples: int = 1) -> Any:
            z = draw(num_samples, self.zero)
            return z, logistic(z)

        def log_prob(self, z: Any) -> Any:
            return logistic(z)

    modes = ("channel", "channel_inv")
    steps = [AffineCouplingBlock(Net(case, k, -1), scale=False, split_mode=modes[k % 2]) for k in range(case.couplings)]

    class Model(NormalizingFlow):  # type: ignore[misc]
        def sample(self, n: int) -> Any:
            return super().sample(n)[0]

    return Model(Logistic(), [Scale(), *reversed(steps)])  # the data are the end of its forward direction


def _zuko(case: Case) -> Any:
    from torch.distributions import Distribution, Transform, constraints
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.lazy import Flow, UnconditionalDistribution, UnconditionalTransform
    from zuko.transforms import AdditiveTransform

    class Scale(Transform):
        domain = codomain = constraints.real  # type: ignore[assignment]
        bijective, sign = True, 1

        def __init__(self, s: Any) -> None:
            super().__init__()
            self.s = s

        def _call(self, x: Any) -> Any:
            return x * self.s.exp()

        def _inverse(self, y: Any) -> Any:
            return y * (-self.s).exp()

        def log_abs_det_jacobian(self, x: Any, y: Any) -> Any:
            return self.s.expand(x.shape)

        def call_and_ladj(self, x: Any) -> Any:  # zuko's own composition asks for it
            return self._call(x), self.s.expand(x.shape)

    class Logistic(Distribution):
        arg_constraints = {}  # noqa: RUF012
        support, has_rsample = constraints.real_vector, True

        def __init__(self, zero: Any) -> None:
            super().__init__(event_shape=zero.shape, validate_args=False)
            self.zero = zero

        def log_prob(self, value: Any) -> Any:
            return logistic(value)

        def rsample(self, sample_shape: Any = ()) -> Any:
            return draw(sample_shape[0], self.zero)

    steps = []
    for k in range(case.couplings):
        constant = torch.arange(case.features) % 2 == k % 2
        shape: dict[str, Any] = {"shapes": [()], "hidden_features": case.hidden}
        steps.append(GeneralCouplingTransform(case.features, 0, constant, AdditiveTransform, **shape))
        give(steps[-1].hyper, case, k)
    scale = UnconditionalTransform(Scale, torch.zeros(case.features))
    base = UnconditionalDistribution(Logistic, torch.zeros(case.features), buffer=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = Flow([*steps, scale], base)

        def log_prob(self, x: Any) -> Any:
            return self.flow().log_prob(x)

        def sample(self, n: int) -> Any:
            return self.flow().rsample((n,))

    return Model()

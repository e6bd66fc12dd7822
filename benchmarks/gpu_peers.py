"""The peers of benchmarks/peers.py on a GPU: the same step, written as their users would write a fast one there.

With device "cpu" they run without a GPU, for a trial; only a graph of PyTorch's needs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import BETA1, BETA2, EPSILON, SEED, Case
from benchmarks.machine import versions
from benchmarks.peers import Jax, Torch, batch_indices

WARM_UP = 3  # steps before a capture, as PyTorch's documentation has it


class GpuTorch(Torch):
    """mode "eager", "compile" (torch.compile, max-autotune) or "graph" (the whole step in one torch.cuda.graph)."""

    def __init__(self, case: Case, device: str, mode: str, tf32: bool) -> None:
        import torch

        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        if torch.backends.cuda.matmul.allow_tf32 != tf32:
            raise RuntimeError("PyTorch's precision of float32 products is not the one that was asked for")
        torch.manual_seed(SEED)
        self.torch, self.case, self.device, self.mode = torch, case, device, mode
        self.dtype = getattr(torch, case.dtype)
        data = case.data()
        self.data = [torch.from_numpy(np.ascontiguousarray(data[:, part::2])).to(device) for part in (0, 1)]
        self.index = torch.from_numpy(batch_indices(case)).to(device)
        self.graph: Any = None
        self.reset()

    def reset(self) -> None:
        torch = self.torch

        def put(array: NDArray[Any]) -> Any:
            return torch.nn.Parameter(torch.from_numpy(array).to(self.device))

        layers = [[(put(w), put(b)) for w, b in layers] for layers in self.case.weights()]
        scale = [put(np.zeros(size, self.case.dtype)) for size in self.case.parts]
        loss_of = self._loss

        class Flow(torch.nn.Module):  # parameters of a module: torch.compile knows that they stay where they are
            def __init__(self) -> None:
                super().__init__()
                self.all = torch.nn.ParameterList([tensor for one in layers for pair in one for tensor in pair] + scale)

            def forward(self, x0: Any, x1: Any) -> Any:
                given = iter(self.all)
                return loss_of(x0, x1, [[(next(given), next(given)) for _ in one] for one in layers], [*given])

        flow = Flow()
        self.loss = torch.compile(flow, mode="max-autotune") if self.mode == "compile" else flow
        self.optimizer = torch.optim.Adam(
            flow.parameters(),
            lr=self.case.rate,
            betas=(BETA1, BETA2),
            eps=EPSILON,
            fused=True,
            capturable=self.mode == "graph",
        )
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)  # on the device, so that a graph can count

    def _step(self) -> Any:
        torch = self.torch
        if self.mode == "compile" and self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        index = self.index.index_select(0, self.at)[0]
        self.at.add_(1).remainder_(len(self.index))
        parts = [half.index_select(0, index) for half in self.data]
        if self.case.image8:
            noise = (torch.rand(part.shape, dtype=self.dtype, device=self.device) for part in parts)
            parts = [(part + more) * (1.0 / 256.0) for part, more in zip(parts, noise, strict=True)]
        return self._train_on(*parts)

    def _capture(self) -> None:
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.captured = self._step()

    def gate(self, batches: Sequence[NDArray[Any]]) -> list[float]:
        losses = []
        for x in batches:
            halves = [self.torch.from_numpy(np.ascontiguousarray(x[:, part::2])).to(self.device) for part in (0, 1)]
            losses.append(float(self._train_on(*halves).detach()))
        self.reset()
        return losses

    def run(self, steps: int) -> float:
        if self.mode == "graph" and self.graph is None:
            self._capture()
        self._wait()
        start = perf_counter()
        loss: Any = None
        for _ in range(steps):
            if self.graph is not None:
                self.graph.replay()
                loss = self.captured
            else:
                loss = self._step()
        self._wait()
        seconds = perf_counter() - start
        if not np.isfinite(float(loss.detach())):
            raise FloatingPointError("the loss is not finite")
        return seconds

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def about(self) -> dict[str, Any]:
        return {"mode": self.mode, **versions("torch", "triton")}


class GpuJax(Jax):
    """jit and lax.scan over a chunk of steps, the state donated."""

    def __init__(self, case: Case, device: str, tf32: bool) -> None:
        import jax

        jax.config.update("jax_platforms", device)
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "highest")
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        jax.config.update("jax_default_prng_impl", "rbg")  # faster than the default one
        self.jax, self.case, self.scan = jax, case, True
        data = case.data()
        self.data = [jax.numpy.asarray(np.ascontiguousarray(data[:, part::2])) for part in (0, 1)]
        self.index = jax.numpy.asarray(batch_indices(case).astype(np.int32))
        self._given = jax.jit(self._train_on, donate_argnums=0)
        self._one = jax.jit(self._step, donate_argnums=0)
        self._many = jax.jit(self._steps, static_argnums=3, donate_argnums=0)
        self.state = self._fresh()

    def about(self) -> dict[str, Any]:
        return {"device": str(self.jax.devices()[0]), **versions("jax", "jaxlib")}

"""Who is timed: other software's training step, written as its users would write a fast one, and the bare products.

A contestant does ``gate(batches)``, a list of losses from the initial weights on given batches, before anything is
timed, and ``run(steps)``, which trains on its own resident data, drawing batches and noise itself, and returns seconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import BETA1, BETA2, EPSILON, SEED, Case
from benchmarks.machine import versions


class Contestant(Protocol):
    def gate(self, batches: Sequence[NDArray[Any]]) -> list[float]: ...
    def run(self, steps: int) -> float: ...
    def about(self) -> dict[str, Any]: ...


def batch_indices(case: Case, epoch: int = 0) -> NDArray[np.int64]:
    """(batches, batch): the rows of an epoch, shuffled."""
    order = np.random.default_rng([SEED + 2, epoch]).permutation(case.rows)
    return order[: case.rows // case.batch * case.batch].reshape(-1, case.batch)


def pieces(x: NDArray[Any], rows: int = 2000) -> list[NDArray[Any]]:
    """Rows so many at a time."""
    return [x[start : start + rows] for start in range(0, len(x), rows)]


class Products:
    """The matrix products of a step and nothing else: NumPy's BLAS, outputs allocated beforehand."""

    def __init__(self, case: Case, threads: int) -> None:
        from threadpoolctl import threadpool_info, threadpool_limits

        threadpool_limits(threads, user_api="blas")
        self.blas = [
            f"{lib['internal_api']} {lib['version']}" for lib in threadpool_info() if lib["user_api"] == "blas"
        ]
        random = np.random.default_rng(SEED)
        self.work: list[tuple[Any, Any, Any]] = []
        for k in range(case.couplings):
            sizes = case.sizes(k)
            activations = [random.standard_normal((case.batch, size)).astype(case.dtype) for size in sizes]
            gradients = [random.standard_normal((case.batch, size)).astype(case.dtype) for size in sizes]
            weights = [layer[0] for layer in case.weights()[k]]
            for j, weight in enumerate(weights):
                self.work.append((activations[j], weight, np.empty_like(activations[j + 1])))
            for j in range(len(weights) - 1, -1, -1):
                if k > 0 or j > 0:
                    self.work.append((gradients[j + 1], weights[j].T, np.empty_like(activations[j])))
                self.work.append((activations[j].T, gradients[j + 1], np.empty_like(weights[j])))
        shapes = [(a.shape[0], a.shape[1], b.shape[1]) for a, b, _ in self.work]
        assert sorted(shapes) == sorted(case.products())

    def gate(self, batches: Sequence[NDArray[Any]]) -> list[float]:
        return []

    def run(self, steps: int) -> float:
        start = perf_counter()
        for _ in range(steps):
            for a, b, out in self.work:
                np.matmul(a, b, out=out)
        return perf_counter() - start

    def about(self) -> dict[str, Any]:
        return {"blas": self.blas, **versions("numpy")}


class Torch:
    """PyTorch: eager mode, or the loss through torch.compile; fused Adam; data resident, already in halves."""

    def __init__(self, case: Case, threads: int, compiled: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(SEED)
        self.torch, self.case = torch, case
        self.dtype = getattr(torch, case.dtype)
        self.data = self.tensors(case.data())
        self.index = torch.from_numpy(batch_indices(case))
        self._function = torch.compile(self._loss) if compiled else self._loss
        self.at = 0
        self.reset()

    def tensors(self, x: NDArray[Any]) -> list[Any]:
        """x : (n, d) -> what a loss takes: the two halves."""
        return [self.torch.from_numpy(np.ascontiguousarray(x[:, part::2])) for part in (0, 1)]

    def reset(self) -> None:
        torch = self.torch
        self.layers = [
            [(torch.from_numpy(w).requires_grad_(), torch.from_numpy(b).requires_grad_()) for w, b in layers]
            for layers in self.case.weights()
        ]
        self.scale = [torch.zeros(size, dtype=self.dtype, requires_grad=True) for size in self.case.parts]
        self._optimize([tensor for layers in self.layers for pair in layers for tensor in pair] + self.scale)

    def _optimize(self, parameters: list[Any]) -> None:
        adam = self.torch.optim.Adam
        self.optimizer = adam(parameters, lr=self.case.rate, betas=(BETA1, BETA2), eps=EPSILON, fused=True)

    def _loss(self, x0: Any, x1: Any, couplings: Any, scales: Any) -> Any:
        torch, parts = self.torch, [x0, x1]
        for k, layers in enumerate(couplings):
            y = parts[k % 2]
            for weight, bias in layers[:-1]:
                y = torch.relu(torch.addmm(bias, y, weight))
            weight, bias = layers[-1]
            parts[1 - k % 2] = parts[1 - k % 2] + torch.addmm(bias, y, weight)
        log_prob = 0.0
        for part, scale in zip(parts, scales, strict=True):
            h = part * torch.exp(scale)
            log_prob = log_prob - (h + 2.0 * torch.nn.functional.softplus(-h)).sum(1).mean() + scale.sum()
        return -log_prob

    def loss(self, *parts: Any) -> Any:
        """Of what ``tensors`` gives."""
        return self._function(*parts, self.layers, self.scale)

    def _train_on(self, *parts: Any) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*parts)
        loss.backward()
        self.optimizer.step()
        return loss

    def _step(self) -> Any:
        torch = self.torch
        index = self.index[self.at]
        self.at = (self.at + 1) % len(self.index)
        parts = [half.index_select(0, index) for half in self.data]
        if self.case.image8:
            parts = [(part + torch.rand(part.shape, dtype=self.dtype)) * (1.0 / 256.0) for part in parts]
        return self._train_on(*parts)

    def gate(self, batches: Sequence[NDArray[Any]]) -> list[float]:
        losses = []
        for x in batches:
            losses.append(float(self._train_on(*self.tensors(x)).detach()))
        self.reset()
        return losses

    def shuffle(self, epoch: int) -> None:
        """The rows in another order, from their beginning."""
        self.index, self.at = self.torch.from_numpy(batch_indices(self.case, epoch)), 0

    def valid(self, x: NDArray[Any]) -> float:
        """Mean log-density of rows as the flow sees them."""
        with self.torch.no_grad():
            return -sum(float(self.loss(*self.tensors(part))) * len(part) for part in pieces(x)) / len(x)

    def run(self, steps: int) -> float:
        start = perf_counter()
        for _ in range(steps):
            loss = self._step()
        seconds = perf_counter() - start
        if not np.isfinite(float(loss.detach())):
            raise FloatingPointError("the loss is not finite")
        return seconds

    def about(self) -> dict[str, Any]:
        return {"threads": self.torch.get_num_threads(), **versions("torch")}


class TorchLibrary(Torch):
    """The same flow in a library on PyTorch (benchmarks/libraries.py), eager, with the same optimiser."""

    def __init__(self, case: Case, threads: int, library: str) -> None:
        self.library = library
        super().__init__(case, threads, compiled=False)

    def tensors(self, x: NDArray[Any]) -> list[Any]:
        from benchmarks.libraries import columns

        return [self.torch.from_numpy(columns(self.library, x))]

    def reset(self) -> None:
        from benchmarks.libraries import build

        self.model = build(self.library, self.case)
        self._optimize(list(self.model.parameters()))

    def loss(self, x: Any) -> Any:
        return -self.model.log_prob(x).mean()

    def about(self) -> dict[str, Any]:
        return {**super().about(), **versions(self.library)}


class Jax:
    """JAX: the whole step compiled, its state donated; with scan, a chunk of steps is one call."""

    def __init__(self, case: Case, threads: int, scan: bool) -> None:
        if threads == 1:
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        jax.config.update("jax_default_prng_impl", "rbg")  # faster than the default one
        self.jax, self.case, self.scan = jax, case, scan
        data = case.data()
        self.data = [jax.numpy.asarray(np.ascontiguousarray(data[:, part::2])) for part in (0, 1)]
        self.index = jax.numpy.asarray(batch_indices(case).astype(np.int32))
        self._score = jax.jit(self._loss)
        self._given = jax.jit(self._train_on, donate_argnums=0)
        self._one = jax.jit(self._step, donate_argnums=0)
        self._many = jax.jit(self._steps, static_argnums=3, donate_argnums=0)
        self.state = self._fresh()

    def _fresh(self) -> Any:
        np_ = self.jax.numpy
        parameters = {
            "layers": [[(np_.asarray(w), np_.asarray(b)) for w, b in layers] for layers in self.case.weights()],
            "scale": [np_.zeros(size, self.case.dtype) for size in self.case.parts],
        }

        def zeros() -> Any:
            return self.jax.tree.map(np_.zeros_like, parameters)

        return parameters, zeros(), zeros(), np_.zeros((), "int32"), self.jax.random.key(SEED)

    def _loss(self, parameters: Any, x0: Any, x1: Any) -> Any:
        jax, np_, parts = self.jax, self.jax.numpy, [x0, x1]
        for k, layers in enumerate(parameters["layers"]):
            y = parts[k % 2]
            for weight, bias in layers[:-1]:
                y = np_.maximum(y @ weight + bias, 0)
            weight, bias = layers[-1]
            parts[1 - k % 2] = parts[1 - k % 2] + (y @ weight + bias)
        log_prob = 0.0
        for part, scale in zip(parts, parameters["scale"], strict=True):
            h = part * np_.exp(scale)
            log_prob = log_prob - (h + 2.0 * jax.nn.softplus(-h)).sum(1).mean() + scale.sum()
        return -log_prob

    def _train_on(self, state: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
        tree, np_ = self.jax.tree, self.jax.numpy
        p, m, v, t, key = state
        loss, g = self.jax.value_and_grad(self._loss)(p, x0, x1)
        time = (t + 1).astype(self.case.dtype)
        m = tree.map(lambda m, g: BETA1 * m + (1.0 - BETA1) * g, m, g)
        v = tree.map(lambda v, g: BETA2 * v + (1.0 - BETA2) * g * g, v, g)
        rate, root = self.case.rate / (1.0 - BETA1**time), np_.sqrt(1.0 / (1.0 - BETA2**time))
        p = tree.map(lambda p, m, v: p - rate * m / (np_.sqrt(v) * root + EPSILON), p, m, v)
        return (p, m, v, t + 1, key), loss

    def _step(self, state: Any, data: Any, index: Any) -> tuple[Any, Any]:
        random, dtype = self.jax.random, self.case.dtype
        t, key = state[3], state[4]
        rows = index[t % index.shape[0]]
        parts = [half[rows] for half in data]
        if self.case.image8:
            keys = random.split(random.fold_in(key, t))
            parts = [(part + random.uniform(k, part.shape, dtype)) / 256 for part, k in zip(parts, keys, strict=True)]
        return self._train_on(state, *parts)

    def _steps(self, state: Any, data: Any, index: Any, steps: int) -> tuple[Any, Any]:
        state, losses = self.jax.lax.scan(lambda s, _: self._step(s, data, index), state, None, length=steps)
        return state, losses[-1]

    def gate(self, batches: Sequence[NDArray[Any]]) -> list[float]:
        losses, state = [], self._fresh()
        for x in batches:
            state, loss = self._given(state, x[:, 0::2], x[:, 1::2])
            losses.append(float(loss))
        return losses

    def shuffle(self, epoch: int) -> None:
        """The rows in another order, from their beginning: an epoch is a whole number of rounds through the index."""
        self.index = self.jax.numpy.asarray(batch_indices(self.case, epoch).astype(np.int32))

    def valid(self, x: NDArray[Any]) -> float:
        """Mean log-density of rows as the flow sees them."""
        parts = [(part[:, 0::2], part[:, 1::2]) for part in pieces(x)]
        total = sum(float(self._score(self.state[0], *halves)) * len(halves[0]) for halves in parts)
        return -total / len(x)

    def run(self, steps: int) -> float:
        start = perf_counter()
        if self.scan:
            self.state, loss = self._many(self.state, self.data, self.index, steps)
        else:
            for _ in range(steps):
                self.state, loss = self._one(self.state, self.data, self.index)
        self.jax.block_until_ready((self.state, loss))
        seconds = perf_counter() - start
        if not np.isfinite(float(loss)):
            raise FloatingPointError("the loss is not finite")
        return seconds

    def about(self) -> dict[str, Any]:
        return versions("jax", "jaxlib")

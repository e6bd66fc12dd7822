"""The variational auto-encoder as a NICE model over data and noise (Dinh et al. 2015, section 4 and appendix C).

With z = g(eps | x), eps ~ N(0, I), and xi = (x - f(z)) / sigma(z), the map (x, eps) -> (xi, z) is two affine couplings:
the first changes eps by what it reads from x, the second x by what it reads from z. Its density over the pair is exact,
and

    log p(x, eps) - log p(eps) = log p(x | z) + log p(z) - log q(z | x),

the estimate of the evidence's lower bound by which Kingma & Welling (2014) train auto-encoders.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.coupling import AffineCoupling, Buffers
from nicecp.kernels import get_backend
from nicecp.kernels.backend import ALIGNMENT, FACTOR_BOUND, OPTIMIZERS, PRIORS, Array, Backend, Purpose, Slot
from nicecp.mlp import Layers
from nicecp.optimizers import AdaM
from nicecp.spec import CouplingSpec

Floats = NDArray[np.float64]
DATA, NOISE = 0, 1  # parts: x becomes xi, eps becomes z


class _Pass:
    """Buffers of both couplings for n pairs, and the recorded pass over them."""

    def __init__(self, vae: VAE, n: int) -> None:
        backend, sizes = vae.backend, (vae.n_features, vae.n_latent)

        def array(width: int) -> Array:
            return backend.alloc((n, width), vae.dtype)

        self.x, self.eps, self.xi, self.z = (array(sizes[part]) for part in (DATA, NOISE, DATA, NOISE))
        self.h = array(sizes[DATA]), array(sizes[NOISE])
        self.dh = array(sizes[DATA]), array(sizes[NOISE])
        self.dz = array(sizes[NOISE])  # the second network's part of the gradient by z
        self.logp, self.dlogp, self.log_det, self.weight = (backend.alloc(n, np.float64) for _ in range(4))
        backend.copy_in(self.weight, np.ones(n))
        self.at = []
        changes = ((self.eps, self.z, self.x), (self.x, self.xi, self.z))
        for k, ((before, after, condition), shapes) in enumerate(zip(changes, vae.layer_sizes, strict=True)):
            ys, dys = ([array(size) for size in shapes[1:]] for _ in range(2))
            self.at.append(Buffers(before, after, condition, ys, dys, self.log_det, first=k == 0))
        self.score = backend.record(lambda: self._score(vae))

    def _score(self, vae: VAE) -> None:
        """x, eps -> logp = log p(xi) + log p(z) + log det: the density of the pair."""
        backend, (data, noise) = vae.backend, vae.no_scale
        for coupling, at, layers in zip(vae.couplings, self.at, vae.layers, strict=True):
            coupling.forward(backend, at, layers)
        backend.scale_prior_forward(self.logp, *self.h, self.xi, self.z, data, noise, PRIORS["gaussian"])
        backend.accumulate(self.logp, self.log_det)

    def backward(self, vae: VAE) -> None:
        """dlogp -> the gradients of both networks."""
        backend, (data, noise) = vae.backend, vae.no_scale
        (dxi, dz), (encoder, decoder) = self.dh, vae.couplings
        backend.scale_prior_backward(dxi, dz, None, None, self.dlogp, *self.h, data, noise, PRIORS["gaussian"])
        decoder.backward(backend, self.at[1], self.dz, vae.gradients[1], dxi, self.dlogp, vae.layers[1])
        backend.couple(dz, dz, self.dz, 1)
        encoder.backward(backend, self.at[0], None, vae.gradients[0], dz, self.dlogp, vae.layers[0])


class VAE:
    """A Gaussian variational auto-encoder, trained as a NICE model over (x, eps).

    Parameters
    ----------
    n_features, n_latent : int
    hidden : sequence of int
        Hidden layers of both networks, ReLU.
    dtype : "float64" or "float32"
    seed : int
        Of weights and noise.
    threads
        See nicecp.kernels.get_backend.

    The standard deviations of q(z | x) and of p(x | z) lie between exp(-3) and exp(3): Backend.factor_forward.
    """

    def __init__(
        self,
        n_features: int,
        n_latent: int = 8,
        hidden: tuple[int, ...] = (64, 64),
        dtype: str = "float64",
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        if n_features < 1 or n_latent < 1:
            raise ValueError(f"a pair needs at least one feature and one latent, got {n_features} and {n_latent}")
        self.n_features, self.n_latent, self.dtype, self.seed = n_features, n_latent, np.dtype(dtype), seed
        self.backend: Backend = get_backend("cpu", threads)
        self.couplings = (
            AffineCoupling(CouplingSpec("affine", DATA, NOISE, hidden)),
            AffineCoupling(CouplingSpec("affine", NOISE, DATA, hidden)),
        )
        self.layer_sizes = ((n_features, *hidden, 2 * n_latent), (n_latent, *hidden, 2 * n_features))
        size = sum(self._room(i * o) + self._room(o) for sizes in self.layer_sizes for i, o in pairwise(sizes))
        self.flat, self._flat_gradient, self._first, self._second = (
            self.backend.alloc(size, self.dtype) for _ in range(4)
        )
        self.layers, self.gradients = self._views(self.flat), self._views(self._flat_gradient)
        self.no_scale = self.backend.alloc(n_features, self.dtype), self.backend.alloc(n_latent, self.dtype)
        self._epoch, self._step = 0, 0.0
        rng = np.random.default_rng(seed)
        for layers in self.layers:
            for j, (weight, _) in enumerate(layers):
                bound = np.sqrt(6.0 / len(weight)) if j < len(layers) - 1 else 0.01  # He et al. 2015; near identity
                self.backend.copy_in(weight, rng.uniform(-bound, bound, weight.shape))

    def _room(self, size: int) -> int:
        unit = ALIGNMENT // self.dtype.itemsize
        return -(-size // unit) * unit

    def _views(self, flat: Array) -> tuple[Layers, Layers]:
        at, out = 0, []
        for sizes in self.layer_sizes:
            layers = []
            for i, o in pairwise(sizes):
                weight = flat[at : at + i * o].reshape(i, o)
                at += self._room(i * o)
                layers.append((weight, flat[at : at + o]))
                at += self._room(o)
            out.append(layers)
        return out[0], out[1]

    # --- the pair's density -----------------------------------------------------------------------------------------

    def log_prob_pair(self, x: ArrayLike, eps: ArrayLike) -> Floats:
        """x : (n, d), eps : (n, n_latent) -> (n,): exact log-density of the pair under the NICE model, in nats."""
        rows, noise = self._checked(x, self.n_features), self._checked(eps, self.n_latent)
        if len(rows) != len(noise):
            raise ValueError(f"x has {len(rows)} rows, eps {len(noise)}")
        run = _Pass(self, len(rows))
        self.backend.copy_in(run.x, rows)
        self.backend.copy_in(run.eps, noise)
        with self.backend.computing():
            run.score()
        return np.asarray(self.backend.copy_out(run.logp))

    def bound(self, x: ArrayLike, eps: ArrayLike) -> Floats:
        """x : (n, d), eps : (n, n_latent) standard normal -> (n,): one-sample estimates of the bound on log p(x)."""
        noise = self._checked(eps, self.n_latent)
        log_noise: Floats = -0.5 * (noise**2 + np.log(2 * np.pi)).sum(axis=1)
        return self.log_prob_pair(x, noise) - log_noise

    def encode(self, x: ArrayLike) -> tuple[Floats, Floats]:
        """x : (n, d) -> mean and standard deviation of q(z | x), each (n, n_latent)."""
        return self._normal(0, self._checked(x, self.n_features))

    def decode(self, z: ArrayLike) -> tuple[Floats, Floats]:
        """z : (n, n_latent) -> mean and standard deviation of p(x | z), each (n, d).

        The second coupling makes xi = x exp(a) + b of x, so that x = (xi - b) exp(-a).
        """
        shift, factor = self._normal(1, self._checked(z, self.n_latent))
        return -shift / factor, 1 / factor

    def sample(self, n: int, seed: int = 0) -> Floats:
        """n draws of x : (n, d), z from its prior."""
        rng = np.random.default_rng(seed)
        mean, deviation = self.decode(rng.standard_normal((n, self.n_latent)))
        return np.asarray(mean + deviation * rng.standard_normal(mean.shape))

    def _normal(self, number: int, condition: Floats) -> tuple[Floats, Floats]:
        """A network's shift and factor, in plain NumPy."""
        y, layers = condition.astype(self.dtype), self.layers[number]
        for j, (weight, bias) in enumerate(layers):
            y = y @ weight + bias
            y = np.maximum(y, 0) if j < len(layers) - 1 else y
        u, shift = np.split(y.astype(np.float64), 2, axis=1)
        return shift, np.exp(FACTOR_BOUND * np.tanh(u / FACTOR_BOUND))

    def _checked(self, values: ArrayLike, width: int) -> Floats:
        rows = np.asarray(values, np.float64)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"expected an array of shape (n, {width}), got {rows.shape}")
        return rows

    # --- training ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        x: ArrayLike,
        epochs: int = 50,
        batch_size: int = 100,
        optimizer: AdaM = AdaM(),  # noqa: B008 (frozen)
        noise: float = 0.0,
    ) -> list[float]:
        """Maximise the bound on rows x : (n, d) -> its mean in each epoch, nats per row.

        noise : width of uniform noise that is added anew to every presentation (1/256 dequantizes k/256). Each call
        goes on from where the last one ended. ValueError for fewer rows than a batch.
        """
        rows = self._checked(x, self.n_features)
        if len(rows) < batch_size:
            raise ValueError(f"{len(rows)} rows are fewer than a batch of {batch_size}")
        backend, run = self.backend, _Pass(self, batch_size)
        host, state = np.zeros(Slot.SIZE), backend.alloc(Slot.SIZE, np.float64)
        optimizer.write(host)
        host[Slot.STEP] = self._step  # to which the moments belong
        backend.copy_in(state, host)
        size, rule = len(self.flat), OPTIMIZERS[optimizer.kind]

        def learn() -> None:
            run._score(self)
            backend.loss(state, run.dlogp, run.logp, run.weight)
            run.backward(self)
            backend.update(self.flat, self._flat_gradient, self._first, self._second, 0, size, state, rule)
            backend.advance(state)

        step, means = backend.record(learn), []
        eps = backend.alloc((len(rows), self.n_latent), np.float64)
        for _ in range(epochs):
            self._epoch += 1
            rng = np.random.default_rng([self.seed, self._epoch])
            backend.fill_normal(eps, self.seed, Purpose.TRAIN_NOISE, self._epoch)
            order, drawn, total = rng.permutation(len(rows)), backend.copy_out(eps), 0.0
            batches = len(rows) // batch_size
            with backend.computing():
                for batch in order[: batches * batch_size].reshape(batches, batch_size):
                    picked = rows[batch]
                    backend.copy_in(run.x, picked + noise * rng.random(picked.shape) if noise else picked)
                    backend.copy_in(run.eps, drawn[batch])
                    step()
                    total += float(state[Slot.LOSS]) - 0.5 * float((drawn[batch] ** 2).sum(axis=1).mean())
            self._step = float(state[Slot.STEP])
            means.append(-total / batches + 0.5 * self.n_latent * float(np.log(2 * np.pi)))
        return means

    def loss_and_gradient(self, x: ArrayLike, eps: ArrayLike) -> tuple[float, Any]:
        """Mean negative log-density of the pairs and its gradient by the flat parameters: for gradient checks."""
        rows = self._checked(x, self.n_features)
        run = _Pass(self, len(rows))
        self.backend.copy_in(run.x, rows)
        self.backend.copy_in(run.eps, self._checked(eps, self.n_latent))
        self.backend.copy_in(run.dlogp, np.full(len(rows), -1.0 / len(rows)))
        with self.backend.computing():
            run.score()
            run.backward(self)
        return -float(run.logp.mean()), self.backend.copy_out(self._flat_gradient)

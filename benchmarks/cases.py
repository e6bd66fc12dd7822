"""The two flows that are timed, their data and initial weights: the same numbers for every contestant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

BETA1, BETA2, EPSILON, RATE = 0.9, 0.99, 1e-4, 1e-3  # Adam as the paper's AdaM in today's notation
SEED = 1

Layers = list[
    list[tuple[NDArray[Any], NDArray[Any]]]
]  # [coupling][layer] = (weight (fan_in, fan_out), bias (fan_out,))


@dataclass(frozen=True)
class Case:
    """A NICE flow with additive couplings and a logistic prior, and a training step of it."""

    name: str
    features: int
    hidden: tuple[int, ...]
    batch: int
    rows: int
    image8: bool  # uint8 pixels dequantized anew at every step, else a standardised table
    weight_bound: float | None  # initial weights are uniform in +-bound; None: +-1 / sqrt(fan_in)
    chunk: int  # steps timed in one go
    gate_steps: int
    couplings: int = 4
    dtype: str = "float32"
    rate: float = RATE  # of Adam
    file: str = ""  # whose dataset train are the rows, instead of drawn ones

    @property
    def parts(self) -> tuple[int, int]:
        return (self.features + 1) // 2, self.features // 2

    def sizes(self, coupling: int) -> tuple[int, ...]:
        """Layer sizes of one coupling's network; coupling k reads part k % 2 and changes the other."""
        return (self.parts[coupling % 2], *self.hidden, self.parts[1 - coupling % 2])

    def data(self) -> NDArray[Any]:
        """(rows, features): uint8, four in five pixels black, or floats whose columns have mean 0, deviation 1."""
        if self.file:
            import h5py

            with h5py.File(self.file) as file:
                return np.asarray(file["train"][: self.rows]).reshape(-1, self.features)
        random = np.random.default_rng(SEED)
        if self.image8:
            pixels = random.integers(0, 256, (self.rows, self.features), dtype=np.uint8)
            pixels[random.random(pixels.shape, np.float32) < 0.8] = 0
            return pixels
        table = random.standard_normal((self.rows, self.features))
        table[:, 1:] += np.sin(2.0 * table[:, :-1])
        return np.ascontiguousarray((table - table.mean(0)) / table.std(0), dtype=self.dtype)

    def held_out(self, epoch: int) -> NDArray[Any]:
        """The rows of the file after those that are trained on, as the flow sees them in that epoch's validation."""
        rest = replace(self, rows=2**31).data()[self.rows :]
        noise = np.random.default_rng([SEED + 3, epoch]).random(rest.shape, np.float32)
        return ((rest + noise) / 256.0).astype(self.dtype)

    def weights(self) -> Layers:
        """Initial weights; biases and log-scales are 0."""
        random = np.random.default_rng(SEED + 1)
        layers: Layers = []
        for k in range(self.couplings):
            sizes = self.sizes(k)
            layers.append([])
            for i, o in pairwise(sizes):
                bound = self.weight_bound or i**-0.5
                layers[-1].append((random.uniform(-bound, bound, (i, o)).astype(self.dtype), np.zeros(o, self.dtype)))
        return layers

    def batch_of(self, data: NDArray[Any], rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[Any]:
        """rows : (n,) -> (n, features) as the flow sees them, with the noise of nicecp's kernel contract.

        Column c of a row takes 16 bits: block c // 8, word c % 8 // 2, the low half first.
        """
        if not self.image8:
            return data[rows]
        from nicecp.kernels.backend import Purpose
        from nicecp.kernels.philox import random_words

        bits = np.empty((len(rows), self.features), np.float64)
        for block in range(-(-self.features // 8)):
            words = random_words(seed, Purpose.TRAIN_NOISE, epoch, rows, block)
            halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(len(rows), 8)
            columns = slice(8 * block, min(8 * block + 8, self.features))
            bits[:, columns] = halves[:, : columns.stop - columns.start]
        return ((data[rows] * 65536.0 + bits) / 2.0**24).astype(self.dtype)

    def products(self) -> list[tuple[int, int, int]]:
        """(m, k, n) of every matrix product (m, k) @ (k, n) of one step.

        Forward, gradient by the weights, gradient by the input; nobody needs the last by the data itself.
        """
        shapes = []
        for k in range(self.couplings):
            sizes = self.sizes(k)
            for j, (i, o) in enumerate(pairwise(sizes)):
                shapes += [(self.batch, i, o), (i, self.batch, o)]
                if k > 0 or j > 0:
                    shapes.append((self.batch, o, i))
        return shapes

    @property
    def flops(self) -> int:
        """Floating-point operations of one step's matrix products."""
        return sum(2 * m * k * n for m, k, n in self.products())


CASES = {
    "mnist": Case("mnist", 784, (1000,) * 5, 200, 50_000, True, 0.01, chunk=5, gate_steps=4),
    "small": Case("small", 8, (64, 64), 256, 2**18, False, None, chunk=200, gate_steps=30),
    # The preset demo's flow, for real MNIST (file), whose last 10,000 training images validate.
    "digits": Case("digits", 784, (256,) * 3, 200, 50_000, True, None, chunk=250, gate_steps=4, rate=3e-3),
}

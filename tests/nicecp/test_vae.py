"""The auto-encoder as a NICE model: appendix C's identity to rounding, gradients, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp.digits import draw_digits
from nicecp.optimizers import AdaM
from nicecp.vae import VAE


def make(dtype: str = "float64") -> tuple[VAE, Any, Any]:
    """One whose couplings are far from the identity, with pairs."""
    vae, rng = VAE(5, 3, (7, 6), dtype, seed=1, threads=1), np.random.default_rng(2)
    for layers in vae.layers:
        for weight, bias in layers:
            weight[...] = rng.normal(size=weight.shape) * np.sqrt(1.5 / len(weight))
            bias[...] = 0.4 * rng.normal(size=bias.shape)
    return vae, rng.normal(size=(9, 5)), rng.normal(size=(9, 3))


def normal(x: Any, mean: Any, deviation: Any) -> Any:
    """log N(x; mean, deviation^2), summed over the last axis."""
    return (-0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation) - 0.5 * np.log(2 * np.pi)).sum(axis=1)


def test_the_density_of_the_pair_is_the_sgvb_estimate() -> None:
    """log p(x, eps) - log p(eps) = log p(x | z) + log p(z) - log q(z | x), each from its own definition."""
    vae, x, eps = make()
    mean, deviation = vae.encode(x)
    z = mean + deviation * eps
    expected = normal(x, *vae.decode(z)) + normal(z, 0.0, np.ones(3)) - normal(z, mean, deviation)
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(vae.bound(x, eps), expected, rtol=1e-10, atol=1e-10)
    pair = vae.log_prob_pair(x, eps) - normal(eps, 0.0, np.ones(3))
    np.testing.assert_allclose(pair, expected, rtol=1e-10, atol=1e-10)


def test_its_gradient_is_that_of_differences() -> None:
    vae, x, eps = make()
    _, gradient = vae.loss_and_gradient(x, eps)
    size = np.linalg.norm(gradient)
    used = np.flatnonzero(vae.flat)
    for entry in np.random.default_rng(3).choice(used, 60, replace=False):
        ends, before = [], vae.flat[entry]
        for step in (1e-5, -1e-5):
            vae.flat[entry] = before + step
            ends.append(-vae.log_prob_pair(x, eps).mean())
        vae.flat[entry] = before
        assert abs((ends[0] - ends[1]) / 2e-5 - gradient[entry]) <= 1e-8 * size, entry


def test_float32_agrees() -> None:
    single, x, eps = make("float32")
    double, _, _ = make()
    x, eps = x.astype(np.float32), eps.astype(np.float32)
    double.flat[: len(single.flat)] = 0
    for to, given in zip(double.layers, single.layers, strict=True):
        for (weight, bias), (weight32, bias32) in zip(to, given, strict=True):
            weight[...], bias[...] = weight32, bias32
    np.testing.assert_allclose(single.bound(x, eps), double.bound(x, eps), rtol=2e-5, atol=1e-4)


def test_it_learns_a_known_gaussian() -> None:
    """Data on a line with noise: the bound approaches the entropy, which no bound may exceed by more than chance."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 1)) @ np.array([[1.0, -2.0, 0.5]]) + 0.3 * rng.normal(size=(4000, 3))
    vae = VAE(3, 1, (16,), seed=0, threads=1)
    means = vae.fit(x, epochs=60, batch_size=100, optimizer=AdaM(rate=3e-3))
    covariance = np.array([[1.0, -2.0, 0.5]]).T @ np.array([[1.0, -2.0, 0.5]]) + 0.09 * np.eye(3)
    evidence = -0.5 * (3 * (1 + np.log(2 * np.pi)) + np.linalg.slogdet(covariance)[1])
    assert means[0] < evidence - 1
    assert evidence - 0.1 < means[-1] < evidence + 0.05
    drawn = vae.sample(4000, seed=1)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.35)


def test_digits() -> None:
    """A few epochs on drawn digits with fresh noise: far above where it began, and a second call goes on."""
    images, _ = draw_digits(600, seed=3)
    x = images.reshape(600, -1) / 256.0
    vae = VAE(784, 6, (32,), "float32", threads=1)
    means = vae.fit(x, epochs=4, noise=1 / 256, optimizer=AdaM(rate=3e-3))
    more = vae.fit(x, epochs=2, noise=1 / 256, optimizer=AdaM(rate=3e-3))
    assert means[-1] > means[0] + 300
    assert more[0] > means[1]


def test_a_second_fit_goes_on_where_the_first_ended() -> None:
    """To the bit: the optimiser's moments belong to its number of steps."""
    x = np.random.default_rng(0).normal(size=(400, 3))
    once, twice = (VAE(3, 2, (8,), seed=1, threads=1) for _ in range(2))
    means = once.fit(x, epochs=4)
    assert [*twice.fit(x, epochs=1), *twice.fit(x, epochs=3)] == means
    np.testing.assert_array_equal(twice.flat, once.flat)


def test_what_does_not_fit_is_refused() -> None:
    vae, x, eps = make()
    with pytest.raises(ValueError, match=r"\(n, 5\), got \(9, 3\)"):
        vae.bound(eps, eps)
    with pytest.raises(ValueError, match="9 rows, eps 2"):
        vae.bound(x, eps[:2])
    with pytest.raises(ValueError, match="fewer than a batch"):
        vae.fit(x, batch_size=10)
    with pytest.raises(ValueError, match="at least one"):
        VAE(3, 0)

"""Importance sampling: a flow proposes, weights p / q correct it, and say how good it is.

    python examples/importance_sampling.py

The weights of a normalised target have mean 1 if the flow's densities are exact and it covers the target; their
effective number is what the flow's errors cost.
"""

from __future__ import annotations

import banana
import numpy as np

import nicecp


def main() -> None:
    flow = nicecp.NICE(banana.DIM, (64, 64), 6, "gaussian", coupling="affine", init="he", seed=0, threads=1)
    optimizer = nicecp.AdaM(rate=2e-3, rate_decay=1.001, rate_floor=5e-5)
    x = banana.sample(20_000, seed=0)
    nicecp.fit(flow, x, epochs=60, batch_size=256, optimizer=optimizer, patience=15, whiten="gaussian")

    n = 100_000
    x, log_q = flow.sample(n, rng=1, return_log_prob=True)
    weight = np.exp(banana.log_prob(x) - log_q)
    mean, error = weight.mean(), weight.std() / np.sqrt(n)
    effective = weight.sum() ** 2 / (weight**2).sum()
    print(f"E[p/q] = {mean:.4f} +- {error:.4f}, effective samples {effective / n:.1%}")
    assert abs(mean - 1) < 3 * error
    assert effective / n > 0.7

    # A question about the target, answered with and without weights: E[x3] is (1 + Var(x1) / 4) / 4 - 1, Var(x1) = 3.
    truth = (1 + 3 / 4) / 4 - 1
    weighted = np.average(x[:, 3], weights=weight)
    spread = np.sqrt(np.average((x[:, 3] - weighted) ** 2, weights=weight) / effective)
    print(
        f"E[x3]: exactly {truth:.4f}, by weights {weighted:.4f} +- {spread:.4f}, by the flow alone {x[:, 3].mean():.4f}"
    )
    assert abs(weighted - truth) < 4 * spread


if __name__ == "__main__":
    main()

"""dynesty: a flow fitted to samples of one experiment as the prior of the next one's analysis.

    pip install 'nicecp[examples]' && python examples/dynesty_prior.py

``flow.prior_transform`` maps dynesty's unit cube to the parameters. The evidence is compared with the plain average of
the likelihood over the flow's exact samples, which few problems are easy enough for.
"""

from __future__ import annotations

import banana
import dynesty
import numpy as np

import nicecp


def log_likelihood(x: np.ndarray) -> np.ndarray:
    """x : (..., 4): the second experiment measures x1 = 1.0 +- 0.3 and x3 = 0.5 +- 0.5."""
    x1, x3 = x[..., 1], x[..., 3]
    return -0.5 * ((x1 - 1.0) / 0.3) ** 2 - 0.5 * ((x3 - 0.5) / 0.5) ** 2


def main() -> None:
    earlier = banana.sample(5000, seed=0)  # what a first analysis left behind
    flow = nicecp.NICE(banana.DIM, (64, 64), 4, "gaussian", coupling="affine", init="he", seed=0, threads=1)
    nicecp.fit(flow, earlier, epochs=40, whiten="gaussian")

    rng = np.random.default_rng(1)
    sampler = dynesty.NestedSampler(
        log_likelihood, flow.prior_transform, banana.DIM, nlive=400, sample="rwalk", bootstrap=0, rstate=rng
    )
    sampler.run_nested(dlogz=0.05, print_progress=False)
    found, error = sampler.results.logz[-1], sampler.results.logzerr[-1]

    likelihood = np.exp(log_likelihood(flow.sample(500_000, rng=2)))
    direct = np.log(likelihood.mean())
    direct_error = likelihood.std() / likelihood.mean() / np.sqrt(len(likelihood))
    off = (found - direct) / np.hypot(error, direct_error)
    print(
        f"log Z: dynesty {found:.3f} +- {error:.3f}, direct average {direct:.4f} +- {direct_error:.4f}: {off:+.1f} sigma"
    )
    assert abs(off) < 3
    assert error < 0.2


if __name__ == "__main__":
    main()

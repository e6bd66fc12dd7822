"""emcee: a flow as the target of walkers, and a flow as the proposal that makes almost every step independent.

    pip install 'nicecp[examples]' && python examples/emcee_sampling.py

First walkers explore a flow: it is a density like any other. Then a flow fitted to a short, correlated run on the banana
proposes the next points, and the rule of Metropolis and Hastings keeps the chain exact whatever the flow's errors are.
"""

from __future__ import annotations

import banana
import emcee
import numpy as np

import nicecp


def fitted(x: np.ndarray) -> nicecp.NICE:
    """A flow fitted to rows x : (n, 4). Whitening gives it the best Gaussian to start from."""
    flow = nicecp.NICE(banana.DIM, (64, 64), 6, "gaussian", coupling="affine", init="he", seed=0, threads=1)
    optimizer = nicecp.AdaM(rate=2e-3, rate_decay=1.001, rate_floor=5e-5)
    nicecp.fit(flow, x, epochs=100, batch_size=256, optimizer=optimizer, patience=15, whiten="gaussian")
    return flow


def target(flow: nicecp.NICE) -> None:
    """Walkers on the flow itself: their moments are those of the flow's exact samples."""
    exact = flow.sample(50_000, rng=1)
    sampler = emcee.EnsembleSampler(64, flow.dim, flow.log_prob, vectorize=True)
    sampler.random_state = np.random.RandomState(2).get_state()
    sampler.run_mcmc(exact[:64], 2000)
    walked = sampler.get_chain(discard=200)
    # Of each column; steps are correlated, so the error is taken from the walkers' own means.
    error = np.hypot(walked.mean(axis=0).std(axis=0) / np.sqrt(64), exact.std(axis=0) / np.sqrt(len(exact)))
    off = np.abs(walked.mean(axis=(0, 1)) - exact.mean(axis=0)) / error
    print(f"walkers on the flow: column means within {off.max():.1f} standard errors of exact samples")
    assert off.max() < 5


def proposal(flow: nicecp.NICE) -> None:
    """The flow proposes for the banana: log_factors are log q(old) - log q(new)."""

    def propose(coords: np.ndarray, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        new, log_q = flow.sample(len(coords), int(rng.randint(2**31)), return_log_prob=True)
        return new, flow.log_prob(coords) - log_q

    move = emcee.moves.MHMove(propose)
    sampler = emcee.EnsembleSampler(64, banana.DIM, banana.log_prob, moves=move, vectorize=True)
    sampler.random_state = np.random.RandomState(3).get_state()
    sampler.run_mcmc(flow.sample(64, rng=4), 300)
    accepted = sampler.acceptance_fraction.mean()
    time = sampler.get_autocorr_time(tol=0).max()
    print(f"the flow as proposal: {accepted:.1%} accepted, autocorrelation time {time:.1f} steps")
    assert accepted > 0.8
    assert time < 3


def main() -> None:
    short = emcee.EnsembleSampler(64, banana.DIM, banana.log_prob, vectorize=True)
    short.random_state = np.random.RandomState(0).get_state()
    short.run_mcmc(np.random.default_rng(0).normal(size=(64, banana.DIM)), 3000)
    print(f"emcee's own moves: autocorrelation time {short.get_autocorr_time(tol=0).max():.0f} steps")
    flow = fitted(short.get_chain(discard=500, thin=5, flat=True))
    target(flow)
    proposal(flow)


if __name__ == "__main__":
    main()

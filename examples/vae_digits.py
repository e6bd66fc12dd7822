"""Two latent-variable models of the package's drawn digits: a VAE trained as a NICE flow, and NICE itself.

The VAE's number is a lower bound of its log-likelihood (appendix C of Dinh et al. 2015), NICE's is exact. A minute:

    nicecp train --data demo --out demo-run.h5
    python examples/vae_digits.py --nice demo-run.h5
"""

from __future__ import annotations

import argparse

import numpy as np

from nicecp.data import open_splits
from nicecp.optimizers import AdaM
from nicecp.scoring import score
from nicecp.vae import VAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--nice", help="checkpoint of a NICE flow trained on the demo digits")
    options = parser.parse_args()
    splits = open_splits("demo", 1 / 6, 0)
    assert splits.test is not None
    train, test = (part.load()[0].reshape(len(part), -1) / 256.0 for part in (splits.train, splits.test))
    vae = VAE(train.shape[1], n_latent=24, hidden=(256, 256), dtype="float32", seed=0, threads=1)
    rng = np.random.default_rng(0)
    tenth = max(1, options.epochs // 10)
    for epoch in range(0, options.epochs, tenth):
        rate = 1e-3 if epoch < options.epochs // 2 else 2e-4
        means = vae.fit(train, tenth, 100, AdaM(rate=rate), noise=1 / 256)
        print(f"epoch {epoch + tenth}: training bound {means[-1]:.1f} nats per image", flush=True)
    bounds = np.mean(
        [vae.bound(test + rng.random(test.shape) / 256, rng.standard_normal((len(test), 24))) for _ in range(8)], axis=0
    )
    error = bounds.std(ddof=1) / np.sqrt(len(bounds))
    print(f"VAE, test: bound on the log-likelihood {bounds.mean():.2f} +- {error:.2f} nats per image")
    if options.nice:
        found = score(options.nice, "demo", "test").evaluation
        print(f"NICE, test: exact log-likelihood {found.mean:.2f} +- {found.standard_error:.2f} nats per image")


if __name__ == "__main__":
    main()

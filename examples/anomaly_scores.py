"""Anomaly scores: a flow that has seen gamma showers only ranks hadron showers below them.

    NICECP_DATA=FOLDER python examples/anomaly_scores.py

FOLDER holds magic.h5 (the MAGIC gamma telescope's showers: datasets train, test and their labels); without it a made
table takes its place. The area under the ROC curve is the chance that a random gamma is denser than a random hadron.
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
from scipy.stats import rankdata

import nicecp


def showers() -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """What it is; rows of the usual kind to train on; rows of both kinds, and which of these are unusual."""
    path = Path(os.environ.get("NICECP_DATA", "")) / "magic.h5"
    if path.is_file():
        with h5py.File(path) as file:
            train, test = file["train"][()], file["test"][()]
            usual, unusual = file["train_labels"][()] == 1, file["test_labels"][()] == 0
        return "magic.h5, gamma against hadron", train[usual].astype(float), test.astype(float), unusual
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 5))
    x[:, 1] = 0.3 * x[:, 1] + x[:, 0] ** 2
    unusual = np.arange(8000) >= 7000
    x[unusual, 1] = rng.permutation(x[unusual, 1])  # the columns as before, but not their relation
    return "a made table", x[:6000], x[6000:], unusual[6000:]


def area_under_roc(score: np.ndarray, unusual: np.ndarray) -> float:
    """The chance that an unusual row has the larger score : score (n,), unusual (n,) of bool."""
    n, m = unusual.sum(), (~unusual).sum()
    return float((rankdata(score)[unusual].sum() - n * (n + 1) / 2) / (n * m))


def main() -> None:
    what, train, test, unusual = showers()
    flow = nicecp.NICE(train.shape[1], (64, 64), 6, "gaussian", coupling="affine", init="he", seed=0, threads=1)
    nicecp.fit(flow, train, epochs=40, batch_size=256, patience=10, whiten="gaussian")
    found = area_under_roc(-flow.log_prob(test), unusual)

    # What a Gaussian would say, by the Mahalanobis distance.
    centred = test - train.mean(axis=0)
    distance = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(np.cov(train.T)), centred)
    simple = area_under_roc(distance, unusual)
    print(f"{what}: AUC {found:.3f}, of a Gaussian {simple:.3f} ({unusual.sum()} of {len(test)} rows are unusual)")
    assert found > 0.7
    assert found > simple + 0.05


if __name__ == "__main__":
    main()

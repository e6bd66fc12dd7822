"""scikit-learn: GridSearchCV chooses a flow, and the known entropy says how good its choice is.

    pip install 'nicecp[sklearn]' && python examples/grid_search.py

No density scores more than minus the entropy on average, so that the gap is the fit's loss in nats.
"""

from __future__ import annotations

import banana
import numpy as np
from sklearn.model_selection import GridSearchCV

from nicecp import NICEDensity


def main() -> None:
    train, test = banana.sample(4000, seed=0), banana.sample(20_000, seed=1)
    grid = {"n_couplings": [3, 6], "coupling": ["additive", "spline"]}
    estimator = NICEDensity((32, 32), epochs=40, batch_size=128, random_state=0)
    search = GridSearchCV(estimator, grid, cv=3, n_jobs=2).fit(train)
    for parameters, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        print(f"{score:8.3f} nats  {parameters}")

    values = search.score_samples(test)
    gap, error = -banana.ENTROPY - values.mean(), values.std() / np.sqrt(len(values))
    gaussian = -0.5 * (4 + 4 * np.log(2 * np.pi) + np.linalg.slogdet(np.cov(test.T))[1])
    print(f"chosen: {search.best_params_}; {gap:.3f} +- {error:.3f} nats below the entropy")
    print(f"a Gaussian is {-banana.ENTROPY - gaussian:.3f} below")
    assert search.best_params_["coupling"] == "spline"
    assert -3 * error < gap < 0.15


if __name__ == "__main__":
    main()

"""A flow as a scikit-learn density estimator: ``nicecp.NICEDensity``, with the extra ``sklearn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.errors import MissingExtra
from nicecp.fitting import fit
from nicecp.flow import NICE
from nicecp.optimizers import AdaM
from nicecp.sources import ArraySource
from nicecp.split import as_fraction

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError:
    remedy = "which is not installed, or older than 1.6; pip install 'nicecp[sklearn]'"
    raise MissingExtra(f"NICEDensity needs scikit-learn, {remedy}") from None

if TYPE_CHECKING:
    from numpy.random import RandomState

    Seed = int | RandomState | None

FloatArray = NDArray[np.float64]
LAST_RATE = 0.01  # of the learning rate, when all epochs are over
LEAST_REGULARIZATION = 1e-3
MANY_ROWS = 2**17  # of which it does not matter how many are different


class NICEDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A normalizing flow of NICE couplings as a density of rows of numbers.

    Parameters
    ----------
    hidden : sequence of int
        Hidden layer sizes of every coupling's network.
    n_couplings : int
        Coupling layers; at least 3 for every column to influence every other.
    coupling : "spline", "affine", "additive" or "multiplicative", or several of these that take turns
        Splines bend columns, and leave as they are rows far out, which factors of affine couplings may carry off
        further; affine couplings scale and shift, in half the time; additive ones, the paper's, have a constant
        Jacobian.
    repartition : int
        After so many couplings the seed draws other parts of the columns, so that any two of them meet in a network; 0
        for the same two parts, odd and even columns, throughout.
    prior : "gaussian" or "logistic"
        Of the latent components.
    epochs : int
        Passes over the training rows, at most.
    batch_size : int
        Rows of a training step.
    learning_rate : float
        At the beginning; it falls exponentially, to a hundredth after all epochs.
    patience : int or None
        Epochs without a better validation log-likelihood before training stops; None never stops.
    valid_fraction : float
        Of the rows, chosen at random, on which training is validated; the flow keeps its best epoch. 0 for none: it
        keeps the last one.
    transforms : str or mapping
        Of single columns, before they are standardised: "auto", "quantile", "none", or one for each column, as in
        {"mass": "log", "*": "quantile"} (docs/tables.md). ``record_.events`` say what each column was given, and why.
    whiten : "gaussian", "zca" or "none"
        What stands between the data and the flow: the Gaussian of greatest likelihood of the training rows, which the
        flow then improves on, or only columns that are standardised.
    regularization : float or None
        Added to the variances of the standardised columns for the whitening, which tames directions in which the rows
        do not vary. None: 1e-3, or the square of columns per training row (repeated rows count once, those without
        weight not at all) where that is more, since few rows say little about many directions.
    allow_constant : bool
        Whether columns that hold one value may be fitted: their likelihood has no bound.
    threads : int or None
        CPU threads; more than one helps large networks. None: as many as NumPy's linear algebra uses.
    random_state : int, RandomState or None
        Of initial weights, validation rows and the order of rows. An int makes fits repeatable, bit for bit.

    Attributes
    ----------
    flow_ : nicecp.NICE
        The flow with the best validation log-likelihood: gradients, inverse, ``save`` and all else.
    record_ : nicecp.records.RunRecord
        The history of the fit.
    n_features_in_ : int
    feature_names_in_ : (n_features_in_,) of str
        Only where X had names in ``fit``.

    All log-densities are in nats, in the units of X. Integers of any size are numbers like
    all others here (nicecp.fit takes 8-bit ones for pixels).
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64, 64),
        n_couplings: int = 4,
        *,
        coupling: str | Sequence[str] = "spline",
        repartition: int = 2,
        prior: str = "gaussian",
        epochs: int = 300,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        patience: int | None = 30,
        valid_fraction: float = 0.1,
        transforms: str | Mapping[Any, str] = "auto",
        whiten: str = "gaussian",
        regularization: float | None = None,
        allow_constant: bool = False,
        threads: int | None = 1,
        random_state: Seed = None,
    ) -> None:
        self.hidden = hidden
        self.n_couplings = n_couplings
        self.coupling = coupling
        self.repartition = repartition
        self.prior = prior
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.valid_fraction = valid_fraction
        self.transforms = transforms
        self.whiten = whiten
        self.regularization = regularization
        self.allow_constant = allow_constant
        self.threads = threads
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> NICEDensity:
        """Fit a fresh flow to rows X : (n, d), n and d at least 2; y is ignored.

        sample_weight : (n,) at least 0, of any scale; a row of weight 0 is as good as not there.

        Raises ValueError (NaN, infinity, one column, constant columns, a parameter out of bounds) and TypeError.
        """
        rows = validate_data(
            self, X, dtype=(np.float64, np.float32), order="C", ensure_min_samples=2, ensure_min_features=2
        )
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, rows, dtype=np.float64)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        flow = NICE(
            rows.shape[1], self.hidden, self.n_couplings, self.prior, "auto", seed,
            coupling=self.coupling, repartition=self.repartition, init="table", threads=self.threads,
        )  # fmt: skip
        source: Any = ArraySource(rows, "X", columns=getattr(self, "feature_names_in_", None))
        self.record_ = fit(
            flow,
            source,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self._optimizer(len(rows)),
            patience=self.patience,
            valid_fraction=self.valid_fraction,
            seed=seed,
            sample_weight=sample_weight,
            allow_constant=self.allow_constant,
            transform=self.transforms,
            whiten=self.whiten,
            regularization=self._regularization(rows, sample_weight),
        )
        self.flow_ = flow
        return self

    def _regularization(self, rows: FloatArray, weight: Any) -> float:
        if self.whiten == "none":
            return 0.0
        if self.regularization is not None:
            return self.regularization
        kept = rows if weight is None else rows[np.asarray(weight) > 0]
        n = len(kept) if len(kept) > MANY_ROWS else len(np.unique(kept, axis=0))
        share = 1.0 - float(as_fraction(self.valid_fraction))
        return max(LEAST_REGULARIZATION, float(rows.shape[1] / max(1.0, share * n)) ** 2)

    def _optimizer(self, n: int) -> AdaM:
        """AdaM whose rate falls to LAST_RATE of what it was over the steps that there will be."""
        held = as_fraction(self.valid_fraction)
        rows = n - n * held.numerator // held.denominator
        steps = max(1, self.epochs * (rows // max(1, min(self.batch_size, rows))))
        return AdaM(self.learning_rate, rate_decay=LAST_RATE ** (-1.0 / steps))

    def score_samples(self, X: ArrayLike) -> FloatArray:
        """Log-density of rows X : (n, d) -> (n,) float64, nats."""
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        values: FloatArray = self.flow_.log_prob(rows)
        return values

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log-density of rows X : (n, d), nats per row; y is ignored."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Seed = None) -> FloatArray:
        """Draw rows from the fitted density -> (n_samples, d) float64."""
        check_is_fitted(self)
        drawn: FloatArray = self.flow_.sample(n_samples, int(check_random_state(random_state).randint(2**31 - 1)))
        return drawn

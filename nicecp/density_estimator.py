"""A flow as a scikit-learn density estimator: ``nicecp.NICEDensity``, with the extra ``sklearn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.errors import MissingExtra
from nicecp.fitting import fit
from nicecp.flow import NICE
from nicecp.optimizers import AdaM
from nicecp.preset_table import PRESETS, Preset
from nicecp.sources import ArraySource
from nicecp.split import as_fraction
from nicecp.table_size import TableSize, shrinkage, sized

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
MANY_ROWS = 2**17  # of which it does not matter how many are different


class NICEDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A normalizing flow of NICE couplings as a density of rows of numbers: the preset tabular-spline as an estimator.

    Parameters that are None follow the number of training rows and columns (nicecp.table_size): few rows get small
    batches and a strong weight decay. Repeated rows count once there, those without weight not at all.

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
    epochs : int or None
        Passes over the training rows, at most.
    batch_size : int or None
        Rows of a training step.
    learning_rate : float
        At the beginning; over the epochs it falls to almost 0, as half a cosine does.
    weight_decay : float or None
        At every step the networks' weights are multiplied by 1 - rate * weight_decay: what is learned of single rows
        by heart fades.
    patience : int or None
        Epochs without a better validation log-likelihood before training stops; None never stops.
    valid_fraction : float
        Of the rows, chosen at random, on which training is validated; the flow keeps its best epoch. 0 for none: it
        keeps the last one.
    transforms : str or mapping
        Of single columns, before they are standardised: "auto", "quantile", "none", or one for each column, as in
        {"mass": "log", "*": "quantile"} (docs/tables.md). ``record_.events`` say what each column was given, and why.
    whiten : "gaussian", "zca", "none" or None
        What stands between the data and the flow: the Gaussian of greatest likelihood of the training rows, which the
        flow then improves on, or only columns that are standardised. None: "gaussian" for 16 columns or more of which
        there are fewer than a thousand training rows each, else "none".
    regularization : float or None
        Added to the variances of the standardised columns for the whitening, which tames directions in which the rows
        do not vary. None: 1e-3, or the square of columns per training row where that is more, since few rows say
        little about many directions.
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
        hidden: Sequence[int] = (128, 128),
        n_couplings: int = 6,
        *,
        coupling: str | Sequence[str] = "spline",
        repartition: int = 2,
        prior: str = "logistic",
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float | None = None,
        patience: int | None = None,
        valid_fraction: float = 1 / 6,
        transforms: str | Mapping[Any, str] = "auto",
        whiten: str | None = None,
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
        self.weight_decay = weight_decay
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
        chosen = self._chosen(rows, sample_weight)
        self.record_ = fit(
            flow,
            source,
            epochs=chosen.epochs,
            batch_size=chosen.batch_size,
            optimizer=AdaM(self.learning_rate),
            schedule=chosen.schedule,
            weight_decay=chosen.weight_decay,
            patience=self.patience,
            valid_fraction=self.valid_fraction,
            seed=seed,
            sample_weight=sample_weight,
            allow_constant=self.allow_constant,
            transform=self.transforms,
            whiten=chosen.whiten,
            regularization=chosen.regularization,
        )
        self.flow_ = flow
        return self

    def _chosen(self, rows: FloatArray, weight: Any) -> Preset:
        """The preset for so many rows, and in place of its values the parameters that are not None."""
        kept = rows if weight is None else rows[np.asarray(weight) > 0]
        n = len(kept) if len(kept) > MANY_ROWS else len(np.unique(kept, axis=0))
        n = max(1, int((1 - as_fraction(self.valid_fraction)) * n))
        preset = sized(PRESETS["tabular-spline"], TableSize(n, rows.shape[1], float(n)))
        whiten = preset.whiten if self.whiten is None else self.whiten
        least = 0.0 if whiten == "none" else shrinkage(n, rows.shape[1])
        return replace(
            preset,
            epochs=preset.epochs if self.epochs is None else self.epochs,
            batch_size=preset.batch_size if self.batch_size is None else self.batch_size,
            weight_decay=preset.weight_decay if self.weight_decay is None else self.weight_decay,
            whiten=whiten,
            regularization=least if self.regularization is None or whiten == "none" else self.regularization,
        )

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

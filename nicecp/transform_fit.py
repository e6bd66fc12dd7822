"""Column transforms fitted to training rows: what was asked for, or what ``auto`` chooses, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp import spline
from nicecp.errors import DataError, about_file
from nicecp.sources import column_label
from nicecp.split import BLOCK, Split
from nicecp.transform_spec import Chain, Transform, chains, shown
from nicecp.transform_stats import Column, choose, look_at
from nicecp.transforms import Angle, ColumnStep, Log, Logit, Quantile, Recorded, Student

FloatArray = NDArray[np.float64]

MAX_ROWS = 2**17  # rows that transforms are fitted to, in blocks from all over the training rows
MAX_NUMBERS = 2**23  # of all columns: very wide tables are looked at in fewer rows, so that this takes a minute at most
KNOTS = (8, 16, 32, 64, 128, 256)  # how many are tried, on rows held out of the fit
_HELD = 5  # every fifth row
_TO_COMPARE = (20, 2**14)  # rows by which quantile splines and Student's t are compared: at least, at most
_FOLDED = 2**10  # rows up to which all fifths are held out in turn
_FREEDOM = (0.3, 30.0)  # of Student's t; above, the normal distribution itself is no different


@dataclass
class Fitted:
    """steps in order; lines: what each column was given and why; notes: sentences that a user should read."""

    steps: tuple[ColumnStep, ...] = ()
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sample_of(split: Split) -> tuple[FloatArray, FloatArray | None]:
    """(n, d) float64: all rows of a split, or about MAX_ROWS in blocks from all over it, fewer of more than 64 columns;
    and their weights (n,)."""
    wanted = max(1, min(MAX_ROWS, MAX_NUMBERS // split.source.n_features) // BLOCK)
    blocks = np.unique(np.linspace(0, split.n_blocks - 1, min(wanted, split.n_blocks)).astype(np.int64))
    data, rows = split.load_blocks(blocks)
    weight = split.source.weight
    return np.asarray(data, np.float64), None if weight is None else weight[rows]


def fit_transforms(split: Split, text: str) -> Fitted:
    """The steps that ``text`` asks for (nicecp.transform_spec), fitted to the rows of a split of floats, by their
    weights where they have any.

    Raises ValueError for text that cannot be understood, DataError where training rows lie outside a support.
    """
    info = split.source.info
    wanted = chains(text, split.source.n_features, info.columns)
    x, weights = sample_of(split)
    labels = [column_label(i, info.columns) for i in range(x.shape[1])]
    looks = [look_at(x[:, i], split.source.dtype, weights) for i in range(x.shape[1])]
    result = Fitted()
    for i, look in enumerate(looks):
        if wanted[i] == (Transform("auto"),):
            gain = (
                None
                if look.repeats
                else gain_of_spline(x[:, i], weights, max(_FOLDED, MAX_NUMBERS // 8 // len(labels)))
            )
            wanted[i], why = choose(look, info.columns[i] if info.columns else "", gain)
        elif any(transform.kind == "auto" for transform in wanted[i]):
            raise ValueError(f"transform {shown(wanted[i])!r}: auto stands alone")
        else:
            why = "as asked for"
        result.lines.append(f"{labels[i]}: {shown(wanted[i])}, {why}; {look.summary()}")
    result.notes += _notes(looks, labels, wanted)
    try:
        result.steps = _fit_stages(x, weights, wanted, looks, labels)
    except _Outside as error:
        raise DataError(about_file(split.source.name, *error.args)) from None
    return result


class _Outside(Exception):
    """Training rows outside the support of a transform: (problem, remedy)."""


def _fit_stages(
    x: FloatArray,
    weights: FloatArray | None,
    wanted: Sequence[Chain],
    looks: Sequence[Column],
    labels: Sequence[str],
) -> tuple[ColumnStep, ...]:
    """Stage s holds the s-th transform of every column: one step for each kind of it."""
    steps: list[ColumnStep] = []
    x = np.array(x)
    for stage in range(max(len(chain) for chain in wanted)):
        by_kind: dict[str, list[int]] = {}
        for i, chain in enumerate(wanted):
            if stage < len(chain) and chain[stage].kind != "standardize":  # the last step does that for all columns
                by_kind.setdefault(chain[stage].kind, []).append(i)
        for kind, columns in by_kind.items():
            given = [wanted[i][stage] for i in columns]
            step = _fit_step(kind, columns, given, x, weights, looks, labels)
            if step is not None:
                x = step.forward(x)
                steps.append(step)
    return tuple(steps)


def _fit_step(
    kind: str,
    columns: list[int],
    given: list[Transform],
    x: FloatArray,
    weights: FloatArray | None,
    looks: Sequence[Column],
    labels: Sequence[str],
) -> ColumnStep | None:
    if kind == "recorded":
        kept = [(i, t.numbers[0] if t.numbers else looks[i].step) for i, t in zip(columns, given, strict=True)]
        kept = [(i, width) for i, width in kept if width]  # nothing to do where no step is seen
        return Recorded(_numbers([i for i, _ in kept]), np.array([w for _, w in kept])) if kept else None
    which = _numbers(columns)
    values = [x[:, i] for i in columns]
    if kind == "log":
        low = np.array([t.numbers[0] if t.numbers else 0.0 for t in given])
        _check_inside(values, low, np.full(len(low), np.inf), columns, labels, "log")
        return Log(which, low)
    if kind == "logit":
        low, high = (np.array([t.numbers[end] for t in given]) for end in (0, 1))
        _check_inside(values, low, high, columns, labels, "logit")
        return Logit(which, low, high)
    if kind == "angle":
        period = np.array([t.numbers[0] if t.numbers else 2.0 * np.pi for t in given])
        cuts = [emptiest(v, p, weights) for v, p in zip(values, period, strict=True)]
        return Angle(which, np.array(cuts), period)
    if kind == "student":
        return Student(which, *np.array([fit_student(v, weights) for v in values]).T)
    knots = [
        spline.fit_knots(v, int(t.numbers[0]), weights) if t.numbers else quantile_knots(v, weights)
        for v, t in zip(values, given, strict=True)
    ]
    return Quantile.of(which, knots)


def _numbers(columns: list[int]) -> NDArray[np.int64]:
    return np.array(columns, np.int64)


def _check_inside(
    values: list[FloatArray],
    low: FloatArray,
    high: FloatArray,
    columns: list[int],
    labels: Sequence[str],
    kind: str,
) -> None:
    for v, bottom, top, i in zip(values, low, high, columns, strict=True):
        outside = int(((v <= bottom) | (v >= top)).sum())
        if outside:
            bounds = f"above {bottom:g}" if np.isinf(top) else f"between {bottom:g} and {top:g}"
            problem = f"column {labels[i]}: {outside} of {len(v)} training rows are not {bounds}, as its {kind} needs"
            remedy = f"they reach from {v.min():g} to {v.max():g}: give bounds outside these, or another transform"
            raise _Outside(problem, remedy)


# --- fits of single columns -------------------------------------------------------------------------------------------


def quantile_knots(values: FloatArray, weights: FloatArray | None = None) -> spline.Knots:
    """A quantile spline with the number of KNOTS whose density is best on rows held out of the fit."""
    held = np.arange(len(values)) % _HELD == _HELD - 1
    rest, own = (None, None) if weights is None else (weights[~held], weights[held])
    best, score = KNOTS[0], -np.inf
    if np.ptp(values[~held]) > 0 and held.any():
        for count in KNOTS:
            if count > KNOTS[0] and count > len(values) // 10:
                break
            z, log_slope, _ = spline.forward(values[held], spline.fit_knots(values[~held], count, rest))
            mean = float(np.average(log_slope - 0.5 * z * z, weights=own))
            if mean > score:
                best, score = count, mean
    return spline.fit_knots(values, best, weights)


def gain_of_spline(values: FloatArray, weights: FloatArray | None = None, rows: int = MAX_ROWS) -> float | None:
    """Nats a row, on rows held out of the fits, by which a quantile spline describes a column better than Student's t;
    None for too few rows. rows : at most so many are used."""
    least, most = _TO_COMPARE
    stride = -(-len(values) // min(rows, most))
    values, weights = values[::stride], None if weights is None else weights[::stride]
    if len(values) < least:
        return None
    gains, sizes, place = [], [], np.arange(len(values)) % _HELD
    for fold in range(_HELD) if len(values) <= _FOLDED else [_HELD - 1]:
        held = place == fold
        rest, own = (None, None) if weights is None else (weights[~held], weights[held])
        if not np.ptp(values[~held]) > 0:
            return None
        z, log_slope, _ = spline.forward(values[held], quantile_knots(values[~held], rest))
        t = Student(_numbers([0]), *np.array([fit_student(values[~held], rest)]).T)
        x = values[held, None]
        behind_t = t.log_det_rows(x) - 0.5 * np.square(t.forward(x)[:, 0])
        gains.append(float(np.average(log_slope - 0.5 * z * z - behind_t, weights=own)))
        sizes.append(float(held.sum() if own is None else own.sum()))
    gain = float(np.average(gains, weights=sizes))
    return gain if np.isfinite(gain) else None


def emptiest(values: FloatArray, period: float, weights: FloatArray | None = None) -> float:
    """Where a period should begin: in the middle of the widest gap between angles, or, where they lie all around, of
    the widest one in the part of the period that has the fewest rows, or the least of their weight."""
    angle = np.mod(values, period)
    order = np.argsort(angle)
    angle = angle[order]
    bins = max(8, min(64, len(angle) // 20))
    gaps = np.diff(np.append(angle, angle[0] + period))
    if gaps.max() > period / bins:
        place = int(np.argmax(gaps))
        return float(np.mod(angle[place] + 0.5 * gaps[place], period))
    own = None if weights is None else weights[order]
    places = np.minimum((angle / period * bins).astype(np.int64), bins - 1)
    emptiest_bin = int(np.argmin(np.bincount(places, own, minlength=bins)))
    start, stop = emptiest_bin * period / bins, (emptiest_bin + 1) * period / bins
    inside = np.concatenate([[start], angle[(angle > start) & (angle < stop)], [stop]])
    widest = int(np.argmax(np.diff(inside)))
    return float(0.5 * (inside[widest] + inside[widest + 1]))


def fit_student(values: FloatArray, weights: FloatArray | None = None) -> tuple[float, float, float]:
    """Degrees of freedom, location and scale of greatest likelihood under Student's t."""
    from scipy.optimize import minimize
    from scipy.special import gammaln, psi

    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle))) or float(np.std(values)) or 1.0
    t = (values - middle) / spread

    def loss(p: FloatArray) -> tuple[float, FloatArray]:
        """Of log freedom, location and log scale, and its gradient: unlike differences exact enough for a fit that does
        not depend on the values' unit."""
        nu, scale = np.exp(p[0]), np.exp(p[2])
        u = (t - p[1]) / scale
        norm = gammaln(0.5 * (nu + 1)) - gammaln(0.5 * nu) - 0.5 * np.log(np.pi * nu) - p[2]
        tails = np.average(np.log1p(u**2 / nu), weights=weights)
        pull, share = (np.average(x / (nu + u**2), weights=weights) for x in (u, u**2))
        by_freedom = 0.5 * (nu * (tails + psi(0.5 * nu) - psi(0.5 * (nu + 1))) + 1 - (nu + 1) * share)
        slope = np.array([by_freedom, -(nu + 1) / scale * pull, 1 - (nu + 1) * share])
        return float(0.5 * (nu + 1) * tails - norm), slope

    bounds = [tuple(np.log(_FREEDOM)), (-10.0, 10.0), (-10.0, 10.0)]
    options: Any = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 200}
    start = np.array([1.0, 0.0, 0.3])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return float(np.exp(found[0])), middle + spread * float(found[1]), spread * float(np.exp(found[2]))


# --- what a user should know ------------------------------------------------------------------------------------------


def _notes(looks: Sequence[Column], labels: Sequence[str], wanted: Sequence[Chain]) -> list[str]:
    """Sentences about atoms and coarsely recorded columns that are not dequantized."""
    notes = []
    raw = [i for i, chain in enumerate(wanted) if chain[0].kind != "recorded"]
    atoms = [f"{labels[i]} ({looks[i].atom_share:.2%} are {looks[i].atom:g})" for i in raw if looks[i].atom_share]
    if atoms:
        notes.append(
            f"one value in many rows: {', '.join(atoms)}. A flow gives such values a density as high as it can learn: "
            "likelihoods of such columns compare only among models that see them in the same way"
        )
    coarse = [f"{labels[i]} (steps of {looks[i].step:g})" for i in raw if looks[i].coarse]
    if coarse:
        notes.append(
            f"recorded to few digits: {', '.join(coarse)}. To spread them over the recorded step, put recorded before "
            "their transform, such as recorded+quantile"
        )
    digits = [labels[i] for i in raw if looks[i].few_digits]
    if digits:
        notes.append(
            f"recorded to few significant digits, so that values repeat: {', '.join(digits)}. Likelihoods of such "
            "columns compare only among models that see them in the same way"
        )
    skipped = [labels[i] for i, chain in enumerate(wanted) if chain[0] == Transform("recorded") and not looks[i].step]
    if skipped:
        notes.append(f"no recorded step is to be seen in {', '.join(skipped)}: they are used as they are")
    return notes

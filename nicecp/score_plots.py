"""Figures that show whether a flow fits data: samples laid over rows, latent quantiles, log-densities and weights.

The numbers are compared first (``compare``) and drawn afterwards, each figure by a function of its own that also serves
as a part of one page. matplotlib is an extra (nicecp.plot.new_figure).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import effective_rows
from nicecp.checkpoint import load_run
from nicecp.data_spec import files_in
from nicecp.errors import DataError, OutputError, about_file
from nicecp.flow import NICE
from nicecp.machine import open_backend
from nicecp.outputs import check_output
from nicecp.plot import FORMATS, new_figure, write_figure
from nicecp.score_file import check_scorable, in_data_space
from nicecp.scoring import as_recorded, open_matched
from nicecp.sources import Source, as_they_are

FloatArray = NDArray[np.float64]
StrPath = str | os.PathLike[str]

ROWS = 5000  # of the data, and as many samples
MAX_COLUMNS = 8  # of a corner plot
MAX_COMPONENTS = 16  # of a quantile plot
_RUNS = 50  # neighbouring rows are read together
_BINS = 40
_DATA, _FLOW = "0.25", "tab:orange"


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Rows of data beside as many samples of a flow, and what the flow makes of both.

    data, samples : (n, d) in data space; latent : (n, d) of the data; log_prob, sample_log_prob : (n,) nats
    weight : (n,) of the rows, all 1 where they have none
    """

    data: FloatArray
    samples: FloatArray
    latent: FloatArray
    log_prob: FloatArray
    sample_log_prob: FloatArray
    weight: FloatArray
    names: tuple[str, ...]
    prior: str
    weighted: bool


def compare(flow: NICE, source: Source, seed: int = 0, rows: int = ROWS) -> Compared:
    """At most ``rows`` rows from all over a source, beside as many samples.

    Rows that are not finite, outside the flow's support or of weight 0 are left out; DataError where fewer than two
    remain. Rows get the noise of ``score_file``'s first draw. The samples of a flow with a context have the rows'.
    """
    x, at = _spread(flow, source, seed, rows)
    weight = np.ones(len(x)) if source.weight is None else source.weight[at]
    context = None if source.context is None else source.context[at]
    log_prob = flow.log_prob(x, context)
    kept = np.isfinite(log_prob) & (weight > 0)
    if kept.sum() < 2:
        problem = f"of {len(x):,} rows {int(kept.sum())} can be drawn: the others are not finite, or of weight 0"
        raise DataError(about_file(source.name, problem, "leave --plot out, or look at the data"))
    x, weight, log_prob = x[kept], weight[kept], log_prob[kept]
    if context is not None:  # the samples' contexts are as frequent as the rows'
        chosen = np.random.default_rng(seed).choice(len(x), len(x), p=weight / weight.sum())
        context = context[kept]
        samples, sample_log_prob = flow.sample(len(x), seed, context[chosen], return_log_prob=True)
    else:
        samples, sample_log_prob = flow.sample(len(x), seed, return_log_prob=True)
    return Compared(
        x, samples, flow.forward(x, context)[0], log_prob, sample_log_prob, weight,
        flow.info.columns or source.info.columns or flow.names, flow.spec.prior, source.weight is not None,
    )  # fmt: skip


def _spread(flow: NICE, source: Source, seed: int, rows: int) -> tuple[FloatArray, NDArray[np.int64]]:
    """Runs of rows, evenly spaced in the source -> (k, d) in data space, and their row numbers (k,)."""
    n, length = source.n_rows, max(1, rows // _RUNS)
    starts = [0] if n <= rows else np.unique(np.linspace(0, n - length, _RUNS).astype(np.int64)).tolist()
    parts, numbers = [], []
    for start in starts:
        stop = n if n <= rows else start + length
        with as_they_are():
            read = source.read(start, stop)
        numbers.append(np.arange(start, stop))
        parts.append(np.asarray(in_data_space(flow, read, numbers[-1], seed, 0), np.float64))
    return np.concatenate(parts), np.concatenate(numbers)


def distances(first: FloatArray, second: FloatArray, weight: FloatArray | None = None) -> FloatArray:
    """Kolmogorov-Smirnov distance of every column : (n, d) and (m, d) -> (d,); weight : (n,) of the first's rows."""
    weight = np.ones(len(first)) if weight is None else weight
    out = np.empty(first.shape[1])
    for column in range(len(out)):
        one, two = first[:, column], np.sort(second[:, column])
        order = np.argsort(one, kind="stable")
        one, cumulated = one[order], np.concatenate([[0.0], np.cumsum(weight[order])])
        places = np.concatenate([one, two])
        of_one = cumulated[np.searchsorted(one, places, side="right")] / cumulated[-1]
        out[column] = np.abs(of_one - np.searchsorted(two, places, side="right") / len(two)).max()
    return out


def _quantile(prior: str, level: FloatArray) -> FloatArray:
    from scipy.special import logit, ndtri

    values: FloatArray = logit(level) if prior == "logistic" else ndtri(level)
    return values


def _cdf(prior: str, h: FloatArray) -> FloatArray:
    from scipy.special import expit, ndtr

    values: FloatArray = expit(h) if prior == "logistic" else ndtr(h)
    return values


def _latent_distances(compared: Compared) -> FloatArray:
    """Of every component's distribution from uniform, after the prior's distribution function : (d,)."""
    grid = np.repeat((np.arange(4000)[:, None] + 0.5) / 4000, compared.latent.shape[1], axis=1)
    return distances(_cdf(compared.prior, compared.latent), grid, compared.weight)


def worst(found: FloatArray, count: int) -> NDArray[np.int64]:
    """The numbers of the ``count`` largest, ascending; all of them where there are no more."""
    return np.sort(np.argsort(-found, kind="stable")[:count]).astype(np.int64)


# --- figures: each draws into a matplotlib Figure or SubFigure --------------------------------------------------------


def corner(figure: Any, compared: Compared) -> None:
    """Every pair of columns: rows as points, and the regions that hold 39 % and 86 % (one and two sigma of a Gaussian)
    of rows and of samples; on the diagonal the histograms. Of many columns those that fit worst."""
    d = compared.data.shape[1]
    chosen = worst(distances(compared.data, compared.samples, compared.weight), MAX_COLUMNS)
    k = len(chosen)
    ranges = [_range(compared, column) for column in chosen]
    every = figure.subplots(k, k, squeeze=False)
    for i, row in enumerate(chosen):
        for j, column in enumerate(chosen):
            axes = every[i, j]
            if j > i:
                axes.set_visible(False)
                continue
            axes.tick_params(labelsize=6, labelbottom=i == k - 1, labelleft=j == 0 and i > 0)
            axes.locator_params(nbins=3)
            axes.set_xlim(*ranges[j])
            if i == k - 1:
                axes.set_xlabel(compared.names[column], fontsize=8)
            if i == j:
                bins = np.linspace(*ranges[j], _BINS + 1)
                # As shares of all, so that what lies outside the picture is missing from it.
                weights = compared.weight / compared.weight.sum()
                axes.hist(compared.data[:, column], bins, weights=weights, color="0.8")
                samples = compared.samples[:, column]
                axes.hist(samples, bins, weights=np.full(len(samples), 1 / len(samples)), histtype="step", color=_FLOW)
                axes.set_yticks([])
                continue
            if j == 0:
                axes.set_ylabel(compared.names[row], fontsize=8)
            axes.set_ylim(*ranges[i])
            x, y = compared.data[:, column], compared.data[:, row]
            axes.plot(x, y, ",", color="0.6", alpha=0.5, rasterized=True)
            _regions(axes, x, y, compared.weight, ranges[j], ranges[i], _DATA)
            pair = compared.samples[:, column], compared.samples[:, row]
            _regions(axes, *pair, None, ranges[j], ranges[i], _FLOW)
    which = "" if k == d else f": the {k} of {d} columns that differ most"
    figure.suptitle(f"{len(compared.data):,} rows (grey) and samples (orange){which}", fontsize=10)


def _range(compared: Compared, column: int) -> tuple[float, float]:
    """What all but the outermost rows span, and a little more."""
    low, high = np.quantile(compared.data[:, column], [0.002, 0.998])
    margin = 0.1 * (high - low) or 0.5 * abs(low) or 0.5
    return float(low - margin), float(high + margin)


def _regions(
    axes: Any, x: FloatArray, y: FloatArray, weight: FloatArray | None, across: Any, up: Any, color: str
) -> None:
    """Contours of the smallest regions that hold 39 % and 86 % of the weight, where they lie within the picture."""
    from scipy.ndimage import gaussian_filter

    counts, edges, steps = np.histogram2d(x, y, _BINS, [across, up], weights=weight)
    counts = gaussian_filter(counts, 1.0)
    ordered = np.sort(counts.ravel())[::-1]
    cumulated = np.cumsum(ordered) / (len(x) if weight is None else weight.sum())
    levels = np.unique(
        [ordered[np.searchsorted(cumulated, share)] for share in (0.865, 0.393) if cumulated[-1] > share]
    )
    levels = levels[(levels > counts.min()) & (levels < counts.max())]
    if len(levels):
        centres = [(at[1:] + at[:-1]) / 2 for at in (edges, steps)]
        axes.contour(*centres, counts.T, levels=levels, colors=color, linewidths=0.9)


def latent(figure: Any, compared: Compared) -> None:
    """Quantiles of the rows' latent components against the prior's, with the band that holds 95 % of true samples at
    each quantile. Of many components those that fit worst."""
    from scipy.special import betaincinv

    d, n = compared.latent.shape[1], max(2.0, effective_rows(compared.weight))
    chosen = worst(_latent_distances(compared), MAX_COMPONENTS)
    columns = int(np.ceil(np.sqrt(len(chosen))))
    every = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False, sharex=True, sharey=True).ravel()
    tail = max(0.5 / n, 1e-4)
    level = _cdf("logistic", np.linspace(_quantile("logistic", np.array(tail)), -np.log(tail / (1 - tail)), 200))
    expected = _quantile(compared.prior, level)
    ranks = level * (n + 1)
    band = [_quantile(compared.prior, np.clip(betaincinv(ranks, n + 1 - ranks, p), 1e-12, 1 - 1e-12))
            for p in (0.025, 0.975)]  # fmt: skip
    for axes, component in zip(every, chosen, strict=False):
        h = compared.latent[:, component]
        order = np.argsort(h, kind="stable")
        share = np.cumsum(compared.weight[order])
        found = np.interp(level, (share - 0.5 * compared.weight[order]) / share[-1], h[order])
        axes.fill_between(expected, *band, color="0.85", linewidth=0)
        axes.plot(expected, expected, color="0.5", linewidth=0.8)
        axes.plot(expected, found, color=_FLOW, linewidth=1.2)
        axes.set_title(f"$h_{{{component}}}$", fontsize=8, pad=2)
        axes.tick_params(labelsize=6)
        reach = 1.3 * float(expected[-1])
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    for axes in every[len(chosen) :]:
        axes.set_visible(False)
    figure.supxlabel(f"quantile of the {compared.prior} prior", fontsize=8)
    figure.supylabel("quantile of the rows", fontsize=8)
    which = "" if len(chosen) == d else f": the {len(chosen)} of {d} components that fit worst"
    figure.suptitle(f"Latent quantiles{which}", fontsize=10)


def densities(figure: Any, compared: Compared) -> None:
    """Histograms of the log-density of rows and of samples, which are the same for a perfect flow."""
    axes = figure.subplots()
    both = np.concatenate([compared.log_prob, compared.sample_log_prob])
    low, high = np.quantile(both, 0.01), both.max()  # the tail may be endless
    bins = np.linspace(low, high if high > low else low + 1, 60)
    below = float(compared.weight[compared.log_prob < low].sum() / compared.weight.sum())
    mean = float(np.average(compared.log_prob, weights=compared.weight))
    label = f"rows, mean {mean:.2f}" + (f" ({below:.2%} further left)" if below else "")
    axes.hist(compared.log_prob, bins, weights=compared.weight, density=True, color="0.8", label=label)
    label = f"samples, mean {compared.sample_log_prob.mean():.2f}"
    axes.hist(compared.sample_log_prob, bins, density=True, histtype="step", color=_FLOW, label=label)
    axes.set_xlabel("log-density, nats", fontsize=8)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, loc="upper left")
    figure.suptitle("Log-densities", fontsize=10)


def row_weights(figure: Any, compared: Compared) -> None:
    """A histogram of the rows' weights, in units of their mean, with Kish's effective number of rows."""
    axes = figure.subplots()
    weight = compared.weight / compared.weight.mean()
    low, high = float(weight.min()), float(weight.max())
    wide = high > 100 * low
    bins = np.geomspace(low, high, 50) if wide else np.linspace(low, high if high > low else low + 1, 50)
    axes.hist(weight, bins, color="0.6")
    axes.set_xscale("log" if wide else "linear")
    axes.set_yscale("log")
    axes.set_xlabel("weight of a row, in units of the mean", fontsize=8)
    axes.set_ylabel("rows", fontsize=8)
    axes.tick_params(labelsize=7)
    n, effective = len(weight), effective_rows(weight)
    figure.suptitle(f"Weights: {n:,} rows count as {effective:,.0f} ({effective / n:.0%})", fontsize=10)


# --- files ------------------------------------------------------------------------------------------------------------


def figures_of(compared: Compared) -> dict[str, tuple[Callable[[Any, Compared], None], float, float]]:
    """Name -> what draws it, and its size in inches. Weights only where the data have any."""
    k = min(MAX_COLUMNS, compared.data.shape[1])
    found = {
        "corner": (corner, 1.2 * k + 1.0, 1.2 * k + 1.0),
        "latent": (latent, 6.0, 6.0),
        "log-density": (densities, 6.0, 4.0),
    }
    return found | ({"weights": (row_weights, 6.0, 4.0)} if compared.weighted else {})


def check_plots(target: StrPath, overwrite: bool, *inputs: Any) -> None:
    """OutputError or MissingExtra unless figures could be written to a file, or into a folder, of that name."""
    new_figure(1, 1)
    names = [os.fspath(name) for name in inputs if isinstance(name, (str, os.PathLike))]
    if not os.path.lexists(target) and os.path.realpath(target) in map(os.path.realpath, names):  # an output to come
        raise OutputError(about_file(target, "it is the name of another file of this command", "choose another name"))
    if is_file(target):
        check_output(target, overwrite, *inputs)
        return
    folder = os.fspath(target)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        problem = "it is neither a folder nor named like a figure"
        raise OutputError(about_file(folder, problem, f"name a folder, or a file as {', '.join(FORMATS)}"))
    if os.path.isdir(folder):
        for name in ("corner", "latent", "log-density", "weights"):
            check_output(os.path.join(folder, f"{name}.png"), overwrite, *inputs)
    else:
        check_output(folder, overwrite, *inputs)  # it can be made there


def is_file(target: StrPath) -> bool:
    """Whether figures go to one file of that name, and not into a folder."""
    return os.path.splitext(os.fspath(target))[1].lower() in FORMATS


def write_plots(compared: Compared, target: StrPath, overwrite: bool = False) -> list[str]:
    """All figures, as one page in a file named like a figure, else as a PNG each in a folder -> the files."""
    drawn = figures_of(compared)
    if is_file(target):
        corner_size = drawn["corner"][1]
        figure = new_figure(corner_size + 5, max(corner_size, 3.2 * (len(drawn) - 1) + 1.2))
        left, right = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=[corner_size, 5])))
        corner(left, compared)
        others = [name for name in drawn if name != "corner"]
        heights = [1.6 if name == "latent" else 1.0 for name in others]
        for part, name in zip(right.subfigures(len(others), 1, height_ratios=heights), others, strict=True):
            drawn[name][0](part, compared)
        write_figure(figure, target, overwrite)
        return [os.fspath(target)]
    os.makedirs(target, exist_ok=True)
    written = []
    for name, (draw, width, height) in drawn.items():
        figure = new_figure(width, height)
        draw(figure, compared)
        written.append(os.path.join(os.fspath(target), f"{name}.png"))
        write_figure(figure, written[-1], overwrite)
    return written


def plot_scores(
    checkpoint: StrPath,
    data: Any,
    target: StrPath,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
) -> list[str]:
    """Compare a checkpoint's flow with data (as ``score_file`` chooses them) and write the figures -> the files.

    Raises as ``score_file``, and MissingExtra where matplotlib is not installed.
    """
    check_plots(target, overwrite, checkpoint, *files_in(data))
    flow, record = load_run(checkpoint, backend=open_backend(device, threads), precision=precision)
    source = open_matched(flow, as_recorded(data, record), "test")
    try:
        check_scorable(flow, source, 1)
        compared = compare(flow, source, seed)
    finally:
        source.close()
    return write_plots(compared, target, overwrite)

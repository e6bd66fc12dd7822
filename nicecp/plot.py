"""Figures of a flow: samples, the spectrum of its scaling, a manifold, and the learning curve of its run.

The numbers behind each figure are functions of their own (spectrum, manifold); matplotlib, an extra, is imported when
the first figure is drawn. Figures are made without pyplot, so that nothing global changes and no window opens.
Source: Dinh et al. 2015, figure 5 and appendix A.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.checkpoint import load_run
from nicecp.errors import CheckpointError, MissingExtra, OutputError, about_file
from nicecp.files import write_bytes
from nicecp.flow import NICE
from nicecp.images import grid
from nicecp.inpainting import Painted, blocks
from nicecp.kernels.backend import Purpose
from nicecp.machine import open_backend, require_memory
from nicecp.outputs import check_output
from nicecp.records import EpochRecord, RunRecord
from nicecp.samples import as_images, check_drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]
FloatArray = NDArray[np.float64]

FORMATS = (".png", ".pdf", ".svg")
DPI = 100
_MANIFOLD = 1  # the epoch word of the manifold's random numbers: samples have 0


# --- numbers ----------------------------------------------------------------------------------------------------------


def spectrum(flow: NICE) -> FloatArray:
    """sigma_d = 1 / S_dd = exp(-s_d) : (d,), largest first, in units of the flow's input (after preprocessing).

    A component with a small sigma is a direction off the manifold. Source: appendix A.2, figure 8.
    """
    sigma: FloatArray = np.exp(-flow.parameters()["scaling/log_scale"].astype(np.float64))
    return np.sort(sigma)[::-1]


def typical_norm(flow: NICE) -> float:
    """Root mean square of |h| for h from the prior: sqrt(d) times a component's standard deviation."""
    variance = math.pi**2 / 3 if flow.spec.prior == "logistic" else 1.0
    return math.sqrt(flow.n_features * variance)


def sphere(flow: NICE, rows: int, columns: int, radius: float = 1.0, seed: int = 0) -> FloatArray:
    """A randomly rotated sphere of a 3-dimensional subspace of latent space : (rows, columns, d).

    Row i has the polar angle pi (i + 1/2) / rows, so that no row is a pole; column j the azimuth 2 pi j / columns.
    radius : as a multiple of ``typical_norm``. Raises ValueError for fewer than three features, an empty grid, or a
    radius that is not positive.
    """
    d = flow.n_features
    if d < 3:
        raise ValueError(f"a sphere needs a latent space of at least 3 dimensions, this flow has {d}")
    if rows < 1 or columns < 1 or not 0 < radius < math.inf:
        raise ValueError(f"a sphere needs a grid and a positive radius, got {rows} x {columns} and {radius}")
    drawn = flow.backend.alloc((3, d), np.float64)
    flow.backend.fill_normal(drawn, seed, Purpose.SAMPLE, _MANIFOLD)
    q, r = np.linalg.qr(flow.backend.copy_out(drawn).T)
    axes = (q * np.sign(np.diag(r))).T  # with this sign all rotations are equally likely
    polar = np.pi * (np.arange(rows) + 0.5) / rows
    azimuth = 2 * np.pi * np.arange(columns) / columns
    x = np.sin(polar)[:, None] * np.cos(azimuth)
    y = np.sin(polar)[:, None] * np.sin(azimuth)
    z = np.broadcast_to(np.cos(polar)[:, None], x.shape)
    points: FloatArray = radius * typical_norm(flow) * np.stack([x, y, z], axis=-1) @ axes
    return points


def manifold(
    flow: NICE, rows: int, columns: int, radius: float = 1.0, seed: int = 0, context: ArrayLike | None = None
) -> FloatArray:
    """f^-1 of ``sphere`` : (rows, columns, d) in data space, at one context. Source: appendix A.1, figure 7."""
    return np.asarray(flow.inverse(sphere(flow, rows, columns, radius, seed), context)[0])


# --- figures ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches; MissingExtra where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("figures need matplotlib, which is not installed; pip install 'nicecp[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def picture_figure(picture: NDArray[np.uint8], title: str, x: str = "", y: str = "") -> Figure:
    """A picture, grey (h, w) or RGB (h, w, 3), with its title, and labels of its axes."""
    height, width = picture.shape[:2]
    inches = 6.0 / max(height, width)
    figure = new_figure(width * inches + 0.3, height * inches + 0.6)
    axes = figure.add_subplot()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(title=title, xlabel=x, ylabel=y, xticks=[], yticks=[])
    return figure


def samples_figure(
    flow: NICE, n: int = 100, seed: int = 0, columns: int | None = None, context: ArrayLike | None = None
) -> Figure:
    """A grid of n samples (figure 5). The flow's data must be images."""
    drawn = as_images(flow, flow.sample(n, seed, context))
    return picture_figure(grid(drawn, columns), f"{n:,} samples, seed {seed}")


def spectrum_figure(flow: NICE, log: bool = False) -> Figure:
    """The sorted spectrum (figure 8)."""
    sigma = spectrum(flow)
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(sigma) + 1), sigma, drawstyle="steps-mid" if len(sigma) < 50 else "default")
    axes.set(title="Spectrum of the scaling", xlabel="component, sorted", ylabel=r"$\sigma_d = \exp(-s_d)$")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return figure


def manifold_figure(
    flow: NICE,
    rows: int = 12,
    columns: int = 16,
    radius: float = 1.0,
    seed: int = 0,
    context: ArrayLike | None = None,
) -> Figure:
    """Images over the two angles of a sphere in latent space (figure 7). The flow's data must be images."""
    points = manifold(flow, rows, columns, radius, seed, context)
    picture = grid(as_images(flow, points.reshape(-1, flow.n_features)), columns, gap=1)
    title = f"A sphere in latent space, seed {seed}"
    return picture_figure(picture, title, "azimuth, once around", "polar angle, pole to pole")


def curve_figure(record: RunRecord) -> Figure:
    """Mean log-likelihood of training and validation by epoch, and the best epoch. The run must have an epoch."""
    history = record.history
    epochs = np.array([row.epoch for row in history])
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    values: dict[str, Callable[[EpochRecord], float | None]] = {
        "train": lambda row: row.train_log_likelihood,
        "validation": lambda row: row.valid_log_likelihood,
        "validation, averaged": lambda row: row.average_log_likelihood,
    }
    few = "." if len(history) < 30 else ""
    for label, value in values.items():
        series = np.array([value(row) for row in history], np.float64)  # None is NaN
        if np.isfinite(series).any():
            axes.plot(epochs, series, label=label, marker=few, linewidth=1.2)
    best = record.best_valid_log_likelihood
    label = f"best epoch {record.best_epoch}" + (f": {best:.2f} nats" if math.isfinite(best) else "")
    axes.axvline(record.best_epoch, color="grey", linestyle="--", linewidth=1, label=label)
    if math.isfinite(best):
        axes.plot([record.best_epoch], [best], "o", color="black", markersize=4)
    axes.set(title="Learning curve", xlabel="epoch", ylabel="mean log-likelihood, nats per row")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def inpainting_figure(painted: Painted) -> Figure:
    """Originals, initial states, results (figure 6) and, with several chains, their means; a row for every mask."""
    m, n = len(painted.names), len(painted.original)
    pictures = {title: grid(images, n) for title, images in blocks(painted).items()}
    height, width = next(iter(pictures.values())).shape[:2]
    # Blocks beside one another, or, where each is a single row of images, below one another.
    down, across = (1, len(pictures)) if m > 1 else (len(pictures), 1)
    inches = 3.2 / width if m > 1 else 6.0 / width
    figure = new_figure(across * width * inches + 1.2, down * (height * inches + 0.4) + 0.2)
    every = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (title, picture) in zip(every, pictures.items(), strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set(title=title, xticks=[], yticks=[])
    if m > 1:
        step = (height - 2) / m
        every[0].set_yticks([2 + step * (k + 0.5) for k in range(m)], painted.names)
    else:
        every[0].set_ylabel(painted.names[0])
    return figure


# --- files ------------------------------------------------------------------------------------------------------------


def check_figure_name(out: StrPath) -> None:
    """OutputError unless the name ends as a figure does."""
    if os.path.splitext(os.fspath(out))[1].lower() not in FORMATS:
        raise OutputError(about_file(out, "unknown kind of figure", f"name it {', '.join(FORMATS)}"))


def write_figure(figure: Figure, out: StrPath, overwrite: bool = False, dpi: int = DPI) -> None:
    """Write a figure as its name says (FORMATS), whole or not at all; the same figure gives the same bytes."""
    check_figure_name(out)
    suffix = os.path.splitext(os.fspath(out))[1].lower()
    # No dates and no version within the file.
    metadata: dict[str, Any] = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "nicecp"}):
        figure.savefig(buffer, format=suffix[1:], dpi=dpi, metadata=metadata[suffix])
    write_bytes(out, buffer.getvalue(), overwrite)


def plot(
    kind: str,
    checkpoint: StrPath,
    out: StrPath,
    *,
    overwrite: bool = False,
    dpi: int = DPI,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    **options: Any,
) -> None:
    """Draw one figure of a checkpoint into ``out``.

    kind : "samples" (n, seed, columns, context), "spectrum" (log), "manifold" (rows, columns, radius, seed, context) or
        "curve"

    Raises
    ------
    CheckpointError
        The checkpoint cannot be used; its data are no images (samples, manifold); it has no record of training (curve).
    OutputError
        The output cannot be written, or is no kind of figure.
    MissingExtra
        matplotlib is not installed.
    ValueError
        An option is out of bounds, or the kind is unknown.
    """
    figures: dict[str, Callable[..., Figure]] = {
        "samples": samples_figure,
        "spectrum": spectrum_figure,
        "manifold": manifold_figure,
    }
    if kind not in figures and kind != "curve":
        raise ValueError(f"unknown figure {kind!r}: expected one of {', '.join([*figures, 'curve'])}")
    check_figure_name(out)
    check_output(out, overwrite, checkpoint)
    new_figure(1, 1)  # whether matplotlib is there, before the work
    flow, record = load_run(checkpoint, backend=open_backend(device, threads), precision=precision)
    if kind in ("samples", "manifold"):
        check_drawable(flow, checkpoint, "draw its spectrum or curve")
        count = options.get("n", 0) if kind == "samples" else options.get("rows", 0) * options.get("columns", 0)
        require_memory(5 * 8 * count * flow.n_features, f"drawing {count:,} images")
    if kind == "curve":
        if record is None or not record.history:
            problem = "it has no record of a finished epoch"
            raise CheckpointError(about_file(checkpoint, problem, "draw the curve of a run of `nicecp train`"))
        figure = curve_figure(record, **options)
    else:
        figure = figures[kind](flow, **options)
    write_figure(figure, out, overwrite, dpi)

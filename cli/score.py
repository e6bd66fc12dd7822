"""`nicecp score`: the log-density of every row of a data set, into a file."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator

import click

from nicecp.cli.console import is_silent, plural
from nicecp.cli.options import (
    SEED,
    beside_options,
    command,
    data_name,
    json_option,
    machine_options,
    memory_option,
    row_options,
)
from nicecp.cli.progress import is_terminal
from nicecp.describe import plain

EXAMPLES = """\
  nicecp score run.h5 --data table.h5 --out scores.h5
  nicecp score run.h5 --data events.h5:/run7/muons --out scores.h5 --plot figures
  mpirun -n 4 nicecp score run.h5 --data big.h5 --out scores.h5
  nicecp score run.h5 --data chain.h5:/posterior --weights weight --out scores.h5 --plot fit.pdf
  nicecp score mnist-run.h5 --data mnist.h5 --draws 16 --out scores.h5
"""


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar on a terminal; nothing in a pipe."""
    if is_silent() or not is_terminal(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    with tqdm(desc="scoring", unit="row", unit_scale=True, dynamic_ncols=True, leave=False) as shown:

        def progress(done: int, rows: int) -> None:
            shown.total = rows
            shown.update(done - shown.n)

        yield progress


@command("score", EXAMPLES)
@click.argument("checkpoint", type=data_name)
@click.option(
    "--data",
    type=data_name,
    required=True,
    metavar="FILE.h5[:/DATASET]|demo",
    help="The rows to score; of a file without /DATASET its test dataset, else train.",
)
@click.option("--out", type=data_name, required=True, metavar="FILE.h5", help="Gets the dataset log_prob.")
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of the noise of 8-bit data and of columns recorded to a few digits: what is written is the logarithm of the "
    "densities' mean over so many draws.",
)
@click.option("--seed", type=SEED, show_default="the run's", help="Of that noise, and of the figures.")
@click.option(
    "--plot",
    type=data_name,
    metavar="FOLDER|FILE.png|.pdf|.svg",
    help="Figures of up to 5,000 rows from all over the data and as many samples: the columns laid over each other, "
    "latent quantiles, log-densities, and the weights of rows that have them. In a folder, or as one page.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@memory_option
@beside_options("where the run had it; none: without")
@row_options
@machine_options
@json_option
def score(
    checkpoint: str,
    data: str,
    out: str,
    draws: int,
    seed: int | None,
    plot: str | None,
    overwrite: bool,
    context: str | None,
    weights: str | None,
    memory_limit: int | None,
    device: str,
    threads: int | None,
    precision: str | None,
    as_json: bool,
    **used: str | None,
) -> None:
    """Write the log-density of every row of the data under CHECKPOINT's flow.

    FILE.h5 gets the dataset log_prob (rows) in nats, in the data's space and in the rows' order: NaN for rows with NaN,
    -inf for rows that are infinite or outside the flow's support. Data of any size go through in blocks. Rows with
    weights count by them in the mean that is printed and in the figures.
    """
    from nicecp.cli.ranks import join
    from nicecp.data_spec import files_in, spec_of
    from nicecp.score_file import score_file

    ranks = join()
    spec = spec_of(data, context=context, weights=weights, **used)
    if plot is not None:
        from nicecp.score_plots import check_plots

        check_plots(plot, overwrite, checkpoint, *files_in(spec), out)
    with _bar() as progress:
        scored = score_file(
            checkpoint, spec, out, draws=draws, seed=seed, overwrite=overwrite, device=device, threads=threads,
            precision=precision, progress=progress, communicator=ranks, memory_limit=memory_limit,
        )  # fmt: skip
    figures: list[str] = []
    if plot is not None and ranks.rank == 0:
        from nicecp.score_plots import plot_scores

        figures = plot_scores(checkpoint, spec, plot, scored.seed, overwrite, device, threads, precision)
    if as_json:
        numbers = {"mean": scored.mean, "standard_error": scored.standard_error, "minimum": scored.minimum}
        counts = {"rows": scored.rows, "nan": scored.nan, "outside": scored.outside}
        about = {"checkpoint": checkpoint, "dataset": scored.dataset, "out": out}
        settings = {"seed": scored.seed, "draws": scored.draws, "figures": figures}
        shown = {name: plain(value) for name, value in numbers.items()}
        click.echo(json.dumps({**about, **counts, **shown, "minimum_row": scored.minimum_row, **settings}))
        return
    click.echo(f"{out}: log-densities of {plural(scored.rows, 'row')} of {scored.dataset}")
    if scored.finite:
        error = f" +- {scored.standard_error:.2g}" if math.isfinite(scored.standard_error) else ""
        lowest = f"lowest {scored.minimum:.2f} at row {scored.minimum_row}"
        click.echo(f"mean {scored.mean:.2f}{error} nats, {lowest}")
    if scored.nan:
        click.echo(f"{plural(scored.nan, 'row')} with NaN: log-density NaN")
    if scored.outside:
        click.echo(f"{plural(scored.outside, 'row')} infinite or outside the flow's support: log-density -inf")
    for figure in figures:
        click.echo(f"{figure}: drawn")

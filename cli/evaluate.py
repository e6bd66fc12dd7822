"""`nicecp evaluate`: the mean log-likelihood of a checkpoint's flow on data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from nicecp.cli.console import table
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

if TYPE_CHECKING:
    from nicecp.baselines import Baseline

EXAMPLES = """\
  nicecp evaluate run.h5 --data mnist.h5
  nicecp evaluate run.h5 --data mnist.h5 --split valid
  nicecp evaluate run.h5 --data other.h5:/measurements --json
  nicecp evaluate run.h5 --data mnist.h5 --compare
  mpirun -n 4 nicecp evaluate run.h5 --data big.h5
  nicecp evaluate run.h5 --data other.h5 --context other.h5:/ctx
"""


@command("evaluate", EXAMPLES)
@click.argument("checkpoint", type=data_name)
@click.option("--data", type=data_name, required=True, metavar="FILE.h5[:/DATASET]|demo", help="The rows to score.")
@click.option(
    "--split",
    type=click.Choice(["auto", "train", "valid", "test"]),
    default="auto",
    show_default=True,
    help="auto: the dataset named, else test, else the run's own validation rows, else all. train, valid: the run's "
    "own rows where the data are the run's, else the dataset of that name.",
)
@click.option("--seed", type=SEED, show_default="the run's", help="Of the dequantization noise of 8-bit data.")
@click.option(
    "--compare",
    "comparing",
    is_flag=True,
    help="Beside it a full-covariance Gaussian fitted to the training rows, factor analysis and a mixture where "
    "scikit-learn is installed, and the paper's numbers for its data sets.",
)
@memory_option
@beside_options("where the run had it; none: without")
@row_options
@machine_options
@json_option
def evaluate(
    checkpoint: str,
    data: str,
    split: str,
    seed: int | None,
    comparing: bool,
    memory_limit: int | None,
    context: str | None,
    weights: str | None,
    device: str,
    threads: int | None,
    precision: str | None,
    as_json: bool,
    **used: str | None,
) -> None:
    """Mean log-likelihood of CHECKPOINT's flow on data.

    In nats per row, in the space of the data (for 8-bit data: dequantized to the flow's range), with its standard error
    over rows; bits per dimension for 8-bit data.
    """
    if comparing and memory_limit is not None:
        raise click.UsageError("--compare reads the rows that it needs into memory: leave --memory-limit out")
    from nicecp.cli.ranks import join
    from nicecp.cli.training import evaluation_json, evaluation_text
    from nicecp.data_spec import spec_of
    from nicecp.scoring import score

    ranks = join()
    spec = spec_of(data, context=context, weights=weights, **used)
    result = score(checkpoint, spec, split, seed, device, threads, precision, ranks, memory_limit)
    others = []
    if comparing and ranks.rank == 0:
        from nicecp.baselines import compare

        others = compare(checkpoint, spec, split, seed, device, threads, precision)
    if as_json:
        values = evaluation_json(result.evaluation)
        about = {"checkpoint": checkpoint, "dataset": result.dataset, "rows_used": result.rows, "seed": result.seed}
        compared = {"compare": [asdict(other) for other in others]} if comparing else {}
        click.echo(json.dumps({**about, **(values or {}), **compared}))
        return
    click.echo(f"{evaluation_text(result.evaluation)}\non {result.rows}")
    if comparing:
        rows = [("this flow", _nats(result.evaluation.mean, result.evaluation.standard_error))]
        rows += [(other.name, _line(other)) for other in others]
        click.echo(table(rows))


def _nats(mean: float, error: float | None) -> str:
    return f"{mean:10.2f}" + ("" if error is None or not math.isfinite(error) else f" +- {error:.2g}")


def _line(other: Baseline) -> str:
    if other.mean is None:
        return f"{'-':>10}  {other.note}"
    return _nats(other.mean, other.standard_error) + (f"  ({other.note})" if other.note else "")

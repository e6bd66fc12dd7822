"""`nicecp evaluate`: the mean log-likelihood of a checkpoint's flow on data."""

from __future__ import annotations

import json

import click

from nicecp.cli.options import SEED, command, data_name, json_option, machine_options

EXAMPLES = """\
  nicecp evaluate run.h5 --data mnist.h5
  nicecp evaluate run.h5 --data mnist.h5 --split valid
  nicecp evaluate run.h5 --data other.h5:/measurements --json
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
@machine_options
@json_option
def evaluate(
    checkpoint: str, data: str, split: str, seed: int | None, device: str, threads: int | None, as_json: bool
) -> None:
    """Mean log-likelihood of CHECKPOINT's flow on data.

    In nats per row, in the space of the data (for 8-bit data: dequantized to the flow's range), with its standard error
    over rows; bits per dimension for 8-bit data.
    """
    from nicecp.cli.training import evaluation_json, evaluation_text
    from nicecp.scoring import score

    result = score(checkpoint, data, split, seed, device, threads)
    if as_json:
        values = evaluation_json(result.evaluation)
        about = {"checkpoint": checkpoint, "dataset": result.dataset, "rows_used": result.rows, "seed": result.seed}
        click.echo(json.dumps({**about, **(values or {})}))
        return
    click.echo(f"{evaluation_text(result.evaluation)}\non {result.rows}")

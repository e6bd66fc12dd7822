"""`nicecp sample`: draw from a checkpoint's flow into a file."""

from __future__ import annotations

from typing import Any

import click

from nicecp.cli.options import SEED, command, data_name, machine_options, numbers_or_dataset

EXAMPLES = """\
  nicecp sample run.h5 -n 100 --out digits.png
  nicecp sample run.h5 -n 10000 --seed 1 --out samples.h5
  mpirun -n 4 nicecp sample run.h5 -n 1000000 --out samples.h5
  nicecp sample run.h5 -n 30 --columns-of-grid 10 --out row.png --overwrite
  nicecp sample run.h5 -n 1000 --context 0.5,1 --out at.h5         (a flow with a context)
  nicecp sample run.h5 --context points.h5:/ctx --out each.h5      (a sample for each row)
"""


@command("sample", EXAMPLES)
@click.argument("checkpoint", type=data_name)
@click.option(
    "-n",
    "n",
    type=click.IntRange(min=1),
    show_default="100, or one for each row of --context",
    help="How many samples.",
)
@click.option(
    "--context",
    type=numbers_or_dataset,
    metavar="NUMBERS|FILE.h5:/DATASET",
    help="For a flow with a context: numbers for all samples, such as 0.5,1, or a dataset with a row for each.",
)
@click.option(
    "--out", type=data_name, required=True, metavar="FILE.h5|FILE.png", help="HDF5 for the numbers, PNG for a picture."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Sample i depends on the seed and i alone.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option(
    "--columns-of-grid",
    type=click.IntRange(min=1),
    show_default="as square as it goes",
    help="Images in a row of the PNG.",
)
@machine_options
def sample(
    checkpoint: str,
    n: int | None,
    context: Any,
    out: str,
    seed: int,
    overwrite: bool,
    columns_of_grid: int | None,
    device: str,
    threads: int | None,
    precision: str | None,
) -> None:
    """Draw exact samples from CHECKPOINT's flow.

    FILE.h5 gets the dataset samples (n, d) in data space, context (n, k) if there is one and, for 8-bit data, images
    (n, height, width[, 3]) of bytes; FILE.png a grid of the images.
    """
    from nicecp.cli.ranks import join
    from nicecp.samples import write_samples

    where = (device, threads, context, precision, join())
    written = write_samples(checkpoint, out, n, seed, overwrite, columns_of_grid, *where)
    click.echo(f"{out}: {written.rows:,} samples of {written.features} features, seed {written.seed}")

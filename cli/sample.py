"""`nicecp sample`: draw from a checkpoint's flow into a file."""

from __future__ import annotations

import click

from nicecp.cli.options import SEED, command, data_name, machine_options

EXAMPLES = """\
  nicecp sample run.h5 -n 100 --out digits.png
  nicecp sample run.h5 -n 10000 --seed 1 --out samples.h5
  mpirun -n 4 nicecp sample run.h5 -n 1000000 --out samples.h5
  nicecp sample run.h5 -n 30 --columns-of-grid 10 --out row.png --overwrite
"""


@command("sample", EXAMPLES)
@click.argument("checkpoint", type=data_name)
@click.option("-n", "n", type=click.IntRange(min=1), default=100, show_default=True, help="How many samples.")
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
    n: int,
    out: str,
    seed: int,
    overwrite: bool,
    columns_of_grid: int | None,
    device: str,
    threads: int | None,
) -> None:
    """Draw exact samples from CHECKPOINT's flow.

    FILE.h5 gets the dataset samples (n, d) in data space and, for 8-bit data, images (n, height, width[, 3]) of bytes;
    FILE.png a grid of the images.
    """
    from nicecp.cli.ranks import join
    from nicecp.samples import write_samples

    written = write_samples(checkpoint, out, n, seed, overwrite, columns_of_grid, device, threads, join())
    click.echo(f"{out}: {written.rows:,} samples of {written.features} features, seed {written.seed}")

"""`nicecp data`: other formats to the HDF5 files that training reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nicecp.cli.options import command, data_name, debug_option

if TYPE_CHECKING:
    from nicecp.convert import Written

GROUP_EXAMPLES = """\b
Examples:
  nicecp data demo --out digits.h5
  nicecp data csv table.csv --out table.h5
  nicecp data idx mnist-folder --out mnist.h5
"""
DEMO_EXAMPLES = """\
  nicecp data demo --out digits.h5
"""
CSV_EXAMPLES = """\
  nicecp data csv table.csv --out table.h5
  nicecp data csv points.txt.gz --delimiter space --no-header --out points.h5
"""
IDX_EXAMPLES = """\
  nicecp data idx mnist-folder --out mnist.h5
  nicecp data idx train-images-idx3-ubyte.gz t10k-images-idx3-ubyte.gz --out mnist.h5
"""
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "space": " "}

out_option = click.option("--out", type=data_name, required=True, metavar="FILE.h5", help="The file to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing file.")


@click.group("data", epilog=GROUP_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def data() -> None:
    """Convert data to the HDF5 files that training reads."""


def _say(written: Written) -> None:
    """One line about what was written."""
    shapes = ", ".join(f"{name} {'x'.join(str(size) for size in shape)}" for name, shape in written.shapes.items())
    click.echo(f"{written.path}: {shapes}")


@command("demo", DEMO_EXAMPLES)
@out_option
@overwrite_option
def demo(out: str, overwrite: bool) -> None:
    """Write the drawn digits that --data demo trains on."""
    from nicecp.convert import write_demo

    _say(write_demo(out, overwrite))


@command("csv", CSV_EXAMPLES)
@click.argument("source", type=data_name)
@out_option
@click.option(
    "--delimiter",
    type=click.Choice(["auto", *DELIMITERS]),
    default="auto",
    show_default=True,
    help="Between cells; space is any white space.",
)
@click.option("--header/--no-header", default=None, show_default="by looking", help="Whether the first line is names.")
@click.option("--dataset", type=data_name, default="train", show_default=True, help="The dataset's name in the file.")
@overwrite_option
def csv(source: str, out: str, delimiter: str, header: bool | None, dataset: str, overwrite: bool) -> None:
    """Convert the text table SOURCE (or its .gz), one row per line."""
    from nicecp.convert import csv_to_hdf5

    between = DELIMITERS.get(delimiter)
    _say(csv_to_hdf5(source, out, overwrite, delimiter=between, header=header, dataset=dataset))


@command("idx", IDX_EXAMPLES)
@click.argument("sources", type=data_name, nargs=-1, required=True)
@out_option
@overwrite_option
def idx(sources: tuple[str, ...], out: str, overwrite: bool) -> None:
    """Convert idx files (MNIST's format, also .gz), or a folder of them."""
    from nicecp.convert import idx_to_hdf5

    _say(idx_to_hdf5(list(sources), out, overwrite))


for _command in (demo, csv, idx):
    data.add_command(_command)

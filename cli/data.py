"""`nicecp data`: other formats to the HDF5 files that training reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nicecp.cli.options import command, data_name, debug_option
from nicecp.errors import printable

if TYPE_CHECKING:
    from nicecp.convert import Written

GROUP_EXAMPLES = """\b
Examples:
  nicecp data demo --out digits.h5
  nicecp data csv table.csv --out table.h5
  nicecp data idx mnist-folder --out mnist.h5
  nicecp data cifar10 cifar-10-binary.tar.gz --out cifar10.h5
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
MNIST_EXAMPLES = """\
  nicecp data mnist mnist-folder --out mnist.h5
  nicecp data mnist https://example.org/mnist/ --out mnist.h5
"""
CIFAR10_EXAMPLES = """\
  nicecp data cifar10 cifar-10-binary.tar.gz --out cifar10.h5
  nicecp data cifar10 cifar-10-batches-bin --out cifar10.h5
"""
SVHN_EXAMPLES = """\
  nicecp data svhn svhn-folder --out svhn.h5
  nicecp data svhn http://ufldl.stanford.edu/housenumbers/ --split code --out svhn-code.h5
"""
TFD_EXAMPLES = """\
  nicecp data tfd TFD_48x48.mat --out tfd.h5
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
    click.echo(printable(f"{written.path}: {shapes}"))
    if written.verified:
        click.echo(f"as published, by checksum: {', '.join(written.verified)}")


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


source_argument = click.argument("source", type=data_name)


@command("mnist", MNIST_EXAMPLES)
@source_argument
@out_option
@overwrite_option
def mnist(source: str, out: str, overwrite: bool) -> None:
    """Convert MNIST's four idx files (.gz or not) in SOURCE: a folder, an archive or a URL of either."""
    from nicecp.published import mnist_to_hdf5

    _say(mnist_to_hdf5(source, out, overwrite))


@command("cifar10", CIFAR10_EXAMPLES)
@source_argument
@out_option
@overwrite_option
def cifar10(source: str, out: str, overwrite: bool) -> None:
    """Convert CIFAR-10's binary version in SOURCE: a folder, an archive or a URL of either.

    The Python version is refused: its pickles run code when they are read.
    """
    from nicecp.published import cifar10_to_hdf5

    _say(cifar10_to_hdf5(source, out, overwrite))


@command("svhn", SVHN_EXAMPLES)
@source_argument
@click.option(
    "--split",
    type=click.Choice(["clean", "code"]),
    default="clean",
    show_default=True,
    help="clean: train and extra less the validation images. code: all of the original training file, with which the "
    "validation images overlap, as the authors did.",
)
@out_option
@overwrite_option
def svhn(source: str, split: str, out: str, overwrite: bool) -> None:
    """Convert SVHN's cropped digits (.mat) in SOURCE: a folder, an archive or a URL of either.

    400 images of each class of train and 200 of extra validate, the first ones in the files.
    """
    from nicecp.published import svhn_to_hdf5

    _say(svhn_to_hdf5(source, out, overwrite, split))


@command("tfd", TFD_EXAMPLES)
@source_argument
@click.option("--fold", type=click.IntRange(0), default=0, show_default=True, help="Which of the file's partitions.")
@out_option
@overwrite_option
def tfd(source: str, fold: int, out: str, overwrite: bool) -> None:
    """Convert the Toronto Face Database's TFD_48x48.mat in SOURCE: the file, a folder, an archive or a URL."""
    from nicecp.published import tfd_to_hdf5

    _say(tfd_to_hdf5(source, out, overwrite, fold))


for _command in (demo, csv, idx, mnist, cifar10, svhn, tfd):
    data.add_command(_command)

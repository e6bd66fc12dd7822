"""`nicecp plot`: figures of a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from nicecp.cli.inpaint import bar, inpainting_options, report_text
from nicecp.cli.options import SEED, F, command, data_name, debug_option, fixed_context_option, machine_options

GROUP_EXAMPLES = """\b
Examples:
  nicecp plot samples run.h5 --out samples.png
  nicecp plot spectrum run.h5 --out spectrum.png
  nicecp plot manifold run.h5 --seed 3 --out manifold.png
  nicecp plot curve run.h5 --out curve.pdf
  nicecp plot inpainting run.h5 --data mnist.h5 --chains 1 --out inpainting.png

Figures are drawn by matplotlib: pip install 'nicecp[plot]'
"""
SAMPLES = """\
  nicecp plot samples run.h5 --out samples.png
  nicecp plot samples run.h5 -n 64 --columns 16 --seed 1 --out samples.pdf
"""
SPECTRUM = """\
  nicecp plot spectrum run.h5 --out spectrum.png
  nicecp plot spectrum run.h5 --log --out spectrum.svg
"""
MANIFOLD = """\
  nicecp plot manifold run.h5 --out manifold.png
  nicecp plot manifold run.h5 --grid 8x20 --radius 0.8 --seed 3 --out manifold.png
"""
CURVE = """\
  nicecp plot curve run.h5 --out curve.png
"""
INPAINTING = """\
  nicecp plot inpainting run.h5 --data mnist.h5 --chains 1 --out inpainting.png
  nicecp plot inpainting run.h5 --data mnist.h5 --mask top --gradient-scale 0.01 --iterations 3000 --out top.pdf
"""


@click.group("plot", epilog=GROUP_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def plot() -> None:
    """Draw figures of a trained flow."""


def output_options(function: F) -> F:
    """CHECKPOINT, --out, --overwrite and --dpi."""
    dpi = click.option("--dpi", type=click.IntRange(10, 1000), default=100, show_default=True, help="Dots per inch.")
    overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing file.")
    out = click.option("--out", type=data_name, required=True, metavar="FILE.png|.pdf|.svg", help="The figure.")
    return click.argument("checkpoint", type=data_name)(out(overwrite(dpi(function))))


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()) or not (0 < int(rows) < 1000 and 0 < int(columns) < 1000):
        raise click.BadParameter(f"{text!r} is not ROWSxCOLUMNS such as 12x16")
    return int(rows), int(columns)


def _draw(kind: str, checkpoint: str, out: str, **options: Any) -> None:
    from nicecp import plot as library

    library.plot(kind, checkpoint, out, **options)
    click.echo(f"{out}: {kind} of {checkpoint}")


@command("samples", SAMPLES)
@output_options
@click.option("-n", "n", type=click.IntRange(min=1), default=100, show_default=True, help="How many samples.")
@click.option("--columns", type=click.IntRange(min=1), show_default="as square as it goes", help="Images in a row.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Sample i depends on the seed and i alone.")
@fixed_context_option
@machine_options
def samples(checkpoint: str, out: str, **options: Any) -> None:
    """A grid of exact samples of CHECKPOINT's flow (the paper's figure 5)."""
    _draw("samples", checkpoint, out, **options)


@command("spectrum", SPECTRUM)
@output_options
@click.option("--log", is_flag=True, help="A logarithmic axis of scales.")
@machine_options
def spectrum(checkpoint: str, out: str, **options: Any) -> None:
    """The sorted scales sigma_d = exp(-s_d) of the components (figure 8).

    They show how many directions the model uses: a small scale is a direction off the manifold.
    """
    _draw("spectrum", checkpoint, out, **options)


@command("manifold", MANIFOLD)
@output_options
@click.option("--grid", "shape", type=_grid, default="12x16", show_default=True, help="ROWSxCOLUMNS of images.")
@click.option(
    "--radius",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the sphere, in units of a typical latent's length.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the rotation.")
@fixed_context_option
@machine_options
def manifold(checkpoint: str, out: str, shape: tuple[int, int], **options: Any) -> None:
    """Images over the two angles of a randomly rotated sphere in latent space (figure 7)."""
    _draw("manifold", checkpoint, out, rows=shape[0], columns=shape[1], **options)


@command("curve", CURVE)
@output_options
def curve(checkpoint: str, out: str, **options: Any) -> None:
    """The learning curve of the run that wrote CHECKPOINT: train, validation and the best epoch."""
    _draw("curve", checkpoint, out, **options)


@command("inpainting", INPAINTING)
@output_options
@inpainting_options
@machine_options
def inpainting(
    checkpoint: str, out: str, overwrite: bool, dpi: int, data: str, mask: str, iterations: int, **options: Any
) -> None:
    """Images before and after CHECKPOINT's flow filled in hidden pixels (figure 6); see nicecp inpaint."""
    from nicecp import plot as library
    from nicecp.inpainting import inpaint_images
    from nicecp.outputs import check_output

    library.check_figure_name(out)
    check_output(out, overwrite, checkpoint, data, mask)
    library.new_figure(1, 1)
    with bar(iterations) as progress:
        painted = inpaint_images(checkpoint, data, mask, iterations=iterations, progress=progress, **options)
    library.write_figure(library.inpainting_figure(painted), out, overwrite, dpi)
    click.echo(f"{report_text(painted)}\n{out}: inpainting of {checkpoint}")


for _command in (samples, spectrum, manifold, curve, inpainting):
    plot.add_command(_command)

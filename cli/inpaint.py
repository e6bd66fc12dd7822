"""`nicecp inpaint`: fill in hidden pixels of images with a checkpoint's flow."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from nicecp.cli.console import plural
from nicecp.cli.options import (
    SEED,
    F,
    command,
    data_name,
    fixed_context_option,
    json_option,
    machine_options,
    value_range,
)
from nicecp.cli.progress import is_terminal

if TYPE_CHECKING:
    from nicecp.inpainting import Painted

EXAMPLES = """\
  nicecp inpaint run.h5 --data mnist.h5 --mask all --chains 1 --out figure.png
  nicecp inpaint run.h5 --data mnist.h5 --mask top --gradient-scale 0.01 --iterations 3000 --out top.h5
  nicecp inpaint run.h5 --data mnist.h5:/test --mask mask.h5 --variant code --out filled.png
"""


def inpainting_options(function: F) -> F:
    """What decides an inpainting, beside the checkpoint and the output."""
    options = (
        click.option(
            "--data", type=data_name, required=True, metavar="FILE.h5[:/DATASET]|demo", help="Images; test, else train."
        ),
        click.option(
            "--mask",
            type=data_name,
            default="all",
            show_default=True,
            metavar="NAME|FILE.h5",
            help="What is hidden: top, bottom, odd, even, left, right, middle-rows, middle-columns, random75, "
            "random90, all of these, or a file's dataset (height, width) of 0 and 1 (hidden).",
        ),
        click.option(
            "--iterations",
            type=click.IntRange(0, 2**31 - 2),
            default=111_895,
            show_default=True,
            help="Steps of the ascent; the default is the published script's.",
        ),
        click.option("-n", "n", type=click.IntRange(min=1), default=10, show_default=True, help="How many images."),
        click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="The first one's row."),
        click.option(
            "--chains",
            type=click.IntRange(1, 2**24),
            default=16,
            show_default=True,
            help="Runs for every image and mask, each with noise of its own.",
        ),
        click.option(
            "--variant",
            type=click.Choice(["text", "code"]),
            default="text",
            show_default=True,
            help="text: projected to the data's box, as the paper says. code: as the authors' script, a hundredth of "
            "the gradient, fresh dequantization noise, no projection.",
        ),
        click.option(
            "--gradient-scale",
            type=click.FloatRange(0, min_open=True),
            show_default="1 (text), 0.01 (code)",
            help="Factor of the gradient. With text, 0.01 converges a hundred times sooner than 1.",
        ),
        click.option(
            "--box", type=value_range, metavar="LO,HI", help="Range of the values, for flows of floats without --logit."
        ),
        fixed_context_option,
        click.option("--seed", type=SEED, default=0, show_default=True, help="Of random masks, start and noise."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@contextlib.contextmanager
def bar(iterations: int) -> Iterator[Callable[[int], object] | None]:
    """A progress bar on a terminal; nothing in a pipe."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    with tqdm(total=iterations, desc="inpainting", unit="step", dynamic_ncols=True, leave=False) as shown:
        yield lambda done: shown.update(done - shown.n)


@command("inpaint", EXAMPLES)
@click.argument("checkpoint", type=data_name)
@inpainting_options
@click.option(
    "--out", type=data_name, required=True, metavar="FILE.png|FILE.h5", help="A picture, or HDF5 for the numbers."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@machine_options
@json_option
def inpaint(
    checkpoint: str, data: str, mask: str, iterations: int, out: str, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Hide pixels of images and let CHECKPOINT's flow fill them in.

    Hidden pixels start as uniform noise and ascend the log-likelihood with Gaussian noise, by steps of 10 / (100 + i);
    the others stay. The picture shows originals, initial states, results of the first chain and means over the chains;
    the report compares that mean with filling in the mean of the training images.
    """
    from nicecp.inpainting import check_inpainting_output, inpaint_images, write_inpainting

    check_inpainting_output(out, overwrite, checkpoint, data, mask)
    with bar(iterations) as progress:
        painted = inpaint_images(checkpoint, data, mask, iterations=iterations, progress=progress, **options)
    write_inpainting(painted, out, overwrite)
    if as_json:
        about = {"checkpoint": checkpoint, "dataset": painted.source, "iterations": iterations, "seed": painted.seed}
        click.echo(json.dumps({**about, "out": out, "masks": painted.report()}))
    else:
        click.echo(report_text(painted))
        click.echo(f"{out}: {plural(len(painted.original), 'image')} of {painted.source}, {_setting(painted)}")


def _setting(painted: Painted) -> str:
    return f"{plural(painted.iterations, 'iteration')}, variant {painted.variant}, seed {painted.seed}"


def report_text(painted: Painted) -> str:
    """A table with a line for every mask, and for a single mask one for every chain."""
    report = painted.report()
    chains = len(report[0]["log_prob_before"])
    width = max(4, *(len(str(entry["mask"])) for entry in report))
    average = f"mean of {chains}" if chains > 1 else ""
    lines = [
        f"{'mask':<{width}}  log-likelihood, nats per image  mean squared error on hidden pixels",
        f"{'':<{width}}  {'before':>12}  {'after':>12}     {average:>10}  one chain  training mean",
    ]
    for entry in report:
        before, after = (sum(entry[f"log_prob_{when}"]) / chains for when in ("before", "after"))
        mean = f"{entry['error_of_mean']:.4f}" if chains > 1 else ""
        baseline = entry["error_of_training_mean"]
        lines.append(
            f"{entry['mask']:<{width}}  {before:12.2f}  {after:12.2f}     {mean:>10}  "
            f"{entry['error_of_one_chain']:9.4f}  " + ("-" if baseline is None else f"{baseline:.4f}")
        )
    if len(report) == 1 and chains > 1:
        lines += [
            f"  chain {c}: {before:.2f} -> {after:.2f}"
            for c, (before, after) in enumerate(
                zip(report[0]["log_prob_before"], report[0]["log_prob_after"], strict=True)
            )
        ]
    lines.append(f"log-likelihood of the originals: {report[0]['log_prob_original']:.2f} nats per image")
    return "\n".join(lines)

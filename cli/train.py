"""`nicecp train`: start or resume a run, show it, and say what came of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from nicecp.cli.console import note
from nicecp.cli.optimizer_options import NUMBERS, PRESET, number_options
from nicecp.cli.options import (
    SEED,
    beside_options,
    byte_size,
    command,
    data_name,
    hidden_sizes,
    interval,
    json_option,
    laws,
    machine_options,
    memory_option,
    row_options,
    value_range,
)
from nicecp.cli.stops import describe_stop
from nicecp.errors import CheckpointError
from nicecp.outputs import same_file

if TYPE_CHECKING:
    from nicecp.run import Run

EXAMPLES = """\
  nicecp train --data demo
  nicecp train --data mnist.h5 --out mnist-run.h5 --checkpoint-every 10min
  nicecp train --data table.h5:/measurements --hidden 2x64 --epochs 100 --out table-run.h5
  nicecp train --data table.h5 --coupling affine,additive --hidden 2x64/64/2x64/64 --out table-run.h5
  nicecp train --data table.h5 --couplings 8 --repartition 2 --out table-run.h5
  nicecp train --data table.h5 --preset tabular --transform none --out table-run.h5
  nicecp train --data table.h5 --transform 'mass=log,phi=angle,eff=logit(0:1),*=quantile'
  nicecp train --data chain.h5:/mcmc/chain --burn 500 --thin 10 --out posterior.h5
  nicecp train --data events.h5:/tree/muons --columns pt,eta,phi --select :100000
  nicecp train --data cifar10.h5 --preset cifar10 --dry-run
  nicecp train --data chain.h5 --weights w --out posterior.h5          (MCMC, nested sampling)
  nicecp train --data table.h5 --context mass,age --out given.h5       (p(other columns | mass, age))
  mpirun -n 4 nicecp train --data big.h5 --out big-run.h5
  nicecp train --resume mnist-run.h5
  nicecp train --resume mnist-run.h5 --epochs 2000
"""
_PAPERS = ("mnist", "tfd", "svhn", "cifar10")
_TABLES = ("tabular", "tabular-spline")
PRESETS = ("auto", *_PAPERS, *(f"{name}-code" for name in _PAPERS), *_TABLES, "demo")


@command("train", EXAMPLES)
@click.option(
    "--data", type=data_name, metavar="FILE.h5[:/DATASET]|demo", help="Training data; demo draws its own digits."
)
@click.option("--out", type=data_name, metavar="FILE.h5", show_default="run.h5", help="Where the best model goes.")
@click.option("--resume", type=data_name, metavar="FILE.h5", help="Go on with the run that wrote this file.")
@click.option("--allow-changed-data", is_flag=True, help="Resume although the data are not those of the run.")
@click.option(
    "--preset",
    type=click.Choice([*PRESETS]),
    default="auto",
    show_default=True,
    help="Settings to begin with; auto is mnist for 8-bit data, tabular-spline for floats, of which tabular is a first "
    "look in seconds. "
    "mnist, tfd, svhn, cifar10 are the paper's, those with -code the authors' published files.",
)
@click.option("--epochs", type=click.IntRange(1, 2**31 - 1), show_default=PRESET, help="Passes over the training rows.")
@click.option("--batch-size", type=click.IntRange(1, 2**24), show_default=PRESET, help="Rows in a training step.")
@click.option(
    "--hidden",
    type=hidden_sizes,
    metavar="SIZES",
    show_default=PRESET,
    help="Hidden layers of each coupling's network: 1000,1000 or 5x1000 or none; different ones as 3x64/2x64/64.",
)
@click.option("--couplings", type=click.IntRange(1, 1024), show_default=PRESET, help="Coupling layers.")
@click.option(
    "--coupling",
    type=laws,
    metavar="LAW[,LAW...]",
    show_default=PRESET,
    help="What a coupling does: additive (shifts), multiplicative (scales), affine (both) or spline (bends); several "
    "take turns.",
)
@click.option(
    "--partition",
    type=click.Choice(["odd-even", "halves", "random"]),
    show_default=PRESET,
    help="The two parts of the columns that couplings change in turn; random: two halves drawn by the seed.",
)
@click.option(
    "--partition-file",
    type=data_name,
    metavar="FILE.txt",
    help="Their permutation: all 0-based column numbers as text; the first half (rounded up) is the first part.",
)
@click.option(
    "--repartition",
    type=click.IntRange(0, 1024),
    metavar="N",
    show_default=PRESET,
    help="After every N couplings the seed draws other parts of the columns; 0: never.",
)
@click.option(
    "--prior", type=click.Choice(["logistic", "gaussian"]), show_default=PRESET, help="Density of the latents."
)
@click.option(
    "--optimizer", type=click.Choice(["adam", "rmsprop"]), show_default=PRESET, help="How weights are updated."
)
@number_options
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine"]),
    show_default=PRESET,
    help="Of the learning rate over the epochs: cosine falls to almost 0 in the last of --epochs.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(0),
    show_default=PRESET,
    help="After each update the networks' weights are multiplied by 1 - rate times this.",
)
@click.option(
    "--weight-average",
    metavar="none|tail:EPOCHS|ema:DECAY",
    show_default="none",
    help="Validate averaged parameters beside each epoch's own, and keep the better ones: their mean over the last "
    "EPOCHS of the run, or a moving average that keeps DECAY of itself at every epoch, such as 0.95.",
)
@click.option(
    "--patience",
    type=click.IntRange(1, 2**31 - 1),
    show_default=PRESET,
    help="Stop after so many epochs without a better validation.",
)
@click.option(
    "--valid-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    show_default="1/6, cifar10 1/5",
    help="Rows to validate on where the file has no valid dataset; 0 for none.",
)
@click.option("--seed", type=SEED, show_default="0", help="Of weights, noise, shuffling and the split.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float64"]),
    default="auto",
    show_default=True,
    help="Of the computation; auto is float32 for 8-bit data, float64 for floats.",
)
@click.option(
    "--range",
    "range_",
    type=value_range,
    metavar="LO,HI",
    show_default="0,1",
    help="Where 8-bit values are dequantized to; with --logit, where floats lie.",
)
@click.option(
    "--logit",
    type=click.FloatRange(0, 0.5, max_open=True),
    metavar="MARGIN",
    show_default="none",
    help="Send data in --range to the whole line by a logit that keeps MARGIN away from its ends, such as 0.05.",
)
@click.option(
    "--whiten",
    type=click.Choice(["none", "zca", "gaussian", "approximate"]),
    show_default=PRESET,
    help="Whiten the training rows: zca; gaussian, the triangular map of greatest likelihood; approximate, the same "
    "learned with early stopping.",
)
@click.option(
    "--regularization",
    type=click.FloatRange(0),
    show_default=PRESET,
    help="Added to the variances that zca and gaussian whitening divide by.",
)
@click.option(
    "--transform",
    metavar="KIND|COLUMN=KIND,...",
    show_default=PRESET,
    help="Transforms of single float columns, before standardisation: none; auto, which says what it chose and why; or "
    "for each column standardize, log(LOW), logit(LOW:HIGH), student, quantile, angle(PERIOD) or recorded(STEP), "
    "several joined by +; COLUMN is a name, a number from 0, or * for all others (docs/tables.md).",
)
@click.option("--no-standardize", is_flag=True, help="Use float columns as they are.")
@click.option(
    "--allow-constant", is_flag=True, help="Accept constant float columns (the likelihood is then unbounded)."
)
@click.option(
    "--activations",
    type=click.Choice(["store", "halves", "recompute"]),
    show_default="store",
    help="What a step keeps for its backward pass. halves: what couplings read and change; networks are computed "
    "again (same bits, a third more work). recompute: the output, couplings are inverted: memory that does not grow "
    "with depth; checked every epoch.",
)
@memory_option
@beside_options("none")
@row_options
@machine_options
@click.option(
    "--device-memory-limit",
    type=byte_size,
    metavar="SIZE",
    show_default="all there is",
    help="Memory of a GPU (CPUs have none) for training data, such as 2GiB; more of them stream, to the same result.",
)
@click.option(
    "--checkpoint-every",
    type=interval,
    metavar="TIME|EPOCHS",
    default="5min",
    show_default=True,
    help="Between checkpoints: 30s, 5min, 2h, or 10e for 10 epochs; a plain number is minutes.",
)
@click.option(
    "--keep",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="State files to keep: the newest as run.state.h5, older ones as run.state.1.h5 and so on.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing output files.")
@click.option("--dry-run", is_flag=True, help="Print model, memory, operations and time, and write nothing.")
@click.option(
    "--profile", is_flag=True, help="Print where a step's time goes, by kind of call, and write nothing (CPU)."
)
@json_option
def train(
    data: str | None,
    out: str | None,
    resume: str | None,
    allow_changed_data: bool,
    preset: str,
    optimizer: str | None,
    partition: str | None,
    partition_file: str | None,
    range_: tuple[float, float] | None,
    no_standardize: bool,
    allow_constant: bool,
    context: str | None,
    weights: str | None,
    device: str,
    threads: int | None,
    checkpoint_every: tuple[float, int | None],
    keep: int,
    overwrite: bool,
    dry_run: bool,
    profile: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Train a flow on data by maximum likelihood.

    The best model by validation is kept in --out, and what is needed to go on beside it (run.state.h5). Ctrl-C saves
    and stops; --resume goes on, to the same result as if there had been no interruption. Log-likelihoods are in nats.
    """
    if resume is None and data is None:
        raise click.UsageError("say what to train on: --data FILE.h5, --data demo, or --resume run.h5")
    if resume is not None and out is not None:
        raise click.UsageError("--out cannot be given with --resume: a resumed run goes on with its own files")
    if resume is not None and overwrite:
        raise click.UsageError("--overwrite is for new runs: a resumed run replaces its own files anyway")
    if resume is not None and (dry_run or profile):
        raise click.UsageError(f"--{'dry-run' if dry_run else 'profile'} is for new runs: leave --resume out")
    if resume is None and allow_changed_data:
        raise click.UsageError("--allow-changed-data is for runs that go on: give it with --resume")
    if partition is not None and partition_file is not None:
        raise click.UsageError("--partition and --partition-file are two ways to say one thing: leave one out")
    if partition_file is not None and same_file(partition_file, out or "run.h5"):
        raise click.UsageError(f"the run would replace its --partition-file {partition_file!r}: choose another --out")
    rows = {name: given.pop(name) for name in ("columns", "select", "burn", "thin")}
    settings: dict[str, Any] = {
        "preset": preset,
        "optimizer": optimizer,
        "numbers": {name: given.pop(f"number_{name}") for _, name, _, _ in NUMBERS},
        "partition": partition,
        "value_range": range_,
        "standardize": False if no_standardize else None,
        "allow_constant": True if allow_constant else None,
        "device": device,
        "threads": threads,
        "checkpoint_every": checkpoint_every[0],
        "checkpoint_epochs": checkpoint_every[1],
        "keep": keep,
        **given,
    }
    run: Run | None = None
    try:
        from nicecp.cli import training
        from nicecp.cli.ranks import join
        from nicecp.data_spec import spec_of
        from nicecp.partition import order_from_file
        from nicecp.run import Run

        settings["communicator"] = join()
        if partition_file is not None:
            settings |= {"partition": "permutation", "order": order_from_file(partition_file)}
        spec = spec_of(data, context=context, weights=weights, **rows)
        if resume is not None:
            run = Run.resume(resume, data=spec, allow_changed_data=allow_changed_data, **settings)
        else:
            run = Run.start(spec, None if dry_run or profile else out or "run.h5", overwrite=overwrite, **settings)
        with run:
            if dry_run:
                training.show_plan(run, as_json)
            if profile:
                training.show_profile(run, as_json)
            if dry_run or profile:
                return 0
            return training.carry_out(run, as_json)
    except ValueError as error:
        if type(error) not in (ValueError, CheckpointError):
            raise
        raise type(error)(in_options(str(error))) from error
    except KeyboardInterrupt as stop:
        from nicecp.parallel import end_all

        what, code = describe_stop(stop)
        note(f"nicecp: error: {what} {_what_is_saved(run)}")
        end_all(code)
        return code


# Settings under the names of their options, where these differ by more than dashes.
_OPTIONS = {name: option for option, name, _, _ in NUMBERS} | {"range": "--range", "value_range": "--range"}
_OPTIONS["order"] = "--partition-file"
_NAMES = (
    "epochs", "batch_size", "hidden", "couplings", "coupling", "prior", "patience", "seed", "dtype", "preset",
    "optimizer", "precision", "partition", "repartition", "device_memory_limit", "schedule", "weight_decay",
    "weight_average", "transform", "whiten", "valid_fraction", "regularization", "logit", "activations", "memory_limit",
)  # fmt: skip
_OPTIONS |= {name: "--" + name.replace("_", "-") for name in _NAMES}
_SWITCHES = {
    "standardize is True in the run, False was asked for": "the run standardised its columns (no --no-standardize)",
    "allow_constant is False in the run, True was asked for": "the run had no --allow-constant",
}


def in_options(message: str) -> str:
    """A message about a setting as the library words it, with the option in place of the setting's name."""
    for words, better in _SWITCHES.items():
        message = message.replace(words, better)
    if message.startswith("a partition needs"):  # of how many columns, the file with them does not say
        return f"--partition-file: {message}"
    found = re.fullmatch(r"(optimizer \w+) has no setting (\w+); it has (.*)", message)
    if found is not None:
        known = ", ".join(_OPTIONS.get(name, name) for name in found[3].split(", "))
        return f"{found[1]} has no {_OPTIONS.get(found[2], found[2])}; it has {known}"
    found = re.match(
        r"('[^']*': )?(?:the )?(\w+)(?= (?:sizes )?(?:must|is) )", message
    )  # the file's name may come first
    if found is None or found[2] not in _OPTIONS:
        return message
    return (found[1] or "") + _OPTIONS[found[2]] + message[found.end() :]


def _what_is_saved(run: Run | None) -> str:
    """For the end of a message about an interrupted command."""
    if run is None or run.out is None or not (run.begun or run.complete):
        return "before the first step; nothing was saved"
    if run.complete:
        return f"after training: it is finished and saved in {run.out!r}; only the last evaluation is missing"
    return f"while saving; to go on from the last checkpoint, if there is one: nicecp train --resume {run.out!r}"

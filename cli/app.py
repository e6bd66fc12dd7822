"""The commands as click knows them, and what becomes of their results and errors: a line, an exit code.

Commands are imported when they are called, so that `nicecp --help` stays quick.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from nicecp import __version__
from nicecp.cli.console import abandon, messages, note
from nicecp.cli.options import debug_option
from nicecp.cli.stops import INTERRUPTED
from nicecp.errors import NicecpError, printable
from nicecp.parallel import launched

# Command -> module, function, and its line in the listing.
COMMANDS = {
    "train": ("nicecp.cli.train", "train", "Train a flow on data."),
    "evaluate": ("nicecp.cli.evaluate", "evaluate", "Mean log-likelihood of a trained flow on data."),
    "score": ("nicecp.cli.score", "score", "Log-density of every row of data, into a file."),
    "sample": ("nicecp.cli.sample", "sample", "Draw samples from a trained flow."),
    "inpaint": ("nicecp.cli.inpaint", "inpaint", "Fill in hidden pixels of images."),
    "plot": ("nicecp.cli.plot", "plot", "Figures: samples, spectrum, manifold, curve."),
    "info": ("nicecp.cli.info", "info", "What a checkpoint or a data file holds."),
    "doctor": ("nicecp.cli.doctor", "doctor", "What this machine offers, and whether it computes rightly."),
    "data": ("nicecp.cli.data", "data", "Convert data to the HDF5 files that training reads."),
}
SHARED = ("train", "evaluate", "score", "sample")  # what several processes do together
EXAMPLES = """\b
Examples:
  nicecp train --data demo                      a first flow, in about a minute
  nicecp sample run.h5 -n 100 --out digits.png  look at what it draws
  nicecp train --data mnist.h5 --out mnist-run.h5
  nicecp evaluate mnist-run.h5 --data mnist.h5

Each command has its own --help.
"""
MISTAKE = 1
USAGE_ERROR = 2
LONGEST = 1000  # characters of a message
BROKEN_PIPE = 141  # as a shell reports a program ended by SIGPIPE


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nicecp")
@debug_option
def cli() -> None:
    """NICE normalizing flows: train on data, evaluate exact likelihoods, draw samples."""


def run(arguments: list[str]) -> int:
    """Run a command line -> its exit code."""
    debug = "--debug" in arguments
    command = next((word for word in arguments if not word.startswith("-")), "")
    if launched()[1] > 0 and command not in SHARED:
        return 0  # one of the processes that a launcher has started does it
    try:
        # Not cli.main: it would print a line of its own for an interrupt and end quietly where a pipe is closed.
        with messages(debug), cli.make_context("nicecp", arguments) as ctx:
            result: Any = cli.invoke(ctx)
        sys.stdout.flush()
        # Launchers end all processes when one fails, maybe before rank 0 has said why: its exit code is that of all.
        return result if isinstance(result, int) and launched()[1] == 0 else 0
    except click.exceptions.Exit as ending:  # --help and --version
        return ending.exit_code
    except Exception as error:
        return _failed(error, debug)


def _failed(error: Exception, debug: bool) -> int:
    """Say what went wrong -> the exit code; of several ranks one says it, and all end."""
    from nicecp import parallel

    alike = parallel.failed_alike()
    if alike and parallel.launched()[1] > 0:
        return 0  # as in run
    if debug:
        traceback.print_exc()
    code = _report(error)
    if not alike:
        parallel.end_all(code)
    return code


def _report(error: Exception) -> int:
    """Print an error as one line -> the exit code."""
    if isinstance(error, BrokenPipeError):
        abandon(sys.stdout)  # whoever read our output has gone
        return BROKEN_PIPE
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message())
        return 0
    if isinstance(error, click.Abort):
        return fail("interrupted", INTERRUPTED)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx is not None else "nicecp"
        return fail(f"{_sentence(error.format_message())} (see {where} --help)")
    if isinstance(error, click.ClickException):
        return fail(error.format_message())
    if isinstance(error, MemoryError) and not isinstance(error, NicecpError):
        return fail(f"not enough memory ({error}); use smaller settings" if str(error) else "not enough memory")
    if isinstance(error, OSError):
        if _on_stdout(error):
            abandon(sys.stdout)
            remedy = "write it to a file where there is room, or to a pipe"
            return fail(f"standard output cannot be written ({error.strerror or error}); {remedy}")
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)!r}: "
        return fail(f"{name}{error.strerror or error}")
    if isinstance(error, (NicecpError, ValueError)):
        return fail(str(error))
    return fail(f"a mistake in nicecp ({type(error).__name__}: {error}); please report what --debug shows", MISTAKE)


def _on_stdout(error: OSError) -> bool:
    """Whether it was standard output that could not be written. Such an error has no name; where it arose tells."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    return where is not None and where.tb_frame.f_code in (click.echo.__code__, run.__code__)


def _sentence(message: str) -> str:
    """Without the full stop, since something follows."""
    return message.rstrip().removesuffix(".")


def fail(message: str, code: int = USAGE_ERROR) -> int:
    """One line on standard error -> the exit code."""
    line = printable(f"nicecp: error: {' '.join(message.split())}")
    if len(line) > LONGEST:  # what was given is in it, and may be of any length
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    note(line, error=True)
    return code

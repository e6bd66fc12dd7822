"""`nicecp doctor`: what this machine offers, and whether gradients are right on it."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from nicecp.cli.console import Output, plural
from nicecp.cli.options import command, json_option

EXAMPLES = """\
  nicecp doctor
  nicecp doctor --device cuda && nicecp train --data mnist.h5 --device cuda
  nicecp doctor --json > machine.json
"""
WIDTH = 16
PROBLEMS = 2  # exit code


@command("doctor", EXAMPLES)
@click.option(
    "--device",
    type=click.Choice(["all", "cpu", "cuda"]),
    default="all",
    show_default=True,
    help="What to look at. all: a GPU need not be there, but one that is must work. cuda: it must be there.",
)
@json_option
def doctor(device: str, as_json: bool) -> int:
    """What this machine offers: CPU, libraries, GPU; and a gradient check on every device that can be used.

    Exit code 0 when all is well, 2 when something should be mended, with a line that says what and how.
    """
    from nicecp.doctor import Finding, examine

    output, findings = Output(), list[Finding]()
    for finding in examine(device):
        findings.append(finding)
        if not as_json:
            mark = "PROBLEM: " if finding.problem else ""
            output.line(f"  {finding.name.ljust(WIDTH)}  {mark}{finding.text}")
    problems = [finding for finding in findings if finding.problem]
    if as_json:
        output.line(json.dumps({"well": not problems, "findings": [asdict(finding) for finding in findings]}))
    elif problems:
        output.line(f"{plural(len(problems), 'problem')}: see above")
    else:
        output.line("all is well")
    return PROBLEMS if problems else 0

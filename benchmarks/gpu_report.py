"""The folder that benchmarks/gpu.sh fills, as one text: what ran, what failed, and the numbers beside their aims."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

PEERS = 1.3  # times the fastest peer: the aim
FLOOR = 0.45  # of the floor: the aim


def read(path: Path) -> dict[str, Any]:
    """A JSON file's content, {} where it was not written."""
    try:
        text = path.read_text()
        found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])  # warnings may stand around it
    except (OSError, ValueError):
        return {}
    return found


def steps(report: dict[str, Any]) -> list[str]:
    lines = []
    batch = report["case"]["batch"]
    for precision, results in report["results"].items():
        floor = report["ceilings"].get(precision, {}).get("floor")
        lines += [f"training steps, {precision}, batch {batch}:"]
        lines += [f"  {'':22} {'ms a step':>10} {'rows/s':>12} {'first chunk, s':>15} {'of the floor':>13}"]
        timed = {}
        for name, found in results.items():
            if "failed" in found:
                lines.append(f"  {name:22} {found['failed']}")
                continue
            step = timed[name] = median(found["seconds"])
            share = "" if floor is None else f"{floor / step:13.2f}"
            lines.append(f"  {name:22} {1e3 * step:10.3f} {batch / step:12,.0f} {found['first_chunk']:15.1f} {share}")
        ours, others = timed.pop("nicecp", None), sorted((value, name) for name, value in timed.items())
        if ours is not None and "replay" in results["nicecp"]:
            lines.append(f"  {'nicecp, graph alone':22} {1e3 * results['nicecp']['replay']:10.3f}")
        if ours is not None and others:
            ratio = others[0][0] / ours
            lines.append(f"  {ratio:.2f} times the fastest peer, {others[0][1]} (aim: {PEERS}): {_met(ratio >= PEERS)}")
        if ours is not None and floor is not None:
            lines.append(
                f"  {floor / ours:.2f} of the floor, {1e3 * floor:.3f} ms (aim: {FLOOR}): {_met(floor / ours >= FLOOR)}"
            )
    return lines


def _met(yes: bool) -> str:
    return "reached" if yes else "not reached"


def kernels(report: dict[str, Any]) -> list[str]:
    rows = report["kernels"]
    lines = [f"kernels: {'':15} {'us':>9} {'floor, us':>10} {'share':>6}"]
    for row in rows:
        seconds, floor = row["seconds"], row["floor"]
        lines.append(f"  {row['name']:22} {1e6 * seconds:9.2f} {1e6 * floor:10.2f} {floor / seconds:6.2f}")
    return lines


def main() -> None:
    folder = Path(sys.argv[1])
    lines = [f"results in {folder}"]
    for line in (folder / "parts.txt").read_text().splitlines():
        name, code, seconds = line.split("\t")
        ended = {
            "0": "well",
            "124": "stopped: it took too long",
            "137": "killed: it took too long",
            "skip": "left out",
        }.get(code, f"failed (exit code {code})")
        lines.append(f"  {name:12} {seconds:>4} s  {ended}")
    doctor = read(folder / "doctor.json")
    lines += [
        f"  {one['name']}: {one['text']}" for one in doctor.get("findings", []) if one["name"].startswith(("GPU", "NV"))
    ]
    for name in ("tests", "memcheck", "racecheck"):
        path = folder / f"{name}.txt"
        last = path.read_text(errors="replace").strip().splitlines()[-1:] if path.exists() else []
        lines += [f"{name}: {line}" for line in last]
    for name, shown in (("steps", steps), ("kernels", kernels)):
        report = read(folder / f"{name}.json")
        lines += shown(report) if report else [f"{name}: no results"]
    text = "\n".join(lines)
    (folder / "report.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

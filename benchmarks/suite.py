"""All CPU benchmarks one after the other: a result file (JSON lines) and a log for each, in one folder.

    python benchmarks/suite.py --data FOLDER            # about a quarter of an hour; `make bench` calls this
    python benchmarks/suite.py --quick --out trial      # does it work at all? without other software, a few minutes
    python benchmarks/report.py bench-results           # then: docs/benchmarks.md and its plots from the folder

FOLDER holds mnist.h5 and cms_zmumu.h5 (default: $NICECP_DATA); what needs a file that is not there is left out. So is
other software that is not installed; both are said in the report. A part that fails does not stop the others.
Exit code 0 when every part ended well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.records import Records

PEERS = "nicecp,products,torch,torch-compile,jax,jax-scan"
LIBRARIES = "nflows,normflows,zuko"
TIMEOUT = 400  # seconds for a part


def commands(data: Path | None, quick: bool) -> dict[str, list[str]]:
    """Name of a part -> script and arguments; a part without any is left out for want of data."""
    if quick:
        own = ["--quick", "--contestants"]
        return {
            "steps-mnist": ["train_cpu.py", "--case", "mnist", *own, "nicecp,products"],
            "steps-small": ["train_cpu.py", "--case", "small", "--threads", "1", *own, "nicecp,products"],
            "latency": ["latency.py", *own, "inside,point,nicecp,numpy"],
            "startup": ["startup.py", "--quick"],
            "depth": ["depth.py", "--quick"],
            "streaming": ["streaming.py", "--mib", "8", "--factors", "1", "2", "--limit", "1GiB", "--rounds", "1"],
            "scaling-check": ["scaling.py", "check", "--quick"],
            "scaling-ranks": ["scaling.py", "ranks", "--quick"],
        }
    small = f"{PEERS},{LIBRARIES}"
    mnist, table = (data / name if data is not None else None for name in ("mnist.h5", "cms_zmumu.h5"))
    return {
        "steps-mnist": ["train_cpu.py", "--case", "mnist", "--rounds", "9", "--contestants", PEERS],
        "steps-libraries": ["train_cpu.py", "--case", "mnist", "--rounds", "4", "--contestants", f"nicecp,{LIBRARIES}",
                            "--label", "beside libraries of flows"],
        "steps-small": ["train_cpu.py", "--case", "small", "--threads", "1", "--rounds", "15", "--contestants", small],
        "steps-small64": ["train_cpu.py", "--case", "small", "--threads", "1", "--rounds", "9", "--dtype", "float64",
                          "--contestants", "nicecp,products,torch,jax,jax-scan"],
        "latency": ["latency.py", "--rounds", "11"],
        "startup": ["startup.py", "--rounds", "5"],
        "depth": ["depth.py", "--rounds", "5"],
        "streaming": ["streaming.py", "--mib", "192", "--rounds", "3"],
        "scaling-check": ["scaling.py", "check"],
        "scaling-ranks": ["scaling.py", "ranks"],
        "scaling-predict": ["scaling.py", "predict"],
        "target": ["target.py", "--data", str(mnist)] if mnist is not None and mnist.exists() else [],
        "tabular": ["tabular.py", "--data", str(data), "--tables", "cms_zmumu", "--models", "nicecp,gmm,kde"]
        if table is not None and table.exists() else [],
    }  # fmt: skip


def launcher(part: str) -> list[str] | None:
    """What starts a part: Python, or two ranks of it; None where that is not installed."""
    if part != "scaling-ranks":
        return [sys.executable]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    mpirun = shutil.which("mpirun", path=search)
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return None
    return None if mpirun is None else [mpirun, "--bind-to", "none", "--oversubscribe", "-n", "2", sys.executable]


def section_of(part: str) -> str:
    """The section of the report that a part belongs to."""
    return "log_prob" if part == "latency" else part.partition("-")[0]


def run(part: str, words: list[str], out: Path, limit: float = TIMEOUT) -> str:
    """ "" where it ended well, else what went wrong; leaves PART.jsonl and PART.log."""
    start, result = launcher(part), out / f"{part}.jsonl"
    if not words or start is None:
        why = "no data for it" if not words else "mpi4py or mpirun is not installed"
        Records(result, section_of(part)).note("", f"{part} was left out: {why}.")
        return why
    more = ["--json", str(result)]
    if part == "latency":
        more += ["--sampling-json", str(out / "sampling.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # mpirun as root, in a container; a rank's own threads are one
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with (out / f"{part}.log").open("w") as log:
        command = [*start, str(ROOT / "benchmarks" / words[0]), *words[1:], *more]
        log.write(" ".join(["python", "benchmarks/" + words[0], *words[1:]]) + "\n")
        log.flush()
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=limit
            ).returncode
            problem = "" if code == 0 else f"exit code {code}, see {part}.log"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:g} s"
    if problem:  # beside what it has measured until then
        Records(result, section_of(part), append=True).note("", f"{part} did not end well: {problem}.")
    return problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder (default: bench-results)")
    parser.add_argument("--data", type=Path, default=os.environ.get("NICECP_DATA"), help="default: $NICECP_DATA")
    parser.add_argument("--parts", help="comma-separated (default: all)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help=f"seconds for each part (default: {TIMEOUT})")
    parser.add_argument("--quick", action="store_true", help="does it work at all? nicecp alone")
    options = parser.parse_args()
    parts = commands(options.data, options.quick)
    chosen = options.parts.split(",") if options.parts else list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known are {', '.join(parts)}")
    options.out.mkdir(parents=True, exist_ok=True)
    failed, begin = [], time.monotonic()
    for part in chosen:
        began = time.monotonic()
        print(f"{part} ... ", end="", flush=True)
        problem = run(part, parts[part], options.out, options.timeout)
        print(f"{problem or 'done'} ({time.monotonic() - began:.0f} s)", flush=True)
        failed += [part] if problem.startswith(("exit", "stopped")) else []
    about = {"part": "suite", "quick": options.quick, "seconds": round(time.monotonic() - begin), "failed": failed}
    (options.out / "suite.jsonl").write_text(json.dumps(about) + "\n")
    print(f"{time.monotonic() - begin:.0f} s; results in {options.out}; python benchmarks/report.py {options.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

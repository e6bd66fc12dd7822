"""Kills a run that saves all the time: `python -m tests.kill --kills 200 --seed 1`.

A training process saves after every step and is killed by SIGKILL at a random moment; then both files, if they are
there, must be whole, and the next process goes on from them. In the end the run is finished, and its model must be the
one of a run that was never interrupted, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicecp.checkpoint import load_run, load_state, state_path
from nicecp.run import Run
from tests.nicecp.runs import SMALL, model_bytes, write_table

EPOCHS = 4000
# Saves after every step; says so once it has begun.
CHILD = """
import os, sys
from nicecp.run import Run
from nicecp.train import Callback
from tests.nicecp.runs import SMALL
out, data, keep = sys.argv[1], sys.argv[2], int(sys.argv[3])
class Say(Callback):
    def on_step(self, trainer):
        if not hasattr(self, "said"):
            self.said = True
            os.write(1, b"x")
options = {"checkpoint_every": 1e-9, "keep": keep}
if os.path.exists(out.replace(".h5", ".state.h5")):
    run = Run.resume(out, **options)
else:
    run = Run.start(data, out, **{**SMALL, "preset": "tabular", "epochs": int(sys.argv[4])}, overwrite=True, **options)
with run:
    run.execute([Say()])
"""


@dataclass
class Result:
    kills: int = 0
    resumed: int = 0
    steps: int = 0  # of the last state
    stale: int = 0  # temporary files that the dead left
    older: int = 0  # older state files that were whole


def kill_and_resume(folder: Path, kills: int, seed: int, keep: int = 2) -> Result:
    """AssertionError or CheckpointError if any kill lost or spoiled anything."""
    rng, result = random.Random(seed), Result()
    data, out = write_table(folder / "table.h5"), folder / "run.h5"
    command = [sys.executable, "-c", CHILD, str(out), data, str(keep), str(EPOCHS)]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    while result.kills < kills:
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            assert child.stdout.read(1) == b"x", f"after {result.kills} kills the run does not go on"
            time.sleep(rng.random() ** 2 * 0.3)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL, "the run ended before it was killed: more epochs are needed"
        result.kills += 1
        result.stale += len(list(folder.glob(".nicecp-*.tmp")))
        if not os.path.exists(state_path(out)):
            continue
        step = int(load_state(state_path(out))[2].state[0])
        assert step >= result.steps, "an older state came back"
        result.steps, result.resumed = step, result.resumed + 1
        for number in range(1, keep):
            older = folder / f"run.state.{number}.h5"
            if older.exists():
                load_state(older)
                result.older += 1
        if out.exists():
            record: Any = load_run(out)[1]
            assert record.epoch <= EPOCHS
    epochs = load_state(state_path(out))[1].epoch + 1
    _finish(data, out, epochs, folder)
    left = sorted(path.name for path in folder.glob(".*"))
    assert left == [], f"left behind: {left}"
    return result


def _finish(data: str, out: Path, epochs: int, folder: Path) -> None:
    """Both runs to the end of the same epoch, and their models the same."""
    with Run.resume(out, epochs=epochs) as run:
        assert run.execute().finished
    whole = folder / "whole.h5"
    with Run.start(data, whole, **{**SMALL, "preset": "tabular", "epochs": epochs}) as run:
        assert run.execute().finished
    assert model_bytes(out) == model_bytes(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_and_resume(Path(folder), options.kills, options.seed)
    os.write(1, f"seed {options.seed}: {result} in {time.monotonic() - began:.0f} s\n".encode())


if __name__ == "__main__":
    main()

"""A cache folder that cannot be used costs the cache, nothing else; and the cache is used where it can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nicecp

PROGRAM = """
import numpy as np
from nicecp.kernels import _numba_layers as layers
y = np.full((2, 3), -1.0)
layers.bias_relu_forward(y, np.array([0.5, 1.0, 1.5]), True, 0, 3)
assert (y == [[0.0, 0.0, 0.5]] * 2).all()
print(sum(layers.bias_relu_forward.stats.cache_hits.values()))
"""


def cache_hits(folder: Path, root: Path | None = None, **variables: str) -> int:
    path = [str(root)] if root is not None else []
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join([*path, *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return int(done.stdout)


def test_the_second_process_finds_compiled_code(tmp_path: Path) -> None:
    assert cache_hits(tmp_path) == 0
    assert cache_hits(tmp_path) == 1


def test_no_folder_that_can_be_written(tmp_path: Path) -> None:
    """Neither the folder asked for, nor __pycache__ beside the code, nor the user's cache folder."""
    package = tmp_path / "nicecp"
    shutil.copytree(Path(nicecp.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "kernels" / "__pycache__").write_text("a file where a folder should be")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cache_hits(blocked, tmp_path, HOME=str(blocked), XDG_CACHE_HOME=str(blocked)) == 0
    assert cache_hits(blocked, tmp_path, HOME=str(blocked), XDG_CACHE_HOME=str(blocked)) == 0


CHANGED = """
import numpy as np
from nicecp.kernels import _numba_layers as layers
state = np.ones(64)
layers.advance(state)
print(sum(layers.advance.stats.cache_hits.values()), int((state == 2.0).argmax()))
"""


def test_a_change_in_another_file_is_noticed(tmp_path: Path) -> None:
    """Numba looks at the function's own file; numbers and functions that it takes from others are compiled in."""
    package = tmp_path / "nicecp"
    shutil.copytree(Path(nicecp.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def run() -> list[str]:
        words = [sys.executable, "-P", "-c", CHANGED]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert run() == ["0", "2"]
    assert run() == ["1", "2"]
    state = package / "kernels" / "state.py"
    text = state.read_text()
    assert "CURSOR = 2 " in text
    state.write_text(text.replace("CURSOR = 2 ", "CURSOR = 1 "))
    assert run() == ["0", "1"]


def test_a_full_disk_while_saving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    from numba.core import config

    from nicecp.kernels.jit import kernel

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    @kernel
    def twice(x):  # type: ignore[no-untyped-def]
        return 2 * x

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(twice._cache._impl.__class__, "reduce", full)  # what saving calls first
    assert twice(4) == 8

"""The corpus of odd and hostile data files: each is accepted or refused as it says there, soon and in little memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nicecp.data import open_splits
from nicecp.data_spec import DataSpec
from nicecp.errors import DataError
from tests.corpus import compounds, data
from tests.corpus.data import ACCEPTED

CASES = data.CASES | compounds.CASES

SECONDS = 5.0  # of processor time, children's included: what others do at the same time is not the file's fault
HANGS = 60.0  # seconds of a clock
MEGABYTES = 1000


def used() -> float:
    """Seconds of processor time of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 80
    refused = [name for name, (_, words) in CASES.items() if words != ACCEPTED]
    assert len(refused) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_data(tmp_path: Path, name: str) -> None:
    make, words = CASES[name]
    spec = make(tmp_path)
    began, before, message = time.monotonic(), used(), ACCEPTED
    try:
        with open_splits(spec, valid_fraction=0) as splits:
            for split in (splits.train, splits.test):
                if split is not None:
                    first = split.source.read(0, split.source.n_rows)
                    assert np.isfinite(first).all()
                    np.testing.assert_array_equal(first, split.source.read(0, split.source.n_rows))
                    if isinstance(spec, DataSpec):
                        np.testing.assert_array_equal(first, compounds.NUMBERS)
    except DataError as error:
        message = str(error)
    assert used() - before < SECONDS
    assert time.monotonic() - began < HANGS
    assert bool(message) == bool(words), message
    assert re.search("|".join(map(re.escape, words.split("|"))), message), message
    assert message.isprintable()
    assert len(message) < 1000
    assert not message or message.startswith(("'", '"'))
    assert not os.path.exists("/tmp/nicecp-a-pickle-was-loaded")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_data_by_the_command_line(tmp_path: Path, name: str) -> None:
    """In a process of its own, whose time and memory are the system's numbers."""
    make, words = CASES[name]
    spec = make(tmp_path)
    if isinstance(spec, str) and "\0" in spec:
        pytest.skip("no argument of a command holds a zero byte")
    arguments = ["info", spec]
    if isinstance(spec, DataSpec):
        arguments = ["train", "--dry-run", "--data", spec.data, "--columns", spec.columns]
    began = time.monotonic()
    with open(tmp_path / "err", "w+") as err:
        child = subprocess.Popen([sys.executable, "-m", "nicecp", *arguments], stdout=err, stderr=err)
        with contextlib.suppress(ChildProcessError):
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        text = err.read()
    assert usage.ru_utime + usage.ru_stime < SECONDS
    assert time.monotonic() - began < HANGS
    assert usage.ru_maxrss < MEGABYTES * 1024
    assert child.returncode in (0, 2), text
    assert "Traceback" not in text
    if not words:
        assert child.returncode == 0, text

"""The programs in examples/, and the code on docs/embedding.md as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "embedding.md"
# What a section's code imports that is no dependency: the extras `sklearn` and `examples`, or none of ours.
EXTRAS = {
    "emcee": "emcee",
    "zeus": "zeus",
    "dynesty": "dynesty",
    "nautilus": "nautilus",
    "UltraNest": "ultranest",
    "pocoMC": "pocomc",
    "bilby": "bilby",
    "nutpie": "nutpie",
    "vegas": "vegas",
    "scikit-learn": "sklearn",
}
SLOW = EXTRAS.keys() - {"scikit-learn"}  # samplers
EXAMPLES = {
    "emcee_sampling": "emcee",
    "dynesty_prior": "dynesty",
    "importance_sampling": "numpy",
    "grid_search": "sklearn",
    "worker_pools": "numpy",
    "anomaly_scores": "numpy",
}


def sections() -> dict[str, list[str]]:
    """Heading -> the Python blocks below it."""
    found: dict[str, list[str]] = {}
    for heading, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        found[heading] = re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    return found


SECTIONS = sections()
FIRST = "Ten lines to a first fit"
PARAMETERS = [
    pytest.param(heading, marks=[pytest.mark.slow] if heading in SLOW else [])
    for heading, blocks in SECTIONS.items()
    if blocks and heading != FIRST
]


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, PAGE.name, "exec"), names)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's first block defines, in a folder of its own."""
    folder = tmp_path_factory.mktemp("page")
    before = Path.cwd()
    os.chdir(folder)
    try:
        names: dict[str, Any] = {"__name__": "__page__"}
        run(SECTIONS[FIRST][0], names)
    finally:
        os.chdir(before)
    return names | {"folder": folder}


def test_the_first_fit_is_ten_lines_and_a_good_one(fitted: dict[str, Any]) -> None:
    lines = [line for line in SECTIONS[FIRST][0].splitlines() if line and not line.startswith(("import", "print"))]
    assert len(lines) <= 10
    # The rows' own density: x1 is bent by the square of x0, which changes no volume.
    expected = -1.5 * np.log(2 * np.pi * np.e) - np.log(0.5 * 10.0)
    assert -0.15 < fitted["record"].best_valid_log_likelihood - expected < 0.1
    assert fitted["samples"].shape == (1000, 3)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("heading", PARAMETERS)
def test_code_on_the_page(heading: str, fitted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if heading in EXTRAS:
        pytest.importorskip(EXTRAS[heading])
    if heading == "MPI":
        one_rank(monkeypatch)
    monkeypatch.chdir(fitted["folder"])
    names = dict(fitted)
    for code in SECTIONS[heading]:
        run(code, names)
    check(heading, names)


def check(heading: str, names: dict[str, Any]) -> None:
    """What a section promises, where its own code does not say it."""
    flow, x = names["flow"], names["x"]
    if heading == "What every client can rely on":
        assert np.isnan(flow.log_prob(np.full(3, np.nan)))
        assert flow.log_prob([np.inf, 5.0, -40.0]) == -np.inf
        assert flow.log_prob([np.inf, 5.0, -40.0], floor=-1e300) == -1e300
        np.testing.assert_allclose(names["back"], x[:5], rtol=1e-9)
        np.testing.assert_allclose(names["log_q"], flow.log_prob(names["points"]), rtol=1e-9)
    elif heading == "Weighted rows, and densities given something else":
        assert names["weighted"].sample(20_000, 0)[:, 2].std() == pytest.approx(10 / np.sqrt(2), rel=0.1)
        expected = -np.log(2 * np.pi * np.e) - np.log(0.5 * 10.0)
        mean = names["conditional"].log_prob(x[:, 1:], context=x[:, :1]).mean()
        assert -0.25 < mean - expected < 0.1
    elif heading == "emcee":
        assert names["chain"].shape == (32 * 200, 3)
        assert 0.1 < names["sampler"].acceptance_fraction.mean() < 1
    elif heading == "dynesty":
        # The flow's share of the likelihood, by its own samples.
        direct = np.log(np.mean(np.exp(-0.5 * ((flow.sample(200_000, 0)[:, 1] - 6.0) / 0.5) ** 2)))
        results = names["sampler"].results
        assert abs(results.logz[-1] - direct) < 4 * results.logzerr[-1]
    elif heading in ("nautilus", "UltraNest", "pocoMC"):
        direct = np.log(np.mean(np.exp(-0.5 * ((flow.sample(200_000, 0)[:, 1] - 6.0) / 0.5) ** 2)))
        if heading == "nautilus":
            found = names["sampler"].log_z
        else:
            found = names["log_z"] if heading == "pocoMC" else names["result"]["logz"]
        assert abs(found - direct) < 0.4
    elif heading == "bilby":
        drawn, order = names["drawn"], list(flow.names)
        points = np.stack([drawn[name] for name in order], axis=1)
        np.testing.assert_allclose(names["log_prior"], flow.log_prob(points), rtol=1e-9)
        half = names["priors"].rescale(order, [0.5] * 3)
        last = np.concatenate([np.ravel(part) for part in half])  # all come with the last one
        np.testing.assert_allclose(last, flow.prior_transform([0.5] * 3), rtol=1e-9)
    elif heading == "nutpie":
        chain = np.asarray(names["trace"].posterior["x"]).reshape(-1, 3)
        rows = flow.sample(100_000, 0)
        np.testing.assert_allclose(chain.mean(axis=0), rows.mean(axis=0), atol=0.3 * rows.std(axis=0).max())
        np.testing.assert_allclose(chain.std(axis=0), rows.std(axis=0), rtol=0.3)
    elif heading == "vegas":
        expected = (2 * np.pi) ** 1.5 * 0.5 * 10.0
        assert abs(names["integral"].mean - expected) < max(5 * names["integral"].sdev, 0.02 * expected)
    elif heading == "SciPy":
        assert names["mode"].fun <= -flow.log_prob(x).max() + 0.5
    elif heading == "Numba":
        chain = names["chain"]
        assert 0.05 < (np.diff(chain, axis=0) != 0).any(axis=1).mean() < 0.95
        assert abs(names["log_prob"](x[0]) - flow.log_prob(x[0])) < 1e-9
    elif heading in ("MPI", "multiprocessing"):
        np.testing.assert_allclose(names["scores"], flow.log_prob(x), rtol=1e-9)
    elif heading == "scikit-learn":
        assert names["best"].score(x) > -6.5
    elif heading == "Files of any size":
        assert names["scored"].mean == pytest.approx(flow.log_prob(x).mean(), rel=1e-12)
    else:
        assert heading in ("zeus", "C, C++, Fortran and SciPy's integrators"), "say what it promises"


def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpi4py as it is on a single rank, for machines without MPI."""
    comm = types.SimpleNamespace(size=1, rank=0, gather=lambda value, root: [value], bcast=lambda value, root: value)
    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(COMM_WORLD=comm)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", module)


def test_every_section_with_an_extra_is_there() -> None:
    assert EXTRAS.keys() | SLOW <= SECTIONS.keys()
    assert len(PARAMETERS) >= 13


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    """Each checks itself; a failed assertion or a minute ends it."""
    pytest.importorskip(EXAMPLES[name])
    script = ROOT / "examples" / f"{name}.py"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 1


def test_every_example_is_run() -> None:
    """.ci/run runs vae_digits and custom_coupling with few epochs, and c_metropolis; banana is what others import."""
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts - {"vae_digits", "custom_coupling", "c_metropolis", "banana"} == EXAMPLES.keys()

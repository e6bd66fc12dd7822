"""Held-out log-likelihood of the preset for tables beside scikit-learn's densities.

    python benchmarks/tabular.py --data FOLDER [--tables magic,cms_zmumu] [--models nicecp,gmm,kde,zuko] [--seed 0]
    python benchmarks/tabular.py --data FOLDER --rows 100,1000 --models nicecp,gmm

FOLDER holds TABLE.h5 with the datasets ``train`` and ``test`` (float columns). The test rows are those of the file; of
the training rows a sixth, drawn by the seed as nicecp draws it, validates: it chooses the epoch that nicecp keeps, the
mixture's number of components and the kernel's width. All see the same rows; nicecp computes in float32. Densities are
of the values as they stand in the file: nothing is dequantized, and every number is in nats per row, in original units.
affine is nicecp with couplings that scale and shift, additive the preset tabular, standardize nicecp without column
transforms. --rows takes so many training rows (of which a sixth validates), drawn by the seed.

gmm: GaussianMixture with full covariances of standardised columns, components of 1 to 64, two starts each. kde:
KernelDensity, Gaussian, standardised. zuko (where it is installed): a neural spline flow on standardised columns.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np

from benchmarks.records import Records
from nicecp.data import open_splits
from nicecp.flow import NICE
from nicecp.run import Run

TABLES = ("magic", "cms_zmumu", "sdss_dr14", "protein_casp")
COMPONENTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
WIDTHS = np.geomspace(0.05, 1.0, 9)
TITLES = {
    "nicecp": "nicecp, tabular-spline", "affine": "nicecp, tabular-spline --coupling affine",
    "additive": "nicecp, tabular", "standardize": "nicecp, tabular-spline --transform none",
    "gmm": "scikit-learn GaussianMixture", "kde": "scikit-learn KernelDensity", "zuko": "zuko, neural spline flow",
}  # fmt: skip
Rows = np.ndarray


def summary(values: Rows) -> str:
    """Mean, standard error, mean without the lowest and highest hundredth, minimum."""
    ordered, cut = np.sort(values), len(values) // 100
    trimmed = ordered[cut : len(ordered) - cut].mean()
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():9.3f} +- {error:5.3f}  {trimmed:9.3f}  {ordered[0]:9.1f}"


def nicecp(
    path: str,
    train: Rows,
    valid: Rows,
    test: Rows,
    seed: int,
    preset: str = "tabular-spline",
    epochs: int | None = None,
    **choices: Any,
) -> tuple[Rows, str]:
    choices |= {} if epochs is None else {"epochs": epochs}
    with Run.start(path, None, preset=preset, dtype="float32", **choices, seed=seed, threads=1) as run:
        outcome = run.execute()
        flow: NICE = run.flow
        note = f"{len(outcome.record.history)} epochs, best {outcome.record.best_epoch}"
        return np.asarray(flow.log_prob(test)), f"{note}, validation {outcome.record.best_valid_log_likelihood:.3f}"


def gmm(path: str, train: Rows, valid: Rows, test: Rows, seed: int) -> tuple[Rows, str]:
    from sklearn.mixture import GaussianMixture

    mean, std = train.mean(axis=0), train.std(axis=0)
    best, score, count = None, -np.inf, 0
    for components in COMPONENTS:
        model = GaussianMixture(components, n_init=2, random_state=seed, reg_covar=1e-6).fit((train - mean) / std)
        found = float(model.score((valid - mean) / std))
        if found > score:
            best, score, count = model, found, components
    assert best is not None
    return best.score_samples((test - mean) / std) - np.log(std).sum(), f"{count} components"


def kde(path: str, train: Rows, valid: Rows, test: Rows, seed: int) -> tuple[Rows, str]:
    from sklearn.neighbors import KernelDensity

    mean, std = train.mean(axis=0), train.std(axis=0)
    few = ((valid - mean) / std)[:1000]  # a width needs no more
    models = [KernelDensity(bandwidth=width).fit((train - mean) / std) for width in WIDTHS]
    best = max(models, key=lambda model: model.score(few))
    return best.score_samples((test - mean) / std) - np.log(std).sum(), f"width {best.bandwidth:.3g}"


def zuko(path: str, train: Rows, valid: Rows, test: Rows, seed: int) -> tuple[Rows, str]:
    import torch
    from zuko.flows import NSF

    torch.manual_seed(seed)
    mean, std = train.mean(axis=0), train.std(axis=0)
    z, v, t = (torch.tensor((x - mean) / std, dtype=torch.float32) for x in (train, valid, test))
    flow = NSF(z.shape[1], transforms=5, hidden_features=(128, 128))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    best, score, stale, kept = -1, -np.inf, 0, flow.state_dict()
    for epoch in range(200):
        for rows in torch.randperm(len(z)).split(256):
            optimizer.zero_grad()
            (-flow().log_prob(z[rows]).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(flow().log_prob(v).mean())
        stale += 1
        if found > score:
            best, score, stale, kept = epoch, found, 0, {k: p.clone() for k, p in flow.state_dict().items()}
        if stale >= 15:
            break
    flow.load_state_dict(kept)
    with torch.no_grad():
        values = torch.cat([flow().log_prob(rows) for rows in t.split(500)])
    return values.double().numpy() - np.log(std).sum(), f"best epoch {best + 1}"


def taken(path: str, rows: int, seed: int, folder: str) -> str:
    """A file of the same table with so many of the training rows, drawn by the seed, and all test rows."""
    few = str(Path(folder) / f"{Path(path).stem}-{rows}.h5")
    with h5py.File(path) as file, h5py.File(few, "w") as out:
        kept = np.random.default_rng(seed).permutation(len(file["train"]))[:rows]
        out["train"], out["test"] = file["train"][()][kept], file["test"][()]
    return few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the tables")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--models", default="nicecp,affine,additive,gmm,kde", help="also standardize, zuko")
    parser.add_argument("--rows", default="0", help="training rows to take, such as 100,1000; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of every model")
    parser.add_argument("--epochs", type=int, help="of nicecp (default: the preset's)")
    parser.add_argument("--json", type=Path, help="write all numbers here, as JSON lines")
    given = parser.parse_args()
    records = Records(given.json, "tabular")
    models: dict[str, Callable[..., tuple[Rows, str]]] = {
        "nicecp": partial(nicecp, epochs=given.epochs),
        "affine": partial(nicecp, coupling=("affine",), epochs=given.epochs),
        "additive": partial(nicecp, preset="tabular", epochs=given.epochs),
        "standardize": partial(nicecp, transform="none", epochs=given.epochs),
        "gmm": gmm,
        "kde": kde,
        "zuko": zuko,
    }
    warnings.simplefilter("ignore")
    held = tempfile.TemporaryDirectory()
    for table, rows in itertools.product(given.tables.split(","), map(int, given.rows.split(","))):
        path = str(Path(given.data) / f"{table}.h5")
        path = taken(path, rows, given.seed, held.name) if rows else path
        with open_splits(path, seed=given.seed) as splits:
            if splits.valid is None or splits.test is None:
                raise SystemExit(f"{path!r} needs rows to validate and to test on")
            parts = [np.asarray(part.load()[0], np.float64) for part in (splits.train, splits.valid, splits.test)]
        group = f"{table}: {len(parts[0]):,} training rows, {parts[0].shape[1]} columns, seed {given.seed}"
        sizes = ", ".join(str(len(part)) for part in parts)
        print(f"{table}: {sizes} rows train, validate, test; {parts[0].shape[1]} columns")
        print(f"{'':12}  {'mean':>9}    {'error':>5}  {'trimmed':>9}  {'minimum':>9}  seconds")
        for name in given.models.split(","):
            began = time.perf_counter()
            needs = {"gmm": "sklearn", "kde": "sklearn", "zuko": "zuko"}.get(name)
            if needs is not None and importlib.util.find_spec(needs) is None:
                records.absent(group, TITLES[name])
                continue
            values, note = models[name](path, *parts, given.seed)
            seconds = time.perf_counter() - began
            print(f"{name:12}  {summary(values)}  {seconds:7.0f}  {note}", flush=True)
            records.values(group, TITLES[name], "test log-likelihood, nats per row", [float(values.mean())])
            error = float(values.std(ddof=1) / np.sqrt(len(values)))
            records.values(group, TITLES[name], "standard error", [error])
            records.values(group, TITLES[name], "s to fit and score", [seconds])
    held.cleanup()


if __name__ == "__main__":
    main()

"""What follows from the size of a table: how strongly a flow of few rows is held back, and in what batches it learns.

The numbers were found on tables of 8 to 60 columns and 40 to 40,000 training rows: docs/results.md, "Presets by size".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nicecp.beside import effective_rows
from nicecp.preset_table import Preset
from nicecp.split import Split

DECAY_ROWS, DECAY_COLUMNS = 250.0, 8  # weight decay times training rows, for each of so many columns or more
MOST_DECAY = 20.0
BATCHES = ((5_000, 32), (20_000, 64), (60_000, 128))  # up to so many training rows
LARGE_BATCH = 256
MOST_VISITS = 50_000_000  # of numbers in all epochs: beyond, fewer epochs do
LEAST_EPOCHS = 20
LEAST_REGULARIZATION = 1e-3
FEWEST_WHITENED, MOST_WHITENED = 16, 2_000  # columns: of fewer, a flow learns the covariance; of more, it takes long
ROWS_WHITENED = 1_000  # at most, for each column


@dataclass(frozen=True)
class TableSize:
    """rows: to train on; effective: of rows with weights Kish's effective number (nicecp.beside), else ``rows``."""

    rows: int
    columns: int
    effective: float

    @classmethod
    def of(cls, train: Split) -> TableSize:
        weights = train.weights
        return cls(
            len(train), train.source.n_features, float(len(train)) if weights is None else effective_rows(weights)
        )


def sized(preset: Preset, size: TableSize) -> Preset:
    """The preset for a table of a size; one that is not ``by_size`` is as it was."""
    if not preset.by_size:
        return preset
    rows, columns, effective = max(1, size.rows), size.columns, max(1.0, size.effective)
    whitened = FEWEST_WHITENED <= columns <= MOST_WHITENED and effective <= ROWS_WHITENED * columns
    return replace(
        preset,
        batch_size=next((batch for most, batch in BATCHES if rows <= most), LARGE_BATCH),
        epochs=max(LEAST_EPOCHS, min(preset.epochs, MOST_VISITS // (rows * columns))),
        weight_decay=min(MOST_DECAY, max(preset.weight_decay, DECAY_ROWS * max(DECAY_COLUMNS, columns) / effective)),
        whiten="gaussian" if whitened else preset.whiten,
        regularization=shrinkage(effective, columns) if whitened else preset.regularization,
    )


def shrinkage(rows: float, columns: int) -> float:
    """What is added to the variances of standardised columns before they are whitened: (columns / rows)^2, or more.

    Few rows say little about many directions, and nothing about some: a row that goes there would be infinitely
    unlikely.
    """
    return max(LEAST_REGULARIZATION, (columns / max(1.0, rows)) ** 2)

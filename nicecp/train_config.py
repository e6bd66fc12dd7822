"""How a training loop runs: its lengths, its optimiser, and what it keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass

from nicecp.averaging import NONE, average_kind
from nicecp.decay import check_decay
from nicecp.evaluate import READ_ROWS
from nicecp.network import ACTIVATIONS
from nicecp.optimizers import AdaM, Optimizer
from nicecp.spec import whole_number
from nicecp.split import SHUFFLE_WINDOW


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train. patience: epochs without a better validation log-likelihood before stopping.

    device_memory_limit: bytes of a GPU's memory that training data may take; more of them stream (nicecp.feed).
    activations: what is kept for the backward pass, see nicecp.network.ACTIVATIONS. schedule, weight_decay: of the
    learning rate and of the networks' weights, see nicecp.decay. weight_average: of parameters over epochs, see
    nicecp.averaging. window, read_rows: rows shuffled together, and validation rows read at a time; what has more is
    not kept in memory.
    """

    epochs: int = 100
    batch_size: int = 200
    optimizer: Optimizer = AdaM()  # noqa: RUF009 (frozen, so sharing it is safe)
    patience: int | None = None
    seed: int = 0
    window: int = SHUFFLE_WINDOW
    activations: str = "store"
    device_memory_limit: int | None = None
    schedule: str = "constant"
    weight_decay: float = 0.0
    weight_average: str = NONE
    read_rows: int = READ_ROWS

    def __post_init__(self) -> None:
        check_decay(self.schedule, self.weight_decay)
        average_kind(self.weight_average)
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")
        for name in ("epochs", "batch_size", "window", "read_rows", "seed"):
            whole_number(getattr(self, name), name)
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(f"optimizer must be an AdaM or RMSProp object, got {self.optimizer!r}")
        if self.patience is not None:
            whole_number(self.patience, "patience")
        for name in ("epochs", "batch_size", "window", "read_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {self.seed}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")

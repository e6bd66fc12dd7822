"""Where a training step's time goes: each kind of its calls on the tape replayed on its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from nicecp.errors import DeviceError
from nicecp.kernels.backend import Slot
from nicecp.kernels.numba_backend import NumbaBackend
from nicecp.kernels.tape import Field, Op, Tape
from nicecp.train import Trainer

PARTS: dict[str, tuple[int, ...]] = {  # part of the step -> its calls on the tape
    "loading": (Op.LOAD_BYTES, Op.LOAD_FLOATS, Op.SPLIT, Op.JOIN, Op.GATHER, Op.COPY_COLUMNS, Op.LOGIT_FORWARD),
    "products, forward": (Op.DENSE_FORWARD, Op.MATMUL),
    "products, backward": (Op.DENSE_BACKWARD,),
    "masks and bias gradients": (Op.BIAS_RELU_BACKWARD,),
    "couplings": (
        *(Op.COUPLE, Op.FACTOR_FORWARD, Op.FACTOR_BACKWARD, Op.SPLINE_FORWARD, Op.SPLINE_BACKWARD),
        *(Op.ACCUMULATE, Op.SCALE_INVERSE, Op.PERMUTE),
    ),
    "prior and loss": (Op.SCALE_PRIOR_FORWARD, Op.SCALE_PRIOR_BACKWARD, Op.LOSS),
    "update": (Op.UPDATE, Op.ADVANCE),
    "barriers": (),
}
ALL = "the whole step"
_PRODUCTS = (Op.DENSE_FORWARD, Op.MATMUL, Op.DENSE_BACKWARD)


@dataclass(frozen=True)
class Part:
    """calls: on the tape; seconds: of all of them in a step; flops: of their products, 2 for each multiplication;
    bytes: that an update reads and writes."""

    name: str
    calls: int
    seconds: float
    flops: int
    bytes: int


def profile_step(trainer: Trainer, seconds: float = 1.0) -> list[Part]:
    """The parts of a step, longest first, and the whole of it last; about ``seconds`` for each.

    Several threads do different parts side by side, so that the parts add up to more than the whole. The trainer's flow
    changes: this is for a run that is not going to be trained.

    Raises DeviceError where steps are not recorded on a tape (on GPUs).
    """
    backend = trainer.backend
    if not isinstance(backend, NumbaBackend):
        raise DeviceError(f"a step on {backend.device} cannot be taken apart here: use --device cpu, or Nsight Systems")
    found, everything = [], tuple(code for codes in PARTS.values() for code in codes)
    with backend.computing(), np.errstate(over="ignore", invalid="ignore"):
        trainer.step()
        trainer.reader.close()  # its buffers stay
        trainer.state[Slot.CURSOR] = 0.0
        whole = backend.write_down(trainer._step)
        for name, codes in [*PARTS.items(), (ALL, everything)]:
            rows = [row for row in whole.rows if row[Field.OP] in codes]
            count = len(rows) if name != "barriers" else sum(row[Field.OP] == Op.BARRIER for row in whole.rows)
            if count == 0:
                continue
            kept = [row for row in whole.rows if row[Field.OP] in (Op.BARRIER, *codes)]
            run = backend.player(Tape(kept, whole.arrays, whole.work, whole.dtype))
            taken: list[float] = []
            until = time.perf_counter() + seconds
            while len(taken) < 4 or (time.perf_counter() < until and len(taken) < 1000):
                trainer.state[Slot.CURSOR] = trainer.state[Slot.SKIP] = 0.0
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
            found.append(Part(name, count, median(taken[1:]), sum(map(_flops, rows)), _bytes(trainer, rows)))
    return [*sorted(found[:-1], key=lambda part: -part.seconds), found[-1]]


def _flops(row: list[int]) -> int:
    """Of a product's call."""
    if row[Field.OP] not in _PRODUCTS:
        return 0
    n, i, o = row[Field.NUMBERS : Field.NUMBERS + 3]
    products = sum(address != 0 for address in row[Field.ARRAYS : Field.ARRAYS + 2])  # dx and dw
    return 2 * n * i * o * (products if row[Field.OP] == Op.DENSE_BACKWARD else 1)


def _bytes(trainer: Trainer, rows: list[list[int]]) -> int:
    """Of updates: four arrays are read and three written."""
    item = trainer.flow.dtype.itemsize
    return sum(7 * item * row[Field.EXTENT] for row in rows if row[Field.OP] == Op.UPDATE)

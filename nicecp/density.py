"""What scientific code expects of a density, on top of a flow's own methods: SciPy's names, a prior's, files.

log_prob, sample and inverse are the flow's (nicecp.flow); here stands what follows from them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.borders import as_rows
from nicecp.context import Context
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Array, Backend
from nicecp.native import CFunction, Snapshot
from nicecp.preprocessing import Dequantize, MarginLogit, Standardize, Step
from nicecp.records import DataInfo, Parameters
from nicecp.schema import SECTIONS, Reader, model_tree, read_context, read_model
from nicecp.spec import ModelSpec, whole_number
from nicecp.store import read_tree, write_tree
from nicecp.transforms import ColumnStep

FloatArray = NDArray[np.float64]

_SMALLEST, _LARGEST = np.finfo(np.float64).tiny, 1.0 - 2.0**-53  # of a probability, so that its quantile is finite


class Density(ABC):
    """A flow under the names that samplers, SciPy and nested-sampling priors use."""

    spec: ModelSpec
    preprocessing: tuple[Step, ...]
    info: DataInfo
    context: Context | None
    backend: Backend
    flat: Array

    @classmethod
    @abstractmethod
    def from_spec(
        cls,
        spec: ModelSpec,
        parameters: Parameters | None = None,
        preprocessing: Sequence[Step] = (),
        info: DataInfo | None = None,
        seed: int = 0,
        *,
        context: Context | None = None,
        init: str = "paper",
        backend: Backend | None = None,
    ) -> Self: ...
    @abstractmethod
    def parameters(self) -> Parameters: ...
    @abstractmethod
    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None) -> Any: ...
    @abstractmethod
    def inverse(self, h: ArrayLike, context: ArrayLike | None = None) -> tuple[FloatArray, Any]: ...
    @abstractmethod
    def sample(self, n: int, rng: int | np.random.Generator | None = None, context: ArrayLike | None = None) -> Any: ...

    def __repr__(self) -> str:
        hidden = "-".join(str(size) for size in self.spec.couplings[0].hidden)
        given = "" if self.context is None else f" given {self.context.describe()}"
        return (
            f"NICE({self.n_features} features{given}, {len(self.spec.couplings)} {self.spec.couplings[0].law} "
            f"couplings of {hidden or 'no hidden layer'}, {self.spec.prior} prior, {self.spec.dtype})"
        )

    # --- what it is -------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        return self.spec.n_features

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of parameters and computation."""
        return np.dtype(self.spec.dtype)

    @property
    def n_parameters(self) -> int:
        return self.spec.n_parameters

    @property
    def dim(self) -> int:
        """d, the number of features."""
        return self.spec.n_features

    @property
    def n_context(self) -> int:
        """k, the length of the context that the density is conditioned on; 0 without one."""
        return self.spec.n_context

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, as in the data that the flow was trained on; else x0, x1, ..."""
        return self.info.columns or tuple(f"x{number}" for number in range(self.dim))

    @property
    def bounds(self) -> FloatArray:
        """(d, 2): the lower and the upper end of each column's support, infinite where there is none.

        Dequantized values count as unbounded: the flow has a density, small as it is, beyond their range.
        """
        ends = unbounded = np.tile([[-np.inf], [np.inf]], (1, self.dim))
        for step in reversed(self.preprocessing):
            column_by_column = isinstance(step, (ColumnStep, Standardize, Dequantize, MarginLogit))
            ends = step.inverse(ends) if column_by_column else unbounded
        return np.ascontiguousarray(ends.T)

    # --- as a distribution ------------------------------------------------------------------------

    def logpdf(self, x: ArrayLike, context: ArrayLike | None = None) -> Any:
        """log_prob under SciPy's name."""
        return self.log_prob(x, context)

    def rvs(
        self, size: int | tuple[int, ...] | None = 1, random_state: Any = None, context: ArrayLike | None = None
    ) -> FloatArray:
        """Samples under SciPy's name: size n -> (n, d), a tuple -> (*size, d), None -> (d,).

        random_state : an int, a Generator or a RandomState. None is NumPy's global one, as in SciPy, so that
        ``numpy.random.seed`` reaches it; ``sample`` does not look at that. context : (k,), for all of them.
        """
        shape = () if size is None else tuple(size) if isinstance(size, tuple) else (whole_number(size, "size"),)
        if any(length < 0 for length in shape):
            raise ValueError(f"size must be at least 0, got {size}")
        if random_state is None:
            random_state = np.random.mtrand._rand
        if isinstance(random_state, np.random.RandomState):
            random_state = int(random_state.randint(0, 2**64, dtype=np.uint64))
        drawn: FloatArray = self.sample(int(np.prod(shape, dtype=np.int64)), random_state, context)
        return drawn.reshape(*shape, self.dim)

    def prior_transform(self, u: ArrayLike, context: ArrayLike | None = None) -> FloatArray:
        """The unit cube to data space, u : (..., d) in [0, 1] -> x : (..., d): uniform u become samples, exactly.

        x = f^-1(F^-1(u)) with the quantiles F^-1 of the flow's prior, for nested samplers. The ends 0 and 1 are taken
        as the numbers next to them.

        Raises ValueError for a u outside [0, 1] and for NaN.
        """
        rows, shape = as_rows(u, self.dim)
        if not ((rows >= 0.0) & (rows <= 1.0)).all():
            raise ValueError("prior_transform needs numbers in [0, 1]")
        level = np.clip(np.asarray(rows, np.float64), _SMALLEST, _LARGEST)
        if self.spec.prior == "logistic":
            h = np.log(level) - np.log1p(-level)
        else:
            from scipy.special import ndtri

            h = ndtri(level)
        return self.inverse(h.reshape(*shape, self.dim), context)[0]

    # --- for compiled code ------------------------------------------------------------------------

    def njit_log_prob(self, floor: float | None = None) -> Any:
        """log_prob as a Numba function of one point, x : (d,) float64 -> float, for Python and your own ``@njit`` code.

        A flow with a context takes it second. The function has its own copy of the weights: later training does not
        reach it. It releases the GIL, may be pickled, and raises as log_prob does; floor is that of log_prob. Functions
        that call it are not kept in Numba's cache on disk, since they hold an address of this process.

        Raises ValueError for a step of preprocessing that has no compiled form.
        """
        from nicecp.kernels._numba_call import point_function

        return point_function(self._snapshot(), -np.inf if floor is None else float(floor))

    def cfunc(self, floor: float | None = None, *, exponentiate: bool = False) -> CFunction:
        """log_prob of one point as a C function, see nicecp.native.CFunction: ``.address``, ``.low_level_callable()``.

        exponentiate : the density itself instead of its logarithm, which is what one integrates.

        Raises ValueError for a step of preprocessing that has no compiled form.
        """
        return CFunction(self._snapshot(), -np.inf if floor is None else float(floor), exponentiate)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.spec, self.backend.copy_out(self.flat), self.preprocessing, self.context)

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the flow as a version 1 checkpoint (docs/checkpoint.md), whole or not at all.

        Raises OutputError if the path exists (unless overwrite) or cannot be written.
        """
        tree = model_tree(self.spec, self.parameters(), self.preprocessing, self.info, self.context)
        write_tree(path, tree, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> Self:
        """The flow in a checkpoint, of ``save`` or of a run.  See nicecp.load, which also checks a run's record.

        Raises CheckpointError, in one line with the file's name, for a model that is not exactly as written.
        """
        reader = Reader(read_tree(path), path)
        spec, parameters, preprocessing, info = read_model(reader)
        context = read_context(reader, spec.n_context)
        reader.finish(SECTIONS)
        backend = get_backend(device, threads)
        return cls.from_spec(spec, parameters, preprocessing, info, context=context, backend=backend)

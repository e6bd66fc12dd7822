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
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Backend
from nicecp.preprocessing import Step
from nicecp.records import DataInfo, Parameters
from nicecp.schema import SECTIONS, Reader, model_tree, read_model
from nicecp.spec import ModelSpec, whole_number
from nicecp.store import read_tree, write_tree

FloatArray = NDArray[np.float64]

_SMALLEST, _LARGEST = np.finfo(np.float64).tiny, 1.0 - 2.0**-53  # of a probability, so that its quantile is finite


class Density(ABC):
    """A flow under the names that samplers, SciPy and nested-sampling priors use."""

    spec: ModelSpec
    preprocessing: tuple[Step, ...]
    info: DataInfo

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
        init: str = "paper",
        backend: Backend | None = None,
    ) -> Self: ...
    @abstractmethod
    def parameters(self) -> Parameters: ...
    @abstractmethod
    def log_prob(self, x: ArrayLike, context: None = None) -> Any: ...
    @abstractmethod
    def inverse(self, h: ArrayLike) -> tuple[FloatArray, Any]: ...
    @abstractmethod
    def sample(self, n: int, rng: int | np.random.Generator | None = None, context: None = None) -> Any: ...

    # --- what it is -------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        return self.spec.n_features

    @property
    def dim(self) -> int:
        """d, the number of features."""
        return self.spec.n_features

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, as in the data that the flow was trained on; else x0, x1, ..."""
        return self.info.columns or tuple(f"x{number}" for number in range(self.dim))

    @property
    def bounds(self) -> FloatArray:
        """(d, 2): the lower and the upper end of each column's support, infinite where there is none.

        Dequantized values count as unbounded: the flow has a density, small as it is, beyond their range.
        """
        return np.tile([-np.inf, np.inf], (self.dim, 1))

    # --- as a distribution ------------------------------------------------------------------------

    def logpdf(self, x: ArrayLike) -> Any:
        """log_prob under SciPy's name."""
        return self.log_prob(x)

    def rvs(self, size: int | tuple[int, ...] | None = 1, random_state: Any = None) -> FloatArray:
        """Samples under SciPy's name: size n -> (n, d), a tuple -> (*size, d), None -> (d,).

        random_state : an int, a Generator or a RandomState. None is NumPy's global one, as in SciPy, so that
        ``numpy.random.seed`` reaches it; ``sample`` does not look at that.
        """
        shape = () if size is None else tuple(size) if isinstance(size, tuple) else (whole_number(size, "size"),)
        if any(length < 0 for length in shape):
            raise ValueError(f"size must be at least 0, got {size}")
        if random_state is None:
            random_state = np.random.mtrand._rand
        if isinstance(random_state, np.random.RandomState):
            random_state = int(random_state.randint(0, 2**64, dtype=np.uint64))
        drawn: FloatArray = self.sample(int(np.prod(shape, dtype=np.int64)), random_state)
        return drawn.reshape(*shape, self.dim)

    def prior_transform(self, u: ArrayLike) -> FloatArray:
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
        return self.inverse(h.reshape(*shape, self.dim))[0]

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the flow as a version 1 checkpoint (docs/checkpoint.md), whole or not at all.

        Raises OutputError if the path exists (unless overwrite) or cannot be written.
        """
        write_tree(path, model_tree(self.spec, self.parameters(), self.preprocessing, self.info), overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> Self:
        """The flow in a checkpoint, of ``save`` or of a run.  See nicecp.load, which also checks a run's record.

        Raises CheckpointError, in one line with the file's name, for a model that is not exactly as written.
        """
        reader = Reader(read_tree(path), path)
        spec, parameters, preprocessing, info = read_model(reader)
        reader.finish(SECTIONS)
        return cls.from_spec(spec, parameters, preprocessing, info, backend=get_backend(device, threads))

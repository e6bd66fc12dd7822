"""Context and weights of a data set's rows on the device, for batches of any pass over it; and what they are fitted to.

They are kept whole, whatever part of the data is in memory: a batch takes its own by the numbers of its rows.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import effective_rows
from nicecp.context import Context, seen
from nicecp.errors import DataError, about_file
from nicecp.flow import NICE
from nicecp.kernels.backend import Array
from nicecp.network import Workspace
from nicecp.records import Event
from nicecp.sources import Source
from nicecp.split import Split

logger = logging.getLogger("nicecp")

FEW = 0.1  # effective rows for each parameter below which there is a warning


class Extras:
    """The context, as the flow's networks see it, and the weights of a source's rows."""

    def __init__(self, flow: NICE, source: Source) -> None:
        self._backend = backend = flow.backend
        context = seen(source.context, flow.context, flow.dtype)
        self._context: Array | None = None if context is None else backend.asarray(context)
        self._weight: Array | None = None if source.weight is None else backend.asarray(source.weight)

    def load(self, ws: Workspace, rows: Array, state: Array) -> None:
        """ws.context and ws.weight of the batch at the state's cursor, after load_batch; rows as of that.

        Rows whose number is negative, padding, keep the weight 0.
        """
        if self._context is not None:
            self._backend.gather(ws.context, self._context, rows, state)
        if self._weight is not None:
            self._backend.gather(ws.weight, self._weight, rows, state)


def fit_context(train: Split) -> Context | None:
    """The scale of the training rows' context: mean and standard deviation of each column, by their weights.

    A column that is constant is not scaled: the flow learns nothing from it. None for data without a context.
    """
    source = train.source
    if source.context is None:
        return None
    rows, weight = source.context[train.rows()], train.weights
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.average(rows, axis=0, weights=weight)
        std = np.sqrt(np.average(np.square(rows - mean), axis=0, weights=weight))
    same = rows.min(axis=0) == rows.max(axis=0)
    mean, std = np.where(same, rows[0], mean), np.where(same | (std == 0), 1.0, std)
    bad = ~(np.isfinite(mean) & np.isfinite(std))
    if bad.any():
        column = int(np.argmax(bad))
        label = str(column) if source.context_names is None else repr(source.context_names[column])
        problem = f"column {label} of its context spans more than float64 can hold"
        raise DataError(about_file(source.name, problem, "rescale this column"))
    return Context(mean, std, source.context_names)


def check_context(flow: NICE, source: Source) -> None:
    """DataError unless the source's rows have the context that the flow is conditioned on."""
    known, context = flow.context, source.context
    if known is None and context is None:
        return
    if known is None:
        problem = "its rows have a context, but the flow has none"
        raise DataError(about_file(source.name, problem, "leave --context out, or train a flow with it"))
    if context is None:
        problem = f"its rows have no context, but the flow is conditioned on {known.describe()}"
        raise DataError(about_file(source.name, problem, "say where it is (--context, context=)"))
    if context.shape[1] != len(known):
        problem = f"its context has {context.shape[1]} columns, but the flow is conditioned on {known.describe()}"
        raise DataError(about_file(source.name, problem, "give the context that the flow was trained with"))
    if None not in (known.names, source.context_names) and known.names != source.context_names:
        names = ", ".join(source.context_names or ())
        problem = f"its context is {names}, but the flow is conditioned on {known.describe()}"
        raise DataError(about_file(source.name, problem, "give the same columns in the same order"))


def weights_noted(train: Split, n_parameters: int) -> list[Event]:
    """A warning, and the same as an event, where weighted rows are worth few beside the flow's parameters."""
    weights = train.weights
    if weights is None:
        return []
    effective = effective_rows(weights)
    if effective >= FEW * n_parameters:
        return []
    message = (
        f"{train.source.name!r}: the weights make the {len(train):,} training rows worth {effective:,.0f} "
        f"(Kish's effective sample size), few beside {n_parameters:,} parameters: the flow may learn single rows by "
        f"heart; a smaller flow (--hidden, --couplings) or more even weights help"
    )
    logger.warning("%s", message)
    return [Event(0, 0, "weights", message)]


def weights_line(split: Split) -> str:
    """What the weights make of a split's rows, in words; empty without weights."""
    weights: NDArray[np.float64] | None = split.weights
    if weights is None:
        return ""
    return f"weights with an effective sample size (Kish) of {effective_rows(weights):,.1f}"

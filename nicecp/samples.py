"""Samples of a flow as files: HDF5 with the numbers, or a PNG picture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import read_context
from nicecp.checkpoint import load
from nicecp.context import context_of, rows_for
from nicecp.errors import CheckpointError, OutputError, about_file
from nicecp.files import write_bytes
from nicecp.flow import CHUNK, NICE
from nicecp.images import encode_png, grid
from nicecp.machine import require_memory
from nicecp.outputs import check_output
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize
from nicecp.rank_devices import open_for

StrPath = str | os.PathLike[str]
FORMATS = (".h5", ".hdf5", ".png")


@dataclass(frozen=True)
class Written:
    """What was written: rows and columns of the samples, and the seed that they come from."""

    rows: int
    features: int
    seed: int


def write_samples(
    checkpoint: StrPath,
    out: StrPath,
    n: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    columns: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    context: Any = None,
    precision: str | None = None,
    communicator: Communicator = ALONE,
) -> Written:
    """Draw n samples from a checkpoint's flow into ``out``, which appears whole or not at all.

    out : FILE.h5 with the dataset ``samples`` (n, d) of the flow's dtype in data space, ``context`` (n, k) float64 if
        the flow has one, and for 8-bit data ``images``
        uint8 (n, *image_shape); or FILE.png with a grid of the images, ``columns`` in a row.
    n : 100 by default, or as many as there are rows of context.
    seed : row i depends on the seed and i (and its context) alone.
    context : for a flow with a context: (k,) numbers for all samples, (n, k), or a dataset 'FILE.h5:/NAME' of (n, k),
        which then is in ``out`` as well
    communicator : of the ranks that share the drawing, all of which make the same call; rank 0 writes

    Raises CheckpointError (the checkpoint, a picture of what has no image shape), OutputError, ValueError, MemoryError.
    """
    suffix = os.path.splitext(os.fspath(out))[1].lower()
    if suffix not in FORMATS:
        raise OutputError(about_file(out, "unknown kind of output", f"name it {' or '.join(FORMATS)}"))
    if columns is not None and suffix != ".png":
        raise ValueError("columns of a grid (--columns-of-grid) are for pictures: leave them out, or write a .png file")
    if n is not None and n < 1:
        raise ValueError(f"the number of samples must be at least 1, got {n}")
    communicator.from_first(lambda: check_output(out, overwrite, checkpoint, context))
    given = read_context(context) if isinstance(context, str) else context
    backend = open_for(communicator, device, threads)
    flow = load(checkpoint, backend=backend, precision=precision)
    if suffix == ".png":
        check_drawable(flow, checkpoint)
    rows = context_of(given, flow.context)
    if n is None:
        n = 100 if rows is None or rows.ndim == 1 else len(rows)
    # The prior's draw, the rows, and copies on the way.
    require_memory(5 * 8 * n * flow.n_features, f"drawing {n:,} samples")
    samples = draw(flow, n, seed, given, communicator)
    if samples is not None:
        if suffix == ".png":
            data = encode_png(grid(as_images(flow, samples), columns))
        else:
            data = _hdf5(flow, samples, rows, seed, os.path.basename(os.fspath(checkpoint)))
        write_bytes(out, data, overwrite)
    return Written(n, flow.n_features, seed)


def draw(
    flow: NICE, n: int, seed: int, context: Any = None, communicator: Communicator = ALONE
) -> NDArray[np.float64] | None:
    """flow.sample(n, seed, context), the same bits, with the rows shared by ranks; None but on rank 0."""
    chunks, rank, size = -(-n // CHUNK), communicator.rank, communicator.size
    first, last = (min(chunks * (rank + i) // size * CHUNK, n) for i in (0, 1))
    rows = rows_for(n, context_of(context, flow.context))
    own = rows if rows is None or len(rows) == 1 else rows[first:last]
    return communicator.gather(flow.sample(last - first, seed, own, first=first))


def dequantization_of(flow: NICE) -> Dequantize | None:
    """The flow's dequantization, or None for flows of floats."""
    return next((step for step in flow.preprocessing if isinstance(step, Dequantize)), None)


def check_drawable(flow: NICE, checkpoint: StrPath, remedy: str = "write the samples to a .h5 file") -> None:
    """CheckpointError with this remedy unless the flow's data are grey or RGB images."""
    shape = flow.info.image_shape
    if shape is None:
        raise CheckpointError(about_file(checkpoint, "its data have no image shape", remedy))
    if len(shape) != 2 and not (len(shape) == 3 and shape[2] in (1, 3)):
        problem = f"its images of shape {shape} are neither grey (h, w) nor RGB (h, w, 3)"
        raise CheckpointError(about_file(checkpoint, problem, remedy))


def as_images(flow: NICE, samples: NDArray[np.float64]) -> NDArray[np.uint8]:
    """samples : (n, d) in data space -> (n, h, w) or (n, h, w, 3) uint8.

    Values of 8-bit data get their bytes back; floats are stretched so that the samples' extremes are black and white.
    """
    shape = flow.info.image_shape or (flow.n_features,)
    step = dequantization_of(flow)
    if step is not None:
        pixels = step.to_bytes(samples)
    else:
        low, high = float(samples.min()), float(samples.max())
        pixels = Dequantize(low, high if high > low else low + 1.0).to_bytes(samples)
    return pixels.reshape(-1, *(shape[:2] if shape[2:] == (1,) else shape))


def _hdf5(
    flow: NICE, samples: NDArray[np.float64], context: NDArray[np.float64] | None, seed: int, checkpoint: str
) -> bytes:
    """The image of an HDF5 file."""
    import h5py

    info = flow.info
    # Earlier formats limit attributes, as the columns' names are, to 64 KiB.
    with h5py.File("samples", "w", libver=("v108", "v108"), driver="core", backing_store=False) as file:
        attrs: dict[str, Any] = {"seed": np.uint64(seed), "checkpoint": _text(checkpoint)}
        dataset = file.create_dataset("samples", data=samples.astype(flow.dtype), track_times=False)
        if info.columns is not None:
            attrs["columns"] = np.array([_text(name) for name in info.columns])
        if info.units is not None:
            attrs["units"] = np.array([_text(name) for name in info.units])
        if info.image_shape is not None:
            attrs["image_shape"] = np.array(info.image_shape, np.int64)
        for name, value in attrs.items():
            dataset.attrs[name] = value
        if context is not None and flow.context is not None:
            given = np.broadcast_to(context, (len(samples), len(flow.context)))
            beside = file.create_dataset("context", data=given, track_times=False)
            if flow.context.names is not None:
                beside.attrs["columns"] = np.array([_text(name) for name in flow.context.names])
        step = dequantization_of(flow)
        if step is not None:
            dataset.attrs["range"] = np.array([step.low, step.high])
            shape = info.image_shape or (flow.n_features,)
            images = step.to_bytes(samples).reshape(len(samples), *shape)
            file.create_dataset("images", data=images, track_times=False)
        file.flush()
        return bytes(file.id.get_file_image())


def _text(text: str) -> np.bytes_:
    return np.bytes_(text.encode("utf-8", "backslashreplace"))

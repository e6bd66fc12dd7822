"""Inpaint images of a data set with a checkpoint's flow: which images and masks, a report, pictures and files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.checkpoint import load_run
from nicecp.data import VALID_FRACTION, column_stats, open_source, open_splits
from nicecp.data_spec import from_record
from nicecp.errors import DataError, OutputError, about_file
from nicecp.evaluate import check_kind, check_width
from nicecp.files import write_bytes
from nicecp.flow import NICE
from nicecp.images import encode_png, grid
from nicecp.inpaint import box_of, inpaint, outside
from nicecp.kernels.backend import Purpose
from nicecp.machine import open_backend, require_memory
from nicecp.masks import masks_of
from nicecp.outputs import check_output
from nicecp.records import RunRecord
from nicecp.samples import as_images, check_drawable, dequantization_of
from nicecp.scoring import recorded_settings
from nicecp.split import Split

StrPath = str | os.PathLike[str]
FloatArray = NDArray[np.float64]

ITERATIONS = 111_895  # of the published script
FORMATS = (".png", ".h5", ".hdf5")
_COPIES = 12  # arrays of the batch's size that are alive at once, the network's chunk aside


@dataclass(frozen=True)
class Painted:
    """m masks, c chains, n images of d values in data space.

    original (n, d); hidden (m, d) bool; start, result (m, c, n, d); log-densities before and after (m, c, n), nats;
    fill (d,) mean of the training rows, None where there are none at hand.
    """

    flow: NICE
    names: tuple[str, ...]
    source: str
    first: int
    seed: int
    iterations: int
    variant: str
    hidden: NDArray[np.bool_]
    original: FloatArray
    start: FloatArray
    result: FloatArray
    log_prob_before: FloatArray
    log_prob_after: FloatArray
    log_prob_original: FloatArray
    fill: FloatArray | None

    @property
    def mean(self) -> FloatArray:
        """(m, n, d) mean over chains."""
        return np.asarray(self.result.mean(axis=1))

    def error(self, mask: int, guess: FloatArray) -> float:
        """Mean squared error on a mask's hidden values of a guess : (..., n, d) or (d,)."""
        at = self.hidden[mask]
        return float(np.square(guess[..., at] - self.original[:, at]).mean())

    def report(self) -> list[dict[str, Any]]:
        """One entry for each mask: log-densities by chain (means over images) and errors on the hidden pixels."""
        return [
            {
                "mask": name,
                "hidden": int(self.hidden[k].sum()),
                "log_prob_before": self.log_prob_before[k].mean(axis=1).tolist(),
                "log_prob_after": self.log_prob_after[k].mean(axis=1).tolist(),
                "log_prob_original": float(self.log_prob_original.mean()),
                "error_of_mean": self.error(k, self.mean[k]),
                "error_of_one_chain": self.error(k, self.result[k]),
                "error_of_training_mean": None if self.fill is None else self.error(k, self.fill),
            }
            for k, name in enumerate(self.names)
        ]


def inpaint_images(
    checkpoint: StrPath,
    data: Any,
    mask: str = "all",
    *,
    iterations: int = ITERATIONS,
    n: int = 10,
    first: int = 0,
    chains: int = 1,
    seed: int = 0,
    box: tuple[float, float] | None = None,
    variant: str = "text",
    gradient_scale: float | None = None,
    context: ArrayLike | None = None,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Painted:
    """Hide pixels of n images of a data set and let a checkpoint's flow fill them in (nicecp.inpaint.inpaint).

    Parameters
    ----------
    data : as nicecp.data.open_source
        The test dataset, else the training dataset. 8-bit values stand for the middle of their bins; floats are taken
        as values in data space.
    mask : one of nicecp.masks.MASKS, "all" of them, or a file (nicecp.masks.mask_from_file)
    first : number of the first image
    context : (k,), for a flow with a context: the same for all images

    Raises
    ------
    CheckpointError
        The flow's data are no grey or RGB images.
    DataError
        The data or the mask's file cannot be used, do not fit the flow, or lie outside its box.
    ValueError, TrainingError, MemoryError
        As inpaint; n or first is out of bounds.
    """
    flow, record = load_run(checkpoint, backend=open_backend(device, threads), precision=precision)
    check_drawable(flow, checkpoint, "inpainting is for images")
    assert flow.info.image_shape is not None
    masks = masks_of(mask, flow.info.image_shape, seed)
    require_memory(_COPIES * 8 * len(masks) * chains * n * flow.n_features, f"inpainting {n} images in {chains} chains")
    original, name = _images(flow, data, n, first, box)
    m, d = len(masks), flow.n_features
    hidden = np.array(list(masks.values()))
    painted = inpaint(
        flow,
        np.tile(original, (m, 1)),
        np.repeat(hidden, n, axis=0),
        iterations,
        chains=chains,
        seed=seed,
        box=box,
        variant=variant,
        gradient_scale=gradient_scale,
        context=context,
        progress=progress,
    )

    def by_mask(array: FloatArray) -> FloatArray:
        """(c, m * n, ...) -> (m, c, n, ...)"""
        return np.ascontiguousarray(np.moveaxis(array.reshape(chains, m, n, *array.shape[2:]), 0, 1))

    return Painted(
        flow=flow,
        names=tuple(masks),
        source=name,
        first=first,
        seed=seed,
        iterations=iterations,
        variant=variant,
        hidden=hidden.reshape(m, d),
        original=original,
        start=by_mask(painted.start),
        result=by_mask(painted.result),
        log_prob_before=by_mask(painted.log_prob_before),
        log_prob_after=by_mask(painted.log_prob_after),
        log_prob_original=np.asarray(flow.log_prob(original, context)),
        fill=_training_mean(flow, record, data),
    )


def _images(flow: NICE, data: Any, n: int, first: int, box: tuple[float, float] | None) -> tuple[FloatArray, str]:
    """n rows in data space : (n, d), and the name of their dataset; DataError where they do not fit."""
    step = dequantization_of(flow)
    source = open_source(data, "test")
    try:
        split = Split.contiguous(source, 0, source.n_rows, Purpose.TEST_NOISE)
        check_width(flow, split)
        if step is None or source.is_image8:
            check_kind(flow, split)
        if n < 1 or first < 0 or first + n > source.n_rows:
            raise ValueError(f"images {first} to {first + n - 1} are not among the {source.n_rows} of {source.name!r}")
        rows = np.asarray(source.read(first, first + n), np.float64)
        if step is not None and source.is_image8:
            return step.middle(rows), source.name
        limits = box or box_of(flow)
        where = None if limits is None else outside(rows, *limits)
        if limits is not None and where is not None:
            value, row = rows[where], first + where[0]
            problem = f"row {row}, column {where[1]} is {value:g}, outside the data's box {limits[0]:g}..{limits[1]:g}"
            raise DataError(about_file(source.name, problem, "give images in the range that the flow was trained on"))
        return rows, source.name
    finally:
        source.close()


def _training_mean(flow: NICE, record: RunRecord | None, data: Any) -> FloatArray | None:
    """(d,) mean of the rows that the flow was trained on, in data space, if they are in the data or where they were."""
    recorded = None if record is None else record.config.get("data")
    step, settings = dequantization_of(flow), recorded_settings(record)
    rule = (VALID_FRACTION, 0) if settings is None else (settings.valid_fraction, settings.seed)
    for spec in [data, recorded] if isinstance(recorded, str) and recorded else [data]:
        try:
            with open_splits(spec if record is None else from_record(spec, record.config), *rule) as splits:
                if splits.train.source.fingerprint() != flow.info.fingerprint:
                    continue
                mean = column_stats(splits.train).mean
        except DataError:
            continue
        return mean if step is None else step.middle(mean)
    return None


# --- pictures and files -----------------------------------------------------------------------------------------------


def blocks(painted: Painted) -> dict[str, NDArray[np.uint8]]:
    """Title -> images (m * n, h, w[, 3]), one row of n for each mask: original, start, result, and the chains' mean."""
    m, n, d = len(painted.names), *painted.original.shape
    parts = {
        "original": np.broadcast_to(painted.original, (m, n, d)),
        "initial state": painted.start[:, 0],
        "result": painted.result[:, 0],
    }
    chains = painted.result.shape[1]
    if chains > 1:
        parts[f"mean of {chains} chains"] = painted.mean
    return {title: as_images(painted.flow, np.reshape(part, (m * n, d))) for title, part in parts.items()}


def picture(painted: Painted) -> NDArray[np.uint8]:
    """The paper's figure 6: for several masks the blocks beside one another, a mask's row in each; for one mask below
    one another, an image's column through all."""
    n = len(painted.original)
    parts = [grid(images, n) for images in blocks(painted).values()]
    return np.concatenate(parts, axis=1 if len(painted.names) > 1 else 0)


def write_inpainting(painted: Painted, out: StrPath, overwrite: bool = False) -> None:
    """Write FILE.png (picture) or FILE.h5, whole or not at all.

    FILE.h5 holds original (n, d); hidden (m, d) uint8; start, result (m, chains, n, d), mean (m, n, d) in data space,
    of the flow's dtype; log_prob_before, log_prob_after (m, chains, n) float64; masks (m,) names; for 8-bit data
    result_images uint8 (m, chains, n, *image_shape); attributes image_shape, seed, iterations, variant, source, first.
    """
    if _suffix(out) == ".png":
        write_bytes(out, encode_png(picture(painted)), overwrite)
    else:
        write_bytes(out, _hdf5(painted), overwrite)


def check_inpainting_output(out: StrPath, overwrite: bool, *inputs: Any) -> None:
    """OutputError where the output cannot be written, before the work for it."""
    if _suffix(out) not in FORMATS:
        raise OutputError(about_file(out, "unknown kind of output", f"name it {' or '.join(FORMATS)}"))
    check_output(out, overwrite, *inputs)


def _suffix(out: StrPath) -> str:
    return os.path.splitext(os.fspath(out))[1].lower()


def _hdf5(painted: Painted) -> bytes:
    """The image of an HDF5 file."""
    import h5py

    flow = painted.flow
    shape = flow.info.image_shape or (flow.n_features,)
    with h5py.File("inpainting", "w", driver="core", backing_store=False) as file:
        arrays: dict[str, NDArray[Any]] = {
            "original": painted.original.astype(flow.dtype),
            "hidden": painted.hidden.astype(np.uint8),
            "start": painted.start.astype(flow.dtype),
            "result": painted.result.astype(flow.dtype),
            "mean": painted.mean.astype(flow.dtype),
            "log_prob_before": painted.log_prob_before,
            "log_prob_after": painted.log_prob_after,
            "masks": np.array([name.encode("utf-8", "backslashreplace") for name in painted.names]),
        }
        step = dequantization_of(flow)
        if step is not None:
            arrays["result_images"] = step.to_bytes(painted.result).reshape(*painted.result.shape[:-1], *shape)
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
        file.attrs["image_shape"] = np.array(shape, np.int64)
        for name, number in (("seed", painted.seed), ("iterations", painted.iterations), ("first", painted.first)):
            file.attrs[name] = np.uint64(number)
        for name, text in (("variant", painted.variant), ("source", painted.source)):
            file.attrs[name] = np.bytes_(text.encode("utf-8", "backslashreplace"))
        file.flush()
        return bytes(file.id.get_file_image())

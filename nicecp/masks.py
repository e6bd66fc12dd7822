"""Which pixels are hidden: the paper's ten masks, and masks from files.  Dinh et al. 2015, section 5.2, figure 6."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nicecp.data import open_source
from nicecp.errors import DataError, about_file
from nicecp.kernels.backend import Purpose
from nicecp.kernels.philox import random_keys

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]


def _rows(height: int, width: int) -> Indices:
    return np.repeat(np.arange(height), width)


def _columns(height: int, width: int) -> Indices:
    return np.tile(np.arange(width), height)


def _middle(index: Indices, size: int) -> Bools:
    """The middle half: 7..20 of 28."""
    first = size // 4
    return np.asarray((index >= first) & (index < first + size // 2))


# Name -> (height, width) -> (height * width,) hidden pixels, in the order of the paper's figure. Odd is the authors':
# pixels 1, 3, 5, ... counted from 1. A middle row or column of an odd number of them goes to the bottom or the right.
_GEOMETRIC: dict[str, Callable[[int, int], Bools]] = {
    "top": lambda h, w: _rows(h, w) < h // 2,
    "bottom": lambda h, w: _rows(h, w) >= h // 2,
    "odd": lambda h, w: np.arange(h * w) % 2 == 0,
    "even": lambda h, w: np.arange(h * w) % 2 == 1,
    "left": lambda h, w: _columns(h, w) < w // 2,
    "right": lambda h, w: _columns(h, w) >= w // 2,
    "middle-rows": lambda h, w: _middle(_rows(h, w), h),
    "middle-columns": lambda h, w: _middle(_columns(h, w), w),
}
_RANDOM = {"random75": 0.75, "random90": 0.9}
_EPOCH = 2**32 - 1  # epoch word of the random masks; the noise of inpainting counts up from 0
MASKS = (*_GEOMETRIC, *_RANDOM)


def named_mask(name: str, image_shape: tuple[int, ...], seed: int = 0) -> Bools:
    """-> (d,) True where a pixel is hidden, all its channels together.

    name : one of MASKS. random75 and random90 hide exactly that part of the pixels (rounded to the nearest), those with
    the smallest Philox keys of the seed. Raises ValueError for other names, for images that are not (h, w) or
    (h, w, channels), or so small that the mask hides nothing.
    """
    if len(image_shape) not in (2, 3):
        raise ValueError(f"masks are for images (h, w) or (h, w, channels), got {image_shape}")
    height, width = image_shape[:2]
    if name in _GEOMETRIC:
        hidden = _GEOMETRIC[name](height, width)
    elif name in _RANDOM:
        count = round(_RANDOM[name] * height * width)
        pixels = np.arange(height * width, dtype=np.int64)
        hidden = np.zeros(height * width, np.bool_)
        hidden[np.argsort(random_keys(seed, Purpose.INPAINT, _EPOCH, pixels), kind="stable")[:count]] = True
    else:
        raise ValueError(f"unknown mask {name!r}: expected one of {', '.join(MASKS)}, or a file")
    if not hidden.any():
        raise ValueError(f"the mask {name!r} hides nothing of images of {height} x {width} pixels")
    return np.repeat(hidden, image_shape[2] if len(image_shape) == 3 else 1)


def mask_from_file(spec: str, image_shape: tuple[int, ...]) -> Bools:
    """The mask in 'FILE.h5' or 'FILE.h5:/DATASET' : (d,) True where the dataset is not 0.

    The dataset is (h, w), or as large as an image with its channels, of the numbers 0 (seen) and 1 (hidden). Raises
    DataError for another shape or other numbers, or where nothing is hidden.
    """
    source = open_source(spec)
    try:
        shape = source.info.image_shape or (source.n_features,)
        shape = (source.n_rows, *shape)
        if shape not in ((*image_shape[:2],), image_shape, (image_shape[0], int(np.prod(image_shape[1:])))):
            problem = f"the mask has shape {shape}, images of this flow {image_shape}"
            remedy = f"store one number per pixel, as ({image_shape[0]}, {image_shape[1]})"
            raise DataError(about_file(source.name, problem, remedy))
        values = source.read(0, source.n_rows).reshape(-1)
        name = source.name
    finally:
        source.close()
    odd = (values != 0) & (values != 1)
    if odd.any():
        problem = f"the mask holds {values[odd][0]:g}"
        raise DataError(about_file(name, problem, "store 0 (seen) and 1 (hidden) as unsigned 8-bit integers"))
    if not (values == 1).any():
        raise DataError(about_file(name, "the mask hides nothing", "store 1 where pixels are to be filled in"))
    d = int(np.prod(image_shape))
    return np.repeat(values == 1, d // len(values))


def masks_of(spec: str, image_shape: tuple[int, ...], seed: int = 0) -> dict[str, Bools]:
    """Name -> (d,) hidden: all ten masks for "all", else the one that is named or in a file."""
    if spec == "all":
        return {name: named_mask(name, image_shape, seed) for name in MASKS}
    if spec in MASKS or not ("." in spec or "/" in spec or ":" in spec):
        return {spec: named_mask(spec, image_shape, seed)}
    return {spec: mask_from_file(spec, image_shape)}

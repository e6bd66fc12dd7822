"""Pictures without a picture library: PNG files of grey or RGB bytes, and grids of many images."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SIDE = 2**16  # pixels of a picture; viewers give up far below
_GREY, _RGB = 0, 2  # colour types


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """(h, w) grey or (h, w, 3) RGB uint8 -> the bytes of a PNG file, always the same ones.

    Raises ValueError for any other array. Source: PNG specification, third edition (W3C), sections 5 and 11.
    """
    shape = picture.shape
    if picture.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
        raise ValueError(f"a picture is (h, w) or (h, w, 3) of uint8, got {shape} of {picture.dtype}")
    height, width = shape[:2]
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"a picture of {width} x {height} pixels cannot be written (at most {MAX_SIDE} each way)")
    rows = picture.reshape(height, -1)
    filtered = np.zeros((height, rows.shape[1] + 1), np.uint8)  # each row begins with its filter: 0, none
    filtered[:, 1:] = rows
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY if len(shape) == 2 else _RGB, 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), 9)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grid(
    images: NDArray[np.uint8], columns: int | None = None, gap: int = 2, background: int = 128
) -> NDArray[np.uint8]:
    """images : (n, h, w) or (n, h, w, 3) uint8 -> one picture of them, row by row, ``gap`` pixels apart.

    columns : images in a row; as square as it goes by default. Places that are left over have the background's grey.
    Raises ValueError for no images, fewer than one column, or shapes that no picture has.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images are (n, h, w) or (n, h, w, 3) of uint8, got {images.shape} of {images.dtype}")
    n, height, width = images.shape[:3]
    if n < 1 or (columns is not None and columns < 1):
        raise ValueError(f"a grid has at least one image and one column, got {n} and {columns}")
    across = min(n, columns if columns is not None else int(np.ceil(np.sqrt(n))))
    down = -(-n // across)
    if down * (height + gap) > MAX_SIDE or across * (width + gap) > MAX_SIDE:
        raise ValueError(f"{n} images of {width} x {height} pixels are too many for one picture: ask for fewer")
    shape = (down * (height + gap) + gap, across * (width + gap) + gap, *images.shape[3:])
    picture = np.full(shape, background, np.uint8)
    for i in range(n):
        top, left = gap + i // across * (height + gap), gap + i % across * (width + gap)
        picture[top : top + height, left : left + width] = images[i]
    return picture

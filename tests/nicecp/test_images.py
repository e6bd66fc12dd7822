"""PNG files and grids, read back by a decoder of their own."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from nicecp.images import MAX_SIDE, encode_png, grid


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """8-bit grey or RGB, filter 0 only: what encode_png writes; every chunk's CRC is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, 1 + channels * width)
    assert not rows[:, 0].any()
    pixels = rows[:, 1:]
    return pixels.reshape((height, width) if channels == 1 else (height, width, 3))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (28, 28), (4, 7, 3), (1, 1, 3)])
def test_png_holds_the_pixels(shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(decode_png(encode_png(picture)), picture)


def test_pillow_reads_it_too(tmp_path: object) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(encode_png(picture)))), picture)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((2, 2)),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros((1, MAX_SIDE + 1), np.uint8),
    ],
)
def test_what_is_no_picture(picture: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="picture"):
        encode_png(picture)


def test_grid_puts_images_row_by_row() -> None:
    images = np.stack([np.full((2, 3), 10 * i, np.uint8) for i in range(1, 6)])
    picture = grid(images, columns=3, gap=1, background=7)
    assert picture.shape == (2 * 3 + 1, 3 * 4 + 1)
    for i in range(5):
        top, left = 1 + i // 3 * 3, 1 + i % 3 * 4
        np.testing.assert_array_equal(picture[top : top + 2, left : left + 3], 10 * (i + 1))
    assert (picture == 7).sum() == picture.size - 5 * 6  # gaps, frame and the place left over


@pytest.mark.parametrize(
    ("n", "columns", "shape"), [(9, None, (3, 3)), (10, None, (3, 4)), (2, 5, (1, 2)), (7, 2, (4, 2))]
)
def test_grid_shapes(n: int, columns: int | None, shape: tuple[int, int]) -> None:
    colour = grid(np.zeros((n, 4, 4, 3), np.uint8), columns, gap=0)
    assert colour.shape == (4 * shape[0], 4 * shape[1], 3)


def test_grids_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        grid(np.zeros((0, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="at least one image"):
        grid(np.zeros((1, 2, 2), np.uint8), columns=0)
    with pytest.raises(ValueError, match="too many"):
        grid(np.zeros((MAX_SIDE, 1, 1), np.uint8), columns=1)
    with pytest.raises(ValueError, match="images are"):
        grid(np.zeros((1, 2, 2, 2), np.uint8))

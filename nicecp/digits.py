"""Pictures of digits that the package draws itself, so that a first run needs no download.

A digit is a few pen strokes (Bezier curves). Their distance fields are computed once for some variants of each digit;
a picture looks its pixels up in one of them through a random smooth map (size, slant, rotation, bending) and blackens
what lies within the pen's width. Only +, -, *, / and square roots of single numbers are used, in a fixed order: IEEE
arithmetic gives the same bytes on every machine.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Purpose
from nicecp.kernels.philox import random_words

SIZE = 28  # pixels
VARIANTS = 16  # shapes of each digit
_GRID = 72  # samples of a distance field along each axis
_LOW, _STEP = -0.4, 1.8 / (_GRID - 1)  # first sample and spacing; a digit is 1 high and ASPECT wide
_ASPECT = 0.74
_PIECES = 14  # straight pieces of a curve
_JITTER = 0.075  # of the control points
_CHUNK = 256  # rows drawn at a time, so that intermediate arrays stay in cache

# Strokes in a box 0..1, x to the right and y down: a line is two points, a Bezier curve four. Two styles where people
# write a digit in two ways.
_STYLES: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...] = (
    (  # 0
        (
            (0.52, 0.0, 0.2, 0.0, 0.1, 0.3, 0.1, 0.53),
            (0.1, 0.53, 0.1, 0.85, 0.28, 1.0, 0.5, 1.0),
            (0.5, 1.0, 0.78, 1.0, 0.9, 0.72, 0.9, 0.47),
            (0.9, 0.47, 0.9, 0.2, 0.75, 0.0, 0.52, 0.0),
        ),
    ),
    (  # 1
        ((0.52, 0.0, 0.5, 0.35, 0.5, 0.65, 0.48, 1.0),),
        ((0.3, 0.22, 0.55, 0.02), (0.55, 0.02, 0.53, 1.0)),
    ),
    (  # 2
        (
            (0.14, 0.24, 0.2, -0.08, 0.84, -0.1, 0.82, 0.28),
            (0.82, 0.28, 0.78, 0.55, 0.4, 0.75, 0.1, 0.97),
            (0.1, 0.97, 0.92, 0.95),
        ),
        (
            (0.16, 0.2, 0.25, -0.08, 0.82, -0.08, 0.78, 0.28),
            (0.78, 0.28, 0.74, 0.6, 0.42, 1.0, 0.2, 0.96),
            (0.2, 0.96, 0.02, 0.9, 0.14, 0.7, 0.36, 0.82),
            (0.36, 0.82, 0.55, 0.93, 0.7, 1.02, 0.96, 0.9),
        ),
    ),
    (  # 3
        (
            (0.16, 0.12, 0.36, -0.08, 0.86, -0.04, 0.78, 0.25),
            (0.78, 0.25, 0.72, 0.42, 0.52, 0.46, 0.38, 0.47),
            (0.38, 0.47, 0.7, 0.46, 0.92, 0.58, 0.86, 0.77),
            (0.86, 0.77, 0.76, 1.06, 0.3, 1.06, 0.1, 0.88),
        ),
    ),
    (  # 4
        (
            (0.24, 0.02, 0.2, 0.2, 0.16, 0.36, 0.12, 0.52),
            (0.12, 0.52, 0.35, 0.56, 0.62, 0.52, 0.88, 0.48),
            (0.78, 0.04, 0.74, 0.4, 0.7, 0.7, 0.66, 1.0),
        ),
        ((0.68, 0.0, 0.08, 0.64), (0.08, 0.64, 0.94, 0.62), (0.68, 0.0, 0.66, 1.0)),
    ),
    (  # 5
        (
            (0.86, 0.03, 0.3, 0.04),
            (0.3, 0.04, 0.2, 0.44),
            (0.2, 0.44, 0.5, 0.3, 0.92, 0.4, 0.86, 0.7),
            (0.86, 0.7, 0.8, 1.06, 0.34, 1.04, 0.1, 0.9),
        ),
    ),
    (  # 6
        (
            (0.74, 0.0, 0.4, 0.1, 0.12, 0.45, 0.15, 0.72),
            (0.15, 0.72, 0.2, 1.08, 0.78, 1.08, 0.82, 0.75),
            (0.82, 0.75, 0.84, 0.44, 0.34, 0.42, 0.16, 0.72),
        ),
    ),
    (  # 7
        ((0.1, 0.08, 0.4, 0.04, 0.65, 0.04, 0.88, 0.05), (0.88, 0.05, 0.76, 0.32, 0.5, 0.62, 0.42, 1.0)),
        (
            (0.12, 0.06, 0.88, 0.04),
            (0.88, 0.04, 0.74, 0.35, 0.52, 0.65, 0.4, 1.0),
            (0.34, 0.52, 0.82, 0.5),
        ),
    ),
    (  # 8
        (
            (0.8, 0.16, 0.66, -0.08, 0.2, -0.04, 0.22, 0.22),
            (0.22, 0.22, 0.26, 0.46, 0.84, 0.54, 0.82, 0.78),
            (0.82, 0.78, 0.8, 1.07, 0.16, 1.07, 0.16, 0.78),
            (0.16, 0.78, 0.18, 0.54, 0.76, 0.44, 0.8, 0.16),
        ),
    ),
    (  # 9
        (
            (0.82, 0.26, 0.76, -0.08, 0.2, -0.08, 0.16, 0.26),
            (0.16, 0.26, 0.14, 0.6, 0.72, 0.62, 0.82, 0.26),
            (0.82, 0.26, 0.84, 0.55, 0.76, 0.8, 0.64, 1.0),
        ),
        (
            (0.8, 0.06, 0.4, -0.1, 0.16, 0.1, 0.16, 0.3),
            (0.16, 0.3, 0.18, 0.56, 0.7, 0.5, 0.8, 0.06),
            (0.8, 0.06, 0.78, 0.4, 0.76, 0.7, 0.74, 1.0),
        ),
    ),
)


def _curve(stroke: NDArray[np.float64]) -> NDArray[np.float64]:
    """stroke : (2 or 4, 2) control points -> (pieces + 1, 2) points on it."""
    if len(stroke) == 2:
        return stroke
    t = (np.arange(_PIECES + 1) / _PIECES)[:, None]
    s = 1.0 - t
    a, b, c, d = stroke
    curve: NDArray[np.float64] = s * s * s * a + 3.0 * s * s * t * b + 3.0 * s * t * t * c + t * t * t * d
    return curve


@functools.lru_cache(maxsize=1)
def _fields() -> NDArray[np.float32]:
    """(10 * VARIANTS, _GRID, _GRID) distances to the nearest stroke, y before x."""
    axis = _LOW + _STEP * np.arange(_GRID)
    px, py = axis[None, :], axis[:, None]
    fields = np.empty((10 * VARIANTS, _GRID, _GRID), np.float32)
    for digit, styles in enumerate(_STYLES):
        for variant in range(VARIANTS):
            strokes = styles[variant % len(styles)]
            # points that strokes share move together: the shift belongs to the place, not to the stroke
            places = sorted({(s[i], s[i + 1]) for s in strokes for i in range(0, len(s), 2)})
            words = random_words(0, Purpose.DEMO, 1, np.arange(len(places)), block=digit * VARIANTS + variant)
            shifts = (words[:, :2] / 2.0**32 - 0.5) * (2 * _JITTER)
            moved = {place: (place[0] + dx, place[1] + dy) for place, (dx, dy) in zip(places, shifts, strict=True)}
            nearest = np.full((_GRID, _GRID), np.inf)
            for stroke in strokes:
                control = [moved[stroke[i], stroke[i + 1]] for i in range(0, len(stroke), 2)]
                points = _curve(np.array(control)) * (_ASPECT, 1.0)
                for (ax, ay), (bx, by) in itertools.pairwise(points):
                    ex, ey = bx - ax, by - ay
                    t = ((px - ax) * ex + (py - ay) * ey) / (ex * ex + ey * ey)
                    t = np.minimum(np.maximum(t, 0.0), 1.0)
                    dx, dy = px - ax - t * ex, py - ay - t * ey
                    np.minimum(nearest, dx * dx + dy * dy, out=nearest)
            fields[digit * VARIANTS + variant] = np.sqrt(nearest)
    return fields


def draw_digits(n: int, seed: int = 0, first: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw rows first..first+n-1 of an endless sequence -> images (n, 784) uint8, labels (n,) uint8 in 0..9.

    White on black, 28 x 28, like MNIST's. A row depends on the seed and its own number only, and its bytes not on the
    machine.
    """
    if n < 0 or first < 0:
        raise ValueError(f"n and first must not be negative, got {n} and {first}")
    images = np.empty((n, SIZE * SIZE), np.uint8)
    labels = np.empty(n, np.uint8)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        _draw(images[start:stop], labels[start:stop], seed, np.arange(first + start, first + stop))
    return images, labels


def _draw(images: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int, rows: NDArray[np.int64]) -> None:
    """Fill images : (k, 784) and labels : (k,) for these row numbers."""
    words = np.concatenate([random_words(seed, Purpose.DEMO, 0, rows, block=block) for block in range(3)], axis=1)
    labels[...] = ((words[:, 0] >> 16) * 10) >> 16
    variant = ((words[:, 0] & 0xFFFF) * VARIANTS) >> 16
    field = (labels.astype(np.int64) * VARIANTS + variant) * (_GRID * _GRID)
    # columns of uniforms in [-1, 1), each of 16 bits
    u = np.concatenate([words[:, 1:] >> 16, words[:, 1:] & 0xFFFF], axis=1).astype(np.float32) / 32768 - 1
    bell = (u[:, 0:11] + u[:, 11:22]) * 0.5  # denser in the middle

    def column(k: int, middle: float, spread: float) -> NDArray[np.float32]:
        return np.asarray(middle + spread * bell[:, k], np.float32)[:, None]

    height = column(0, 18.8, 2.4)  # pixels
    wide, slant, turn = column(1, 1.0, 0.25), column(2, 0.12, 0.38), column(3, 0.0, 0.22)
    bend_x, curl_x, bend_y, curl_y = (column(k, 0.0, s) for k, s in ((4, 0.09), (5, 0.11), (6, 0.09), (7, 0.08)))
    radius, softness = column(8, 1.2, 0.6), column(9, 1.3, 0.4)  # of the pen, pixels
    press = column(10, 0.0, 0.5)
    move_x, move_y = u[:, 3:4] * np.float32(1.1), u[:, 15:16] * np.float32(1.1)  # pixels

    grid = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)
    px = np.tile(grid, SIZE)[None, :]
    py = np.repeat(grid, SIZE)[None, :]
    across, down = (px - move_x) / height, (py - move_y) / height  # about -0.5..0.5 on the digit
    cosine = np.sqrt(1 - turn * turn)
    x = (cosine * across + turn * down) * wide + slant * down
    y = cosine * down - turn * across
    p, q = 2 * y, 2 * x
    x = x + bend_x * (p * p - np.float32(0.4)) + curl_x * p * (1 - p * p) + np.float32(_ASPECT / 2)
    y = y + bend_y * (q * q - np.float32(0.2)) + curl_y * q + np.float32(0.5)
    distance = _look_up(field, x, y) * height
    ink = (radius * (1 + press * p * np.float32(0.5)) - distance) / softness + np.float32(0.5)
    np.multiply(np.minimum(np.maximum(ink, 0), 1), np.float32(255), out=ink)
    images[...] = (ink + np.float32(0.5)).astype(np.uint8)


def _look_up(field: NDArray[np.int64], x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float32]:
    """field : (k,) offsets into the fields, x, y : (k, m) -> (k, m) distances, bilinear; beyond the edge as at it."""
    values = _fields().reshape(-1)
    limit = np.float32(_GRID - 1.001)
    gx = np.minimum(np.maximum((x - np.float32(_LOW)) / np.float32(_STEP), 0), limit)
    gy = np.minimum(np.maximum((y - np.float32(_LOW)) / np.float32(_STEP), 0), limit)
    ix, iy = gx.astype(np.int64), gy.astype(np.int64)
    fx, fy = gx - ix.astype(np.float32), gy - iy.astype(np.float32)
    at = field[:, None] + iy * _GRID + ix
    top = values[at] * (1 - fx) + values[at + 1] * fx
    bottom = values[at + _GRID] * (1 - fx) + values[at + _GRID + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy, np.float32)

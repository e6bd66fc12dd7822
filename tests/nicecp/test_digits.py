"""The drawn digits: the same bytes everywhere, row by row, and recognisable as digits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nicecp.digits import draw_digits


def test_bytes_are_frozen() -> None:
    # single IEEE operations in a fixed order only, so this holds on every machine; a change of it changes the demo
    images, labels = draw_digits(600, seed=0, first=0)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "8820ecf1bbff1fa3f478af93965c904fdc87c77947ea73cc71794d2eafbd710e"


def test_rows_do_not_depend_on_batching() -> None:
    images, labels = draw_digits(700, seed=4)
    assert images.shape == (700, 784)
    assert labels.shape == (700,)
    assert images.dtype == labels.dtype == np.uint8
    for first, count in ((0, 1), (255, 3), (500, 200)):
        part, part_labels = draw_digits(count, seed=4, first=first)
        np.testing.assert_array_equal(part, images[first : first + count])
        np.testing.assert_array_equal(part_labels, labels[first : first + count])
    other, _ = draw_digits(700, seed=5)
    assert (other != images).any(axis=1).all()


def test_rows_differ_and_look_like_ink_on_paper() -> None:
    images, labels = draw_digits(3000)
    assert len(np.unique(images, axis=0)) == 3000
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 300 - 5 * np.sqrt(270)
    assert counts.max() < 300 + 5 * np.sqrt(270)
    pictures = images.reshape(-1, 28, 28)
    ink = pictures.mean(axis=(1, 2))
    assert ink.min() > 5  # nothing empty ...
    assert ink.max() < 110  # ... and nothing blotted out
    assert pictures.max(axis=(1, 2)).min() > 120
    frame = np.ones((28, 28), bool)
    frame[1:-1, 1:-1] = False
    assert (pictures[:, frame] > 60).any(axis=1).mean() < 0.03  # digits lie inside the picture
    assert (pictures[:, 13:15] > 0).any(axis=(1, 2)).mean() > 0.99


def test_digits_are_recognised_by_the_nearest_of_ten_means() -> None:
    images, labels = draw_digits(4000)
    x = images / 255.0
    train, test = slice(0, 3000), slice(3000, 4000)
    means = np.stack([x[train][labels[train] == digit].mean(axis=0) for digit in range(10)])
    nearest = ((x[test][:, None, :] - means) ** 2).sum(axis=2).argmin(axis=1)
    accuracy = (nearest == labels[test]).mean()
    assert 0.6 < accuracy < 0.97  # far above 0.1, and not ten rigid templates
    assert all((nearest == labels[test])[labels[test] == digit].mean() > 0.4 for digit in range(10))


def test_no_rows_and_bad_arguments() -> None:
    images, labels = draw_digits(0)
    assert images.shape == (0, 784)
    assert labels.shape == (0,)
    with pytest.raises(ValueError, match="negative"):
        draw_digits(-1)
    with pytest.raises(ValueError, match="negative"):
        draw_digits(1, first=-1)

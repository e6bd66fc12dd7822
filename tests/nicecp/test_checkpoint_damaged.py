"""Every field of a state file damaged in every way, every length class of truncation, thousands of flipped bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nicecp import checkpoint
from nicecp.checkpoint import load
from nicecp.errors import CheckpointError
from nicecp.store import BLOCK_SIZE, Tree, block_for, decode, encode, is_checkpoint
from tests.nicecp.test_checkpoint_refused import kept, kept_bytes

FLIPS = 2000
# What may be missing or different in a file that is right: versions, settings that only go on, names of columns.
FREE = ("/optimizer ", "/training version_", "/data/columns", "/data/units", "/ nicecp_version", "/training seed")
FREE_VALUES = ("/training best_valid", "/resume", "/training threads", "/training epoch", "/data fingerprint")


def other_values(value: Any) -> list[tuple[str, Any]]:
    """Values of other types, and numbers out of bounds."""
    if isinstance(value, str):
        return [("a number", 3), ("another text", "no such thing"), ("text of another length", "x" * 5000)]
    if isinstance(value, float):
        return [("a text", "1"), ("a whole number", 1), ("NaN", math.nan), ("infinity", math.inf)]
    return [("a text", "1"), ("a float", 1.0), ("negative", -1), ("huge", 2**63), ("the largest", 2**64 - 1)]


def damages() -> Iterator[tuple[str, Callable[[Tree], object]]]:
    """What is damaged and how, for every attribute and array of the kept state file."""
    tree = kept()
    for path, attrs in tree.attrs.items():
        for key, value in attrs.items():
            yield f"{path} {key}: missing", lambda tree, path=path, key=key: tree.attrs[path].pop(key)
            for name, other in other_values(value):
                yield (
                    f"{path} {key}: {name}",
                    lambda tree, path=path, key=key, other=other: tree.attrs[path].update({key: other}),
                )
        yield f"{path} more: one too many", lambda tree, path=path: tree.attrs[path].update({"more": 1})
    for path, array in tree.arrays.items():
        changes: dict[str, Any] = {
            "missing": None,
            "flat": array.reshape(-1)[None],
            "longer": np.concatenate([array, array]),
            "shorter": array[:-1],
            "empty": array[:0],
            "another type": array.astype("S9") if array.dtype.kind != "S" else np.zeros(array.shape),
        }
        if array.dtype.kind == "f":
            changes["float of another size"] = array.astype("f4" if array.dtype == "f8" else "f8")
            changes["NaN"] = np.full_like(array, np.nan)
            changes["infinity"] = np.full_like(array, -np.inf)
        for name, other in changes.items():
            yield f"{path}: {name}", lambda tree, path=path, other=other: put(tree, path, other)
        yield f"{path}/x: below it", lambda tree, path=path: put(tree, path + "-x", np.zeros(3))


def put(tree: Tree, path: str, array: Any) -> None:
    if array is None:
        del tree.arrays[path]
    else:
        tree.arrays[path] = array


def test_every_field_damaged_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right digests: it is the content that is refused, in one line, unless such a file would be right as well."""
    said: dict[str, str] = {}
    whole = kept()
    for what, change in damages():
        tree = Tree({path: dict(attrs) for path, attrs in whole.attrs.items()}, dict(whole.arrays))
        change(tree)
        monkeypatch.setattr(checkpoint, "read_tree", lambda path, tree=tree: tree)
        try:
            load("x.h5")
            said[what] = ""
        except CheckpointError as error:
            said[what] = str(error)
    assert len(said) > 300
    assert all(message.startswith("'x.h5': ") and "\n" not in message for message in said.values() if message)
    accepted = {what for what, message in said.items() if not message}
    unexpected = {what for what in accepted if not what.startswith((*FREE, *FREE_VALUES))}
    harmless = {"history", "events", "empty", "infinity", "NaN", "another text"}
    assert {what for what in unexpected if not harmless & set(what.replace("/", " ").replace(":", "").split())} == set()
    assert len(accepted) < 60, sorted(accepted)


def lengths(size: int) -> list[int]:
    """0, 1, within the magic, the header, the block and HDF5's superblock, around every power of two, near the end."""
    near = [2**k + more for k in range(1, 24) for more in (-1, 0, 1)]
    header = [8, 12, 16, 24, 55, 56, 57, 511, 512, 513, 519, 520, 521, 600]
    return sorted({n for n in [0, 1, *header, *near, size // 3, size // 2, size - 512, size - 2, size - 1] if n < size})


@pytest.mark.parametrize("name", ["v1.h5", "v1.state.h5"])
def test_every_length_class_of_truncation(name: str) -> None:
    data = (Path(__file__).resolve().parents[1] / "data" / name).read_bytes()
    for size in lengths(len(data)):
        with pytest.raises(CheckpointError, match=r"truncated|not a nicecp checkpoint"):
            decode(data[:size], "x.h5")
        if size > BLOCK_SIZE:  # and with a digest of what is left: HDF5 sees that it is not whole
            image = data[BLOCK_SIZE:size]
            with pytest.raises(CheckpointError, match=r"HDF5 part cannot be read|but not the bytes for it"):
                decode(block_for(image) + image, "x.h5")


def test_two_thousand_flipped_bits() -> None:
    """Anywhere in a state file: every one is noticed before HDF5 parses anything."""
    data = bytearray(kept_bytes())
    rng = np.random.default_rng(2)
    for at, bit in zip(rng.integers(0, len(data), FLIPS), rng.integers(0, 8, FLIPS), strict=True):
        data[at] ^= 1 << bit
        with pytest.raises(
            CheckpointError, match=r"SHA-256|first 512 bytes|not a nicecp|newer nicecp|follow the first"
        ):
            decode(bytes(data), "x.h5")
        data[at] ^= 1 << bit
    assert decode(bytes(data), "x.h5").attrs == kept().attrs


@pytest.mark.parametrize("version", [0, 2, 3, 2**32 - 1])
def test_other_versions_of_the_block(version: int) -> None:
    data = bytearray(kept_bytes())
    struct.pack_into("<I", data, 8, version)
    with pytest.raises(CheckpointError, match="newer nicecp" if version > 1 else "damaged"):
        decode(bytes(data), "x.h5")


def test_a_newer_format_of_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = kept()
    tree.attrs["/"]["format_version"] = 2
    tree.attrs["/new"] = {"x": 1}
    monkeypatch.setattr(checkpoint, "read_tree", lambda path: decode(encode(tree), path))
    with pytest.raises(CheckpointError, match=r"'x\.h5': written in checkpoint format 2 by a newer nicecp.*upgrade"):
        load("x.h5")


def test_the_magic_alone_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    for data in (b"NICECP\r\n", b"NICECP\r\n" + bytes(504), b"NICECP\r\n" + bytes(5000), b"NICECP\n" + bytes(5000)):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.h5': "):
            load(path)
    assert not is_checkpoint(path)

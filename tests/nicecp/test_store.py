"""The bytes of a checkpoint: what goes in comes out, damage and tricks are refused, a failing write leaves no trace."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import store
from nicecp.errors import CheckpointError, OutputError
from nicecp.files import write_bytes
from nicecp.store import Tree, decode, encode, read_tree, write_tree


def example() -> Tree:
    """Every type that the format has."""
    return Tree(
        attrs={
            "/": {"format": "nicecp", "format_version": 1},
            "/a/b": {"text": "héllo", "empty": "", "low": -(2**63), "high": 2**64 - 1, "x": 0.1, "nan": float("nan")},
            "/bare": {},
        },
        arrays={
            "/a/w": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
            "/a/b/v": np.array([np.nan, np.inf, -0.0, 1e-310]),
            "/n": np.array([-(2**63), 2**63 - 1]),
            "/bytes": np.frombuffer(b'{"k": 1}', np.uint8),
            "/none": np.zeros((0,)),
            "/names": store.strings(["a", "", "größe"]),
        },
    )


def same(one: Tree, two: Tree) -> None:
    """Equal to the last bit, but for groups that are only listed where they hold something."""
    first, second = (
        {path: sorted(attrs.items()) for path, attrs in tree.attrs.items() if attrs} for tree in (one, two)
    )
    assert repr(sorted(first.items())) == repr(sorted(second.items()))  # by repr, in which NaN equals NaN
    assert sorted(one.arrays) == sorted(two.arrays)
    for path, array in one.arrays.items():
        assert two.arrays[path].dtype == array.dtype, path
        assert two.arrays[path].shape == array.shape, path
        assert two.arrays[path].tobytes() == array.tobytes(), path


# --- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact() -> None:
    tree = example()
    back = decode(encode(tree), "x")
    same(tree, back)
    assert set(back.attrs) == {"/", "/a", "/a/b", "/bare"}
    assert [type(value) for value in back.attrs["/"].values()] == [str, int]


def test_same_tree_same_bytes() -> None:
    tree = example()
    attrs = {path: dict(reversed(values.items())) for path, values in reversed(tree.attrs.items())}
    assert encode(tree) == encode(Tree(attrs, dict(reversed(tree.arrays.items()))))


def test_user_block_is_as_documented() -> None:
    data = encode(example())
    assert data[:8] == b"NICECP\r\n"
    assert struct.unpack_from("<IIQ", data, 8) == (1, 512, len(data) - 512)
    assert data[24:56] == hashlib.sha256(data[512:]).digest()
    assert data[56:512] == bytes(456)
    assert data[512:520] == b"\x89HDF\r\n\x1a\n"


def test_plain_h5py_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_tree(path, example())
    with h5py.File(path) as file:
        assert file.userblock_size == 512
        np.testing.assert_array_equal(file["a/w"][()], example().arrays["/a/w"])
        assert file["a/b"].attrs["text"] == "héllo".encode()
        assert file["a/b"].attrs["high"] == 2**64 - 1
        assert file["names"][()].tolist() == [b"a", b"", "größe".encode()]
        assert file["a/w"].chunks is None
        # absolute positions: readers that know nothing of user blocks but base addresses find the data
        offset = file["a/w"].id.get_offset()
    raw = path.read_bytes()
    assert raw[offset : offset + 24] == example().arrays["/a/w"].tobytes()


def test_not_contiguous_and_big_endian_arrays_are_stored_by_value() -> None:
    array = np.arange(6.0).reshape(2, 3)
    back = decode(encode(Tree(arrays={"/t": array.T, "/e": array.astype(">f8")})), "x")
    np.testing.assert_array_equal(back.arrays["/t"], array.T)
    np.testing.assert_array_equal(back.arrays["/e"], array)
    assert back.arrays["/e"].dtype == np.dtype("<f8")


def test_text_that_utf8_or_padding_cannot_hold_is_escaped() -> None:
    back = decode(encode(Tree(attrs={"/": {"t": "a\0", "s": "\udcff"}})), "x")
    assert back.attrs["/"] == {"t": "a\\0", "s": "\\udcff"}


@pytest.mark.parametrize("array", [np.zeros(2, np.float16), np.zeros(2, complex), np.array(["a"]), np.array([None])])
def test_other_array_types_are_not_written(array: Any) -> None:
    with pytest.raises(TypeError, match="cannot be stored"):
        encode(Tree(arrays={"/x": array}))


def test_other_attribute_types_are_not_written() -> None:
    with pytest.raises(TypeError, match="got bool"):
        encode(Tree(attrs={"/": {"x": True}}))


@pytest.mark.parametrize(
    "tree",
    [
        Tree(attrs={"/": {str(number): number for number in range(65)}}),
        Tree(arrays=dict.fromkeys(map(str, range(20_001)), np.zeros(1))),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tree: Tree) -> None:
    with pytest.raises(CheckpointError, match="too many datasets or attributes"):
        encode(tree)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_changed_byte_of_the_user_block_is_refused() -> None:
    data = bytearray(encode(example()))
    for at in range(512):
        for flip in (0x01, 0x80, 0xFF):
            data[at] ^= flip
            with pytest.raises(CheckpointError):
                decode(bytes(data), "x")
            data[at] ^= flip
    decode(bytes(data), "x")


def test_random_bit_flips_are_refused() -> None:
    data = bytearray(encode(example()))
    rng = np.random.default_rng(1)
    for at, bit in zip(rng.integers(512, len(data), 500), rng.integers(0, 8, 500), strict=True):
        data[at] ^= 1 << bit
        with pytest.raises(CheckpointError, match="does not match its SHA-256"):
            decode(bytes(data), "x")
        data[at] ^= 1 << bit


def test_truncation_and_growth_are_refused(tmp_path: Path) -> None:
    data, path = encode(example()), tmp_path / "x.h5"
    for size in [0, 1, 7, 8, 9, 55, 56, 511, 512, 513, 1024, 4096, len(data) // 2, len(data) - 512, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError) as caught:
            read_tree(path)
        assert str(caught.value).startswith(repr(str(path)))
        assert "\n" not in str(caught.value)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="follow the first 512"):
        read_tree(path)


def test_a_newer_format_is_named_as_such() -> None:
    data = bytearray(encode(example()))
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(CheckpointError, match=r"'run.h5': written in checkpoint format 2 by a newer nicecp.*upgrade"):
        decode(bytes(data), "run.h5")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"x\.h5': already exists; allow it \(--overwrite"):
        write_tree(path, example())
    assert path.read_bytes() == b"old"
    write_tree(path, example(), overwrite=True)
    same(example(), read_tree(path))
    assert os.listdir(tmp_path) == ["x.h5"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fsync = tmp_path / "x.h5", os.fsync

    def appear(fd: int) -> None:
        path.write_bytes(b"theirs")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", appear)
    with pytest.raises(OutputError, match="already exists"):
        write_bytes(path, b"ours")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["x.h5"]


def test_modes_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.h5", tmp_path / "link.h5"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_bytes(link, [b"ne", b"w"], overwrite=True)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_order_of_the_steps_that_make_it_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents on disk before the name points at them, the name on disk before we say so."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(fd: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size}")
        fsync(fd)

    def watch_replace(source: str, target: str) -> None:
        assert os.path.dirname(source) == str(tmp_path)
        seen.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_bytes(tmp_path / "x", b"12345")
    assert seen == ["file of 5", "replace", "folder"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    write_tree(tmp_path / "x.h5", example())
    monkeypatch.undo()
    same(example(), read_tree(tmp_path / "x.h5"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        ("write", errno.ENOSPC, "No space left on device); free some space"),
        ("write", errno.EDQUOT, "free some space"),
        ("write", errno.EFBIG, "free some space"),
        ("fsync", errno.EIO, "Input/output error); check the folder"),
        ("replace", errno.EACCES, "Permission denied"),
        ("close", errno.EIO, "Input/output error"),
    ],
)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, text: str, overwrite: bool
) -> None:
    path = tmp_path / "x.h5"
    if overwrite:
        path.write_bytes(b"old")
    real, calls = getattr(os, call), []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if call == "close":
            real(*arguments)
        if len(calls) == 1 and call != "write":
            raise OSError(code, os.strerror(code))
        if call == "write" and len(calls) > 1:  # after some of it was written
            raise OSError(code, os.strerror(code))
        return real(arguments[0], arguments[1][:100]) if call == "write" else None

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError) as caught:
        write_tree(path, example(), overwrite)
    monkeypatch.undo()
    assert calls
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{str(path)!r}: cannot be written (")
    assert os.listdir(tmp_path) == (["x.h5"] if overwrite else [])
    assert not overwrite or path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "x", b"1")
    assert os.listdir(tmp_path) == []


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tree: Tree) -> bytes:
        raise MemoryError

    monkeypatch.setattr(store, "_image", fail)
    with pytest.raises(OutputError, match=r"cannot be written \(MemoryError\)"):
        write_tree(tmp_path / "x", example())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        folder = Path("/dev/fd")
    path = tmp_path / "x.h5"
    write_tree(path, example())
    read_tree(path)
    before = len(os.listdir(folder))
    for _ in range(3):
        write_tree(path, example(), overwrite=True)
        read_tree(path)
        with pytest.raises(CheckpointError):
            read_tree(tmp_path)
        with pytest.raises(OutputError):
            write_tree(path, example())
    assert len(os.listdir(folder)) == before

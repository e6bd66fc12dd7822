"""Files made on purpose, with a digest that is right, and paths that are no files: all are refused, in one line."""

from __future__ import annotations

import os
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import store
from nicecp.errors import CheckpointError, OutputError
from nicecp.store import Tree, block_for, decode, is_checkpoint, read_tree, write_tree


def framed(build: Callable[[h5py.File], object], **options: Any) -> bytes:
    """A file of any content with a user block that is right: what a hostile author can make."""
    with h5py.File("x", "w", driver="core", backing_store=False, userblock_size=512, **options) as file:
        build(file)
        file.flush()
        image = bytes(file.id.get_file_image())
    return block_for(image) + image


# --- what a right digest cannot excuse --------------------------------------------------------------------------------


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(".", "v", (3,))
    file.create_virtual_dataset("v", layout)


def _shared_type(file: h5py.File) -> None:
    file["t"] = np.dtype("f8")


def _deep(file: h5py.File) -> None:
    file.create_group("/".join("abcdefghijkl"))


def _hard_link_twice(file: h5py.File) -> None:
    file["a"] = np.zeros(3)
    file["b"] = file["a"]


def _cycle(file: h5py.File) -> None:
    file.create_group("a")["b"] = file["/"]


def _many(file: h5py.File) -> None:
    for number in range(store.MAX_MEMBERS + 1):
        file.create_group(str(number))


def _attribute_array(file: h5py.File) -> None:
    file.attrs["x"] = np.zeros(3)


def _attribute_text(file: h5py.File) -> None:
    file.attrs["x"] = "variable length"


def _attribute_empty(file: h5py.File) -> None:
    file.attrs["x"] = h5py.Empty("f8")


def _attribute_bool(file: h5py.File) -> None:
    file.attrs["x"] = np.bool_(True)


def _many_attributes(file: h5py.File) -> None:
    for number in range(store.MAX_ATTRIBUTES + 1):
        file.attrs[str(number)] = 1


def _attribute_not_utf8(file: h5py.File) -> None:
    file.attrs["x"] = np.bytes_(b"\xff\xfe")


def _dataset_attribute(file: h5py.File) -> None:
    file.create_dataset("x", data=np.zeros(3)).attrs["y"] = 1


def _unallocated(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 50,), "f8")


# What the file holds -> a part of the refusal, and how to make it.
TRICKS: dict[str, tuple[str, Callable[[h5py.File], object]]] = {
    "soft link": ("a soft or external link", lambda file: file.update({"x": h5py.SoftLink("/y")})),
    "external link": (
        "a soft or external link",
        lambda file: file.update({"x": h5py.ExternalLink("/etc/hosts", "/y")}),
    ),
    "hard links to one object": ("linked more than once", _hard_link_twice),
    "cycle": ("linked more than once", _cycle),
    "named type": ("neither a group nor a dataset", _shared_type),
    "virtual": ("virtual", _virtual),
    "external storage": (
        "stored in another file",
        lambda file: file.create_dataset("x", (3,), "u1", external=[("/etc/hosts", 0, 3)]),
    ),
    "chunked": ("chunked", lambda file: file.create_dataset("x", (3,), "f8", chunks=(1,))),
    "compressed": ("filtered", lambda file: file.create_dataset("x", data=np.zeros(99), compression="gzip")),
    "nothing stored": ("not the bytes", _unallocated),
    "big-endian": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, ">f8"))),
    "half": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, "f2"))),
    "int32": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, "i4"))),
    "uint64 array": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, "u8"))),
    "bool": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, bool))),
    "complex": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, complex))),
    "compound": ("a type that is not used", lambda file: file.create_dataset("x", data=np.zeros(3, [("a", "f8")]))),
    "variable-length text": ("a type that is not used", lambda file: file.create_dataset("x", data=["a", "b"])),
    "references": (
        "a type that is not used",
        lambda file: file.create_dataset("x", data=np.array([file.ref], h5py.ref_dtype)),
    ),
    "scalar": ("is not an array", lambda file: file.create_dataset("x", data=1.0)),
    "null space": ("is not an array", lambda file: file.create_dataset("x", data=h5py.Empty("f8"))),
    "too deep": ("too many levels", _deep),
    "too many members": ("too many levels or members", _many),
    "too many attributes": ("65 attributes", _many_attributes),
    "attribute array": ("attribute 'x' of a type", _attribute_array),
    "attribute of variable length": ("attribute 'x' of a type", _attribute_text),
    "attribute without value": ("attribute 'x' of a type", _attribute_empty),
    "bool attribute": ("attribute 'x' of a type", _attribute_bool),
    "attribute not UTF-8": ("cannot be read", _attribute_not_utf8),
    "attribute of a dataset": ("or attributes", _dataset_attribute),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_with_a_right_digest_are_refused(trick: str) -> None:
    text, build = TRICKS[trick]
    data = framed(build)
    with pytest.raises(CheckpointError) as caught:
        decode(data, "x.h5")
    assert text in str(caught.value)
    assert str(caught.value).startswith("'x.h5': ")
    assert "\n" not in str(caught.value)


def test_the_tricks_are_what_is_refused() -> None:
    def plain(file: h5py.File) -> None:
        file.create_dataset("x", data=np.zeros(3))
        file.attrs["y"] = np.bytes_("z")

    assert decode(framed(plain), "x.h5").attrs == {"/": {"y": "z"}}


def test_datasets_that_share_their_bytes_do_not_fill_the_memory() -> None:
    """The storage of one dataset entered into the headers of others: a small file with large arrays."""
    names, size = [f"x{number}" for number in range(20)], 1 << 16

    def build(file: h5py.File) -> None:
        for name in names:
            file.create_dataset(name, data=np.full(size if name == "x0" else 77, 7, np.uint8))

    data = framed(build)
    with h5py.File(h5py.h5f.open_file_image(data)) as file:
        offsets = [file[name].id.get_offset() - 512 for name in names]
    # Layout message, version 3, contiguous: address and size. Data space: length and largest length.
    image = data[512:].replace(struct.pack("<QQ", 77, 77), struct.pack("<QQ", size, size))
    for offset in offsets[1:]:
        layout = b"\x03\x01" + struct.pack("<QQ", offset, 77)
        assert image.count(layout) == 1
        image = image.replace(layout, b"\x03\x01" + struct.pack("<QQ", offsets[0], size))
    data = block_for(image) + image
    with h5py.File(h5py.h5f.open_file_image(data)) as file:
        assert file["x19"].id.get_storage_size() == size  # HDF5 would read it
    with pytest.raises(CheckpointError, match="but not the bytes for it"):
        decode(data, "x.h5")


def test_what_is_not_hdf5_at_all() -> None:
    image = b"not HDF5" * 100
    with pytest.raises(CheckpointError, match="HDF5 part cannot be read"):
        decode(block_for(image) + image, "x.h5")


# --- large files -----------------------------------------------------------------------------------------------------


def test_other_files_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would not end
    with pytest.raises(CheckpointError, match="not a nicecp checkpoint"):
        read_tree(path)


def test_a_large_file_with_the_right_block_is_refused_in_constant_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "big", 1 << 27
    header = struct.pack("<8sIIQ32s", b"NICECP\r\n", 1, 512, size, bytes(32))
    with path.open("wb") as file:
        file.write(header.ljust(512, b"\0"))
        file.truncate(512 + size)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_tree(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * (1 << 24)  # pieces of 2^24 bytes
    with path.open("r+b") as file:
        file.write(struct.pack("<8sIIQ32s", b"NICECP\r\n", 1, 512, 1 << 41, bytes(32)))
        file.truncate(512 + (1 << 41))
    with pytest.raises(CheckpointError, match="larger than 16 GiB"):
        read_tree(path)


# --- files that are not files -----------------------------------------------------------------------------------------


def test_reading_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        for path in [
            tmp_path,
            *(tmp_path / name for name in ("fifo", "loop", "socket", "absent")),
            "/dev/null",
            "a\0b",
        ]:
            with pytest.raises(CheckpointError) as caught:
                read_tree(path)
            assert str(caught.value).startswith(repr(str(path)))
            assert not is_checkpoint(path)


def test_is_checkpoint_looks_at_the_magic_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"NICECP\r\n damaged")
    assert is_checkpoint(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    assert not is_checkpoint(path)


@pytest.mark.parametrize("name", ["folder", "fifo", "device", "loop", "no/such/folder/x", "a\0b", "x" * 300])
def test_writing_to_what_cannot_be_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError) as caught:
        write_tree(tmp_path / name, Tree(arrays={"/x": np.zeros(3)}), overwrite=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(repr(str(tmp_path / name)))
    assert sorted(os.listdir(tmp_path)) == before

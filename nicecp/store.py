"""Groups, attributes and arrays as the bytes of one HDF5 file whose user block holds a SHA-256 of all the rest.

Knows nothing of flows: docs/checkpoint.md describes the format, nicecp.schema gives the names their meaning.
Reading trusts nothing: the digest is verified before HDF5 sees a byte (so damage never reaches it), and of what it
then finds only hard-linked groups and contiguous, unfiltered, internal datasets of a few types are accepted (so that
a file made on purpose can do no more than be read or be refused).
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nicecp import probe
from nicecp.errors import CheckpointError, about_file
from nicecp.files import find_target, opened, reason, reporting, write_bytes

Attribute = int | float | str

MAGIC = b"NICECP\r\n"  # the line end shows a transfer in text mode, as PNG's signature does
BLOCK_VERSION = 1
BLOCK_SIZE = 512  # HDF5 looks for its own signature at 0, 512, 1024, 2048, ...
_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, size of this block, length and SHA-256 of what follows it

MAX_FILE = 1 << 34  # bytes
MAX_DEPTH = 8  # groups below the root
MAX_MEMBERS = 4096  # links of one group
MAX_OBJECTS = 40_000  # seconds to walk through
MAX_ATTRIBUTES = 64  # of one group
MAX_STRING = 1 << 15  # bytes of one string: HDF5 holds attributes below 64 KiB

DAMAGED = "use another copy of the file"
_CHUNK = 1 << 24  # bytes hashed by one call


@dataclass
class Tree:
    """The content of a file.

    attrs : path of a group, "/" or "/model/couplings/0", to its attributes; ``decode`` lists every group here, also
        those without attributes. On disk int is int64 (uint64 above 2^63 - 1), float is float64, str is fixed-length
        UTF-8 padded with zero bytes.
    arrays : path of a dataset to its array, of dtype float32, float64, int64, uint8 or S (fixed-length bytes).
    """

    attrs: dict[str, dict[str, Attribute]] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def encode(tree: Tree) -> bytes:
    """The whole file: user block and HDF5 image. The same tree gives the same bytes (with the same HDF5 library)."""
    image = _image(tree)
    return block_for(image) + image


def block_for(image: bytes) -> bytes:
    """The 512-byte user block that belongs in front of an image."""
    header = _HEADER.pack(MAGIC, BLOCK_VERSION, BLOCK_SIZE, len(image), hashlib.sha256(image).digest())
    return header.ljust(BLOCK_SIZE, b"\0")


def _image(tree: Tree) -> bytes:
    """HDF5's part of the file: oldest format (HDF5 1.0 and every later reader), no times, contiguous, unfiltered."""
    if len(tree.arrays) > MAX_OBJECTS // 2 or any(len(attrs) > MAX_ATTRIBUTES for attrs in tree.attrs.values()):
        raise CheckpointError(about_file("checkpoint", "too many datasets or attributes to be read again", "not saved"))
    # The core driver grows its buffer by this much at a time: small steps cost a second per 300 MB.
    step = 1 << 26 if sum(array.nbytes for array in tree.arrays.values()) > 1 << 22 else 1 << 16
    options = {"driver": "core", "backing_store": False, "block_size": step, "userblock_size": BLOCK_SIZE}
    with h5py.File("image", "w", libver=("earliest", "v108"), **options) as file:
        for path, attrs in sorted(tree.attrs.items()):
            group = file.require_group(path)
            for name, value in sorted(attrs.items()):
                group.attrs.create(name, _labelled(_attribute(value)))
        for path, array in sorted(tree.arrays.items()):
            file.create_dataset(path, data=_labelled(_storable(path, array)), track_times=False)
        file.flush()
        return bytes(file.id.get_file_image())


def _labelled(array: NDArray[Any]) -> NDArray[Any]:
    """Byte strings marked as UTF-8 for HDF5; other arrays as they are."""
    return array.astype(h5py.string_dtype("utf-8", array.dtype.itemsize)) if array.dtype.kind == "S" else array


def _attribute(value: Attribute) -> NDArray[Any]:
    """A scalar array as it is stored."""
    if isinstance(value, str):
        return _fixed(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"an attribute must be int, float or str, got {type(value).__name__}")
    if isinstance(value, float):
        return np.array(value, "<f8")
    return np.array(value, "<u8" if value > 2**63 - 1 else "<i8")


def _fixed(text: str) -> NDArray[Any]:
    """Text as a fixed-length string. What UTF-8 or zero padding cannot hold is written as a backslash escape."""
    data = text.replace("\0", "\\0").encode("utf-8", "backslashreplace")
    if len(data) > MAX_STRING:
        raise CheckpointError(about_file(text[:40], f"a text of {len(data)} bytes", f"at most {MAX_STRING} are stored"))
    return np.array(data, f"S{max(1, len(data))}")


def strings(texts: Sequence[str]) -> NDArray[Any]:
    """(k,) fixed-length byte strings, UTF-8, as wide as the longest."""
    rows = [_fixed(text) for text in texts]
    return np.array(rows, f"S{max([1, *(row.dtype.itemsize for row in rows)])}")


def _storable(path: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array C-contiguous, little-endian and of a type that the format has."""
    if array.dtype.kind == "S" and 0 < array.dtype.itemsize <= MAX_STRING:
        return np.ascontiguousarray(array)
    dtype = array.dtype.newbyteorder("<")
    if dtype.str not in ("<f4", "<f8", "<i8", "|u1"):
        raise TypeError(f"{path}: an array of dtype {array.dtype} cannot be stored")
    return np.ascontiguousarray(array, dtype)


# --- bytes in ---------------------------------------------------------------------------------------------------------


def decode(data: bytes, name: str | os.PathLike[str]) -> Tree:
    """The tree in a file's bytes; ``name`` is the file in messages. CheckpointError if anything is not as written."""
    _check_block(data[:BLOCK_SIZE], len(data), name)
    _check_digest(data[:BLOCK_SIZE], hashlib.sha256(memoryview(data)[BLOCK_SIZE:]).digest(), name)
    try:
        with h5py.File(h5py.h5f.open_file_image(data)) as file:
            walk = _Walk(name, len(data))
            walk.group(h5py.h5g.open(file.id, b"/"), "/", 0)
            return walk.result
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError) as error:
        problem = f"its HDF5 part cannot be read ({reason(error)})"
        raise CheckpointError(about_file(name, problem, DAMAGED)) from error


def _check_block(block: bytes, size: int, name: str | os.PathLike[str]) -> None:
    """All of the user block but the digest, against the file's size."""
    if not block.startswith(MAGIC):
        remedy = "expected a file written by `nicecp train` or NICE.save"
        raise CheckpointError(about_file(name, "not a nicecp checkpoint", remedy))
    if len(block) < BLOCK_SIZE:
        raise CheckpointError(about_file(name, f"truncated: only {size} bytes", DAMAGED))
    _, version, block_size, length, _ = _HEADER.unpack_from(block)
    if version > BLOCK_VERSION:
        raise CheckpointError(newer(name, version, BLOCK_VERSION))
    if version != BLOCK_VERSION or block_size != BLOCK_SIZE or any(block[_HEADER.size :]):
        raise CheckpointError(about_file(name, "damaged: its first 512 bytes are not as written", DAMAGED))
    if length != size - BLOCK_SIZE:
        problem = f"truncated or damaged: {size - BLOCK_SIZE} bytes follow the first 512, not {length}"
        raise CheckpointError(about_file(name, problem, DAMAGED))
    if size > MAX_FILE:
        raise CheckpointError(about_file(name, f"larger than {MAX_FILE >> 30} GiB", "expected a smaller file"))


def _check_digest(block: bytes, digest: bytes, name: str | os.PathLike[str]) -> None:
    if _HEADER.unpack_from(block)[4] != digest:
        raise CheckpointError(about_file(name, "damaged: its content does not match its SHA-256", DAMAGED))


def newer(name: str | os.PathLike[str], version: int, known: int) -> str:
    """The message for a file of a later format."""
    problem = f"written in checkpoint format {version} by a newer nicecp; this one reads formats up to {known}"
    return about_file(name, problem, "upgrade with `pip install -U nicecp`")


def go_through(path: str) -> None:
    """All that ``decode`` does with a file but for the digest and the numbers, for nicecp.probe's child."""
    with h5py.File(path, "r", locking="best-effort") as file:
        _Walk(path, os.path.getsize(path), numbers=False).group(h5py.h5g.open(file.id, b"/"), "/", 0)


class _Walk:
    """Collects a file's tree, refusing all that the format does not use before reading any of it."""

    def __init__(self, name: str | os.PathLike[str], size: int, numbers: bool = True) -> None:
        self.name, self.numbers = name, numbers
        self.unread = size  # datasets may not add up to more than the file: storage can be shared by many of them
        self.addresses: set[int] = set()
        self.result = Tree()

    def refuse(self, path: str, problem: str) -> CheckpointError:
        return CheckpointError(about_file(self.name, f"{path!r} {problem}", "expected a file written by nicecp"))

    def group(self, group: Any, path: str, depth: int) -> None:
        self.result.attrs[path] = self.attributes(group, path)
        if depth > MAX_DEPTH or group.get_num_objs() > MAX_MEMBERS:
            raise self.refuse(path, "has too many levels or members")
        for raw in list(group):
            member = ("" if path == "/" else path) + "/" + raw.decode("utf-8", "backslashreplace")
            if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                raise self.refuse(member, "is a soft or external link")
            info = h5py.h5o.get_info(group, raw)
            # One link per object: cycles and many names for one object have no place here.
            if info.addr in self.addresses or info.rc != 1 or len(self.addresses) >= MAX_OBJECTS:
                raise self.refuse(member, "is linked more than once, or one object too many")
            self.addresses.add(info.addr)
            if info.type == h5py.h5o.TYPE_GROUP:
                self.group(h5py.h5g.open(group, raw), member, depth + 1)
            elif info.type == h5py.h5o.TYPE_DATASET:
                self.result.arrays[member] = self.dataset(h5py.h5d.open(group, raw), member)
            else:
                raise self.refuse(member, "is neither a group nor a dataset")

    def attributes(self, group: Any, path: str) -> dict[str, Attribute]:
        count = h5py.h5a.get_num_attrs(group)
        if count > MAX_ATTRIBUTES:
            raise self.refuse(path, f"has {count} attributes")
        values: dict[str, Attribute] = {}
        for index in range(count):
            attribute = h5py.h5a.open(group, index=index)
            key = attribute.name.decode("utf-8", "backslashreplace")
            dtype = _dtype(attribute.get_type())
            if dtype is None or attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
                raise self.refuse(path, f"has an attribute {key!r} of a type that is not used here")
            value = np.empty((), dtype)
            attribute.read(value, mtype=attribute.get_type())
            values[key] = value.item().decode("utf-8") if dtype.kind == "S" else value.item()
        return values

    def dataset(self, dataset: Any, path: str) -> NDArray[Any]:
        creation = dataset.get_create_plist()
        if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_nfilters() or creation.get_external_count():
            raise self.refuse(path, "is chunked, filtered, virtual or stored in another file")
        dtype, space = _dtype(dataset.get_type()), dataset.get_space()
        if dtype is None or dtype == np.uint64 or h5py.h5a.get_num_attrs(dataset):
            raise self.refuse(path, "has a type that is not used here, or attributes")
        if space.get_simple_extent_type() != h5py.h5s.SIMPLE:
            raise self.refuse(path, "is not an array")
        shape = tuple(int(length) for length in space.get_simple_extent_dims())
        size = math.prod(shape, start=dtype.itemsize)
        if size > self.unread or dataset.get_storage_size() != size:
            raise self.refuse(path, f"has shape {shape} but not the bytes for it")
        self.unread -= size
        array = np.empty(shape if self.numbers else 0, dtype)
        if size and self.numbers:
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array, mtype=dataset.get_type())
        return array


def _dtype(kind: Any) -> np.dtype[Any] | None:
    """NumPy's name for one of the HDF5 types of the format, None for all others."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        if kind.is_variable_str() or kind.get_strpad() != h5py.h5t.STR_NULLPAD or kind.get_size() > MAX_STRING:
            return None
        return np.dtype(f"S{kind.get_size()}")
    numbers = {"IEEE_F32LE": "<f4", "IEEE_F64LE": "<f8", "STD_I64LE": "<i8", "STD_U64LE": "<u8", "STD_U8LE": "u1"}
    return next((np.dtype(dtype) for name, dtype in numbers.items() if kind == getattr(h5py.h5t, name)), None)


# --- files ------------------------------------------------------------------------------------------------------------


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file begins with the magic; False for all else, also for what cannot be opened."""
    try:
        with opened(path) as fd:
            return os.read(fd, len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """The tree in a file. CheckpointError, one line, for all that can be wrong with a file."""
    try:
        with opened(path) as fd:
            data = _read(fd, path)
        # The digest shows damage, not what somebody made on purpose: that could still hang or crash HDF5.
        if not probe.passes(os.fspath(path)):
            raise CheckpointError(about_file(path, "its HDF5 part cannot be read in time", DAMAGED))
        return decode(data, path)
    except CheckpointError:
        raise
    except (OSError, MemoryError, ValueError) as error:  # ValueError: a zero byte in the name
        problem, remedy = f"cannot be read ({reason(error)})", "check the path and its permissions"
        raise CheckpointError(about_file(path, problem, remedy)) from error


def _read(fd: int, name: str | os.PathLike[str]) -> bytes:
    """The whole file, after a pass that verifies its block and digest in constant memory: a large file that is not
    a checkpoint must not fill the memory first."""
    size, block = os.fstat(fd).st_size, os.pread(fd, BLOCK_SIZE, 0)
    _check_block(block, size, name)
    digest, at = hashlib.sha256(), BLOCK_SIZE
    while piece := os.pread(fd, _CHUNK, at):
        digest.update(piece)
        at += len(piece)
    _check_digest(block, digest.digest(), name)
    pieces, at = [], 0
    while at < size and (piece := os.pread(fd, size - at, at)):  # one piece below 2 GiB, and then no copy
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def write_tree(path: str | os.PathLike[str], tree: Tree, overwrite: bool = False) -> None:
    """Write a tree to a file, whole or not at all (see nicecp.files.write_bytes). Raises OutputError."""
    with reporting(path):
        find_target(path, overwrite)  # before the work of building the image
        image = _image(tree)
        write_bytes(path, (block_for(image), image), overwrite)  # not joined: that would copy a large image once more

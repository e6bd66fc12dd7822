"""Other people's formats to the HDF5 layout that training reads: drawn digits, text tables, MNIST's idx files.

Data go through in blocks, so that memory does not grow with the file. The output appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import h5py
import numpy as np
from numpy.typing import NDArray

from nicecp.csv_text import Table, text_blocks
from nicecp.errors import DataError, OutputError, about_file
from nicecp.files import reason, write_bytes
from nicecp.hdf5_open import check_regular, one_line
from nicecp.outputs import check_output
from nicecp.sources import check_finite, check_size
from nicecp.unpacking import check_unpacked

BLOCK_BYTES = 2**22  # read and written at a time
_CHUNK_BYTES = 2**18  # of the datasets
_IN_MEMORY = 2**26  # an output up to this size is built in memory, a larger one in an unnamed file
_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


@dataclass
class Written:
    """What a conversion wrote: shapes by dataset, the images' shape or the columns' names where there are any."""

    path: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    image_shape: tuple[int, ...] | None = None
    columns: tuple[str, ...] | None = None
    verified: tuple[str, ...] = ()  # files whose published checksum was found to be right


# --- the output -----------------------------------------------------------------------------------------


class _Spool(io.RawIOBase):
    """The file that HDF5 writes to while the output is being built.

    HDF5 may crash the process when a write fails (a full disk). Here the first failure is kept, HDF5 hears of none,
    and whoever finishes the output raises it.
    """

    def __init__(self, folder: str) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=folder)  # noqa: SIM115 closed in close
        self.failure: OSError | MemoryError | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                self.file.write(data)
            except (OSError, MemoryError) as error:
                self.failure = error
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.file.seek(offset, whence)
        return self.file.tell()

    def tell(self) -> int:
        return self.file.tell()

    def truncate(self, size: int | None = None) -> int:
        if self.failure is None:
            try:
                self.file.truncate(size)
            except (OSError, MemoryError) as error:
                self.failure = error
        return self.file.tell() if size is None else size

    def flush(self) -> None:
        """Nothing is fsynced before the end."""

    def close(self) -> None:
        self.file.close()
        super().close()

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class _Pieces(Sequence[bytes]):
    """The spool's content as a sequence of pieces."""

    def __init__(self, spool: _Spool) -> None:
        self._spool, self._size = spool, spool.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return -(-self._size // BLOCK_BYTES)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._spool.seek(index * BLOCK_BYTES)
        return self._spool.file.read(min(BLOCK_BYTES, self._size - index * BLOCK_BYTES))


@contextlib.contextmanager
def new_file(path: str, overwrite: bool, inputs: Sequence[str] = ()) -> Iterator[h5py.File]:
    """A new HDF5 file to fill; it takes its place when the block ends without an exception."""
    check_output(path, overwrite, *inputs)
    folder = os.path.dirname(os.path.realpath(path))
    try:
        with contextlib.closing(_Spool(folder)) as spool:
            file = h5py.File(spool, "w", libver=("v108", "v108"))  # earlier formats limit attributes to 64 KiB
            try:
                try:
                    yield file
                finally:
                    file.close()
            except RuntimeError:
                spool.check()  # after a failed write HDF5 reads nonsense: the write is to be reported
                raise
            spool.check()
            write_bytes(path, _Pieces(spool), overwrite)
    except OSError as error:
        remedy = "free some space, or check the folder"
        raise OutputError(about_file(path, f"cannot be written ({reason(error)})", remedy)) from None


def new_dataset(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, grow: bool = False, compress: bool = False
) -> h5py.Dataset:
    row_bytes = np.dtype(dtype).itemsize
    for size in shape[1:]:
        row_bytes *= size
    rows = max(1, _CHUNK_BYTES // row_bytes)
    return file.create_dataset(
        name,
        shape,
        dtype,
        maxshape=(None, *shape[1:]) if grow else shape,
        chunks=(rows if grow else min(rows, shape[0]), *shape[1:]),
        compression="gzip" if compress else None,
        compression_opts=4 if compress else None,
    )


def _append(dataset: h5py.Dataset, block: NDArray[Any]) -> None:
    """block : (k, d) behind the rows that are there."""
    n = dataset.shape[0]
    dataset.resize(n + len(block), axis=0)
    dataset[n:] = block


# --- drawn digits ---------------------------------------------------------------------------------------


def write_demo(path: str | os.PathLike[str], overwrite: bool = False) -> Written:
    """Write the drawn digits: train (12000, 784), test (2000, 784) and their labels, the data of ``--data demo``.

    Raises OutputError if the file exists (unless ``overwrite``) or cannot be written.
    """
    from nicecp.data import DEMO_TEST, DEMO_TRAIN
    from nicecp.digits import draw_digits

    result = Written(os.fspath(path), image_shape=(28, 28))
    with new_file(result.path, overwrite) as file:
        for name, first, n in (("train", 0, DEMO_TRAIN), ("test", DEMO_TRAIN, DEMO_TEST)):
            images, labels = draw_digits(n, first=first)
            new_dataset(file, name, images.shape, "uint8", compress=True)[...] = images
            new_dataset(file, name + "_labels", labels.shape, "uint8", compress=True)[...] = labels
            result.shapes |= {name: images.shape, name + "_labels": labels.shape}
        file.attrs["image_shape"] = np.array([28, 28])
    return result


# --- text tables ----------------------------------------------------------------------------------------


class _Gzip(gzip.GzipFile):
    """Says how much it unpacks to before that is much more than the file."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        check_unpacked(str(self.name), self.tell())
        return data


@contextlib.contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """A regular file, unpacked on the way if it is gzip; what the system or gzip says becomes a DataError."""
    check_regular(path)
    try:
        with open(path, "rb") as raw:
            magic = raw.read(2)
            raw.seek(0)
            if magic == b"\x1f\x8b":
                with _Gzip(fileobj=raw) as unpacked:
                    yield cast(BinaryIO, unpacked)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"its gzip data are truncated or damaged ({one_line(error)})"
        raise DataError(about_file(path, problem, "copy or download it again")) from None
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or one_line(error)})"
        raise DataError(about_file(path, problem, "check the file and the disk")) from None


def csv_to_hdf5(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    dataset: str = "train",
) -> Written:
    """Convert a text table (or its .gz) to a dataset (rows, columns) float64 with the attribute ``columns``.

    Parameters
    ----------
    delimiter : ',', ';', tab, ' ' (any white space), or None to look at the first lines
    header : whether the first line names the columns; None: it does if not one of its cells is a number
        Lines that begin with '#' are skipped; the last one before the table may name the columns.

    Raises DataError, with line and column (from 1) of the first cell that is not a finite number; also for tables
    without rows or with one column, and lines of another length. OutputError: ``path`` exists or cannot be written.
    """
    name, target = os.fspath(source), os.fspath(path)
    check_regular(name)
    if not dataset.strip("/") or "." in dataset.split("/") or "\0" in dataset:
        raise DataError(f"{dataset!r} is no name of a dataset; use letters, such as train")
    result = Written(target)
    with new_file(target, overwrite, [name]) as file, reading(name) as stream:
        table = Table(name, delimiter, header)
        out: h5py.Dataset | None = None
        for first_line, lines in text_blocks(name, stream, BLOCK_BYTES):
            block = table.parse(lines, first_line)
            if not len(block):
                continue
            if out is None:
                check_size(name, len(block), block.shape[1])
                out = new_dataset(file, dataset, (0, block.shape[1]), "float64", grow=True)
            _append(out, block)
        if out is None:
            raise DataError(about_file(name, "it has no rows of numbers", "give a table with at least one row"))
        if table.columns is not None:
            out.attrs["columns"] = np.array([text.encode()[:200] for text in table.columns], np.bytes_)
            result.columns = table.columns
        result.shapes[dataset] = out.shape
    return result


# --- idx ------------------------------------------------------------------------------------------------


def _idx_header(name: str, stream: BinaryIO) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of an idx file: 0, 0, type, rank, then big-endian sizes. Source: yann.lecun.com/exdb/mnist."""
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not 1 <= head[3] <= 8:
        remedy = "give files such as train-images-idx3-ubyte.gz"
        raise DataError(about_file(name, "it is not an idx file", remedy))
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise DataError(about_file(name, "the file is truncated", "copy or download it again"))
    return np.dtype(_IDX_TYPES[head[2]]).newbyteorder(">"), struct.unpack(f">{head[3]}I", sizes)


def _idx_role(name: str, shape: tuple[int, ...]) -> str:
    """'train', 'valid', 'test', with '_labels' for rank 1: the part is read off the file's name."""
    stem = os.path.basename(name).lower()
    part = "test" if "t10k" in stem or "test" in stem else "valid" if "valid" in stem else "train"
    return part if len(shape) > 1 else part + "_labels"


def idx_to_hdf5(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    overwrite: bool = False,
) -> Written:
    """Convert idx files (MNIST's format, also .gz), or a folder of them, to train, valid, test and their labels.

    Files whose name contains t10k or test become ``test``, those with valid ``valid``, all others ``train``; rank 1
    becomes ``..._labels``. Images are written as (n, height * width) with the attribute image_shape.

    Raises DataError for files that are not idx, truncated, too long, or do not fit together, OutputError as above.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    names: list[str] = []
    for item in (os.fspath(one) for one in given):
        if os.path.isdir(item):
            found = sorted(f for f in os.listdir(item) if "-idx" in f or ".idx" in f)
            if not found:
                raise DataError(about_file(item, "the folder has no idx files", "give the files by name"))
            names += [os.path.join(item, f) for f in found]
        else:
            names.append(item)
    if not names:
        raise ValueError("expected at least one idx file, got none")
    for name in names:
        check_regular(name)
    result = Written(os.fspath(path))
    origin: dict[str, str] = {}
    with new_file(result.path, overwrite, names) as file:
        for name in names:
            with reading(name) as stream:
                dtype, shape = _idx_header(name, stream)
                role = _idx_role(name, shape)
                if role in origin:
                    problem = f"it and {origin[role]!r} are both {role!r}"
                    raise DataError(about_file(name, problem, "give one of them (names with t10k or test are test)"))
                origin[role] = name
                result.shapes[role] = _copy_idx(file, role, name, stream, dtype, shape)
            if len(shape) > 2:
                if result.image_shape not in (None, shape[1:]):
                    problem = f"its images are {shape[1:]}, the others {result.image_shape}"
                    raise DataError(about_file(name, problem, "convert files of one shape together"))
                result.image_shape = shape[1:]
        for role, (n, *_) in result.shapes.items():
            images = result.shapes.get(role.removesuffix("_labels"))
            if images is not None and images[0] != n:
                problem = f"it has {n} labels for {images[0]} images"
                raise DataError(about_file(origin[role], problem, "give the labels that belong to the images"))
        if not any(role in result.shapes for role in ("train", "test", "valid")):
            raise DataError(about_file(names[0], "it holds labels only", "give the images too"))
        if result.image_shape is not None:
            file.attrs["image_shape"] = np.array(result.image_shape)
    return result


def _copy_idx(
    file: h5py.File, role: str, name: str, stream: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The numbers behind the header, in blocks of whole rows -> the shape that was written."""
    width = 1
    for size in shape[1:]:
        width *= size
    check_size(name, shape[0], width if len(shape) > 1 else 2)
    flat = (shape[0], width) if len(shape) > 1 else shape
    out = new_dataset(file, role, flat, dtype.newbyteorder("=").name, compress=dtype.itemsize == 1)
    row_bytes = width * dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        data = stream.read((stop - start) * row_bytes)
        if len(data) < (stop - start) * row_bytes:
            problem = f"it ends after {start + len(data) // row_bytes} of {shape[0]} rows"
            raise DataError(about_file(name, problem, "copy or download it again"))
        block = np.frombuffer(data, dtype).reshape(stop - start, *flat[1:])
        if block.ndim == 2:  # labels have one axis
            check_finite(block, start, name, None)
        out[start:stop] = block
    if stream.read(1):
        raise DataError(about_file(name, "it is longer than its header says", "copy or download it again"))
    return flat

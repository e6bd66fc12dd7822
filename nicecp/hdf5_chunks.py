"""Chunks of an HDF5 dataset: every one is there, and unpacks to as many bytes as it should.

HDF5 does not look: what a chunk lacks, because it is stored short or its deflate or LZF stream ends early, it hands out
as memory that nobody wrote, bits of other data of the process.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from h5py._objects import phil
from numpy.typing import NDArray

FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
COMPRESSORS = {h5py.h5z.FILTER_DEFLATE: "gzip", h5py.h5z.FILTER_LZF: "lzf"}
MAX_FILTERS = 4
MAX_CHUNK_BYTES = 2**27  # unpacking takes several times as much
# A table of two dimensions that is larger than this must not be packed to less than a part of it: pictures and numbers
# pack to a half or a tenth, and a file of some kilobytes must not cost a minute.
SUSPICIOUS_BYTES, MAX_RATIO = 2**26, 256
MAX_CHUNKS = 2**18  # half a second to go through; 256 GB in chunks of 1 MB
_CACHE_BYTES = 2**26  # of unpacked chunks that are kept
_DEFLATE = h5py.h5z.FILTER_DEFLATE
_CHECKSUM = 4  # bytes that the fletcher32 filter adds


class Unusable(Exception):
    """Why a dataset cannot be used: (problem, remedy)."""


class Chunks:
    """The chunks of a dataset as its index lists them.

    Those of gzip are unpacked here by ``read`` (``direct``), since their length can only be seen in this way and to
    unpack them once more would cost as much again. Before HDF5 reads others, ``verify`` looks at them.

    Raises Unusable: too large, too many, missing, of a wrong size, or behind filters that are not read.
    """

    def __init__(
        self,
        dataset: Any,
        shape: Sequence[int],
        lengths: Sequence[int],
        dtype: np.dtype[Any],
        as_stored: bool = False,
    ) -> None:
        """dataset : h5py.h5d.DatasetID of this shape, without a 0, in chunks of these lengths; read as this dtype.

        as_stored : the dtype is that of the bytes in the file, whatever HDF5 calls it.
        """
        self._dataset, self._shape, self._lengths, self._dtype = dataset, tuple(shape), tuple(lengths), dtype
        self.bytes = math.prod(lengths) * (dtype.itemsize if as_stored else dataset.get_type().get_size())
        if self.bytes > MAX_CHUNK_BYTES:
            problem = f"its chunks of {self.bytes / 2**20:.0f} MiB are larger than {MAX_CHUNK_BYTES // 2**20} MiB"
            raise Unusable(problem, "store it in chunks of about 1 MiB")
        self._grid = tuple(-(-size // length) for size, length in zip(shape, lengths, strict=True))
        count = math.prod(self._grid)
        if count > MAX_CHUNKS:
            raise Unusable(f"it has {count} chunks, more than {MAX_CHUNKS}", "store it in chunks of about 1 MiB")
        self._filters = filters_of(dataset)
        self._verified = np.zeros(self._grid[0], bool)
        plain = self._filters in ((_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE, _DEFLATE))
        if as_stored:
            self.direct = plain or not self._filters
        else:
            self.direct = plain and dataset.get_type() == h5py.h5t.py_create(dtype)
        self._unpacked: tuple[int, dict[tuple[int, ...], NDArray[Any]]] = (-1, {})  # the row of chunks read last
        self._list_chunks(count)

    def _list_chunks(self, count: int) -> None:
        """One pass through the index: where every chunk is, how long, and which filters it skips."""
        sizes, masks = np.full(count, -1, np.int64), np.zeros(count, np.int64)
        strange: list[Any] = []

        def note(chunk: Any) -> int | None:
            place = 0
            for offset, length, cells in zip(chunk.chunk_offset, self._lengths, self._grid, strict=True):
                cell, rest = divmod(int(offset), length)
                if rest or cell >= cells:
                    strange.append(chunk.chunk_offset)
                    return 1  # no more of them
                place = place * cells + cell
            if sizes[place] >= 0:
                strange.append(chunk.chunk_offset)
                return 1
            sizes[place], masks[place] = chunk.size, chunk.filter_mask
            return None

        if self._dataset.get_num_chunks():
            self._dataset.chunk_iter(note)
        if strange:
            raise Unusable(f"its index lists a chunk {tuple(strange[0])} that cannot be", "copy or download it again")
        missing = int((sizes < 0).sum())
        if missing:
            raise Unusable(f"only {count - missing} of its {count} chunks were ever written", "write the file again")
        whole, stored = self.bytes * count, int(sizes.sum())
        if len(self._shape) > 1 and whole > SUSPICIOUS_BYTES and whole > MAX_RATIO * stored:
            problem = f"its {whole >> 20} MiB are packed into {stored / 2**20:.2g} MiB: hardly anything but repetitions"
            raise Unusable(problem, "unpack it if you trust it (h5repack -f NONE)")
        self._masks = masks
        for place in np.flatnonzero(~self._plausible(sizes)):
            problem = f"chunk {self._name(int(place))} is stored in {sizes[place]} bytes"
            raise Unusable(problem, "copy or download the file again")

    def _plausible(self, sizes: Any) -> Any:
        """Which chunks have a possible size: exactly what it must be without a compressor."""
        checksums = np.zeros(len(sizes), np.int64)
        packed = np.zeros(len(sizes), bool)
        for number, code in enumerate(self._filters):
            used = (self._masks >> number & 1) == 0
            checksums += _CHECKSUM * (used & (code == h5py.h5z.FILTER_FLETCHER32))
            packed |= used & (code in COMPRESSORS)
        exact = self.bytes + checksums
        return np.where(packed, (sizes > 0) & (sizes <= exact + exact // 8 + 4096), sizes == exact)

    def _name(self, place: int) -> tuple[int, ...]:
        cells = np.unravel_index(place, self._grid)
        return tuple(int(cell) * length for cell, length in zip(cells, self._lengths, strict=True))

    def read(self, out: NDArray[Any], start: int, stop: int) -> None:
        """Rows start..stop-1 into out : (stop - start, *shape[1:]); where ``direct``. Unusable for damaged chunks."""
        length = self._lengths[0]
        for row in range(start // length, -(-stop // length)):
            first, last = max(start, row * length), min(stop, (row + 1) * length)
            unpacked = self._unpacked  # once: another thread may be reading other rows
            if unpacked[0] != row:
                unpacked = self._unpacked = (row, {})
            kept = unpacked[1]
            for cells in itertools.product(*(range(cells) for cells in self._grid[1:])):
                block = kept.get(cells)
                if block is None:
                    block = self._unpack((row, *cells))
                    # a single one across is kept however large: next rows would unpack it again
                    if math.prod(self._grid[1:]) * self.bytes <= max(_CACHE_BYTES, self.bytes):
                        kept[cells] = block
                sides = zip(cells, self._lengths[1:], self._shape[1:], strict=True)
                places = [slice(cell * side, min((cell + 1) * side, size)) for cell, side, size in sides]
                inside = [slice(0, place.stop - place.start) for place in places]
                part = block[(slice(first - row * length, last - row * length), *inside)]
                out[(slice(first - start, last - start), *places)] = part

    def _unpack(self, cells: tuple[int, ...]) -> NDArray[Any]:
        """One chunk : lengths, of gzip with or without shuffle, or without filters."""
        place = int(np.ravel_multi_index(cells, self._grid))
        offset = self._name(place)
        mask, raw = self._raw(offset)
        deflate = len(self._filters) - 1  # the last one, if there is any
        try:
            data = raw if deflate < 0 or mask >> deflate & 1 else zlib.decompressobj().decompress(raw, self.bytes + 1)
        except zlib.error as error:
            raise Unusable(f"chunk {offset} cannot be unpacked ({error})", "copy or download the file again") from None
        if len(data) != self.bytes:
            problem = f"chunk {offset} unpacks to {len(data)} bytes instead of {self.bytes}"
            raise Unusable(problem, "copy or download the file again")
        if deflate > 0 and not mask & 1:  # shuffle: first the first bytes of all numbers, then the second ones, ...
            data = np.frombuffer(data, np.uint8).reshape(self._dtype.itemsize, -1).T.tobytes()
        return np.frombuffer(data, self._dtype).reshape(self._lengths)

    def _raw(self, offset: tuple[int, ...]) -> tuple[int, bytes]:
        """A chunk as it is stored, and the mask of filters that it was not put through."""
        with phil:  # before 3.16 h5py does not lock this call
            mask, raw = self._dataset.read_direct_chunk(offset)
        return mask, raw

    def verify(self, start: int, stop: int) -> None:
        """Unpack the chunks of rows start..stop-1 that were not yet, and drop the result; Unusable if one is short."""
        if not COMPRESSORS.keys() & set(self._filters):
            return
        for row in range(start // self._lengths[0], -(-stop // self._lengths[0])):
            if self._verified[row]:
                continue
            for cells in itertools.product(*(range(cells) for cells in self._grid[1:])):
                place = int(np.ravel_multi_index((row, *cells), self._grid))
                offset = self._name(place)
                mask, raw = self._raw(offset)
                if mask != self._masks[place]:
                    raise Unusable(f"chunk {offset} changed while it was read", "wait until the file is written")
                self._check_length(offset, mask, raw)
            self._verified[row] = True

    def _check_length(self, offset: tuple[int, ...], mask: int, raw: bytes) -> None:
        """What the compressor unpacks to is what went into it: the chunk, and the checksums of filters before it."""
        want, packed = self.bytes, ""
        for number, code in enumerate(self._filters):
            if mask >> number & 1:
                continue
            if code in COMPRESSORS:
                packed = COMPRESSORS[code]
            elif code == h5py.h5z.FILTER_FLETCHER32 and packed:
                raw = raw[:-_CHECKSUM]
            elif code == h5py.h5z.FILTER_FLETCHER32:
                want += _CHECKSUM
        if packed:
            length = _inflated(raw, want + 1) if packed == "gzip" else lzf_length(raw)
            if length != want:
                problem = f"chunk {offset} unpacks to {max(length, 0)} bytes instead of {want}"
                raise Unusable(problem, "copy or download the file again")


def filters_of(dataset: Any) -> tuple[int, ...]:
    """The codes of a dataset's filters in order of writing; Unusable for others than FILTERS, or odd combinations."""
    plist = dataset.get_create_plist()
    if plist.get_nfilters() > MAX_FILTERS:
        raise Unusable(f"it has {plist.get_nfilters()} filters, more than {MAX_FILTERS}", "store it with gzip or lzf")
    codes = []
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if code not in FILTERS:
            shown = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
            raise Unusable(f"its compression (HDF5 filter {code}, {shown!r}) is not read", "store it with gzip or lzf")
        codes.append(int(code))
    if len(COMPRESSORS.keys() & set(codes)) > 1 or len(set(codes)) < len(codes):
        raise Unusable("its filters are applied more than once", "store it with gzip or lzf")
    return tuple(codes)


def _inflated(raw: bytes, limit: int) -> int:
    """Length of a deflate stream's content, at most ``limit``; -1 for what is none."""
    try:
        return len(zlib.decompressobj().decompress(raw, limit))
    except zlib.error:
        return -1


def lzf_length(raw: bytes) -> int:
    """Length of an LZF stream's content; -1 if it ends within a piece.  Source: liblzf, lzf_d.c.

    A byte c below 32 stands before c + 1 literal bytes; any other repeats (c >> 5) + 2 bytes (7: the next byte more),
    and one byte of the distance follows.
    """
    at, end, length = 0, len(raw), 0
    while at < end:
        control = raw[at]
        if control < 32:
            at += control + 2
            length += control + 1
        elif control < 224:
            at += 2
            length += (control >> 5) + 2
        else:
            if at + 1 >= end:
                return -1
            length += raw[at + 1] + 9
            at += 3
    return length if at == end else -1

"""Files of a published data set, from a folder, an archive or a URL, with their published checksums.

Nothing in a file is run: archives are only read for regular files of expected names, and never unpacked by their paths.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from nicecp.errors import DataError, about_file
from nicecp.hdf5_open import check_regular, one_line
from nicecp.unpacking import check_unpacked, unpacked_limit

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
TIMEOUT = 60.0  # seconds without an answer
MAX_BYTES = 2**33  # of one file in an archive or of a download: the largest that is known has 1.3 GB
MAX_MEMBERS = 10_000  # of an archive
_BLOCK = 2**20
_DEPTH = 2  # folders below the one given that are searched: archives unpack to one

# Name -> (bytes, MD5), of the content where the file is packed by gzip.
# MNIST: yann.lecun.com/exdb/mnist; CIFAR-10: www.cs.toronto.edu/~kriz/cifar.html; SVHN: as torchvision has them.
CHECKSUMS: dict[str, tuple[int, str]] = {
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
    "cifar-10-binary.tar.gz": (170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),
    "train_32x32.mat": (182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test_32x32.mat": (64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
    "extra_32x32.mat": (1_329_278_602, "a93ce644f1a588dc4d68dda5feec44a7"),
}


@dataclass(frozen=True)
class Files:
    """Name -> path, and the names of files and archives whose published checksum is right."""

    paths: dict[str, str]
    verified: tuple[str, ...]


@contextlib.contextmanager
def local_files(source: str, names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Files]:
    """The files of these names, as long as the context lasts, their checksums compared with the published ones.

    source : a folder (and folders in it), a .tar.gz, .tgz, .tar or .zip archive, one file, or an http(s) URL: of an
        archive, of one file, or of a folder in which all ``names`` are then tried.
    names : accepted names; those of ``optional`` may be missing at a URL.

    Raises DataError where there is nothing of these names, an archive is damaged, a URL cannot be read, or a file of
    the published size has another checksum than the published one.
    """
    given = source
    verified: tuple[str, ...] = ()
    with contextlib.ExitStack() as stack:
        if "://" in source:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nicecp-"))
            source = _download_all(source, names, optional, folder)
        if os.path.isdir(source):
            found = _in_folder(source, names)
        elif source.lower().endswith(ARCHIVES):
            check_regular(source)
            verified = verify({os.path.basename(source): source})
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nicecp-"))
            found = _unpack(source, names, folder)
        else:
            check_regular(source)
            found = {os.path.basename(source): source}
        if not found:
            listing = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise DataError(about_file(given, "it holds none of the files of this data set", f"expected {listing}"))
        yield Files(found, verified + verify(found))


def _in_folder(folder: str, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for here, folders, files in os.walk(folder):
        folders.sort()
        if os.path.relpath(here, folder).count(os.sep) >= _DEPTH:
            folders.clear()
        for name in sorted(files):
            if name in names and name not in found:
                check_regular(os.path.join(here, name))
                found[name] = os.path.join(here, name)
    return found


def _unpack(archive: str, names: Sequence[str], folder: str) -> dict[str, str]:
    """Regular members of these names into a folder, under their names alone."""
    found: dict[str, str] = {}
    limit = min(MAX_BYTES, unpacked_limit(archive))
    try:
        if archive.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as packed:
                for count, info in enumerate(packed.infolist()):
                    _check_count(count, archive)
                    name = info.filename.rpartition("/")[2]
                    if name in names and name not in found:
                        with packed.open(info) as stream:
                            found[name] = _keep(stream, os.path.join(folder, name), archive, limit)
        else:
            with tarfile.open(archive, "r:*") as tar:
                for count, member in enumerate(tar):
                    _check_count(count, archive)
                    name = member.name.rpartition("/")[2]
                    if name in names and name not in found and member.isreg():
                        extracted = tar.extractfile(member)
                        if extracted is not None:
                            with extracted:
                                found[name] = _keep(extracted, os.path.join(folder, name), archive, limit)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, RuntimeError) as error:
        problem = f"the archive is damaged ({one_line(error)})"
        raise DataError(about_file(archive, problem, "copy or download it again")) from None
    return found


def _check_count(count: int, archive: str) -> None:
    if count >= MAX_MEMBERS:
        raise DataError(
            about_file(archive, f"it has more than {MAX_MEMBERS} members", "give the archive of the data set")
        )


def _keep(stream: IO[bytes], path: str, where: str, limit: int = MAX_BYTES) -> str:
    """Copy a stream into a file -> its path."""
    size = 0
    with open(path, "wb") as file:
        while block := stream.read(_BLOCK):
            size += len(block)
            if size > limit:
                problem = f"{os.path.basename(path)!r} is larger than {limit >> 20} MiB"
                raise DataError(about_file(where, problem, "give the files of the data set"))
            file.write(block)
    return path


# --- URLs -------------------------------------------------------------------------------------------------------------


def _download_all(url: str, names: Sequence[str], optional: Sequence[str], folder: str) -> str:
    """What a URL names, into a folder -> the path of the archive or file, or the folder."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise DataError(about_file(url, "only http and https can be read", "download it and give the file"))
    name = parts.path.rpartition("/")[2]
    if name in names or name.lower().endswith(ARCHIVES):
        return _download(url, os.path.join(folder, name))
    stems: set[str] = set()
    for wanted in names:
        if stem_of(wanted) in stems:
            continue  # it is there as .gz already
        one = parts._replace(path=parts.path.rstrip("/") + "/" + wanted).geturl()
        try:
            _download(one, os.path.join(folder, wanted))
            stems.add(stem_of(wanted))
        except _NotThere:
            if wanted not in optional:
                raise
    return folder


def stem_of(name: str) -> str:
    """The name under which a file's checksum is listed: train-images.idx3-ubyte.gz -> train-images-idx3-ubyte."""
    return name.removesuffix(".gz").replace(".idx", "-idx") if "idx" in name else name


class _NotThere(DataError):
    """The server is there, the file is not."""


def _download(url: str, path: str) -> str:
    remedy = "check the address and the network, or download it elsewhere and give the file"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
            _keep(answer, path, url)
        if length is not None and length.isdecimal() and os.path.getsize(path) != int(length):
            raise DataError(about_file(url, "the connection ended before the file did", "try again"))
    except urllib.error.HTTPError as error:
        kind = _NotThere if error.code in (404, 410) else DataError
        raise kind(about_file(url, f"the server answers {error.code} ({error.reason})", remedy)) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        why = getattr(error, "reason", None) or error
        problem = f"it cannot be downloaded ({one_line(why) if isinstance(why, Exception) else why})"
        raise DataError(about_file(url, problem, remedy)) from None
    return path


# --- checksums --------------------------------------------------------------------------------------------------------


def verify(paths: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the files whose published checksum is right.

    A file of the published size with another checksum is a DataError; one of another size is another file, of which
    nothing is known: it is left to whoever reads it.
    """
    right = []
    for name, path in paths.items():
        packed = name != stem_of(name) and name.endswith(".gz")
        size, expected = CHECKSUMS.get(stem_of(name), (-1, ""))
        if size < 0 or not (packed or os.path.getsize(path) == size):
            continue
        found, count = _md5(path, packed)
        if count != size:
            continue
        if found != expected:
            problem = f"its MD5 checksum is {found}, the published one {expected}"
            raise DataError(about_file(path, problem, "copy or download it again"))
        right.append(name)
    return tuple(right)


def _md5(path: str, packed: bool) -> tuple[str, int]:
    """MD5 and length of a file's content, unpacked from gzip or as it is."""
    digest, count = hashlib.md5(usedforsecurity=False), 0
    try:
        with gzip.open(path) if packed else open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                count += len(block)
                if packed:
                    check_unpacked(path, count)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"its gzip data are truncated or damaged ({one_line(error)})"
        raise DataError(about_file(path, problem, "copy or download it again")) from None
    return digest.hexdigest(), count

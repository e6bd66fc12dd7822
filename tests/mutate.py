"""Changes files at random and reads them: `python -m tests.mutate data|checkpoint --seconds 60 --seed 1`.

Every case runs in a worker process without nicecp.probe's child around it. What makes the worker hang or crash is then
opened in the ordinary way, and must be refused, or read, in less than five seconds each time. Checkpoints get a digest
that is right after the change, as only somebody who means it would do; those whose digest is wrong do not reach HDF5.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from nicecp import probe
from nicecp.data import DataSpec, open_splits
from nicecp.errors import NicecpError
from nicecp.store import BLOCK_SIZE, block_for

KINDS = ("data", "checkpoint")
PATIENCE = 4.0  # seconds for one case
ORDINARY = 5.0  # seconds to refuse it or read it with the child, in each of so many ways:
WAYS = 2
WORDS = [0, 1, 2, 7, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def seeds(kind: str) -> list[bytes]:
    """Files to begin with: all storage, index and attribute formats that are read."""
    if kind == "checkpoint":
        folder = Path(__file__).parent / "data"
        return [(folder / name).read_bytes() for name in ("v1.h5", "v1.state.h5")]
    table = np.random.default_rng(0).normal(size=(50, 3))
    made = []
    for libver in ("earliest", "latest"):
        for options in ({}, {"chunks": (8, 2)}, {"chunks": (9, 3), "compression": "gzip", "shuffle": True},
                        {"chunks": (9, 3), "compression": "lzf", "fletcher32": True},
                        {"chunks": (5, 3), "maxshape": (None, 3)}):  # fmt: skip
            with h5py.File("seed", "w", driver="core", backing_store=False, libver=libver) as file:
                file.create_dataset("train", data=table, **options)
                file.create_dataset("g/other", data=table.astype("f4"))
                file["train"].attrs["columns"] = ["a", "b", "c"]  # of variable length
                file["train"].attrs["units"] = np.array([b"m", b"s", b"kg"])
                file.attrs["image_shape"] = [3, 1]
                file.flush()
                made.append(bytes(file.id.get_file_image()))
        made += tables(libver, table)
    return made


FIELDS = "b,a"  # the columns that are read of a table with others that hold no numbers


def tables(libver: str, numbers: np.ndarray) -> list[bytes]:
    """Compound tables, plain and with text, references and arrays beside the numbers; and a group of columns."""
    made = []
    plain = np.dtype([("a", "f8"), ("b", "i4"), ("c", ">f4")])
    mixed = np.dtype(
        [("a", "f8"), ("name", "S5"), ("b", "i2"), ("text", h5py.string_dtype()), ("many", "f4", (3,)),
         ("list", h5py.vlen_dtype("f4")), ("to", h5py.ref_dtype)]
    )  # fmt: skip
    for dtype, options in ((plain, {}), (plain, {"chunks": (9,), "compression": "gzip", "shuffle": True}),
                           (mixed, {}), (mixed, {"chunks": (7,), "compression": "gzip"})):  # fmt: skip
        with h5py.File("seed", "w", driver="core", backing_store=False, libver=libver) as file:
            rows = np.zeros(len(numbers), dtype)
            rows["a"], rows["b"] = numbers[:, 0], np.arange(len(numbers))
            if dtype is mixed:
                rows["text"], rows["to"] = "text", file.ref
                rows["list"] = [np.arange(3, dtype="f4")] * len(numbers)
            file.create_dataset("train", data=rows, **options)
            file.flush()
            made.append(bytes(file.id.get_file_image()))
    with h5py.File("seed", "w", driver="core", backing_store=False, libver=libver) as file:
        for name, column in zip("abc", numbers.T, strict=True):
            file.create_dataset(f"train/{name}", data=column, chunks=(11,), compression="gzip")
        file.flush()
        made.append(bytes(file.id.get_file_image()))
    return made


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, numbers put in the place of others, pieces moved, cut or filled; mostly few of them."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        # Metadata lie at the front of these files, and near numbers that point there.
        at = rng.randrange(len(out)) if rng.random() < 0.4 else rng.randrange(min(len(out), 4096))
        how = rng.randrange(7)
        if how <= 2:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            out[at] = rng.randrange(256)
        elif how == 4:
            size = rng.choice((2, 4, 8))
            out[at : at + size] = (rng.choice(WORDS) % 256**size).to_bytes(size, "little")
        elif how == 5:
            size, other = rng.choice((1, 4, 8, 16, 64)), rng.randrange(len(out))
            out[at : at + size] = out[other : other + size]
        elif rng.random() < 0.2:
            del out[at:]
            out += b"\0"
        else:
            out[at : at + 8] = rng.randrange(len(out)).to_bytes(8, "little")
    return bytes(out)


def use_data(path: str) -> str:
    """Open and read all, and then two columns by name -> what came of it."""
    came = "refused"
    for data in (path, DataSpec(path, columns=FIELDS)):
        try:
            with open_splits(data) as splits:
                for split in (splits.train, splits.valid, splits.test):
                    if split is not None:
                        first = split.load_blocks(np.arange(split.n_blocks))[0]
                        second = split.load_blocks(np.arange(split.n_blocks))[0]
                        assert first.tobytes() == second.tobytes(), "bytes that nobody wrote"
            came = "accepted"
        except NicecpError as error:
            if not str(error).isprintable():
                return f"mistake: {error!r}"
        except MemoryError:
            pass
    return came


def use_checkpoint(path: str) -> str:
    from nicecp.checkpoint import load

    try:
        load(path)
    except NicecpError as error:
        return "refused" if str(error).isprintable() else f"mistake: {error!r}"
    return "accepted"


def worker(kind: str, seed: int, first: int, path: str, pipe: int) -> None:
    """Cases first, first + 1, ...: a byte on the pipe says what came of each."""
    probe.switch_off()
    files = seeds(kind)
    for number in range(first, sys.maxsize):
        rng = random.Random(f"{seed} {number}")
        data = rng.choice(files)
        if kind == "checkpoint":
            image = mutated(data[BLOCK_SIZE:], rng)
            data = block_for(image) + image
        else:
            data = mutated(data, rng)
        Path(path).write_bytes(data)
        try:
            said = (use_data if kind == "data" else use_checkpoint)(path)
        except Exception as error:
            said = f"mistake: {type(error).__name__}: {error}"
        os.write(pipe, (said[:200].replace("\n", " ") + "\n").encode())


def start(kind: str, seed: int, first: int, path: str) -> tuple[int, int]:
    """A worker process and the end of the pipe on which it reports."""
    end, other = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        try:
            worker(kind, seed, first, path, other)
        finally:
            os._exit(0)
    os.close(other)
    return child, end


def run(kind: str, seconds: float, seed: int, limit: int = sys.maxsize,
        say: Callable[[str], object] = lambda line: None) -> Counter[str]:  # fmt: skip
    """Cases for so many seconds -> how many were refused, accepted, hung, crashed, or were a mistake of ours."""
    counts: Counter[str] = Counter()
    number, deadline = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.h5")
        while time.monotonic() < deadline and number < limit:
            child, pipe = start(kind, seed, number, path)
            rest = b""
            what = ""
            while not what and time.monotonic() < deadline and number < limit:
                if not select.select([pipe], [], [], PATIENCE)[0]:
                    what = "hung"
                    break
                piece = os.read(pipe, 4096)
                if not piece:
                    what = "crashed"
                lines = (rest + piece).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    said = line.decode()
                    counts[said.partition(":")[0]] += 1
                    if said.startswith("mistake"):
                        say(f"case {number}: {said}")
                    number += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(pipe)
            if what:
                counts[what] += 1
                began = time.monotonic()
                outcome = (use_data if kind == "data" else use_checkpoint)(path)
                took = time.monotonic() - began
                if outcome not in ("refused", "accepted") or took > ORDINARY * WAYS:
                    counts["got through"] += 1
                say(f"case {number}: {what}; in the ordinary way: {outcome} in {took:.1f} s")
                number += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts = run(options.kind, options.seconds, options.seed, say=lambda line: os.write(1, f"{line}\n".encode()))
    os.write(1, f"{options.kind}, seed {options.seed}: {dict(counts)}\n".encode())
    bad = counts["mistake"] + counts["got through"]
    sys.exit(1 if bad or not counts else 0)


if __name__ == "__main__":
    main()

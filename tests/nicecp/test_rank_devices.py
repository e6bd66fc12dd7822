"""Ranks on GPUs: sums inside the captured step, on stand-ins for CuPy and NCCL; and which rank gets which GPU."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nicecp import rank_devices, ranks
from nicecp.errors import DeviceError
from nicecp.flow import NICE
from nicecp.kernels import detect
from nicecp.kernels.backend import Purpose, Slot
from nicecp.kernels.cuda_backend import CudaBackend
from nicecp.kernels.numba_backend import NumbaBackend
from nicecp.optimizers import AdaM
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize
from nicecp.rank_devices import OnDevice, open_for, with_device_sums
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests import gates
from tests.emulated import build
from tests.kernels.fake_nccl import FakeNccl
from tests.kernels.stand_in import stand_in_driver
from tests.nicecp.crews import Member, together

DATA = np.random.default_rng(3).integers(0, 256, (90, 5), np.uint8)
STEPS = 6
emulated = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sums in a step, although the flow is small."""
    monkeypatch.setattr(ranks.buckets_of, "__defaults__", (400,))


EMULATOR = threading.Lock()  # it runs one kernel at a time


def backend_of(rank: Any, version: int = 22703) -> CudaBackend:
    driver = stand_in_driver()
    cupy = driver.cupy
    cupy.cuda.nccl = FakeNccl(cupy, rank.total, version)
    run_kernel = cupy.run_kernel

    def alone(*launched: Any) -> None:
        with EMULATOR:
            run_kernel(*launched)

    cupy.run_kernel = alone
    return CudaBackend(driver)


class OnlyOne:
    """A rank whose sums are its own numbers."""

    total = staticmethod(np.array)


def trained(backend: Any, communicator: Communicator, steps: int = STEPS, batch: int = 7) -> Trainer:
    spec = gates.make_spec(5, [(6, 5), (4,), (), (3,)], laws=("additive", "affine", "multiplicative"))
    flow = NICE.from_spec(spec, gates.draw_parameters(spec), (Dequantize(-1, 1),), backend=backend)
    split = Split.contiguous(ArraySource(DATA), 0, len(DATA), Purpose.TRAIN_NOISE)
    config = TrainConfig(batch_size=batch, seed=5, optimizer=AdaM(rate=3e-3))
    trainer = Trainer(flow, split, None, config, communicator=communicator)
    for _ in range(steps):
        trainer.step()
    return trainer


@emulated
@pytest.mark.parametrize("version", [22703, 20800], ids=["captured", "between the parts of a step"])
def test_two_gpus_train_as_one_cpu(version: int) -> None:
    """Rows are not shared evenly, so that what a rank sends differs from what it has received."""
    alone = trained(NumbaBackend(1), ALONE)

    def run(rank: Member) -> tuple[Any, Any, Any, list[int], Trainer]:
        backend = backend_of(rank, version)
        trainer = trained(backend, rank)
        trainer._shared.checksum(trainer.p, trainer.m, trainer.v, trainer.state)  # type: ignore[union-attr]
        nccl = backend.driver.cupy.cuda.nccl  # type: ignore[attr-defined]
        return backend.copy_out(trainer.p), backend.copy_out(trainer.state), nccl.made, nccl.sums, trainer

    crew = together(2, run)
    for rank, (parameters, state, made, sums, trainer) in enumerate(crew):
        gates.assert_near(parameters, alone.p, 1e-12, "parameters")
        np.testing.assert_array_equal(parameters, crew[0][0])
        assert made == [(2, rank)]
        own = [2 * 7 + 2, *(bucket.range.size for bucket in trainer._shared._buckets)]  # type: ignore[union-attr]
        assert len(own) == 5, "a sum for every coupling, and one for the rows"
        assert sums == [1, 2**20] * 2 + own * STEPS + [2], "connected first; the checksum last"
        assert state[Slot.STEP] == STEPS


@emulated
def test_a_captured_step_is_one_graph() -> None:
    backend = backend_of(OnlyOne)
    communicator = OnDevice(ALONE, backend)
    trainer = trained(backend, communicator)
    calls = backend.driver.cupy.calls  # type: ignore[attr-defined]
    assert sum(call[0] == "launch graph" for call in calls) == STEPS
    alone = trained(backend_of(OnlyOne), ALONE)
    assert np.array_equal(backend.copy_out(trainer.p), alone.backend.copy_out(alone.p))
    assert communicator.describe() == "NCCL 2.27.3"
    assert communicator.threads() == ALONE.threads()


@emulated
def test_ranks_on_gpus_stop_after_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LOOK_EVERY", 4)

    def run(rank: Member) -> tuple[int, int]:
        trainer = trained(backend_of(rank), rank, steps=1)
        if rank.rank == 1:
            trainer.request_stop(15)
        steps = 1
        while not trainer.stopped:
            trainer.step()
            steps += 1
        return steps, trainer.stop_number

    assert together(2, run) == [(4, 15)] * 2


def test_nccl_that_is_missing_or_fails_says_so() -> None:
    backend = backend_of(OnlyOne)
    cupy = backend.driver.cupy  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match=r"^NCCL failed to start .NCCL_ERROR_INVALID_USAGE.*GPU of its own$"):
        backend.open_nccl(99, 0, lambda compute: compute())
    cupy.cuda.nccl = SimpleNamespace(available=False)
    with pytest.raises(DeviceError, match="by NCCL, which CuPy does not find: pip install nvidia-nccl-cu13"):
        OnDevice(ALONE, backend)


def test_cpus_and_lone_ranks_keep_their_communicator() -> None:
    assert with_device_sums(ALONE, backend_of(OnlyOne)) is ALONE
    member = Member(SimpleNamespace(size=2), 0)  # type: ignore[arg-type]
    assert with_device_sums(member, NumbaBackend(1)) is member


# --- which GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "device", "found"),
    [
        (2, "cuda", "cuda"),
        (2, "auto", "cuda"),
        (1, "auto", "cpu"),
        (1, "cuda", "^device .cuda.: 2 ranks on this machine have 1 GPU.s.: start one rank for each GPU"),
        (0, "auto", "cpu"),
        (0, "cuda", "^device .cuda.: there is none"),
        (2, "cpu", "cpu"),
    ],
)
def test_each_rank_gets_a_gpu_of_its_own(
    gpus: int, device: str, found: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks are threads here, which cannot be told their GPUs apart by a number of the process: each by its own."""
    chosen: dict[int, int] = {}
    monkeypatch.setattr(detect, "problem", lambda: "" if gpus else "there is none")
    monkeypatch.setattr(detect, "has_driver", lambda: True)

    def run(rank: Member) -> str:
        class Opened(SimpleNamespace):
            pass

        def opened(name: str, threads: int | None) -> Any:
            bus = f"bus {rank.rank % max(1, gpus)}"
            return Opened(device=name, driver=SimpleNamespace(cupy=gpu_at(bus), stream=0))

        return str(rank_devices.open_for(Backends(rank, opened, chosen), device).device)

    opened_by: dict[int, Any] = {}

    class Backends(Member):
        def __init__(self, member: Member, opened: Any, numbers: dict[int, int]) -> None:
            super().__init__(member._meeting, member.rank)
            opened_by[self.rank] = opened

    def open_backend(name: str, threads: int | None) -> Any:
        assert threads == 1
        return opened_by[current()](name, threads)

    def current() -> int:
        return numbers[threading.get_ident()]

    numbers: dict[int, int] = {}

    def use(rank: int) -> None:
        numbers[threading.get_ident()] = chosen[rank] = rank

    def named(rank: Member) -> str:
        use(rank.rank)
        return run(rank)

    monkeypatch.setattr(detect, "use", use)
    monkeypatch.setattr(rank_devices, "open_backend", open_backend)
    with caplog.at_level(logging.WARNING, "nicecp"):
        if found.startswith("^"):
            with pytest.raises(DeviceError, match=found):
                together(2, named)
            return
        assert together(2, named) == [found] * 2
    assert sorted(chosen) == [0, 1]
    assert ("compute on CPUs" in caplog.text) == (device == "auto" and found == "cpu")


def gpu_at(bus: str) -> Any:
    return SimpleNamespace(cuda=SimpleNamespace(Device=lambda: SimpleNamespace(pci_bus_id=bus)))


def test_a_rank_uses_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "look", lambda: detect.Found(gpus=(detect.Gpu("a", 1, (9, 0)),) * 3))
    monkeypatch.setattr(detect, "_rank", 0)
    assert detect.ordinal() == 0
    detect.use(4)
    assert detect.ordinal() == 1, "the fifth rank on three GPUs"


def test_one_rank_opens_what_it_is_asked_for() -> None:
    assert open_for(ALONE, "cpu", 1).device == "cpu"

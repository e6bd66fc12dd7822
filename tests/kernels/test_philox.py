"""Philox4x32-10: published known answers, and the counter layout of the kernel contract on every device."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.backend import Backend, Purpose
from nicecp.kernels.philox import philox4x32, random_keys, random_words
from tests import oracle
from tests.kernels.checks import Device

# counter, key, answer: kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEED = 0xC0FFEE_1234_5678  # above 2^32: both key words matter
ROW = 2**32 + 5


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert tuple(int(w) for w in philox4x32(counter, key)) == answer
    assert tuple(int(w) for w in oracle.philox(counter, key)) == answer  # type: ignore[arg-type]


def test_known_answer_on_the_device(backend: Backend) -> None:
    """Seed, purpose, epoch and row 0 make the counter and key of the first known answer."""
    device = Device(backend, "float64")
    out = device.out(1, 8)
    backend.fill_uniform(out, 0, 0, 0)
    low_half_first = [half for word in KNOWN_ANSWERS[0][2] for half in (word & 0xFFFF, word >> 16)]
    assert (device.get(out)[0] * 65536).tolist() == low_half_first


def test_host_words_follow_the_contract() -> None:
    rows = np.array([0, 1, 2**32 - 1, 2**32, ROW, 2**55 + 3])
    expected = oracle.words(SEED, Purpose.SHUFFLE, 9, rows, 4)
    for block in range(4):
        words = random_words(SEED, Purpose.SHUFFLE, 9, rows, block)
        assert words.dtype == np.uint32
        assert np.array_equal(words, expected[:, block])
    keys = random_keys(SEED, Purpose.SHUFFLE, 9, rows)
    assert keys.tolist() == [(int(w[0]) << 32) | int(w[1]) for w in expected[:, 0]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 8), (31, 33), (33, 7), (1000, 31), (1025, 9), (3, 1025), (31, 1000)])
def test_uniform_bits_are_exact(backend: Backend, dtype: str, n: int, k: int) -> None:
    device = Device(backend, dtype)
    out = device.out(n, k)
    backend.fill_uniform(out, SEED, Purpose.SAMPLE, 4, ROW - 7)
    expected = oracle.fill_uniform(SEED, Purpose.SAMPLE, 4, ROW - 7 + np.arange(n), k)
    assert np.array_equal(device.get(out), expected)


@pytest.mark.parametrize("fill", ["fill_normal", "fill_logistic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 2), (31, 33), (33, 4), (1000, 31), (1025, 3), (3, 1025)])
def test_normal_and_logistic_follow_the_formula(backend: Backend, fill: str, dtype: str, n: int, k: int) -> None:
    device = Device(backend, dtype)
    out = device.out(n, k)
    getattr(backend, fill)(out, SEED, Purpose.INIT, 2, ROW - 1)
    expected = getattr(oracle, fill)(SEED, Purpose.INIT, 2, ROW - 1 + np.arange(n), k)
    # libraries differ by units in the last place of log and cos: 1e-12 in float64; float32 is that, rounded once
    bound = 1e-12 * (1 + np.abs(expected)) + (2.0**-24 * np.abs(expected) if dtype == "float32" else 0)
    assert (np.abs(device.get(out) - expected) <= bound).all()


@pytest.mark.parametrize(
    ("fill", "variance", "fourth", "sd_of_fourth"),
    # standard normal: 1, 3, Var x^4 = 105 - 9; standard logistic: pi^2/3, 7 pi^4/15, E x^8 = 127 pi^8 / 15
    [
        ("fill_normal", 1.0, 3.0, np.sqrt(96.0)),
        ("fill_logistic", np.pi**2 / 3, 7 * np.pi**4 / 15, np.sqrt(127 * np.pi**8 / 15 - (7 * np.pi**4 / 15) ** 2)),
    ],
)
def test_moments(backend: Backend, fill: str, variance: float, fourth: float, sd_of_fourth: float) -> None:
    """Within five standard errors, and neighbouring columns and rows uncorrelated."""
    device = Device(backend, "float64")
    out = device.out(50_000, 4)
    getattr(backend, fill)(out, 11, Purpose.SAMPLE, 0)
    x = device.get(out)
    root_n = np.sqrt(x.size)
    assert abs(x.mean()) < 5 * np.sqrt(variance) / root_n
    assert abs((x**2).mean() - variance) < 5 * np.sqrt(fourth - variance**2) / root_n
    assert abs((x**4).mean() - fourth) < 5 * sd_of_fourth / root_n
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x[:, :-2], x[:, 2:])):
        assert abs((a * b).mean()) < 5 * variance / np.sqrt(a.size)


def test_uniform_is_flat(backend: Backend) -> None:
    device = Device(backend, "float32")
    out = device.out(20_000, 16)
    backend.fill_uniform(out, 12, Purpose.SAMPLE, 0)
    x = device.get(out)
    counts = np.bincount((x * 64).astype(int).ravel(), minlength=64)
    expected = x.size / 64
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_every_word_of_the_counter_and_key_matters(backend: Backend) -> None:
    device = Device(backend, "float64")

    def draw(seed: int = 5, purpose: int = 1, epoch: int = 1, row: int = 0) -> tuple[float, ...]:
        out = device.out(1, 16)
        backend.fill_uniform(out, seed, purpose, epoch, row)
        return tuple(device.get(out)[0])

    draws = [draw(), draw(seed=5 + 2**32), draw(seed=6), draw(purpose=2), draw(epoch=2), draw(row=1), draw(row=2**32)]
    assert len(set(draws)) == len(draws)
    assert draws[0][:8] != draws[0][8:]
    assert draw() == draws[0]

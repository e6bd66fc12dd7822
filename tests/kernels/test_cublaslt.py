"""cuBLASLt: what is asked of the library computes what the driver's protocol says (fake_lt computes it)."""

from __future__ import annotations

import ctypes
import re
import site
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nicecp.errors import DeviceError
from nicecp.kernels import cublaslt
from nicecp.kernels.cublaslt import BGRADA, BIAS, DRELU_BGRAD, RELU_AUX_BIAS, RELU_BIAS, Kind, Products
from tests.kernels.fake_lt import FakeLt

WORKSPACE = 2**20  # any address that is not 0: the stand-in does not write there


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


def product(lt: FakeLt, out: Any, a: Any, b: Any, bias: Any = None, aux: Any = None, **given: Any) -> None:
    products = Products(lt)
    k = a.shape[0] if given.get("transpose_a") else a.shape[1]
    pointers = [0 if array is None else address(array) for array in (bias, aux)]
    kind = cublaslt.kind_of(out.dtype, out.shape, k, alignment=cublaslt.alignment_of(address(out), *pointers), **given)
    plan = products.plan(kind, *pointers)
    assert plan is not None
    plan.run((address(a), address(b), address(out)), pointers[0], pointers[1], WORKSPACE, 5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transposes", [(False, False), (True, False), (False, True), (True, True)])
def test_rows_first_products(dtype: str, transposes: tuple[bool, bool]) -> None:
    random = np.random.default_rng(1)
    m, k, n = 3, 5, 7
    a = random.standard_normal((k, m) if transposes[0] else (m, k)).astype(dtype)
    b = random.standard_normal((n, k) if transposes[1] else (k, n)).astype(dtype)
    out = np.full((m, n), np.nan, dtype)
    lt = FakeLt()
    product(lt, out, a, b, transpose_a=transposes[0], transpose_b=transposes[1])
    expected = (a.T if transposes[0] else a) @ (b.T if transposes[1] else b)
    np.testing.assert_allclose(out, expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-6)
    assert lt.calls[-1][-1] == 5, "the stream"


def relu_case(n: int = 4, i: int = 6, o: int = 130) -> Any:
    """Sizes for which the mask's leading dimension (256) is not the output's."""
    random = np.random.default_rng(2)
    return (random.standard_normal(shape).astype(np.float32) for shape in ((n, i), (i, o), (o,)))


def test_forward_epilogues() -> None:
    x, w, bias = relu_case()
    linear = x @ w + bias
    out = np.empty((4, 130), np.float32)
    product(FakeLt(), out, x, w, bias, epilogue=BIAS)
    np.testing.assert_allclose(out, linear, rtol=1e-4, atol=1e-5)
    product(FakeLt(), out, x, w, bias, epilogue=RELU_BIAS)
    np.testing.assert_allclose(out, np.maximum(linear, 0), rtol=1e-4, atol=1e-5)


def test_a_mask_goes_from_forward_to_backward() -> None:
    x, w, bias = relu_case()
    y, mask = np.empty((4, 130), np.float32), np.zeros(4 * cublaslt.mask_ld(130) // 8, np.uint8)
    product(FakeLt(), y, x, w, bias, mask, epilogue=RELU_AUX_BIAS)
    above = np.random.default_rng(3).standard_normal((4, 9)).astype(np.float32)
    v = np.random.default_rng(4).standard_normal((130, 9)).astype(np.float32)
    dx, db = np.empty((4, 130), np.float32), np.empty(130, np.float32)
    product(FakeLt(), dx, above, v, db, mask, epilogue=DRELU_BGRAD, transpose_b=True)
    expected = np.where(x @ w + bias > 0, above @ v.T, 0)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(db, expected.sum(axis=0), rtol=1e-4, atol=1e-5)


def test_the_bias_gradient_of_a_weight_gradient() -> None:
    x, _, _ = relu_case()
    dy = np.random.default_rng(5).standard_normal((4, 3)).astype(np.float32)
    dw, db = np.empty((6, 3), np.float32), np.empty(3, np.float32)
    product(FakeLt(), dw, x, dy, db, epilogue=BGRADA, transpose_a=True)
    np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(db, dy.sum(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tf32", "compute", "scale"),
    [("float32", False, 68, 0), ("float32", True, 77, 0), ("float64", False, 70, 1), ("float64", True, 70, 1)],
)
def test_float32_is_full_unless_tf32_was_asked_for(dtype: str, tf32: bool, compute: int, scale: int) -> None:
    lt = FakeLt()
    assert Products(lt, tf32).plan(Kind(dtype, 2, 3, 4)) is not None
    about = lt.calls[0][1]
    assert (about["compute"], about["scale"]) == (compute, scale)


def test_an_algorithm_is_chosen_once_for_each_kind() -> None:
    lt = FakeLt(declined=(RELU_AUX_BIAS,))
    products = Products(lt)
    plans = [products.plan(Kind("float32", 2, 3, 4)) for _ in range(3)]
    assert len({id(plan) for plan in plans}) == 1
    assert products.plan(Kind("float32", 2, 3, 4, epilogue=RELU_AUX_BIAS)) is None
    assert products.plan(Kind("float32", 2, 3, 4, epilogue=RELU_AUX_BIAS)) is None
    assert products.plan(Kind("float32", 2, 3, 4, epilogue=BIAS)) is not None
    assert [call[1][7] for call in lt.calls] == [1, RELU_AUX_BIAS, BIAS]


def test_the_workspace_is_fixed_and_alignment_is_that_of_the_addresses() -> None:
    lt = FakeLt()
    Products(lt).plan(Kind("float32", 2, 3, 4, alignment=cublaslt.alignment_of(4096, 48, 0)))
    preference = lt.calls[0][2]
    assert preference[1] == 32 * 2**20
    assert [preference[attribute] for attribute in (5, 6, 7, 8)] == [16] * 4
    assert [cublaslt.alignment_of(*given) for given in ((0, 0), (512, 256), (256, 4), (1,))] == [256, 256, 4, 1]


def test_a_refusal_is_a_device_error_with_the_library_s_words() -> None:
    lt = FakeLt()
    products = Products(lt)
    plan = products.plan(Kind("float32", 1, 1, 1))
    assert plan is not None
    lt.status = 13
    with pytest.raises(DeviceError, match="cuBLASLt refuses Matmul \\(status 13, words for 13\\)"):
        plan.run((1, 1, 1), 0, 0, WORKSPACE, 0)
    with pytest.raises(DeviceError, match="not float16"):
        cublaslt.kind_of(np.float16, (1, 1), 1)


def test_structures_have_the_header_s_sizes() -> None:
    assert ctypes.sizeof(cublaslt.Algorithm) == 64
    assert ctypes.sizeof(cublaslt.Heuristic) == 96
    assert cublaslt.Heuristic.state.offset == 72


def test_version() -> None:
    assert cublaslt.version(FakeLt()) == "13.1.1"
    assert cublaslt.version(SimpleNamespace(cublasLtGetVersion=lambda: 120902)) == "12.9.2"


def test_sums_are_added_in_one_order() -> None:
    """No algorithm that adds its parts in place, in whatever order they come."""
    lt = FakeLt()
    Products(lt).plan(Kind("float32", 2, 3, 4))
    assert lt.calls[0][2][cublaslt.REDUCTION_SCHEMES] == 6


def test_numbers_of_cublaslt_are_the_header_s() -> None:
    """Where CUDA's packages, or its toolkit, brought the header."""
    folders = [Path(folder) for folder in (*site.getsitepackages(), "/usr/local/cuda/include")]
    found = [path for folder in folders for path in (*folder.glob("nvidia/*/include/cublasLt.h"),
                                                     *folder.glob("cublasLt.h"))]  # fmt: skip
    if not found:
        pytest.skip("cublasLt.h is not installed")
    for path in found:
        text = path.read_text() + (path.parent / "cublas_api.h").read_text()
        text += (path.parent / "library_types.h").read_text()

        def number(name: str, text: str = text) -> int:
            match = re.search(rf"\b{name}\s*=\s*([^,/\n]+)", text)
            assert match is not None, name
            parts = [part.strip(" ()") for part in match[1].split("|")]
            total = 0
            for part in parts:
                total |= int(part) if part.isdecimal() else number(part)
            return total

        for name, value in {
            "CUDA_R_32F": cublaslt.R_32F, "CUDA_R_64F": cublaslt.R_64F, "CUBLAS_OP_T": cublaslt.OP_T,
            "CUBLAS_COMPUTE_32F": cublaslt.COMPUTE_32F, "CUBLAS_COMPUTE_64F": cublaslt.COMPUTE_64F,
            "CUBLAS_COMPUTE_32F_FAST_TF32": cublaslt.COMPUTE_32F_FAST_TF32,
            "CUBLASLT_MATMUL_DESC_TRANSA": cublaslt.TRANSA, "CUBLASLT_MATMUL_DESC_TRANSB": cublaslt.TRANSB,
            "CUBLASLT_MATMUL_DESC_EPILOGUE": cublaslt.EPILOGUE,
            "CUBLASLT_MATMUL_DESC_BIAS_POINTER": cublaslt.BIAS_POINTER,
            "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER": cublaslt.AUX_POINTER,
            "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD": cublaslt.AUX_LD,
            "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES": cublaslt.MAX_WORKSPACE_BYTES,
            "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK": cublaslt.REDUCTION_SCHEMES,
            "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE": cublaslt.APART & 3,
            "CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE": cublaslt.APART & 4,
            "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES": cublaslt.MIN_ALIGNMENT[0],
            "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES": cublaslt.MIN_ALIGNMENT[3],
            "CUBLASLT_EPILOGUE_DEFAULT": cublaslt.DEFAULT, "CUBLASLT_EPILOGUE_BIAS": cublaslt.BIAS,
            "CUBLASLT_EPILOGUE_RELU_BIAS": cublaslt.RELU_BIAS,
            "CUBLASLT_EPILOGUE_RELU_AUX_BIAS": cublaslt.RELU_AUX_BIAS,
            "CUBLASLT_EPILOGUE_DRELU_BGRAD": cublaslt.DRELU_BGRAD, "CUBLASLT_EPILOGUE_BGRADA": cublaslt.BGRADA,
        }.items():  # fmt: skip
            assert number(name) == value, name

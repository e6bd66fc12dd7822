"""The CUDA sources compile for every architecture that is supported: by NVRTC as CuPy calls it, and by nvcc.

NVRTC needs no GPU and no driver: the wheel nvidia-cuda-nvrtc is enough, and is called here as CuPy calls it.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from nicecp.kernels import cuda_source

ARCHITECTURES = [75, 80, 90, 100, 120]
MOST_REGISTERS = {"f32": 64, "f64": 80}  # so that a multiprocessor holds four or three blocks of 256 threads
PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The library of the installed wheel, or None."""
    for package in PACKAGES:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        found = {file.name: str(file.locate()) for file in files}
        libraries = [path for name, path in found.items() if re.fullmatch(r"libnvrtc\.so\.\d+", name)]
        for name, path in found.items():  # NVRTC asks for it by its bare name, which finds it once it is loaded
            if libraries and re.fullmatch(r"libnvrtc-builtins\.so\.[\d.]+", name):
                ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        if libraries:
            return ctypes.CDLL(libraries[0])
    return None


def compiled(text: str, architecture: int) -> tuple[bytes, str]:
    """A cubin, or nothing, and the compiler's log."""
    library = nvrtc()
    if library is None:
        pytest.skip(f"{PACKAGES[0]} is not installed")
    options = [*cuda_source.OPTIONS, "-ftz=true", f"-arch=sm_{architecture}", "--device-as-default-execution-space"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def check(status: int) -> None:
        assert status == 0, f"NVRTC status {status}"

    check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None))
    arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = library.nvrtcCompileProgram(program, len(options), arguments)
    check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetProgramLog(program, log))
    cubin = b""
    if not failed:
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, buffer))
        cubin = buffer.raw
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log.value.decode()


@pytest.mark.parametrize(
    "architecture", [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
@pytest.mark.parametrize("unit", cuda_source.UNITS)
def test_nvrtc_compiles(unit: str, architecture: int) -> None:
    cubin, log = compiled(cuda_source.text(unit), architecture)
    assert cubin[:4] == b"\x7fELF", log
    assert "warning" not in log, log
    for kernel in cuda_source.kernels(unit):
        assert f".text.{kernel}".encode() in cubin, f"{kernel} is not in the module"


def test_nvrtc_refuses_a_mistake() -> None:
    unit = cuda_source.text("state_f64").replace("fmax(", "unheard_of(")
    cubin, log = compiled(unit, 90)
    assert not cubin
    assert "unheard_of" in log


# --- nvcc -------------------------------------------------------------------------------------------------------------


def nvcc() -> str:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        pytest.skip("nvcc is not installed")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", cuda_source.UNITS)
def test_nvcc_compiles_without_spilling(unit: str, architecture: int, tmp_path: Path) -> None:
    """Registers of all kernels within bounds, and nothing of theirs in local memory."""
    source = tmp_path / "kernels.cu"
    source.write_text(cuda_source.text(unit))
    flags = ["-ftz=true", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]
    command = [nvcc(), *cuda_source.OPTIONS, *flags, "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"Compiling entry function", done.stderr)) == len(cuda_source.kernels(unit))
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert {number for found in spills for number in found} == {"0"}, done.stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == len(cuda_source.kernels(unit))
    assert max(registers) <= (128 if unit.startswith("spline") else MOST_REGISTERS[unit[-3:]])


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "pack"), [("update_f32", "v4.f32"), ("update_f64", "v2.f64")])
def test_updates_move_sixteen_bytes_at_a_time(unit: str, pack: str, tmp_path: Path) -> None:
    """Four loads and three stores of whole packs in each kernel; the compiler may cut a pack into numbers again."""
    source = tmp_path / "kernels.cu"
    source.write_text(cuda_source.text(unit))
    command = [nvcc(), *cuda_source.OPTIONS, "-arch=sm_90", "-ptx", "-o", str(tmp_path / "kernels.ptx"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    text = (tmp_path / "kernels.ptx").read_text()
    kernels = len(cuda_source.kernels(unit))
    assert len(re.findall(rf"ld\.global(\.nc)?\.{pack}", text)) == 4 * kernels
    assert len(re.findall(rf"st\.global\.{pack}", text)) == 3 * kernels


# --- the text ---------------------------------------------------------------------------------------------------------


def test_every_file_is_a_unit_and_every_kernel_is_found() -> None:
    folder = Path(cuda_source.__file__).parent
    assert {path.stem for path in folder.glob("*.cu")} == {f"cuda_{topic}" for topic in cuda_source.TOPICS}
    names = [kernel for unit in cuda_source.UNITS for kernel in cuda_source.kernels(unit)]
    assert len(set(names)) == len(names)
    for unit in cuda_source.UNITS:
        assert "#include" not in cuda_source.text(unit)
        for kernel in cuda_source.kernels(unit):
            assert cuda_source.unit_of(kernel) == unit


def test_numbers_that_stand_in_two_places_agree() -> None:
    for unit, name in (("dense_f32", "BIAS_COLUMNS"), ("scaling_f32", "SCALE_COLUMNS")):
        assert f"constexpr int {name} = {getattr(cuda_source, name)};" in cuda_source.text(unit)
    assert f"#define THREADS {cuda_source.THREADS} " in cuda_source.text("state_f64")


@pytest.mark.parametrize("name", ["unheard_of_f32", "couple", "couple_f16"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        cuda_source.unit_of(name)
    with pytest.raises(ValueError, match=name):
        cuda_source.text(name)

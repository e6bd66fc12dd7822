"""The entry point: help, versions, errors as one line, exit codes, and what is imported when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import nicecp
from nicecp.cli import app
from nicecp.cli.app import COMMANDS
from nicecp.cli.main import main
from nicecp.flow import NICE

ROOT = Path(__file__).resolve().parents[2]
ALL = [[name] for name in COMMANDS] + [
    ["data", name] for name in ("demo", "csv", "idx", "mnist", "cifar10", "svhn", "tfd")
]
ALL += [["plot", name] for name in ("samples", "spectrum", "manifold", "curve", "inpainting")]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_help_with_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:\n" in out
    assert f"\n    nicecp {' '.join(words)}" in out
    assert "--debug" in out


def test_the_listing_is_that_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, _, text) in COMMANDS.items():
        assert f"  {name}" in out
        assert text in out
    assert "Examples:" in out
    assert main([]) == 0
    assert capsys.readouterr().out == out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nicecp, version {nicecp.__version__}\n"


def test_help_is_light_and_quick() -> None:
    """Under 0.3 s on a quiet machine; here only what would make it slow, and a limit that a busy machine keeps."""
    code = (
        "import sys; from nicecp.cli.main import main; main(['--help']); "
        "print([n for n in ('numpy', 'numba', 'h5py', 'scipy', 'tqdm', 'nicecp.cli.train') if n in sys.modules])"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert time.monotonic() - begin < 10
    code = (
        "import sys; from nicecp.cli.main import main; main(['train', '--help']); "
        "print([n for n in ('numpy', 'numba', 'h5py') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "nicecp", "tran"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nicecp: error: no such command 'tran': did you mean 'train'? (see nicecp --help)\n"


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    """The reader takes one line and goes, in the middle of more than a pipe holds."""
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for i in range(600):
            file[f"a_dataset_with_a_name_{i:0200d}"] = np.zeros((2, 2))
    command = f"{sys.executable} -m nicecp info {tmp_path / 'many.h5'} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{", "")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of all sorts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    good = rng.normal(size=(60, 3))

    def file(name: str, **datasets: object) -> None:
        with h5py.File(name, "w") as f:
            for key, value in datasets.items():
                f[key] = value

    file("good.h5", train=good)
    file("images.h5", train=rng.integers(0, 256, (60, 2, 3), dtype=np.uint8))
    nan = good.copy()
    nan[7, 1] = np.nan
    file("nan.h5", train=nan)
    constant = good.copy()
    constant[:, 2] = 4.0
    file("nan-test.h5", train=good, test=nan)
    file("nan-valid.h5", train=good, valid=nan)
    file("constant.h5", train=constant)
    file("strings.h5", train=np.full((4, 3), b"text"))
    file("complex.h5", train=good + 1j)
    file("two.h5", a=good, b=good)
    file("nothing.h5", labels=np.zeros(5))
    file("empty.h5", train=np.zeros((0, 3)))
    file("thin.h5", train=good[:, :1])
    Path("text.h5").write_text("these are not the data you are looking for")
    Path("cut.h5").write_bytes(Path("good.h5").read_bytes()[:-500])
    Path("table.csv").write_text("a,b\n1,2\n3,x\n")
    Path("good.csv").write_text("a,b\n1,2\n3,4\n")
    idx = np.array([[1, 2], [np.nan, 3]], ">f4")
    Path("nan-idx").write_bytes(bytes([0, 0, 0x0D, 2]) + np.array(idx.shape, ">i4").tobytes() + idx.tobytes())
    file("one.h5", train=good[:1])
    NICE(3, (4,), 3).save("flow.h5")
    NICE(6, (4,), 3).save("other.h5")
    Path("damaged.h5").write_bytes(Path("flow.h5").read_bytes()[:-1] + b"!")
    os.mkdir("a-folder")
    os.mkfifo("fifo.h5")
    return tmp_path


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one line that a command line that must fail prints; nothing may have been written."""

    def content() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    before = content()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nicecp: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert content() == before
    return captured.err


DATA_ERRORS = [
    ("none.h5", ["no such file"]),
    ("a-folder", ["folder"]),
    ("fifo.h5", ["not a regular file"]),
    ("text.h5", ["not an HDF5 file", "nicecp data csv"]),
    ("cut.h5", ["truncated"]),
    ("nothing.h5", ["no usable dataset", "labels"]),
    ("two.h5", ["/a", "/b", "choose one"]),
    ("good.h5:/trian", ["/trian", "did you mean", "/train"]),
    ("strings.h5", ["strings"]),
    ("complex.h5", ["complex"]),
    ("nan.h5", ["row 7", "column 1", "nan"]),
    ("nan-test.h5", ["nan-test.h5:/test", "row 7", "column 1", "nan"]),
    ("nan-valid.h5", ["nan-valid.h5:/valid", "row 7", "column 1", "nan"]),
    ("empty.h5", ["no rows"]),
    ("thin.h5", ["one column"]),
    ("constant.h5", ["column", "2", "--allow-constant"]),
]


@pytest.mark.parametrize(("data", "words"), DATA_ERRORS, ids=[data for data, _ in DATA_ERRORS])
def test_bad_data(data: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(["train", "--data", data, "--epochs", "1"], capsys, folder)
    assert data.split(":")[0] in line
    for word in words:
        assert word in line


ERRORS = [
    (["train"], ["--data", "--resume"]),
    (["train", "--data", ""], ["--data", "empty"]),
    (["train", "--data", "good.h5", "--out", "flow.h5"], ["'flow.h5'", "already exists", "--overwrite"]),
    (["train", "--data", "good.h5", "--out", "good.h5", "--overwrite"], ["'good.h5'", "one of the inputs"]),
    (["train", "--data", "good.h5", "--out", "no/run.h5"], ["'no/run.h5'", "folder"]),
    (["train", "--data", "good.h5", "--out", "a-folder"], ["'a-folder'", "folder"]),
    (["train", "--data", "good.h5", "--out", "fifo.h5"], ["'fifo.h5'", "not a regular file"]),
    (["train", "--data", "good.h5", "--epoch", "3"], ["--epoch'", "--epochs"]),
    (["train", "--data", "good.h5", "--epochs", "many"], ["--epochs", "'many'"]),
    (["train", "--data", "good.h5", "--epochs", "0"], ["--epochs", "0"]),
    (["train", "--data", "good.h5", "--hidden", "10,x"], ["--hidden", "'10,x'", "5x1000"]),
    (["train", "--data", "good.h5", "--hidden", "9x999999"], ["memory", "parameters"]),
    (["train", "--data", "good.h5", "--prior", "logistc"], ["--prior", "'logistc'", "logistic"]),
    (["train", "--data", "good.h5", "--preset", "mnits"], ["--preset", "'mnits'", "mnist"]),
    (["train", "--data", "good.h5", "--optimizer", "sgd"], ["--optimizer", "'sgd'", "rmsprop"]),
    (["train", "--data", "good.h5", "--average", "0.5"], ["adam has no --average", "--lr", "--momentum"]),
    (["train", "--data", "good.h5", "--lr", "-1"], ["--lr", "-1"]),
    (["train", "--data", "good.h5", "--lr", "nan"], ["--lr must be finite", "nan"]),
    (["train", "--data", "good.h5", "--lr", "1e30"], ["--lr must be at most 1e+06", "1e+30"]),
    (["train", "--data", "images.h5", "--range", "0,1e300"], ["--range must lie within", "1e+300", "1e+06"]),
    (["train", "--data", "good.h5", "--seed", "-1"], ["--seed", "-1"]),
    (["train", "--data", "good.h5", "--valid-fraction", "1"], ["--valid-fraction", "1"]),
    (["train", "--data", "good.h5", "--batch-size", "51"], ["'good.h5:/train'", "51", "batch size"]),
    (["train", "--data", "good.h5", "--range", "-1,1"], ["--range", "8-bit"]),
    (["train", "--data", "images.h5", "--range", "1,0"], ["--range", "'1,0'"]),
    (["train", "--data", "images.h5", "--no-standardize"], ["--no-standardize"]),
    (["train", "--data", "good.h5", "--device", "cuda"], ["cuda", "--device cpu"]),
    (["train", "--data", "good.h5", "--device", "gpu"], ["--device", "'gpu'"]),
    (["train", "--data", "good.h5", "--threads", "0"], ["--threads", "0"]),
    (["train", "--data", "good.h5", "--checkpoint-every", "5 parsecs"], ["--checkpoint-every", "'5 parsecs'", "5min"]),
    (["train", "--data", "good.h5", "--checkpoint-every", "0"], ["--checkpoint-every", "'0'"]),
    (["train", "--data", "good.h5", "extra"], ["extra"]),
    (["train", "--resume", "none.h5"], ["'none.h5'", "no such run"]),
    (["train", "--resume", "flow.h5"], ["'flow.h5'", "'flow.state.h5'"]),
    (["train", "--resume", "flow.h5", "--out", "x.h5"], ["--out", "--resume"]),
    (["evaluate", "flow.h5"], ["--data"]),
    (["evaluate", "--data", "good.h5"], ["CHECKPOINT"]),
    (["evaluate", "none.h5", "--data", "good.h5"], ["'none.h5'", "No such file"]),
    (["evaluate", "good.h5", "--data", "good.h5"], ["'good.h5'", "not a nicecp checkpoint"]),
    (["evaluate", "damaged.h5", "--data", "good.h5"], ["'damaged.h5'", "damaged"]),
    (["evaluate", "other.h5", "--data", "good.h5"], ["'good.h5:/train'", "3 columns", "6"]),
    (["evaluate", "flow.h5", "--data", "nan.h5"], ["'nan.h5:/train'", "row 7"]),
    (["evaluate", "other.h5", "--data", "images.h5"], ["'images.h5:/train'", "8-bit"]),
    (["evaluate", "flow.h5", "--data", "good.h5", "--split", "valid"], ["'good.h5'", "valid"]),
    (["sample", "flow.h5"], ["--out"]),
    (["sample", "flow.h5", "--out", "x.png"], ["'flow.h5'", "image shape", ".h5"]),
    (["sample", "flow.h5", "--out", "x.txt"], ["'x.txt'", ".png"]),
    (["sample", "flow.h5", "--out", "good.h5"], ["'good.h5'", "already exists"]),
    (["sample", "flow.h5", "--out", "flow.h5", "--overwrite"], ["'flow.h5'", "inputs"]),
    (["sample", "flow.h5", "--out", "no/x.h5"], ["'no/x.h5'", "folder"]),
    (["sample", "flow.h5", "--out", "x.h5", "-n", "0"], ["-n", "0"]),
    (["sample", "flow.h5", "--out", "x.h5", "-n", "999999999999"], ["memory", "samples"]),
    (["info", "none.h5"], ["'none.h5'", "no such file"]),
    (["info", "text.h5"], ["'text.h5'", "not an HDF5 file"]),
    (["info", "damaged.h5"], ["'damaged.h5'", "damaged"]),
    (["info"], ["FILE"]),
    (["data", "csv", "table.csv", "--out", "t.h5"], ["'table.csv'", "3", "x"]),
    (["data", "csv", "table.csv", "--out", "good.h5"], ["'good.h5'", "already exists"]),
    (["data", "idx", "text.h5", "--out", "t.h5"], ["'text.h5'", "not an idx file"]),
    (["data", "cvs", "table.csv"], ["cvs", "csv"]),
    (["data", "csv", "good.csv", "--out", "t.h5", "--dataset", "/"], ["'/'", "no name of a dataset"]),
    (["data", "idx", "nan-idx", "--out", "t.h5"], ["'nan-idx'", "row 1", "column 0", "nan"]),
    (["train", "--data", "one.h5"], ["'one.h5:/train'", "one row is not enough"]),
    (["train", "--data", "flow.h5"], ["'flow.h5'", "checkpoint", "--resume"]),
    (["data", "demo"], ["--out"]),
    (["evalute"], ["'evalute'", "'evaluate'"]),
    (["--versio"], ["--versio", "--version"]),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_one_line_says_what_and_how(
    arguments: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(arguments, capsys, folder)
    for word in words:
        assert word in line


def test_debug_shows_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "none.h5", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("nicecp: error: 'none.h5'")
    assert main(["--debug", "info", "none.h5"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "not enough memory"),
        (OSError(28, "No space left on device", "x.h5"), 2, "'x.h5': No space left on device"),
        (KeyError("surprise"), 1, "a mistake in nicecp (KeyError: 'surprise')"),
        (ValueError("two\n  lines"), 2, "two lines"),
    ],
)
def test_whatever_happens_is_one_line(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("nicecp.describe.describe", fails)
    assert main(["info", "x.h5"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("nicecp: error: ")
    assert words in err


def test_warnings_are_single_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library's, once each though the flow is built twice, and Python's own."""
    import warnings

    import nicecp.samples

    write: Callable[..., object] = nicecp.samples.write_bytes

    def warns(*args: object) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old\nthing", DeprecationWarning, stacklevel=1)
        return write(*args)

    NICE(3, (4,), 2).save("two.h5", overwrite=True)
    monkeypatch.setattr(nicecp.samples, "write_bytes", warns)
    capsys.readouterr()
    assert main(["sample", "two.h5", "--out", "x.h5"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("nicecp: warning: 2 coupling(s)")
    assert lines[1] == "nicecp: warning: old thing"


def test_json_of_info_on_a_flow_without_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "flow.h5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["training"], found["model"]["n_features"]) == ("checkpoint", None, 3)
    assert main(["info", "flow.h5"]) == 0
    assert "not recorded" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [(["evaluate"], True), (["--debug", "score"], True), (["info"], False)])
def test_other_ranks_carry_out_what_all_do_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: bool
) -> None:
    """Also behind an option of the whole program: rank 0 would wait for them for ever."""
    monkeypatch.setattr(app, "launched", lambda: (2, 1))
    assert app.run([*words, "--help"]) == 0
    assert ("Usage:" in capsys.readouterr().out) == said


def test_names_of_the_package_are_listed_once() -> None:
    names = dir(nicecp)
    assert len(names) == len(set(names))
    assert {"NICE", "fit", "load", "testing"} <= set(names)


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks and control characters of datasets' and columns' names are shown, not sent."""
    path = str(tmp_path / "x.h5")
    with h5py.File(path, "w") as file:
        file["a\r\nb\x7f"] = np.zeros((4, 2))
        file["a\r\nb\x7f"].attrs["columns"] = np.array([b"\x1b[2J", b"\xe2\x80\xae"])
    assert main(["info", path]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert r"a\r\nb\x7f" in out
    assert r"\x1b[2J, \u202e" in out

"""What is refused of couplings and networks of a user's own, and the page that shows how to write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nicecp
from nicecp import NICE
from nicecp.errors import DeviceError
from nicecp.kernels.backend import Backend
from nicecp.kernels.numba_backend import NumbaBackend
from nicecp.spec import CouplingSpec, ModelSpec, alternating
from tests.nicecp.own import Ramp, Shift, Stretch, make, registered, rows

ROOT = Path(__file__).resolve().parents[2]

known = pytest.fixture(autouse=True)(registered)


# --- the page ------------------------


def test_the_code_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL):
        exec(compile(code, "docs/extending.md", "exec"), names)
    assert names["report"].error <= 0.5
    out = capsys.readouterr().out
    assert "couplings/0/law/a" in out
    assert "couplings/0/network/V" in out


# --- what is refused ------------------------


def test_names_and_kinds() -> None:
    for name in ("affine", "mlp"):
        with pytest.raises(ValueError, match="is built in"):
            nicecp.register_coupling(name, Shift)
    for name in ("", "A", "x/y", "1", "a" * 65, None, "ä"):
        with pytest.raises(ValueError, match="is no name"):
            nicecp.register_network(name, Ramp)  # type: ignore[arg-type]
    for kind in (Ramp, Shift(), "Shift", None):
        with pytest.raises(TypeError, match=r"'x': expected a subclass of nicecp\.CouplingLaw"):
            nicecp.register_coupling("x", kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'shift' is registered already, as .*\.Shift"):
        nicecp.register_coupling("shift", Stretch)
    nicecp.register_coupling("shift", Shift)  # the same again, as when a notebook's cell is run again
    with pytest.raises(ValueError, match="outputs must be a whole number of at least 1, got 0"):
        nicecp.register_coupling("none", type("No", (Shift,), {"outputs": 0}))
    with pytest.raises(ValueError, match=r"'none'.*nicecp\.register_coupling\('none'"):
        NICE(4, (3,), 3, coupling="none")
    with pytest.raises(ValueError, match=r"unknown network 'none': expected one of mlp, constant, ramp"):
        CouplingSpec("additive", 0, 1, (), "none")


@pytest.mark.parametrize(
    ("law", "network", "says"),
    [
        ({"forward": lambda s, x, m, p: (x[:, :1], 0.0)}, {}, r"coupling 'odd': forward's result has shape \(4, 1\)"),
        ({"forward": lambda s, x, m, p: (x, np.zeros((len(x), 1)))}, {}, r"forward's log_det has shape \(4, 1\)"),
        ({"backward": lambda s, dy, d, x, m, p: (dy, dy[0], {"scale": dy.sum(0)})}, {}, "backward's dm has shape"),
        ({"backward": lambda s, dy, d, x, m, p: (dy, dy, {})}, {}, "gradients by scale are missing"),
        ({}, {"forward": lambda s, x, p: (x[:1], None)}, r"network 'odd-net': forward's m has shape \(1, 3\)"),
        ({}, {"backward": lambda s, dm, saved, p: (dm, {"W": dm})}, "backward's dx has shape"),
        ({"shapes": lambda s, k: {"a/b": (k,)}}, {}, "'a/b' is no name of a parameter"),
        ({"shapes": lambda s, k: {"a": (0,)}}, {}, "lengths of at least 1"),
        ({"initial": lambda s, name, uniform: uniform[:1]}, {}, "initial values of law/scale have shape"),
        ({"forward": lambda s, x, m, p: (np.add(x, m, out=x), 0.0)}, {}, "read-only"),
    ],
)
def test_results_of_another_form_are_refused(law: Any, network: Any, says: str) -> None:
    nicecp.register_coupling("odd", type("Odd", (Shift,), law))
    nicecp.register_network("odd-net", type("OddNet", (Ramp,), network))
    network_name = "odd-net" if network else "mlp"
    with pytest.raises(ValueError, match=says):
        NICE(5, (6,), 3, coupling="odd", network=network_name).loss_and_gradients(rows(4))


def test_an_error_in_ones_own_code_comes_through() -> None:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("mine")

    nicecp.register_coupling("odd", type("Odd", (Shift,), {"forward": fail}))
    flow = NICE(5, (6,), 3, coupling="odd")
    for _ in range(2):  # a recording that failed leaves nothing behind
        with pytest.raises(ZeroDivisionError, match="mine"):
            flow.log_prob(rows(4))
    assert np.isfinite(make("shift", "mlp").log_prob(rows(4))).all()


def test_other_devices_refuse() -> None:
    class Elsewhere(NumbaBackend):
        device = "cuda"

    spec = ModelSpec(4, alternating((6,), 3, "stretch", "ramp"))
    with pytest.raises(DeviceError, match=r"'ramp', 'stretch' run in Python on a CPU, not on 'cuda'"):
        NICE.from_spec(spec, backend=Elsewhere(1))
    with pytest.raises(DeviceError, match="run on a CPU, not on 'cuda'"):
        Backend.host(Elsewhere(1), lambda: None, (), ())


def test_one_tape_is_refused_for_them() -> None:
    flow = make("shift", "mlp")
    backend, ws = flow.backend, flow.network.workspace(3, False)
    with pytest.raises(ValueError, match="is not one tape"):
        backend.write_down(lambda: flow.network.forward(ws, flow._views))  # type: ignore[attr-defined]

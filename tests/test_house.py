"""The rules of the house: layout, packaging, which way imports run, versions, file sizes."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"nicecp": "nicecp", "nicecp.kernels": "kernels", "nicecp.cli": "cli"}  # import name -> folder

# Bottom to top. A module may import from its own level (without a cycle) and from levels below it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("nicecp.errors",),
    ("nicecp.kernels",),
    (
        "nicecp.registry",
        "nicecp.orders",
        "nicecp.spec",
        "nicecp.context",
        "nicecp.preprocessing",
        "nicecp.spline",
        "nicecp.transforms",
        "nicecp.records",
        "nicecp.probe",
        "nicecp.files",
        "nicecp.store",
        "nicecp.schema",
        "nicecp.params",
        "nicecp.mlp",
        "nicecp.host",
        "nicecp.coupling",
        "nicecp.scaling",
        "nicecp.network",
        "nicecp.calls",
        "nicecp.optimizers",
    ),
    ("nicecp.arrays", "nicecp.borders", "nicecp.density", "nicecp.native"),  # what a flow is made with
    ("nicecp.flow",),
    ("nicecp.*",),  # training and tools: every module that is not named elsewhere
    ("nicecp",),  # nicecp/__init__.py: what users import
    ("nicecp.cli", "nicecp.__main__"),
)
FRAMEWORKS = {"torch", "jax", "jaxlib", "tensorflow", "keras", "flax", "mxnet", "paddle"}
BEHIND_EXTRAS = {"nicecp.density_estimator"}  # what inherits from an extra's classes; loaded when first asked for
LINE_LIMIT = 400
LONGER: dict[str, str] = {}  # file -> why it may be longer

# Spelled apart so that this file does not find itself.
LEFTOVERS = re.compile(
    "|".join(["TO" + "DO", "FIX" + "ME", r"\bXX" + r"X\b", "pragma: no " + "cover", "break" + "point"])
)


def files_below(folder: Path, *patterns: str) -> list[Path]:
    """Files below a folder whose names match, symlinked folders not entered, sorted."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        found += [Path(here, name) for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]
    return sorted(found)


def module_name(path: Path) -> str:
    """The import name of a file of the package."""
    for package, folder in reversed(FOLDERS.items()):
        if path.is_relative_to(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            return ".".join([package, *(part for part in parts if part != "__init__")])
    raise ValueError(f"{path} is not part of the package")


MODULES = {module_name(path): path for folder in FOLDERS.values() for path in files_below(ROOT / folder, "*.py")}
TREES = {name: ast.parse(path.read_bytes(), str(path)) for name, path in MODULES.items()}


def imports_of(tree: ast.Module, modules: frozenset[str] = frozenset(MODULES)) -> Iterator[str]:
    """Every module that a file imports, at its top, in functions, and by importlib.import_module("name").

    ``from package import name`` counts as package.name where that is a module. The version may be read from anywhere.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full != "nicecp.__version__":
                    yield full if full in modules else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def level_of(module: str) -> int:
    """The layer of a module of the package."""
    for level, names in enumerate(LAYERS):
        if any(module == name or (name != "nicecp" and module.startswith(name + ".")) for name in names):
            return level
    return LAYERS.index(("nicecp.*",))


def assigned(name: str, tree: ast.Module) -> ast.expr:
    """What a module assigns to a name, once, at its top level."""
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and [ast.unparse(t) for t in n.targets] == [name]]
    assert len(found) == 1, f"{name} is assigned {len(found)} times"
    return found[0]


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    """Imports of one module that run against the order."""
    return [
        f"{module} imports {name}"
        for name in imports_of(tree)
        if name.split(".")[0] == "nicecp" and name != module and level_of(name) > level_of(module)
    ]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    assert wrong_imports(module, TREES[module]) == []


def test_wrong_imports_are_noticed() -> None:
    upwards = (
        "def f():\n    from nicecp.flow import NICE\n    import nicecp.cli.main\n    from nicecp import __version__\n"
    )
    found = wrong_imports("nicecp.spec", ast.parse(upwards))
    assert found == ["nicecp.spec imports nicecp.flow", "nicecp.spec imports nicecp.cli.main"]
    assert (
        wrong_imports("nicecp.errors", ast.parse("import importlib\nimportlib.import_module('nicecp.kernels')")) != []
    )
    with pytest.raises(AssertionError, match="relative"):
        wrong_imports("nicecp.flow", ast.parse("from . import spec"))
    assert wrong_imports("nicecp.flow", ast.parse("import nicecp.unheard_of")) == [
        "nicecp.flow imports nicecp.unheard_of"
    ]
    assert (
        wrong_imports("nicecp.unheard_of", ast.parse("from nicecp.flow import NICE\nimport nicecp.kernels.pool")) == []
    )


def test_no_import_cycles() -> None:
    graph = {
        module: {name for name in imports_of(tree) if name in MODULES and name != module and name != "nicecp"}
        for module, tree in TREES.items()
    }
    while graph:  # take away whatever imports nothing that is left
        leaves = {module for module, names in graph.items() if not names & graph.keys()}
        assert leaves, f"these import one another in a circle, or need those that do: {sorted(graph)}"
        for module in leaves:
            del graph[module]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_are_declared(module: str) -> None:
    """Third-party modules come from the dependencies, none is a deep-learning framework; extras only in functions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    extras = {"matplotlib", "cupy", "cuda", "sklearn", "mpi4py"}  # cuda.pathfinder comes with CuPy
    base.add("llvmlite")  # is a part of Numba: a version of one goes with a version of the other
    for name in imports_of(TREES[module]):
        top = name.split(".")[0]
        assert top not in FRAMEWORKS
        assert top == "nicecp" or top in sys.stdlib_module_names or top in base | extras, f"{name} is not declared"
    for node in TREES[module].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = set(imports_of(ast.Module([node], [])))
            assert not names & BEHIND_EXTRAS, "only nicecp/__init__.py, and when asked"
            assert not {name.split(".")[0] for name in names} & extras


def test_packages_are_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == FOLDERS
    folders = {module_name(path) for folder in FOLDERS.values() for path in files_below(ROOT / folder, "__init__.py")}
    assert sorted(setuptools["packages"]) == sorted(folders)
    with_code = {
        path.parent for folder in FOLDERS.values() for path in files_below(ROOT / folder, "*.py", "*.cu", "*.h")
    }
    assert all((folder / "__init__.py").is_file() for folder in with_code), (
        "a folder without __init__.py is not installed"
    )


def test_package_data_is_complete() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in declared["nicecp"]
    assert (ROOT / "nicecp/py.typed").is_file()
    for package, folder in FOLDERS.items():
        for path in files_below(ROOT / folder, "*"):
            if path.suffix in {".py", ".pyc", ".nbi", ".nbc"}:
                continue
            name = path.relative_to(ROOT / folder).as_posix()
            assert any(fnmatch.fnmatch(name, pattern) for pattern in declared.get(package, [])), (
                f"{path} is not installed"
            )


def test_entry_point_exists() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["nicecp"].split(":")
    names = {node.name for node in TREES[module].body if isinstance(node, ast.FunctionDef)}
    assert function in names


@pytest.mark.parametrize("name", ["kernels", "cli"])
def test_symlinks(name: str) -> None:
    link = ROOT / "nicecp" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_version_is_the_same_everywhere() -> None:
    code = "import nicecp; print(nicecp.__version__)"
    version = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == [version]
    assert ast.literal_eval(assigned("__version__", TREES["nicecp"])) == version, "setuptools reads a literal"


def test_importing_nicecp_is_light() -> None:
    heavy = ["numba", "llvmlite", "scipy", "h5py", "click", "tqdm", "threadpoolctl", "cupy", "matplotlib", "sklearn"]
    code = f"import sys, nicecp; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_not_modules() -> None:
    """``import nicecp.name`` would put the module in the place of the function of that name."""
    public = next(
        node for node in TREES["nicecp"].body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)
    )
    names = {f"nicecp.{name}" for name in ast.literal_eval(public.value)}
    assert names & set(MODULES) == set()


SOURCES = [
    path
    for folder in [*FOLDERS.values(), "tests", "benchmarks", "examples", "docs"]
    for path in files_below(ROOT / folder, "*.py", "*.cu", "*.h", "*.sh")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short_and_finished(path: Path) -> None:
    text = path.read_text()
    if path.relative_to(ROOT).as_posix() not in LONGER:
        assert text.count("\n") <= LINE_LIMIT
    assert LEFTOVERS.findall(text) == []
    if path.suffix == ".py":
        raised = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise)]
        assert [line for line in raised if "NotImplemented" in line] == []


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.startswith("nicecp.cli")))
def test_the_library_does_not_print(module: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    assert {"print", "sys.stdout.write", "sys.stderr.write"} & set(calls) == set()

"""The laws of the house: what is packaged, where `splitfx.passes` is, what importing splitfx loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str, folder: Path, *, path: str | None = None) -> str:
    """Standard output of `code` in a fresh interpreter that starts in `folder`."""
    first = f"import sys; sys.path.insert(0, {path!r})\n" if path else ""
    done = subprocess.run([sys.executable, "-c", first + code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_folder_is_listed():
    folders = {
        ".".join(("splitfx", *one.parent.relative_to(ROOT / "splitfx").parts))
        for one in (ROOT / "splitfx").rglob("*.py")
    }
    folders |= {
        ".".join(("splitfx", "passes", *one.parent.relative_to(ROOT / "passes").parts))
        for one in (ROOT / "passes").rglob("*.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"splitfx.passes"}


def test_the_link_for_bare_clones_is_relative_and_points_to_passes():
    link = ROOT / "splitfx" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def test_splitfx_passes_is_the_folder_passes():
    folder = Path(next(iter(import_module("splitfx.passes").__path__)))
    assert folder.resolve() == ROOT / "passes"


@pytest.mark.parametrize("name", ["passes", "tests"])
def test_bare_names_are_not_importable_from_elsewhere(name: str, tmp_path: Path):
    # A site-packages folder may carry some other project's `tests`; ours must not be found.
    code = f"from importlib.util import find_spec; s = find_spec({name!r})\n"
    code += "print(list(s.submodule_search_locations or []) if s else [])"
    assert str(ROOT) not in run_python(code, tmp_path)


def test_importing_splitfx_loads_no_heavy_leaf(tmp_path: Path):
    code = "import sys, splitfx; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run_python(code, tmp_path, path=str(ROOT)).split())
    heavy = {"onnx", "onnxruntime", "onnxscript", "torchvision", "matplotlib", "timm", "accelerate", "optuna"}
    assert not loaded & heavy


def test_the_protocol_and_plans_need_no_torch(tmp_path: Path):
    code = "import sys, splitfx.errors, splitfx.compiler.options, splitfx.ground.files; print('torch' in sys.modules)"
    stub = f"import types; s = types.ModuleType('splitfx'); s.__path__ = [{str(ROOT / 'splitfx')!r}]\n"
    stub += "import sys; sys.modules['splitfx'] = s\n"
    modules = "splitfx.compiler.protocol, splitfx.compiler.registry, splitfx.compiler.plan"
    more = f"import {modules}; print('torch' in sys.modules)"
    assert run_python(stub + code + "\n" + more, tmp_path).split() == ["False", "False"]


def imported(path: Path) -> Iterator[str]:
    """The top modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (one.name.partition(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def undeclared(modules: set[str]) -> set[str]:
    """Those of the modules whose distribution is among neither the dependencies nor the extras of a user."""
    extras = {k: v for k, v in PROJECT["project"]["optional-dependencies"].items() if k != "dev"}
    written = [*PROJECT["project"]["dependencies"], *(one for extra in extras.values() for one in extra)]
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    declared = {plain(re.match(r"[\w.-]+", one)[0]) for one in written}  # type: ignore[index]
    known = packages_distributions()
    return {one for one in modules if not declared & {plain(name) for name in known.get(one, [one])}}


def test_what_is_imported_is_declared():
    files = [*(ROOT / "splitfx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    modules = {name for path in files for name in imported(path)} - set(sys.stdlib_module_names) - {"splitfx"}
    assert {"filelock", "onnx_ir", "PIL"} <= modules  # within functions too
    assert undeclared(modules) == set()


def test_sabotage_an_import_that_nobody_declared_is_found():
    assert undeclared({"torch", "PIL", "pytest", "no_such_module"}) == {"pytest", "no_such_module"}


def test_the_probe_of_onnxruntime_starts_without_torch(tmp_path: Path):
    code = "import sys, splitfx.export.probe; print('torch' in sys.modules)"
    assert run_python(code, tmp_path, path=str(ROOT)) == "False"


def test_constraints_are_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [one for one in lines if one and not one.startswith("#")]
    pattern = re.compile(r'[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+(; sys_platform == "linux")?')
    assert [one for one in pins if not pattern.fullmatch(one)] == []
    cuda = [one for one in pins if re.match(r"nvidia-|cuda-|triton", one)]
    assert all(one.endswith('; sys_platform == "linux"') for one in cuda)


@pytest.mark.parametrize(
    ("system", "machine", "python", "expected"),
    [
        ("linux", "x86_64", "3.11", "onnxruntime-gpu"),
        ("linux", "x86_64", "3.14", "onnxruntime-gpu"),
        ("win32", "AMD64", "3.12", "onnxruntime-gpu"),
        ("linux", "x86_64", "3.15", "onnxruntime"),
        ("linux", "aarch64", "3.11", "onnxruntime"),
        ("darwin", "arm64", "3.13", "onnxruntime"),
        ("win32", "ARM64", "3.12", "onnxruntime"),
    ],
)
def test_exactly_one_onnxruntime_per_machine(system: str, machine: str, python: str, expected: str):
    requirements = pytest.importorskip("packaging.requirements")
    machine_is = {"sys_platform": system, "platform_machine": machine, "python_version": python}
    parsed = [requirements.Requirement(one) for one in PROJECT["project"]["dependencies"]]
    chosen = [one.name for one in parsed if one.name.startswith("onnxruntime") and one.marker.evaluate(machine_is)]
    assert chosen == [expected]

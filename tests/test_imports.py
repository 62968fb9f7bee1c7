"""The direction of imports, and what must not be imported to get started."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "ops": {"ops"},
    "search_spaces": {"search_spaces", "ops"},
    "hw_models": {"hw_models", "ops"},
    "nas": {"nas", "ops", "search_spaces", "hw_models"},
}
OURS = {*ALLOWED, "tests", "benchmarks"}
SEARCH_ENGINES: dict[str, tuple[str, ...]] = {
    "optuna": ("nas/searchers", "nas/dashboard"),
    "ray": ("nas/executors",),
    "nni": ("nas/executors", "nas/searchers/nni", "nas/interop"),
}


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Top-level package names that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_downhill_only(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        uphill = imported(path) & OURS - ALLOWED[package]
        assert not uphill, f"{path.relative_to(ROOT)} imports {uphill}; {package} may import only {ALLOWED[package]}"


def test_search_engines_are_imported_only_where_they_belong() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            for engine, homes in SEARCH_ENGINES.items():
                if engine in imported(path):
                    where = path.relative_to(ROOT).as_posix()
                    assert where.startswith(homes), f"{where} imports {engine}, which belongs in {homes}"


def test_torchvision_is_never_imported() -> None:
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            assert "torchvision" not in imported(path), path


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("nas", ["torch", "optuna", "ray", "nni", "numba"]),
        ("nas.cli", ["torch", "optuna", "ray", "nni", "numba"]),
        ("nas.driver", ["ray", "nni"]),
        ("ops", ["numba", "optuna"]),
        ("search_spaces", ["numba", "optuna"]),
    ],
)
def test_importing_a_module_does_not_import_what_it_may_not_need(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"

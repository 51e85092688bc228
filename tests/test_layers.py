"""Which module may import which, and what a user may import."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantforge

PACKAGE = Path(quantforge.__file__).parent
ROOT = PACKAGE.parent


def imported(file: Path, *, nested: bool = True) -> set[str]:
    """Return the modules that a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(str(node.module))
    return found


def test_the_contracts_of_import_linter_are_kept():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the contracts are in the source tree")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


@pytest.mark.parametrize("file", sorted((PACKAGE / "numerics").glob("*.py")), ids=lambda f: f.name)
def test_numerics_need_torch_and_the_standard_library_only(file):
    tops = {name.partition(".")[0] for name in imported(file)}
    assert tops <= {"torch", "quantforge", *sys.stdlib_module_names}
    ours = {name for name in imported(file) if name.startswith("quantforge")}
    assert all(name.startswith("quantforge.numerics") or name == "quantforge.errors" for name in ours)


@pytest.mark.parametrize(
    "file",
    [PACKAGE / "__init__.py", PACKAGE / "__main__.py", PACKAGE / "errors.py", *sorted((PACKAGE / "cli").glob("*.py"))],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_what_help_imports_does_not_import_torch(file):
    tops = {name.partition(".")[0] for name in imported(file, nested=False)}
    assert tops <= {"quantforge", "click", *sys.stdlib_module_names}


def test_help_comes_without_torch():
    code = "import sys, quantforge.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_public_functions_are_functions_whatever_else_was_imported():
    for found in pkgutil.walk_packages([str(PACKAGE)], "quantforge."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    for name in set(quantforge.__all__) - {"__version__"}:
        assert callable(getattr(quantforge, name)), f"quantforge.{name} is {getattr(quantforge, name)}"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_module_reads_pickles_or_runs_text(file):
    assert not {name.partition(".")[0] for name in imported(file)} & {"pickle", "marshal", "shelve", "dill", "joblib"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "torch.load", "yaml.load", "os.system", "compile"), f"{called} in {file}"

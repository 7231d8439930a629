"""The rules of the house: imports go down, no cycles, a type name means one thing, every option is read and said."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrite"
FILES = sorted(PACKAGE.rglob("*.py"))
SCHEMAS = ("Config", "Training", "Logging", "Evaluation", "Import")
SCHEMAS += ("Ask", "Export", "Agreement", "JudgeOptions", "Variants")

spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
assert spec is not None and spec.loader is not None
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)
module_name, floor = house.module_name, house.floor


def imported(path: Path) -> set[str]:
    return house.imports()[module_name(path)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    mine = module_name(path)
    for other in imported(path):
        if other.split(".")[0] != "pyrite":
            continue
        assert floor(other) <= floor(mine), f"{mine} (floor {floor(mine)}) imports {other} (floor {floor(other)})"
        if mine.startswith("pyrite.jobs.") and other.startswith("pyrite.jobs."):
            pytest.fail(f"{mine} imports the job {other}")


@pytest.mark.parametrize("path", [p for p in FILES if floor(module_name(p)) == 0], ids=module_name)
def test_mathematics_needs_torch_only(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "annotated_types", "pyrite", "__future__"}


def test_no_import_cycles() -> None:
    assert house.cycles() == []


def test_the_size_of_the_house() -> None:
    """Numbers that may fall and must not rise; `make size` prints them with what stands behind them."""
    size = house.size()
    assert size["top-level entries"] <= 12
    assert size["files"] <= 100
    assert size["longest chain"] <= 9
    assert size["options"]["ppo"] <= 45 and size["options"]["online"] <= 40 and size["options"]["dpo"] <= 32
    assert not size["options without text"]
    assert house.repeated_types() == {}


def test_no_test_imports_what_one_file_uses() -> None:
    """Such a module is its user's own business: test it through the user, so that it may move.

    Mathematics is tested directly. Jobs, recipes, kinds of parts and the command line are loaded by name. Sampling has
    one user, `Policy`, and is compared token by token with the models themselves.
    """
    direct = ("pyrite.math.", "pyrite.jobs.", "pyrite.recipes.", "pyrite.cli", "pyrite.models.generation")
    direct += tuple(importlib.import_module("pyrite.cli").KINDS.values())
    users = {name: [other for other, found in house.inside().items() if name in found] for name in house.inside()}
    alone = {name for name, found in users.items() if len(found) < 2 and name.count(".") > 1}
    alone = {name for name in alone if not name.startswith(direct)}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert not found & alone, f"{path.relative_to(ROOT)} imports {sorted(found & alone)}"


def config_fields(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    schemas = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in SCHEMAS]
    lines = [line for schema in schemas for line in schema.body if isinstance(line, ast.AnnAssign)]
    return [line.target.id for line in lines if isinstance(line.target, ast.Name)]


@pytest.mark.parametrize("path", [p for p in FILES if config_fields(p)], ids=module_name)
def test_every_config_field_is_read(path: Path) -> None:
    read = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    unread = set(config_fields(path)) - read - {"out"}  # `out` is read by runs.start
    assert not unread, f"{path.name}: nothing reads {sorted(unread)}"


def at_import(path: Path) -> set[str]:
    """Root packages imported when the module is, not later inside a function."""
    body = ast.parse(path.read_text()).body
    found = {alias.name for n in body if isinstance(n, ast.Import) for alias in n.names}
    return {name.split(".")[0] for name in found | {n.module or "" for n in body if isinstance(n, ast.ImportFrom)}}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_core_dependencies_only(path: Path) -> None:
    """Extras are imported inside the function that needs them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {re.split(r"[<>=]", name)[0].replace("-", "_") for name in declared}
    core = core - {"vl_convert_python", "pyyaml"} | {"vl_convert", "yaml"}
    assert at_import(path) <= core | {"pyrite", "__future__"} | set(sys.stdlib_module_names)


def test_mathematics_imports_without_transformers() -> None:
    names = [module_name(p) for p in FILES if floor(module_name(p)) == 0]
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\n"
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_readme_tree_is_the_tree() -> None:
    """The tree drawn in the README names every module and package, and nothing else."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\npyrite/\n(.*?)```", text, re.DOTALL)
    assert block, "README.md draws no tree of pyrite/"
    drawn = {line.split()[0] for line in block[1].splitlines() if line.strip() and not line.strip().startswith("#")}
    real = {p.name for p in PACKAGE.glob("*.py") if p.name != "__init__.py"}
    real |= {f"{p.name}/" for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert drawn == real


def test_nothing_speaks_of_the_workplace() -> None:
    words = re.compile(r"/(tmp|root|home)/|TODO|FIXME|XXX")
    for path in [*FILES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.py")]:
        hit = words.search(path.read_text())
        assert not hit, f"{path}: {hit}"

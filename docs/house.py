"""Measure the package and draw its folders: `make size` prints the numbers, `--draw` writes docs/architecture.svg.

Everything is read from the source: lines with docstrings, imports anywhere in a file, class names. Only the counts of
options load the jobs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrite"
FLOORS = ("math", "core", "data", "models", "feedback", "training", "report", "jobs", "recipes", "cli")  # upward
KNOWS = {
    "math": "numbers",
    "core": "run folders, spec strings, processes",
    "data": "rows of text",
    "models": "models",
    "feedback": "opinions about text",
    "training": "learning",
    "report": "charts and pages",
    "jobs": "one file, one command",
    "recipes": "whole experiments",
    "cli": "the command line",
}
Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    """pyrite/math/logps.py is pyrite.math.logps."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports() -> Graph:
    """What every module imports, anywhere in its file but for type checkers: modules of the package, and others."""
    graph: Graph = {}
    for name, path in modules().items():
        found: set[str] = set()
        tree = ast.parse(path.read_text())
        tree.body = [
            one for one in tree.body if not (isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING")
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {one if one in modules() else node.module for one in whole}
        graph[name] = found - {name}
    return graph


def inside() -> Graph:
    """Imports among the modules of the package."""
    return {name: {other for other in found if other in modules()} for name, found in imports().items()}


def floor(module: str) -> int:
    """What a folder may know: pyrite itself knows nothing but its names, the command line knows all."""
    parts = module.split(".")
    return -1 if len(parts) < 2 else len(FLOORS) if parts[1] == "__main__" else FLOORS.index(parts[1])


def cycles() -> list[list[str]]:
    """Circles of imports."""
    graph, found, done = inside(), [], set[str]()

    def visit(name: str, above: list[str]) -> None:
        if name in above:
            found.append([*above[above.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def longest_chain() -> list[str]:
    """The longest way down through the imports; of a graph without cycles."""
    graph = inside()

    @cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in graph[name]), key=len, default=()))

    return list(max((below(name) for name in graph), key=len))


def repeated_types() -> dict[str, list[str]]:
    """Names of classes and type aliases that stand for more than one thing."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                target = node.targets[0].id
                if target[0].isupper() and not target.isupper() and isinstance(node.value, ast.Subscript):
                    found[target].append(name)
    allowed = {"Config", "Import"}  # the options of a job or of its subcommand, by its module
    return {name: places for name, places in found.items() if len(places) > 1 and name not in allowed}


def options(job: str) -> dict[str, str]:
    """The options of a job, as they are typed, with their text."""
    declared = importlib.import_module("pyrite.math.ranges").declared
    schema = importlib.import_module(f"pyrite.jobs.{job}").Config
    return {found.typed: found.text for one in get_args(schema) or [schema] for found in declared(one)}


def size() -> dict[str, Any]:
    """What `make size` prints."""
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    folders = Counter[str]()
    for name, count in lines.items():
        folders[name.split(".")[1] if name.count(".") else "pyrite"] += count
    pages = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "recipes").rglob("*.html*"))
    jobs = [name.split(".")[-1] for name in modules() if name.startswith("pyrite.jobs.")]
    every = {job: options(job) for job in jobs}
    return {
        "files": len(lines),
        "lines": sum(lines.values()),
        "lines by folder": dict(folders),
        "recipes and their pages": folders["recipes"] + pages,
        "top-level entries": len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]),
        "longest chain": len(longest_chain()),
        "cycles": len(cycles()),
        "type names twice": len(repeated_types()),
        "options without text": sum(not text for found in every.values() for text in found.values()),
        "options": {job: len(found) for job, found in every.items()},
    }


# The picture --------------------------------------------------------------------------------------------------------

WIDTH, ROW, BOX = 760, 64, 330


def draw() -> str:
    """The folders as floors, and how many imports go from one to another, as SVG."""
    graph, arrows = inside(), Counter[tuple[str, str]]()
    for name, found in graph.items():
        for other in found:
            above, below = (one.split(".")[1] if one.count(".") else "" for one in (name, other))
            if above in FLOORS and below in FLOORS and above != below:
                arrows[above, below] += 1
    y = {folder: (len(FLOORS) - 1 - i) * ROW + 40 for i, folder in enumerate(FLOORS)}
    files = Counter(name.split(".")[1] for name in modules() if name.count("."))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {len(FLOORS) * ROW + 50}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{len(FLOORS) * ROW + 50}" fill="#fff"/>',
        '<text x="20" y="22" fill="#57606a">imports go down only; the thicker a line, the more files import</text>',
    ]
    for (above, below), count in sorted(arrows.items()):
        drop = (y[below] - y[above]) / ROW
        reach = 30 + 32 * drop
        start, end, x = y[above] + 24, y[below] + 24, 20 + BOX
        parts.append(
            f'<path d="M{x} {start} C{x + reach:.0f} {start} {x + reach:.0f} {end} {x} {end}" fill="none" '
            f'stroke="#8c6d1f" stroke-opacity=".45" stroke-width="{min(1 + count / 3, 9):.1f}">'
            f"<title>{above} imports {below}: {count}</title></path>"
        )
    parts.extend(
        f'<rect x="20" y="{y[folder]}" width="{BOX}" height="48" rx="6" fill="#f6f1e0" stroke="#8c6d1f"/>'
        f'<text x="34" y="{y[folder] + 21}" font-weight="600" fill="#1f2328">{folder}/</text>'
        f'<text x="34" y="{y[folder] + 39}" fill="#57606a">{KNOWS[folder]} · {files[folder]} files</text>'
        for folder in FLOORS
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="write docs/architecture.svg")
    if parser.parse_args().draw:
        (ROOT / "docs" / "architecture.svg").write_text(draw())
        return
    for name, value in size().items():
        print(f"{name:24} {value}")
    print("longest chain            " + " > ".join(name.removeprefix("pyrite.") for name in longest_chain()))
    for name, places in sorted(repeated_types().items()):
        print(f"{name:24} stands in {', '.join(place.removeprefix('pyrite.') for place in places)}")


if __name__ == "__main__":
    main()

"""The order of the packages: every import, lazy ones and those for types included, goes down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "compress": (
        "errors",
        "progress lazy",
        "artifact",
        "catalog cli config_values linalg",
        "refusals",
        "recipe",
        "architecture",
        "source",
        "structures",
        "model",
        "rewrites",
        "checkpoint",
        "calibration",
        "rotation",
        "allocation",
        "fit",
        "methods",
        "requests options",
        "forecast default_out",
        "preflight",
        "pipeline",
        "api",
        "run",
    ),
    "export": (
        "memory",
        "graph",
        "runtime",
        "halves",
        "stages",
        "tensorrt",
        "triton",
        "build",
    ),
    "validate": (
        "gates cost measure",
        "graphfacts",
        "baseline report",
        "perplexity",
        "first",
        "tasks",
        "speed",
        "parity",
        "latency serving",
        "quality",
        "run",
    ),
}
"""Package -> its files and folders from the ground up, those on one floor side by side."""

BELOW = {
    "compress": (),
    "trt_plugins": ("compress",),
    "export": ("compress", "trt_plugins"),
    "validate": ("compress", "export"),
}
"""Package -> the others that it may import."""


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, wherever it stands; names of a package may be modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def modules(package: str) -> Iterator[Path]:
    """Every module that is imported from where it lies; the templates of a Triton repository run elsewhere."""
    return (path for path in sorted((ROOT / package).rglob("*.py")) if "templates" not in path.parts)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    floors = {room: floor for floor, row in enumerate(FLOORS[package]) for room in row.split()}
    rooms = {path.relative_to(ROOT / package).with_suffix("").parts[0] for path in modules(package)} - {"__init__"}
    assert rooms == set(floors), "FLOORS names every file and folder"
    up = []
    for path in modules(package):
        room = path.relative_to(ROOT / package).with_suffix("").parts[0]
        for line, name in imported(path):
            top, _, rest = name.partition(".")
            inner = rest.split(".")[0]
            if top == package and inner in floors and inner != room and floors[inner] >= floors.get(room, len(floors)):
                up.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert not up


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_those_below(package: str) -> None:
    others = set(BELOW) - {package, *BELOW[package]}
    assert not [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in modules(package)
        for line, name in imported(path)
        if name.split(".")[0] in others | {"tests"}
    ]


def test_no_test_imports_another() -> None:
    """What several tests use has a file of its own."""
    assert not [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in imported(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]


@pytest.mark.parametrize("package", FLOORS)
def test_the_document_has_the_same_floors(package: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(rf"^### {package}\n(.*?)(?=^##)", text, re.M | re.S)
    assert section is not None
    rows = re.findall(r"^\| ((?:`\w+` ?)+)\|", section[1], re.M)
    assert [set(re.findall(r"\w+", row)) for row in rows] == [set(row.split()) for row in FLOORS[package]]

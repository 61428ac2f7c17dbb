"""pyproject.toml, and what messages and documents say of it: extras that exist, versions that are asked for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.pyproject import ROOT, least, lowest, requirements

PACKAGES = ("compress", "export", "trt_plugins", "validate")
DOCUMENTS = (ROOT / "README.md", ROOT / "trt_plugins" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
EXTRA = re.compile(r"(?:procrustes-llm|'\.)\[([\w,-]+)\]")
DISTRIBUTION = {"lm_eval": "lm-eval"}
"""Module -> the distribution that brings it, where the names differ."""


def sources() -> Iterator[Path]:
    return (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))


def calls_of_require() -> Iterator[tuple[str, str, str]]:
    """(where, module, what the message says after `pip install`) of every call of compress.lazy.require."""
    for path in sources():
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "compress.lazy"
            for alias in node.names
        }
        for node in ast.walk(tree):
            if "require" in imported and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                [pip] = [keyword.value for keyword in node.keywords if keyword.arg == "pip"]
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.literal_eval(node.args[0]), ast.literal_eval(pip)


def test_a_missing_package_is_of_the_extra_that_is_named() -> None:
    asked = requirements()
    calls = list(calls_of_require())
    assert len(calls) >= 14
    for where, module, pip in calls:
        name = module.split(".")[0]
        name = DISTRIBUTION.get(name, name)
        found = EXTRA.search(pip)
        if found is not None:
            assert name in {each.name for each in asked[found[1]]}, f"{where}: {found[1]} does not bring {module}"
        else:
            [always] = [each for each in asked[""] if each.name == name]
            assert pip == f"'{name}>={least(always)}'", where


def test_extras_that_are_named_exist() -> None:
    named = {
        (str(path.relative_to(ROOT)), extra)
        for path in (*sources(), *DOCUMENTS, ROOT / "Makefile", ROOT / "constraints-cpu.txt")
        for extras in EXTRA.findall(path.read_text())
        for extra in extras.split(",")
    }
    assert len(named) >= 10
    assert [each for each in sorted(named) if each[1] not in requirements()] == []


def test_messages_name_an_extra_and_no_package_of_one() -> None:
    """A package by its name alone comes without the version that is needed. What a server gets runs by itself."""
    optional = {each.name for extra, asked in requirements().items() if extra for each in asked}
    for path in (path for path in sources() if "templates" not in path.parts):
        for word in re.findall(r"pip install '?([\w-]+)", path.read_text()):
            assert word not in optional, f"{path.relative_to(ROOT)}: pip install {word}"


def test_the_readme_has_a_row_for_each_extra() -> None:
    table = (ROOT / "docs/usage.md").read_text().split("| extra |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == requirements().keys() - {""}


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    """Write them with: python -m tests.pyproject > constraints-lowest.txt"""
    assert (ROOT / "constraints-lowest.txt").read_text() == lowest()

"""The documents hold together: links and anchors resolve, and what they name in the code is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "trt_plugins/README.md"])
SOURCES = sorted(
    path
    for package in ("compress", "export", "trt_plugins", "validate")
    for path in (ROOT / package).rglob("*")
    if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")
)


def prose(text: str) -> str:
    """The text without fenced and indented blocks and spans of code, where brackets are no links."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.M))


def headings(text: str) -> list[str]:
    """The anchors of a document, as GitHub and mkdocs make them of its headings."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M)
    return [re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles]


def broken_links(path: Path, text: str) -> Iterator[str]:
    """The relative links of a document that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        inside = file.is_relative_to(path.parent) or file.is_relative_to(ROOT)
        if not (inside and file.exists() and (not anchor or anchor in headings(file.read_text()))):
            yield target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    assert not list(broken_links(path, path.read_text()))


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading, of `code`\n")
    text = "# Here\n[a](other.md#one-heading-of-code) [b](#here) [c](other.md#two) [d](gone.md) [e](#f) `[f](g.md)`\n"
    (tmp_path / "page.md").write_text(text)
    assert list(broken_links(tmp_path / "page.md", text)) == ["other.md#two", "gone.md", "#f"]


def test_code_refers_to_headings_that_exist() -> None:
    """A comment says docs/method.md#heading; numbers of sections would point to nothing after the next change."""
    references = [
        (path, document, anchor)
        for path in SOURCES
        for document, anchor in re.findall(r"(?<![\w/])(docs/[\w-]+\.md)(#[\w-]+)?", path.read_text())
    ]
    assert len([reference for reference in references if reference[2]]) >= 9
    for path, document, anchor in references:
        assert (ROOT / document).is_file(), f"{path}: {document}"
        if anchor:
            assert anchor[1:] in headings((ROOT / document).read_text()), f"{path}: {document}{anchor}"
    assert not [path for path in SOURCES if re.search(r"\bmethods \d", path.read_text())]


def names(path: Path) -> set[str]:
    """Names of a module's top level and of its classes' members ("Class.member")."""
    found = set[str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_names_exist(path: Path) -> None:
    """`compress/linalg.py`, `compress/structures` (a file or folder), `compress/linalg.py:Moment`; not of a history."""
    if path.name == "CHANGELOG.md":
        return
    pattern = r"`((?:compress|export|trt_plugins|validate|tests)/[\w./-]*)(?::([\w.]+))?`"
    for file, name in re.findall(pattern, path.read_text()):
        assert (ROOT / file).exists() or (ROOT / f"{file}.py").exists(), file
        if name:
            assert name in names(ROOT / file), f"{file}:{name}"

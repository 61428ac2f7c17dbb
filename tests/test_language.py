"""The English of docstrings and comments, as far as a program can read it (CONTRIBUTING.md, "Style")."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = (
    "compress/allocation",
    "compress/architecture.py",
    "compress/artifact/files.py",
    "compress/artifact/locking.py",
    "compress/artifact/manifest.py",
    "compress/artifact/reading.py",
    "compress/artifact/state.py",
    "compress/calibration",
    "compress/config_values.py",
    "compress/fit",
    "compress/linalg.py",
    "compress/methods",
    "compress/rewrites",
    "compress/rotation",
    "compress/source",
    "export/graph",
    "export/halves.py",
    "export/memory.py",
    "export/runtime",
    "export/stages.py",
    "export/tensorrt",
    "export/triton",
    "validate/baseline.py",
    "validate/cost.py",
    "validate/first.py",
    "validate/gates.py",
    "validate/graphfacts.py",
    "validate/measure.py",
    "validate/parity",
    "validate/perplexity",
    "validate/quality/__main__.py",
    "validate/quality/plots.py",
    "validate/quality/run.py",
    "validate/quality/table.py",
    "validate/report",
    "validate/serving.py",
    "validate/speed",
    "validate/tasks",
)
"""Files and folders that keep the rules; whoever rewrites another one adds it."""

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FIRST = re.compile(r"(Of|As|Whose|Whether)\b")
BANNED = {
    r"\b(?:is|are|was|were|be|been) told\b": "is given, is sent, is logged",
    r"\bminds?\b": "costs, counts",
    r"\bnobody\b": "no client, no caller",
    r"\bsays? (?:of|so)\b": "describes, names",
    r"\bseen to\b": "",
    r"\b(?:has|have) not(?= (?:a|an|the|what|both|any|all|its|their)\b|[.,;:)]|$)": "does not have, lacks",
    r"\b(?:has|have) (?:it|them) not\b": "does not have them",
    r"\bat the (?:least|most)\b": "as a minimum, as a maximum",
    r"\b[Aa]rtefacts?\b": "artifact",
}
"""What is not to be written -> what is instead."""


def texts(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, "docstring" or "comment", text) of a module; strings that describe a constant count as docstrings."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, "docstring", value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], "comment", token.string


def faults(source: str) -> list[str]:
    """The lines that break a rule, each with the rule."""
    found = []
    for line, kind, text in texts(source):
        if kind == "docstring" and FIRST.match(text):
            found.append(f"{line}: begins with {text.split()[0]}: a noun or a verb first")
        joined = " ".join(text.split())
        found += [
            f"{line}: {wrong[0]!r}: {right}" for rule, right in BANNED.items() for wrong in re.finditer(rule, joined)
        ]
    return found


@pytest.mark.parametrize("place", WRITTEN)
def test_docstrings_and_comments(place: str) -> None:
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    assert not [f"{file.relative_to(ROOT)}:{fault}" for file in files for fault in faults(file.read_text())]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents(path: Path) -> None:
    text = " ".join(path.read_text().split())
    assert not [wrong[0] for rule in BANNED for wrong in re.finditer(rule, text)]


def test_faults_are_found() -> None:
    source = '"""Whether this has not what it needs."""\n\nx = 1\n"""Of a thing."""\n# nobody is told; it has not run\n'
    assert [fault.partition(":")[0] for fault in faults(source)] == ["1", "1", "4", "5", "5"]

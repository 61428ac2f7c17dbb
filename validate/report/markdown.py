"""Markdown tables, and documents that hold one between two marks, written anew by a command and never by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.errors import UsageError


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line for each row, without a newline at its end; cells are taken as they are."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def marks(name: str) -> tuple[str, str]:
    """The lines that the table called `name` stands between."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def surroundings(file: Path, name: str, new: str) -> tuple[str, str]:
    """What stands before and after the table in `file`; `new` and nothing when there is no such file.

    Raises UsageError when the file does not have both marks, once and in order.
    """
    if not file.exists():
        return new, "\n"
    first, last = marks(name)
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end) or first in after:
        raise UsageError(f"{file} has no single pair of lines {first} and {last} to put the table between; add them")
    return before, after


def with_table(file: Path, name: str, new: str, table: str) -> str:
    """The text of `file` with `table` between its marks. Raises as `surroundings`."""
    (before, after), (first, last) = surroundings(file, name, new), marks(name)
    return f"{before}{first}\n{table}\n{last}{after}"

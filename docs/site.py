"""MkDocs hook: the README and its neighbours become pages of the site, and links between all of them hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""File beside docs/ -> its page."""


def on_files(files: Any, config: Any, **unused: Any) -> Any:
    """Add the pages that are written elsewhere."""
    for name, page in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())
        files.append(File.generated(config, page, content=_between_pages(text)))
    return files


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Let links out of docs/ lead to the pages of these files."""
    return _between_pages(re.sub(r"\]\(\.\./", "](", markdown))


def _between_pages(text: str) -> str:
    return re.sub(r"\]\(README\.md", "](index.md", text)

"""Artefacts from elsewhere: damaged, and signed anew, so that their manifest vouches for the damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.files import sha256_of


def sign(out: Path) -> None:
    """Let manifest.json give the sizes and hashes that the files have now, and the stages the digests of their inputs."""
    from compress.manifest import Manifest

    path = out / "manifest.json"
    values = json.loads(path.read_text())
    for name, entry in values["files"].items():
        file = out / name
        if file.is_file():
            entry.update(size=file.stat().st_size, sha256=sha256_of(file))
    manifest = Manifest(**values)
    for facts in values["stages"].values():
        for source in facts.get("inputs", {}):
            facts["inputs"][source] = manifest.digest(source)
    path.write_text(json.dumps(values))


def edited(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A JSON file of the artefact edited, and signed."""

    def damage(out: Path) -> None:
        path = out / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        if name != "manifest.json":
            sign(out)

    return damage


def replaced(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with another content, and signed."""

    def damage(out: Path) -> None:
        (out / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if name != "manifest.json":
            sign(out)

    return damage

"""manifest.json: what is in OUT, from what and by what it was made, and each file's size and SHA-256.

{"schema": 1, "source": {...}, "recipe_sha256": "...", "versions": {...},
 "files": {"checkpoint/config.json": {"size": 1234, "sha256": "..."}, ...},
 "gates": {...}, "stages": {"checkpoint": {...}, "onnx": {"inputs": {"checkpoint": "<digest>"}, ...}}}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from compress.artifact.reading import RefusedError, read_json, shown
from compress.errors import ArtifactError

SCHEMA = 1
_REPLACED, _MERGED = ("source", "recipe_sha256", "gates"), ("versions",)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(TypedDict):
    """Size in bytes and SHA-256 in lower-case hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One state of manifest.json; the methods return new states."""

    schema: int = SCHEMA
    source: dict[str, Any] = field(default_factory=dict)
    recipe_sha256: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ArtifactError, naming the file and the first thing wrong in it."""
        elsewhere = f"build in another folder, or move {path.parent} away first"
        if not path.is_file() and os.path.lexists(path):
            raise ArtifactError(f"{path} is not a regular file; {elsewhere}")
        try:
            value = read_json(path, finite=True)
        except RefusedError as error:
            if not os.path.lexists(path):
                what = (
                    "it is a model" if (path.parent / "config.json").is_file() else "no build has been completed there"
                )
                raise ArtifactError(
                    f"{path.parent} is no output folder of this program: {what} ({path.name} is missing); name the "
                    f"folder that python -m export.build --model MODEL --out FOLDER has made"
                ) from None
            raise ArtifactError(f"{path} {error}; {elsewhere}") from error
        fault = _fault(value)
        if fault is not None:
            raise ArtifactError(f"{path} is malformed: {fault}; {elsewhere}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """A copy that the caller may change."""
        return asdict(self)

    def to_json(self) -> str:
        """Indented, with sorted keys: two equal artifacts have equal manifests."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def digest(self, stage: str) -> str:
        """One SHA-256 over the names and hashes of a stage's files."""
        lines = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(self._files_of(stage, self.files).items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def with_stage(self, stage: str, facts: dict[str, Any], files: Mapping[str, FileEntry]) -> Manifest:
        """`stage` made anew: its files replace the older ones. Gates stay only when it is reports itself."""
        previous = self._files_of(stage, self.files)
        kept = {name: entry for name, entry in self.files.items() if name not in previous}
        return replace(
            self,
            files={**kept, **files},
            stages={**self.stages, stage: facts},
            gates=self.gates if stage == "reports" else {},
        )

    def updated(self, section: Mapping[str, Any]) -> Manifest:
        """`source`, `recipe_sha256` and `gates` replaced, `versions` merged; other keys: ValueError."""
        changes: dict[str, Any] = {}
        for key, value in section.items():
            if key in _REPLACED:
                changes[key] = value
            elif key in _MERGED:
                changes[key] = {**getattr(self, key), **value}
            else:
                raise ValueError(f"{key!r} is not one of {(*_REPLACED, *_MERGED)}")
        changed = replace(self, **changes)
        fault = _fault(asdict(changed))
        if fault is not None:
            raise ValueError(fault)
        return changed

    @staticmethod
    def _files_of(stage: str, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
        return {name: e for name, e in files.items() if name == stage or name.startswith(stage + "/")}


def _fault(value: Any) -> str | None:
    """The first thing wrong in a parsed manifest, as a clause; None when it is sound."""
    if not isinstance(value, dict):
        return f"it is a JSON {type(value).__name__}, not an object"
    schema = value.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        return f"its schema is {shown(schema)}, and this version reads {SCHEMA}; upgrade procrustes-llm"
    if schema != SCHEMA or isinstance(schema, bool):
        return f"its schema is {shown(schema)}, not {SCHEMA}"
    defaults = asdict(Manifest())
    for key in defaults.keys() - value.keys():
        return f"it has no {key!r}"
    for key in sorted(value.keys() - defaults.keys()):
        return f"it has an unknown key {shown(key)}"
    for key, default in defaults.items():
        if not isinstance(value[key], type(default)):
            return f"{key!r} is a {type(value[key]).__name__}, not a {type(default).__name__}"
    for name, entry in value["files"].items():
        fault = _path_fault(name) or _entry_fault(entry)
        if fault is not None:
            return f"file {shown(name)} {fault}"
    for name, facts in value["stages"].items():
        if not isinstance(facts, dict) or not isinstance(facts.get("inputs", {}), dict):
            return f"stage {shown(name)} is not an object with an object of inputs"
        fault = _facts_fault(facts, _STAGE_FACTS)
        if fault is not None:
            return f"stage {shown(name)} {fault}"
    fault = _source_fault(value["source"])
    if fault is not None:
        return f"source {fault}"
    return None


_NUMBER = (int, float)
_STAGE_FACTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("ratio", "model_ratio"), _NUMBER),
    **dict.fromkeys(("structured_linears", "dense_linears"), int),
    **dict.fromkeys(("dtype", "logits", "engine"), str),
    **dict.fromkeys(("activations", "request"), dict),
}
"""Facts of stages that commands read, and their types where they are given."""

_ACTIVATIONS: dict[str, type | tuple[type, ...]] = {
    "beyond": dict,
    "place": str,
    "tokens": int,
    "value": (*_NUMBER, str),  # "inf", which JSON has no number for
}


def _facts_fault(facts: dict[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> str | None:
    for name, kind in kinds.items():
        fact = facts.get(name)
        if fact is not None and (not isinstance(fact, kind) or isinstance(fact, bool)):
            return f"has {name} {shown(fact)}"
    if isinstance(watched := facts.get("activations"), dict):
        missing = sorted(_ACTIVATIONS.keys() - watched.keys())
        return f"has activations without {missing[0]}" if missing else _facts_fault(watched, _ACTIVATIONS)
    return None


def _source_fault(source: dict[str, Any]) -> str | None:
    """What of the source no command could find it by, as a clause; an empty one is not known yet."""
    if not source:
        return None
    if not isinstance(source.get("id"), str):
        return f"has the id {shown(source.get('id'))}, no string"
    for name, kind in (("kind", str), ("revision", str), ("sha256", dict), ("location", dict)):
        if source.get(name) is not None and not isinstance(source[name], kind):
            return f"has {name} {shown(source[name])}"
    for name in ("sha256", "location"):
        for key, value in (source.get(name) or {}).items():
            if not isinstance(value, str):
                return f"has {name} of {shown(key)} {shown(value)}, no string"
    return None


def _path_fault(name: str) -> str | None:
    """Only plain relative paths that stay inside OUT: checked before anything is opened."""
    if not name or "\\" in name or "\0" in name:
        return "is no plain relative path"
    if PurePosixPath(name).is_absolute() or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leaves its folder or is not in its simplest form"
    return None


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        return "has not exactly a size and a sha256"
    size, digest = entry["size"], entry["sha256"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return f"has size {shown(size)}"
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        return f"has sha256 {shown(digest)}"
    return None

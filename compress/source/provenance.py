"""What an artifact records of its source model, and how a later command finds that model again.

A model is known by what its files hold, wherever they lie: a folder that was moved, renamed or downloaded again is the
same model, one in which a file was changed is another. Where the files lay is remembered beside it, for the next
command, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.artifact.files import sha256_of
from compress.errors import ArtifactError, UsageError
from compress.source import hub
from compress.source.memory import content_hashes
from compress.source.model import ModelSource
from compress.source.resolve import resolve

_SETTINGS = ("config.json", *hub.SETTINGS)
"""Files beside the weights that decide what the model computes, reads or writes. A GGUF file has them in itself."""


def is_local(source: ModelSource) -> bool:
    """True for a folder or file of the user's, which only its path finds again."""
    return source.kind == "folder" or (source.kind == "gguf" and source.source_id == source.gguf_file)


def file_hashes(source: ModelSource) -> dict[str, str]:
    """File name -> SHA-256 of all that makes the model: weights, config, tokenizer."""
    if source.gguf_file is not None or source.kind == "memory":
        return dict(source.sha256)
    settings = [name for name in _SETTINGS if (source.path / name).is_file()]
    return {**source.sha256, **{name: sha256_of(source.path / name) for name in settings}}


def identity(source: ModelSource) -> list[str]:
    """What two sources share exactly when they are the same model: the hashes of its files, whatever their place."""
    return sorted(file_hashes(source).values())


def record_of(source: ModelSource) -> dict[str, Any]:
    """Entry of the source in manifest.json: kind, id, revision and the hashes of its files; of a local one also
    `location`, the path as it was given and as it was found."""
    recorded = {**source.to_dict(), "sha256": file_hashes(source)}
    if is_local(source):
        found = source.path if source.gguf_file is None else source.path / source.gguf_file
        recorded["location"] = {"given": source.name, "path": str(found)}
    return recorded


def public(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the paths of this machine, for reports that are passed on."""
    return {key: value for key, value in recorded.items() if key != "location"}


def find_source(
    recorded: Mapping[str, Any], out: Path, model: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """The model of which OUT's manifest has `recorded`, held against its hashes; `model` names it instead.

    A hub model and a package are found by their names, a folder or file where it lay, or at the same relative path from
    the present folder. Raises UsageError when it is not there, ArtifactError when it is another model than it was.
    """
    if model is not None:
        source = resolve(model, trust_remote_code=trust_remote_code)
        _must_match(source, recorded, out, "name the right one with --model")
        return source
    name = stable_name(recorded)
    if name is not None:
        revision = recorded.get("revision")
        revision = None if revision is None else str(revision)
        source = resolve(name, revision=revision, trust_remote_code=trust_remote_code)
        _must_match(source, recorded, out, "or name the right one with --model")
        return source
    return _find_local(recorded, out, trust_remote_code)


def stable_name(recorded: Mapping[str, Any]) -> str | None:
    """A name by which any machine finds the source; None for a local folder or file."""
    from compress.source.aliases import PACKAGED

    kind, name = recorded.get("kind"), str(recorded.get("id", ""))
    if kind == "hub":
        return f"hf:{name}"
    for alias, package in PACKAGED.items():
        if name == f"{package.distribution}=={package.version}":
            return alias
    return None


def _find_local(recorded: Mapping[str, Any], out: Path, trust_remote_code: bool) -> ModelSource:
    if recorded.get("kind") == "memory":
        raise UsageError(
            f"{out} was made from a model in memory ({str(recorded.get('id'))!r}), of which no file is known: save "
            "that model and its tokenizer with save_pretrained, and name the folder with --model PATH"
        )
    places = list(_places(recorded))
    if not places:
        raise UsageError(
            f"{out} was made from {str(recorded.get('id'))!r}, and its manifest does not say where that model is; "
            "say so with --model PATH"
        )
    there = [place for place in places if place.exists()]
    if not there:
        raise UsageError(
            f"the model that {out} was made from is no longer at {' or '.join(map(str, places))}: it was moved or "
            "removed; say where it is with --model PATH"
        )
    sources = [resolve(str(place), trust_remote_code=trust_remote_code) for place in there]
    for source in sources:
        if not _changed(source, recorded):
            return source
    _must_match(sources[0], recorded, out, "put the original back, compress the new one, or name another with --model")
    raise AssertionError("unreachable: the first source does not match")


def _places(recorded: Mapping[str, Any]) -> Iterator[Path]:
    """Where a local source may be. Raises ArtifactError for what is no path."""
    location = recorded.get("location")
    if location is None:  # written before places were remembered
        return
    values = [location.get(key) for key in ("path", "given")] if isinstance(location, dict) else [None]
    if not all(isinstance(value, str) and value and "\0" not in value for value in values):
        raise ArtifactError(
            f"the source's location in the manifest is {location!r}, which is no path; use --model PATH"
        )
    yield from dict.fromkeys(Path(str(value)).expanduser().absolute() for value in values)


def _must_match(source: ModelSource, recorded: Mapping[str, Any], out: Path, advice: str) -> None:
    changed = _changed(source, recorded)
    if changed:
        raise ArtifactError(
            f"{source.name!r} is not the model that {out} was made from: by the SHA-256 sums in the manifest, "
            f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''} differ{'s' * (len(changed) == 1)}; "
            f"{advice}"
        )


def _changed(source: ModelSource, recorded: Mapping[str, Any]) -> list[str]:
    """The files that are not what they were, by name; a GGUF file may have been renamed."""
    expected = recorded.get("sha256")
    if not isinstance(expected, dict) or not expected:
        raise ArtifactError("the manifest has no hashes of the source model; compress it again")
    if recorded.get("kind") == "gguf" and source.gguf_file is not None:
        return [] if list(expected.values()) == list(source.sha256.values()) else [source.gguf_file]
    if recorded.get("kind") == "memory":
        found = content_hashes(source)
        return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    # Older manifests have the weight files alone: what they do not mention is not held against them.
    found = file_hashes(source) if "config.json" in expected else source.sha256
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))

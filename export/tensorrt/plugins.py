"""OUT/plugins: the libraries that make TensorRT run the custom ops with kernels of ours. No GPU is needed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.artifact.files import sha256_of
from compress.artifact.store import Artifact
from compress.errors import ArtifactError
from compress.progress import log
from export.stages import BUILD_INFO, build_info, is_current, structured_ops, write_json
from trt_plugins.build import ARCHITECTURES, AUTOLOAD, PLUGINS, SOURCES, build

WITHOUT_PLUGIN = "KroneckerLinearGeneral"  # and its twin: their function bodies run


def wants_plugins(artifact: Artifact) -> bool:
    """True if OUT/onnx has an op that a plugin runs."""
    return any(not name.startswith(WITHOUT_PLUGIN) for name in structured_ops(artifact))


def build_plugins(
    artifact: Artifact,
    *,
    libraries: Path | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    keep: bool = False,
) -> dict[str, Any]:
    """OUT/plugins: both libraries and build.json, whose values are returned.

    libraries: a folder in which `python -m trt_plugins.build` left them, in place of compiling them now. keep: what is
    there already stays, whatever it was compiled from. Raises MissingDependencyError without a compiler, ArtifactError
    where `libraries` does not have them.
    """
    if keep and libraries is None and artifact.has_stage("plugins"):
        artifact.verify(["plugins"])
        log(f"re-using {artifact.path('plugins')}")
        return build_info(artifact, "plugins")
    wanted: dict[str, Any]
    if libraries is None:
        wanted = {"sources": _sources_digest(), "architectures": list(architectures)}
    else:
        absent = [name for name in (PLUGINS, AUTOLOAD) if not (libraries / name).is_file()]
        if absent:
            raise ArtifactError(f"{libraries} has no {absent[0]}: make it with python -m trt_plugins.build")
        wanted = {"given": {name: sha256_of(libraries / name) for name in (PLUGINS, AUTOLOAD)}}
    if is_current(artifact, "plugins", [], wanted):
        log(f"re-using {artifact.path('plugins')}: same sources")
        return build_info(artifact, "plugins")
    with artifact.stage("plugins", facts=wanted) as folder, artifact.scratch("plugins") as scratch:
        if libraries is None:
            build(scratch, architectures)
        for name in (PLUGINS, AUTOLOAD):
            shutil.copyfile((libraries or scratch) / name, folder / name)
        hashes = {name: sha256_of(folder / name) for name in (PLUGINS, AUTOLOAD)}
        write_json(folder / BUILD_INFO, {**wanted, "sha256": hashes})
    return build_info(artifact, "plugins")


def _sources_digest() -> str:
    """One SHA-256 over everything that the libraries are compiled from."""
    total = hashlib.sha256()
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(SOURCES).as_posix()} {sha256_of(path)}\n".encode())
    return total.hexdigest()

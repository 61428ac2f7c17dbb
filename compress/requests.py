"""What decides a checkpoint: equal requests give equal checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compress.architecture import Architecture
from compress.artifact.files import sha256_of
from compress.artifact.store import Artifact
from compress.calibration.text_files import text_sha256
from compress.errors import ArtifactError
from compress.progress import log
from compress.recipe import Recipe, read_written
from compress.source.model import ModelSource
from compress.source.provenance import identity


def within_positions(arch: Architecture, recipe: Recipe) -> Recipe:
    """The recipe with sequences that the model can hold where their length was not given, which is said."""
    calibration = recipe.calibration
    given = "sequence_length" in calibration.model_fields_set
    if given or not recipe.needs_text() or calibration.sequence_length <= arch.max_positions:
        return recipe
    log(
        f"--sequence-length is {arch.max_positions} in place of {calibration.sequence_length}: the model has no more "
        "positions"
    )
    shorter = calibration.model_copy(update={"sequence_length": arch.max_positions})
    return recipe.model_copy(update={"calibration": shorter})


def request_digest(source: ModelSource, recipe: Recipe) -> dict[str, Any]:
    """What decides a checkpoint: equal requests give equal checkpoints."""
    request: dict[str, Any] = {"source": identity(source), "recipe": recipe.digest()}
    text = Path(recipe.calibration.data.removeprefix("wikitext:"))
    if recipe.needs_text() and text.is_file():  # a named text never changes, a file may
        request["text"] = text_sha256(text)
    if recipe.latency_table is not None and Path(recipe.latency_table).is_file():
        request["latency_table"] = sha256_of(Path(recipe.latency_table))
    return request


def statistics_digest(source: ModelSource, recipe: Recipe) -> str:
    """Equal for requests whose second moments are equal: those of the first sequences, whatever follows them."""
    c, request = recipe.calibration, request_digest(source, recipe)
    request = {k: v for k, v in request.items() if k not in ("recipe", "latency_table")}
    request["tokens"] = [c.data, c.seed, c.sequence_length, min(c.samples, recipe.sensitivity_samples)]
    request["sensitivity"] = [recipe.sensitivity == "fisher", recipe.calibration_dtype]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def has_checkpoint(artifact: Artifact, source: ModelSource, recipe: Recipe) -> bool:
    """Whether OUT/checkpoint was made by this very request, and OUT/recipe.yaml with it."""
    if not (artifact.has_stage("checkpoint") and artifact.has_stage("recipe.yaml")):
        return False
    manifest = artifact.read_manifest()
    if manifest["stages"]["checkpoint"].get("request") != request_digest(source, recipe):
        return False
    try:
        artifact.verify(["recipe.yaml"])  # it is what was written here, and can be read
        return read_written(artifact.path("recipe.yaml")).digest() == manifest.get("recipe_sha256")
    except ArtifactError as error:
        log(f"compressing again: {error}")
        return False

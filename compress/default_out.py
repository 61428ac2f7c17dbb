"""Where a result goes when no --out was given: a folder named after what it holds, and never over something else."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from compress.artifact.store import Artifact
from compress.errors import UsageError
from compress.recipe import Recipe
from compress.source.model import ModelSource

FOLDER = Path("out")


def default_out(model: str, recipe: Recipe) -> Path:
    """out/MODEL-STRUCTURE-RATIO: the last part of the model's name, and what is kept (a ratio, bytes or seconds)."""
    name = PurePosixPath(model.removeprefix("hf:").replace("\\", "/"))
    if name.name in ("", ".", ".."):  # `--model .`: the folder's own name
        name = PurePosixPath(Path(model).expanduser().resolve().as_posix())
    plain = name.name.removesuffix(".gguf")
    parts = [plain, recipe.label()]
    if recipe.compresses():
        parts.append(_kept(recipe))
    return FOLDER / (re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts)).strip("-.") or "model")


def _kept(recipe: Recipe) -> str:
    if recipe.budget_latency is not None:
        return f"{recipe.budget_latency:g}s"
    return f"{recipe.ratio:g}" if recipe.budget_bytes is None else f"{recipe.budget_bytes}B"


def refuse_anothers(artifact: Artifact, source: ModelSource, recipe: Recipe) -> None:
    """Raise UsageError when a folder that the user did not name holds something else than what is asked for.

    The same request, finished or interrupted, is welcome there: it is used again or goes on.
    """
    from compress.requests import has_checkpoint, request_digest

    out = artifact.out
    advice = f"name another folder with --out, or say --out {out} to replace it"
    if not artifact.exists() or has_checkpoint(artifact, source, recipe):
        return
    manifest = artifact.read_manifest()
    request = manifest["stages"].get("checkpoint", {}).get("request")
    wanted = request_digest(source, recipe)
    if not isinstance(request, dict):
        raise UsageError(f"{out}, the folder that would be used, has something else in it; {advice}")
    if request.get("source") != wanted["source"]:
        raise UsageError(f"{out}, the folder that would be used, was made from another model; {advice}")
    # A recipe that was read back from OUT/recipe.yaml has every choice written out and makes the same model.
    if request != wanted and manifest["recipe_sha256"] != recipe.digest():
        raise UsageError(f"{out}, the folder that would be used, was made with another recipe or text; {advice}")

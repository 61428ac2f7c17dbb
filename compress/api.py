"""What a Python program uses: `compress`, `load`, `register`. Imports nothing heavy; the commands do the same."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.lazy import CORE, check_versions
from compress.progress import Listener, log, progress_to
from compress.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from compress.model.decoder import ProcrustesForCausalLM
    from compress.source.model import ModelSource


def compress(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    out: str | PathLike[str] | None = None,
    calibration: str | PathLike[str] | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    batch: int = 4,
    materialize_dense: bool = False,
    statistics: str | PathLike[str] | None = None,
    progress: Listener | None = None,
) -> Path:
    """Compress `model` into OUT/checkpoint, as `python -m compress.run` does, and return OUT.

    model: a folder, a .gguf file, ORG/NAME on the hub, an alias such as "smollm2-135m", or a causal LM of transformers
    in memory with its `tokenizer`, which stays as it is.
    recipe: what to compress into and how; `Recipe()` when not given.
    out: the folder, out/MODEL-STRUCTURE-RATIO when not given. A run that was interrupted goes on there.
    calibration: the text in place of `recipe.calibration.data`: a name ("boolq"), a file (.txt, .jsonl), or strings.
    progress: called with a `compress.Progress` for each message and each finished item, in place of the lines or the
    bar on stderr.

    Raises the errors of compress.errors: UsageError for what cannot be done, MissingDependencyError for what is not
    installed or reached, ArtifactError for files that are damaged or cannot be written.
    """
    check_versions(*CORE, purpose="compress a model")
    from compress.artifact.store import Artifact
    from compress.default_out import default_out, refuse_anothers
    from compress.pipeline import compress_model
    from compress.requests import within_positions

    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise UsageError(f"recipe must be a compress.Recipe, not a {type(recipe).__name__}: write Recipe(ratio=0.85)")
    with progress_to(progress):
        text = None
        if isinstance(calibration, str | PathLike):
            recipe = _with_text(recipe, fspath(calibration))
        elif calibration is not None:
            from compress.calibration.text import text_in_memory

            text = text_in_memory(calibration)
            recipe = _with_text(recipe, text.name)
        source = _source(model, tokenizer, revision, trust_remote_code)
        folder = default_out(source.name, recipe) if out is None else Path(fspath(out))
        recipe = within_positions(source.architecture(), recipe)
        if out is None:
            log(f"OUT is {folder}")
            refuse_anothers(Artifact(folder), source, recipe)
        artifact = compress_model(
            source,
            recipe,
            folder,
            device=device,
            batch=batch,
            materialize_dense=materialize_dense,
            statistics=None if statistics is None else Path(fspath(statistics)),
            text=text,
        )
    return artifact.out


def load(
    path: str | PathLike[str], *, dtype: torch.dtype | None = None
) -> tuple[ProcrustesForCausalLM, PreTrainedTokenizerFast]:
    """The compressed model of OUT, or of a checkpoint folder, in eval mode on the CPU, and its tokenizer.

    `dtype` is torch.float32 when not given. AutoModelForCausalLM knows the model type afterwards (`register`). Raises
    UsageError for a folder without a checkpoint, ArtifactError for one that is damaged. Nothing in it is executed.
    """
    check_versions(*CORE, purpose="load a compressed model")
    import torch

    from compress.checkpoint.loading import load_model
    from compress.source.model import tokenizer_in

    folder = Path(fspath(path))
    if not (folder / "config.json").is_file():
        if not (folder / "checkpoint" / "config.json").is_file():
            raise UsageError(
                f"{folder} has no compressed model, neither checkpoint/config.json nor config.json: name the OUT that "
                f"compress.compress returned"
            )
        folder = folder / "checkpoint"
    model = load_model(folder, torch.float32 if dtype is None else dtype)
    return model, tokenizer_in(folder, model.config.model_type)


def register() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` of transformers load our checkpoints, without trust in
    the Python files that are in them. `load` does it too, and `import compress` where transformers' auto classes are
    imported already. May be called again."""
    from compress.checkpoint.loading import register

    register()


def _with_text(recipe: Recipe, data: str) -> Recipe:
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"data": data})})


def _source(model: Any, tokenizer: Any, revision: str | None, trust_remote_code: bool) -> ModelSource:
    from compress.source.memory import MemorySource
    from compress.source.resolve import look_up, resolve

    if not isinstance(model, str | PathLike):
        if revision is not None:
            raise UsageError(f"revision {revision!r} is for a model on the hub, not for one in memory")
        return MemorySource.of(model, tokenizer)
    if tokenizer is not None:
        raise UsageError(f"tokenizer is for a model in memory; {fspath(model)!r} brings its own")
    name = fspath(model)
    look_up(name)
    return resolve(name, revision=revision, trust_remote_code=trust_remote_code)

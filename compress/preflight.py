"""What a run would be refused for is said before its work, and by --dry-run in the same words.

`begin` looks at the arguments and finds the model, `check` holds the recipe against it, `inputs_of` reads tokenizer and
text. A run calls them before its first minute; `rehearse` calls them for --dry-run. Only a device that this machine
lacks is no reason to refuse a plan, which may be made for another machine: the plan says so.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.allocation.budget import latency_table
from compress.artifact.files import may_be_folder
from compress.artifact.store import Artifact
from compress.calibration.streams import torch_device
from compress.calibration.text import TextData, load_text, look_for_text
from compress.calibration.tokens import token_sequences
from compress.default_out import default_out, refuse_anothers
from compress.errors import MissingDependencyError, UsageError
from compress.options import recipe_from
from compress.progress import log, track
from compress.recipe import Recipe
from compress.requests import within_positions
from compress.rewrites.folding import FoldedModel, folded
from compress.source.families.base import expected_shapes
from compress.source.model import ModelSource
from compress.source.resolve import look_up, resolve

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


_OF_TEXT = ("calibration_data", "calibration_samples", "sequence_length", "calibration_dtype", "statistics")
"""Flags that decide nothing for a recipe that reads no text."""


@dataclass(frozen=True)
class Begun:
    """What the flags of a compression name: the folder, the model and the recipe."""

    artifact: Artifact
    source: ModelSource
    recipe: Recipe


def begin(args: argparse.Namespace) -> Begun:
    """Resolve the flags of `compress.options`, the cheap ones first: a hub model is fetched after all of them.

    Sets `args.out` where none was given. Raises UsageError for a flag, a file or a name that is wrong, and as
    `resolve`.
    """
    _check_flags(args)
    recipe = recipe_from(args)
    look_up(args.model)
    unnamed = args.out is None
    if unnamed:
        args.out = default_out(args.model, recipe)
        log(f"OUT is {args.out}")
    if "structure" not in recipe.model_fields_set:
        log(f"structure {recipe.structure}, the default; --structure auto has measured better (docs/quality.md)")
    artifact = Artifact(args.out)
    artifact.refuse_others()
    if recipe.needs_text():
        look_for_text(recipe.calibration.data)
    else:
        _say_what_is_not_used(args, recipe)
    if recipe.budget_latency is not None:
        latency_table(recipe)
    source = resolve(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    recipe = within_positions(source.architecture(), recipe)
    if unnamed:
        refuse_anothers(artifact, source, recipe)
    return Begun(artifact, source, recipe)


def _check_flags(args: argparse.Namespace) -> None:
    _check_batch(args.calibration_batch)
    if args.dry_run:
        device_of_plan(args.device)
    else:
        torch_device(args.device)


def _say_what_is_not_used(args: argparse.Namespace, recipe: Recipe) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _OF_TEXT if getattr(args, name) is not None]
    if given:
        log(f"warning: {', '.join(given)}: without effect, since structure {recipe.structure!r} reads no text")


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise UsageError(f"--calibration-batch {batch} runs nothing: give 1 or more calibration sequences at a time")


def device_of_plan(name: str) -> str:
    """What a plan says of --device: its name, and where this machine lacks it, that too. UsageError for no name."""
    try:
        return str(torch_device(name))
    except MissingDependencyError as error:
        return f"{name}, which this machine lacks ({error})"


def check(
    artifact: Artifact,
    source: ModelSource,
    recipe: Recipe,
    *,
    batch: int = 1,
    materialize_dense: bool = False,
    statistics: Path | None = None,
) -> None:
    """Hold flags, model and folders against each other. Raises UsageError."""
    _check_batch(batch)
    if artifact.out.resolve() == source.path.resolve():
        raise UsageError(
            f"--out {artifact.out} is the folder of the source model, which would get files of another one: choose "
            f"another --out"
        )
    if materialize_dense:
        from compress.checkpoint.plain import check_plain

        check_plain(source.name, source.architecture(), recipe)
    if statistics is not None and not may_be_folder(statistics):
        raise UsageError(f"{statistics} is not, or is not in, a folder; choose another --statistics")


@dataclass(frozen=True)
class Inputs:
    """What a compression reads: weights (one by one, later), tokenizer, and (samples, length) int64 tokens or None."""

    model: FoldedModel
    tokenizer: PreTrainedTokenizerFast
    tokens: Tensor | None


def inputs_of(source: ModelSource, recipe: Recipe, text: TextData | None = None) -> Inputs:
    """Weights, tokenizer and text, looked at before anything that takes long, such as hashing the weights.

    `text` is used in place of the one that the recipe names. Raises UsageError for a text that is too short or is none,
    ArtifactError for damaged files.
    """
    model = folded(source)
    tokenizer = source.tokenizer()
    if not recipe.needs_text():
        return Inputs(model, tokenizer, None)
    c, arch = recipe.calibration, source.architecture()
    tokens = token_sequences(
        load_text(c.data) if text is None else text,
        tokenizer,
        samples=c.samples,
        length=c.sequence_length,
        seed=c.seed,
        vocab_size=arch.vocab_size,
    )
    _warn_when_short(tokens.numel(), max(m for _, m in arch.linears().values()))
    return Inputs(model, tokenizer, tokens)


def look_at_weights(model: FoldedModel) -> None:
    """Read every weight once, before the first hour and not where its layer is reached; 0.2 s of processor time a GB.

    Raises ArtifactError for one that is NaN or infinite; warns of linears that are zero throughout.
    """
    linears = {
        linear.weight: f"layers.{index}.{role}"
        for index, layer in enumerate(model.names.layers)
        for role, linear in layer.linears.items()
    }
    zero = []
    for name in track(expected_shapes(model.arch, model.names), description="check weights"):
        tensor = model.reader.get(name)
        if name in linears and not tensor.any():
            zero.append(linears[name])
    if zero:
        some = ", ".join(zero[:3]) + (", ..." if len(zero) > 3 else "")
        log(
            f"warning: {len(zero)} of the {len(linears)} linears of this model are zero throughout ({some}): it was "
            f"not trained, or not saved whole"
        )


def _warn_when_short(tokens: int, width: int) -> None:
    """Second moments of `width` features from too few tokens are singular or noise, and the fits follow the noise."""
    if tokens < 4 * width:
        log(
            f"warning: {tokens:,} calibration tokens for linears of {width:,} inputs are few; at least {4 * width:,} "
            f"are advisable (--calibration-samples, --sequence-length), perplexity suffers otherwise"
        )


def rehearse(begun: Begun, args: argparse.Namespace, names: list[str]) -> str:
    """Raise what a run that writes OUT/`names` would raise before its work; returns what the plan says of the device.

    Nothing is left of it: a folder that had to be made to see whether it can be is removed again.
    """
    check(
        begun.artifact,
        begun.source,
        begun.recipe,
        batch=args.calibration_batch,
        materialize_dense=args.materialize_dense,
        statistics=args.statistics,
    )
    begun.artifact.rehearse(*names)
    inputs_of(begun.source, begun.recipe)
    return device_of_plan(args.device)

"""Second moments of the dense model, for the methods that plan or fit by them."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from compress.calibration.moments import Moments, collect, shared_folder
from compress.methods.base import Context
from compress.recipe import Recipe


def needs_moments(recipe: Recipe) -> bool:
    """True if planning or fitting uses moments of the dense model, collected before anything is compressed."""
    selects = any(config.get("structure") == "select" for config in recipe.layers.values())
    return selects or recipe.has_menus() or recipe.rotation != "none" or recipe.sensitivity != "none"


def first_sequences(context: Context) -> Tensor:
    """The tokens (samples, length) that the moments are of."""
    return context.text[: min(context.recipe.sensitivity_samples, len(context.text))]


def moments_of(context: Context) -> Moments:
    """The moments of the dense model, collected or read from where they are kept; none where none are needed."""
    recipe = context.recipe
    if not needs_moments(recipe):
        return {}
    with nullcontext(context.state) if context.statistics is None else shared_folder(context.statistics) as kept:
        return collect(
            context.model,
            first_sequences(context),
            sensitivity=recipe.sensitivity,
            seed=recipe.calibration.seed,
            runner=context.runner,
            kept=kept,
        )

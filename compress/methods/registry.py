"""How each recipe becomes fitted blocks: by plan and fit, as the paper does, by slicing, or without any text."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from compress.allocation.plan import save_plan, saved_plan
from compress.architecture import extra_biases
from compress.artifact.ledger import KeptFolder
from compress.calibration.measured import measured_losses
from compress.calibration.moments import Moments, collect, shared_folder
from compress.calibration.streams import Runner
from compress.errors import UsageError
from compress.fit.ends import fitted_ends
from compress.fit.fallback import FAILURES
from compress.fit.layers import LayerFitter
from compress.methods.base import Fitted
from compress.methods.paper.fit import fit_by_the_paper
from compress.methods.planned import make_plan, needs_moments
from compress.methods.slicegpt import fit_sliced
from compress.methods.textless import fit_without_text
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel


def fit_model(
    model: FoldedModel,
    recipe: Recipe,
    tokens: Tensor | None,
    state: KeptFolder,
    device: torch.device,
    batch: int,
    statistics: Path | None = None,
) -> Fitted:
    """Compress by `recipe`; tokens (samples, length) int64, None for a recipe that reads no text.

    `state` holds what an interrupted run needs to go on; `statistics` the second moments, for other runs too, which
    wait for each other while they are collected.
    """
    if tokens is None:
        return fit_without_text(model, recipe, state)
    runner = Runner(model.arch, tokens.shape[1], device, batch, recipe.calibration_dtype == "bfloat16")
    if recipe.structure == "slice":
        return fit_sliced(model, recipe, tokens, runner, state)
    moments: Moments = {}
    if needs_moments(recipe):
        few = tokens[: min(recipe.sensitivity_samples, len(tokens))]
        with nullcontext(state) if statistics is None else shared_folder(statistics) as kept:
            moments = collect(
                model, few, sensitivity=recipe.sensitivity, seed=recipe.calibration.seed, runner=runner, kept=kept
            )
    if recipe.fit == "paper":
        return fit_by_the_paper(model, recipe, tokens, moments, state, device)
    if "plan.json" not in state:
        measured = None
        if recipe.sensitivity == "measured":
            measured = measured_losses(model, few, moments, recipe, runner, state)
        try:
            save_plan(state, make_plan(model, recipe, moments, measured, state))
        except FAILURES as error:
            raise UsageError(
                f"the moments of this model and text are singular beyond what damping by {recipe.gram_damping:g} (Gram "
                f"matrices) and {recipe.metric_damping:g} (metrics) makes up for ({str(error).partition(':')[0]}): "
                f"raise gram_damping and metric_damping, e.g. --set gram_damping=1e-3"
            ) from error
    plan = saved_plan(state)
    ends, ranks = fitted_ends(model, recipe, plan.rotations, tokens, moments)
    files, records = LayerFitter(model, plan, recipe, moments, tokens, runner, state, ends).run()
    biases = extra_biases(model.arch, tuple(model.arch.linears())) if "bias" in recipe.inner else []
    return Fitted(plan.rotations, plan.structures, ends, files, records, ranks, biases)

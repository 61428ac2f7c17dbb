"""The road of most methods: moments of the dense model, a plan from them, then a fit layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from compress.allocation.budget import cost_of, unit_of
from compress.allocation.explicit import explicit_layers
from compress.allocation.groups import LayerMenus
from compress.allocation.plan import Plan, save_plan, saved_plan
from compress.architecture import Architecture, extra_biases
from compress.artifact.ledger import Keeper, Nowhere
from compress.calibration.measured import measured_losses
from compress.calibration.moments import Moments
from compress.errors import UsageError
from compress.fit.ends import fitted_ends
from compress.fit.fallback import FAILURES
from compress.fit.layers import LayerFitter
from compress.methods.base import Context, Fitted, Space
from compress.methods.calibrated import first_sequences, moments_of
from compress.methods.space import (
    fitted_blocks,
    larger,
    memory_with_streams,
    moment_bytes,
    rewrite_bytes,
    rotation_bytes,
    stream_bytes,
    terms_bytes,
    with_calibration,
)
from compress.recipe import Recipe, kinds_of
from compress.rewrites.folding import FoldedModel

ROUNDS = 2
"""Rounds of rotation and allocation after the first. The second took the predicted loss from 0.494 to 0.483."""


@dataclass(frozen=True)
class Planning:
    """What a plan is made from. unit: the alignment of sizes. keeper: where each layer's menus and each rotation are
    kept as they are found."""

    model: FoldedModel
    recipe: Recipe
    moments: Moments
    menus: LayerMenus
    unit: int
    keeper: Keeper

    @property
    def arch(self) -> Architecture:
        """The model's."""
        return self.model.arch


class Layered(ABC):
    """A method that says with its plan which structure every linear gets, and leaves the fit to `LayerFitter`."""

    name: str

    @abstractmethod
    def plan(self, planning: Planning) -> Plan:
        """Rotations and structures, those that the recipe gives by name left aside."""

    @abstractmethod
    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """See `Method.check`."""

    def make_plan(
        self,
        model: FoldedModel,
        recipe: Recipe,
        moments: Moments,
        measured: Mapping[str, float] | None = None,
        keeper: Keeper | None = None,
    ) -> Plan:
        """Rotations, structures, and the rewrites that they ask for, choices of the recipe by name included.

        measured: the weights of `--sensitivity measured`, by role.
        """
        unit, keeper = unit_of(model.arch, recipe), keeper or Nowhere()
        menus = LayerMenus(model, recipe, moments, measured, kinds_of(recipe), unit, cost_of(recipe), keeper)
        plan = self.plan(Planning(model, recipe, moments, menus, unit, keeper))
        chosen = {**plan.structures, **explicit_layers(model.arch, recipe)}
        structures = {n: s for n, s in chosen.items() if s.name != "dense"}
        return Plan(plan.rotations, structures, plan.predicted, menus.rewrites_of(structures))

    def fit(self, context: Context) -> Fitted:
        """Calibrate, plan, fit. Raises UsageError where moments are singular beyond what damping makes up for."""
        model, recipe, state, tokens = context.model, context.recipe, context.state, context.text
        moments = moments_of(context)
        if "plan.json" not in state:
            measured = None
            if recipe.sensitivity == "measured":
                measured = measured_losses(model, first_sequences(context), moments, recipe, context.runner, state)
            try:
                save_plan(state, self.make_plan(model, recipe, moments, measured, state))
            except FAILURES as error:
                raise UsageError(
                    f"the moments of this model and text are singular beyond what damping by {recipe.gram_damping:g} "
                    f"(Gram matrices) and {recipe.metric_damping:g} (metrics) makes up for "
                    f"({str(error).partition(':')[0]}): raise gram_damping and metric_damping, e.g. --set "
                    f"gram_damping=1e-3"
                ) from error
        plan = saved_plan(state)
        ends, ranks = fitted_ends(model, recipe, plan.rotations, tokens, moments)
        files, records = LayerFitter(model, plan, recipe, moments, tokens, context.runner, state, ends).run()
        biases = extra_biases(model.arch, tuple(model.arch.linears())) if "bias" in recipe.inner else []
        return Fitted(plan.rotations, plan.structures, ends, files, records, ranks, biases)

    def space(self, arch: Architecture, recipe: Recipe) -> Space:
        """See `Method.space`."""
        rotations, orders = rotation_bytes(arch, recipe), rewrite_bytes(arch, recipe)
        # Rotations for nested subspaces are searched for in rounds, with a pair of matrices for each linear.
        searched = recipe.rotation != "none" and "kron" in kinds_of(recipe)
        streams = 4 * stream_bytes(arch, recipe, few=False)
        fitted = {
            "rotations": rotations,
            "neuron orders": orders,
            "streams": streams,
            **fitted_blocks(arch, recipe),
        }
        planned = {"rotations": (ROUNDS + 2 if searched else 2) * rotations, "neuron orders": 2 * orders}
        terms = {"the plan's matrices": terms_bytes(arch, recipe)} if searched else None
        return Space(
            with_calibration(arch, recipe, larger(planned, fitted)),
            memory_with_streams(arch, recipe, moment_bytes(arch, recipe), terms),
        )

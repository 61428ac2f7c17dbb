"""A copy, but for the linears that the recipe names."""

from __future__ import annotations

from compress.allocation.plan import Plan
from compress.architecture import Architecture
from compress.methods.base import Context, Fitted, Space
from compress.methods.layered import Layered, Planning
from compress.methods.textless import fit_without_text, named_structures, space_without_text
from compress.recipe import Recipe
from compress.rewrites.rotations import Rotations


class Dense(Layered):
    """Opens no text where nothing is fitted; else the linears with names go the road of all others."""

    name = "dense"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError for names that do not hold together."""
        if not recipe.needs_text():
            named_structures(arch, recipe, {})

    def plan(self, planning: Planning) -> Plan:
        """Nothing of its own."""
        return Plan(Rotations.none(), {}, {})

    def space(self, arch: Architecture, recipe: Recipe) -> Space:
        """See `Method.space`."""
        return super().space(arch, recipe) if recipe.needs_text() else space_without_text(arch, recipe)

    def fit(self, context: Context) -> Fitted:
        """A copy from the weights alone, or by text."""
        if context.recipe.needs_text():
            return super().fit(context)
        return fit_without_text(context, named_structures(context.arch, context.recipe, {}))

"""The same kept fraction for every linear, and rotations that serve all of them at once."""

from __future__ import annotations

from compress.allocation.budget import unit_of
from compress.allocation.plan import Plan
from compress.allocation.uniform import uniform_structures
from compress.architecture import Architecture
from compress.methods.layered import Layered, Planning
from compress.progress import log
from compress.recipe import Recipe
from compress.rotation.stream import rotate_members


class Uniform(Layered):
    """One ratio for all; a linear that no aligned size makes smaller stays dense, and the others pay for it."""

    name = "uniform"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError where no linear has an aligned size."""
        uniform_structures(arch, recipe, unit_of(arch, recipe))

    def plan(self, planning: Planning) -> Plan:
        """Sizes, then the rotations that suit them."""
        arch, recipe, unit = planning.arch, planning.recipe, planning.unit
        structures = uniform_structures(arch, recipe, unit)
        for role, (n, m) in arch.linears().items():
            if f"layers.0.{role}" not in structures:
                log(f"{role} ({n} x {m}) stays dense: no {recipe.structure} in steps of {unit} is small enough")
        rotations = rotate_members(planning.model, recipe, planning.moments, structures, planning.keeper)
        return Plan(rotations, structures, {})

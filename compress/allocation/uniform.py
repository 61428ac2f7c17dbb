"""The same kept fraction for every linear."""

from __future__ import annotations

from compress.allocation.budget import (
    budget_parameters,
    ratio_of,
)
from compress.architecture import WRITERS, Architecture
from compress.errors import UsageError
from compress.recipe import Recipe
from compress.structures import (
    KroneckerStructure,
    Structure,
    registry,
)
from compress.structures.base import Side


def uniform_structures(arch: Architecture, recipe: Recipe, unit: int) -> dict[str, Structure]:
    """The same kept fraction for every linear. One that no aligned size makes smaller stays dense, and the others pay
    for it; all stay dense where the budget is that of the dense model."""
    kind, budget = registry()[recipe.structure], budget_parameters(arch, recipe) / arch.num_layers
    open_roles, chosen = dict(arch.linears()), dict[str, Structure]()
    while len(chosen) < len(open_roles):
        share = budget / sum(n * m for n, m in open_roles.values())
        if share >= 1:
            return {}
        chosen, asked = {}, dict(open_roles)
        for role, (n, m) in asked.items():
            side: Side = "out" if role in WRITERS.values() else "in"
            try:
                if issubclass(kind, KroneckerStructure):  # no rotation has brought what matters to the front
                    chosen[role] = kind.for_ratio(m, n, side, share, unit, mix="explicit")
                else:
                    chosen[role] = kind.for_ratio(m, n, side, share, unit)
            except UsageError:
                budget -= n * m
                del open_roles[role]
        if len(open_roles) < len(asked):
            chosen = {}
    if not chosen:
        raise UsageError(
            f"no linear of this model has an aligned {recipe.structure} of ratio {ratio_of(arch, recipe):g}: "
            f"lower --unit or raise --ratio"
        )
    return {f"layers.{i}.{role}": structure for i in range(arch.num_layers) for role, structure in chosen.items()}

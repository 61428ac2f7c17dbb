"""The same kept fraction for every linear."""

from __future__ import annotations

from compress.allocation.budget import (
    budget_parameters,
    ratio_of,
)
from compress.allocation.paying import where_it_helps
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
    kind, shapes = registry()[recipe.structure], arch.linears()

    def chosen_of(roles: list[str], left: float) -> tuple[dict[str, Structure], list[str]]:
        share = left / sum(n * m for n, m in (shapes[role] for role in roles))
        if share >= 1:
            return {}, []
        chosen, stuck = dict[str, Structure](), list[str]()
        for role in roles:
            n, m = shapes[role]
            side: Side = "out" if role in WRITERS.values() else "in"
            try:
                if issubclass(kind, KroneckerStructure):  # no rotation has brought what matters to the front
                    chosen[role] = kind.for_ratio(m, n, side, share, unit, mix="explicit")
                else:
                    chosen[role] = kind.for_ratio(m, n, side, share, unit)
            except UsageError:
                stuck.append(role)
        return chosen, stuck

    budget = budget_parameters(arch, recipe) / arch.num_layers
    chosen = where_it_helps({role: n * m for role, (n, m) in shapes.items()}, budget, chosen_of)
    if chosen is None:
        raise UsageError(
            f"no linear of this model has an aligned {recipe.structure} of ratio {ratio_of(arch, recipe):g}: "
            f"lower --unit or raise --ratio"
        )
    return {f"layers.{i}.{role}": structure for i in range(arch.num_layers) for role, structure in chosen.items()}

"""A method in one file, as somebody else would add it: low rank for the MLPs alone, the same ratio for each."""

from __future__ import annotations

from compress import catalog
from compress.allocation.budget import budget_parameters, unit_of
from compress.allocation.plan import Plan
from compress.architecture import Architecture
from compress.errors import UsageError
from compress.methods import registry
from compress.methods.layered import Layered, Planning
from compress.recipe import Recipe
from compress.rewrites.rotations import Rotations
from compress.structures import LowRankStructure, Structure

ENTRY = catalog.Entry(
    structure="mlp-rank",
    variants=(catalog.Variant("mlp-rank"),),
    help="low rank in the MLPs alone",
    quality=catalog.QualityLine("mlp-rank", "low rank, MLPs alone"),
    why="low rank is the same in every rotation",
)


class MlpRank(Layered):
    """Attention stays dense, and the MLPs pay for it."""

    name = "mlp-rank"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError where attention alone is too much."""
        structures(arch, recipe)

    def plan(self, planning: Planning) -> Plan:
        """Nothing is rotated."""
        return Plan(Rotations.none(), dict(structures(planning.arch, planning.recipe)), {})


def structures(arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
    """Linear name -> low rank, at the ratio that is left when attention is dense."""
    shapes = arch.linears()
    dense = sum(n * m for role, (n, m) in shapes.items() if not role.startswith("mlp."))
    mlps = sum(n * m for role, (n, m) in shapes.items() if role.startswith("mlp."))
    ratio, unit = (budget_parameters(arch, recipe) / arch.num_layers - dense) / mlps, unit_of(arch, recipe)
    if ratio <= 0:
        raise UsageError(
            f"--ratio {recipe.ratio:g} is too low: attention, which stays dense, takes more; raise --ratio"
        )
    return {
        f"layers.{layer}.{role}": LowRankStructure.for_ratio(m, n, arch.side(role), ratio, unit)
        for layer in range(arch.num_layers)
        for role, (n, m) in shapes.items()
        if role.startswith("mlp.")
    }


def add() -> None:
    """Make `--structure mlp-rank` known."""
    catalog.add(ENTRY)
    registry.register(MlpRank())

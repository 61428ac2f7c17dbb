"""The structures that a recipe gives by name."""

from __future__ import annotations

from compress.architecture import Architecture
from compress.errors import ArtifactError, UsageError
from compress.recipe import Recipe
from compress.structures import (
    Structure,
    structure_from_config,
)

TOLD = ("predicted_loss", "bytes", "macs")
"""Fields of a written recipe beside the choice itself."""


def explicit_layers(arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
    """The structures that the recipe gives by name, dense ones included. Raises UsageError naming a wrong entry."""
    names = {f"layers.{i}.{role}": shape for i in range(arch.num_layers) for role, shape in arch.linears().items()}
    explicit = {}
    for name, config in recipe.layers.items():
        if name not in names:
            raise UsageError(f"recipe layers: {name!r} is no linear of this model; names are like layers.0.attn.q")
        try:
            structure = structure_from_config({k: v for k, v in config.items() if k not in TOLD})
        except ArtifactError as error:
            raise UsageError(f"recipe layers: {name}: {error}") from error
        seen = (structure.out_features, structure.in_features)
        if seen != names[name]:
            n, m = names[name]
            raise UsageError(f"recipe layers: {name} is {n} x {m}, the recipe gives {seen[0]} x {seen[1]}")
        explicit[name] = structure
    return explicit

"""`--dry-run`: what a compression will cost and what it can gain, from the architecture alone."""

from __future__ import annotations

from typing import Any

from compress.allocation.budget import most_parameters, overhead_of, ratio_of, unit_of
from compress.allocation.size import model_size
from compress.architecture import Architecture
from compress.methods.registry import check_recipe, method_of
from compress.methods.space import FLOAT, rotation_bytes
from compress.recipe import Recipe


def forecast(arch: Architecture, recipe: Recipe, *, materialize_dense: bool = False) -> dict[str, Any]:
    """Shapes, sizes and limits, all computed: nothing of the model is read. Sizes in parameters, memory in bytes.

    The decode ceiling is dense over compressed weight bytes read per token, at batch 1 with an empty cache. `disk` and
    `memory` list by name what OUT and the process take when it is most. With a budget in seconds sizes follow from the
    plan: what depends on them is None, and space is that of dense projections, the most that there can be.
    """
    check_recipe(arch, recipe)
    size = model_size(arch, {}, recipe.rotation)
    budget, by_seconds = most_parameters(arch, recipe), recipe.budget_latency is not None
    overhead = overhead_of(arch, recipe)
    head = arch.vocab_size * arch.hidden_size
    ends = recipe.embedding * size.dense_embeddings
    read = budget + overhead + recipe.embedding * head
    item = 4 if recipe.checkpoint_dtype == "float32" else 2
    kept = budget + overhead + ends + size.rest
    space = method_of(recipe).space(arch, recipe)
    state, memory = space.state, space.memory
    checkpoint = int(item * kept) + rotation_bytes(arch, recipe)
    disk = {**{f"state: {name}": size for name, size in state.items()}, "checkpoint": checkpoint}
    if materialize_dense:
        disk["dense"] = int(FLOAT * size.dense_parameters)
    return {
        "family": arch.family,
        "linears": {role: list(shape) for role, shape in arch.linears().items()},
        "layers": arch.num_layers,
        "structure": recipe.structure,
        "rotation": recipe.rotation,
        "unit": unit_of(arch, recipe),
        **_asked(arch, recipe),
        "dense_projection_parameters": size.dense_projections,
        "projection_budget": None if by_seconds else int(budget),
        "rotation_overhead": overhead,
        "model_ratio": None if by_seconds else round(kept / size.dense_parameters, 4),
        "decode_ceiling": None if by_seconds else round((size.dense_projections + head) / read, 4),
        "memory_bytes_about": sum(memory.values()),
        "memory": memory,
        "state_bytes_about": sum(state.values()),
        "checkpoint_bytes_about": checkpoint,
        "disk": disk,
    }


def _asked(arch: Architecture, recipe: Recipe) -> dict[str, float]:
    """The budget; a dense copy has none."""
    if not recipe.compresses():
        return {}
    if recipe.budget_latency is not None:
        return {"seconds_asked": recipe.budget_latency}
    return {"ratio_asked": ratio_of(arch, recipe)}


_MEANING = {
    "unit": "sizes are multiples of it",
    "ratio_asked": "of the projection weights",
    "dense_projection_parameters": "the linears of all layers",
    "projection_budget": "parameters that the structures may have",
    "rotation_overhead": "parameters of skip matrices and head map, which count towards the ratio",
    "model_ratio": "kept of the whole model, embeddings and head counted",
    "decode_ceiling": "times as fast as dense at the most: bytes of weights read for one token, at batch 1",
}
"""Key -> what a reader who does not know it is told."""


def lines(result: dict[str, Any]) -> list[str]:
    """A forecast as text, the parts of disk and memory one a line; sums of theirs in bytes are for programs."""
    found = []
    for key, value in result.items():
        if key.endswith("_bytes_about"):
            continue
        if value is None:
            found.append(f"{key}: known once sizes are planned by --latency-table")
        elif key in ("disk", "memory"):
            found.append(f"{key}: about {readable(sum(value.values()))} at most, of that")
            found += [f"  {name}: {readable(size)}" for name, size in value.items()]
        elif key == "linears":
            found.append("linears: of each layer, outputs x inputs")
            found += [f"  {role}: {n} x {m}" for role, (n, m) in value.items()]
        elif isinstance(value, list):
            found.append(f"{key}: {'; '.join(value)}")
        else:
            found.append(f"{key}: {value}" + (f" ({_MEANING[key]})" if key in _MEANING else ""))
    return found


def readable(size: int) -> str:
    """12.3 MB of 12,345,678."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

"""`--dry-run`: what a compression will cost and what it can gain, from the architecture alone."""

from __future__ import annotations

from typing import Any

from compress.accounting import model_size
from compress.architecture import Architecture
from compress.budgets import budget_parameters, overhead_of, ratio_of, unit_of
from compress.planning import check_recipe
from compress.recipe import Recipe


def forecast(arch: Architecture, recipe: Recipe) -> dict[str, Any]:
    """Shapes, sizes and limits, all computed: nothing of the model is read. Sizes in parameters, memory in bytes.

    The decode ceiling is dense over compressed weight bytes read per token, at batch 1 with an empty cache.
    """
    check_recipe(arch, recipe)
    size = model_size(arch, {}, recipe.rotation)
    budget = budget_parameters(arch, recipe) if recipe.structure != "dense" else float(size.dense_projections)
    overhead = overhead_of(arch, recipe)
    head = arch.vocab_size * arch.hidden_size
    ends = recipe.embedding * size.dense_embeddings
    read = budget + overhead + recipe.embedding * head
    c = recipe.calibration
    stream = c.samples * c.sequence_length * arch.hidden_size * 4
    block = 4 * sum(n * m for n, m in arch.linears().values())
    item = 4 if recipe.checkpoint_dtype == "float32" else 2
    return {
        "family": arch.family,
        "linears": {role: list(shape) for role, shape in arch.linears().items()},
        "layers": arch.num_layers,
        "structure": recipe.structure,
        "rotation": recipe.rotation,
        "unit": unit_of(arch, recipe),
        "ratio_asked": ratio_of(arch, recipe),
        "dense_projection_parameters": size.dense_projections,
        "projection_budget": int(budget),
        "rotation_overhead": overhead,
        "model_ratio": round((budget + overhead + ends + size.rest) / size.dense_parameters, 4),
        "decode_ceiling": round((size.dense_projections + head) / read, 4),
        "memory_bytes_about": 6 * block + 4 * stream + 4 * head,
        "state_bytes_about": (arch.num_layers + 1) * min(recipe.sensitivity_samples, c.samples) * stream // c.samples
        + 2 * stream,
        "checkpoint_bytes_about": int(item * (budget + overhead + ends + size.rest)),
    }

"""Budgets: what a recipe asks to keep, in parameters, bytes or seconds, and what a structure costs in that unit."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.allocation.choose import Cost
from compress.allocation.latency import LatencyTable
from compress.allocation.size import bias_parameters, overhead_parameters
from compress.allocation.width import kept_for_ratio
from compress.architecture import Architecture, extra_biases
from compress.errors import UsageError
from compress.model.skips import parameters_of
from compress.recipe import Recipe, kinds_of


def default_unit(arch: Architecture) -> int:
    """Alignment of kept sizes: 64 at production widths, finer where 64 would leave fewer than 16 sizes."""
    return 64 if arch.hidden_size >= 1024 else 32 if arch.hidden_size >= 512 else 8


def unit_of(arch: Architecture, recipe: Recipe) -> int:
    """The alignment that the recipe asks for, or the default one."""
    return recipe.unit or default_unit(arch)


def width_unit(arch: Architecture, recipe: Recipe) -> int:
    """The alignment of sizes, of the kept width of the stream where the method has one of its own for it."""
    return recipe.unit or recipe.variant().unit or unit_of(arch, recipe)


def ratio_of(arch: Architecture, recipe: Recipe) -> float:
    """The kept fraction of the projection parameters that is asked for, by `ratio` or by `budget_bytes`.

    With `budget_latency` none is asked for, and whoever asks has missed that: ValueError.
    """
    if recipe.budget_latency is not None:
        raise ValueError("a budget in seconds asks for no ratio")
    if recipe.budget_bytes is None:
        return recipe.ratio
    item: int = getattr(torch, recipe.checkpoint_dtype).itemsize
    return min(1.0, recipe.budget_bytes / item / arch.projection_parameters())


def shortfall(arch: Architecture, recipe: Recipe, kept: float) -> str | None:
    """Why `kept`, the fraction of the projection parameters that a checkpoint has, is clearly below what was asked for
    (by more than a hundredth of it); None where it is not, and where no ratio was asked for or linears are named."""
    if not recipe.compresses() or recipe.budget_latency is not None or recipe.layers:
        return None
    asked = ratio_of(arch, recipe)
    if kept >= 0.99 * asked:
        return None
    by_unit = f"sizes come in steps of {width_unit(arch, recipe)} features; a smaller --unit may come closer"
    steps = recipe.entry().steps or by_unit
    return f"{kept:.4f} is kept where {asked:.4f} was asked for: {steps}"


def _added_biases(arch: Architecture, recipe: Recipe) -> int:
    """Parameters of the biases that bias correction adds, which corrects what is fitted: nothing of a dense copy."""
    if not recipe.corrects_biases():
        return 0
    return bias_parameters(arch, extra_biases(arch, tuple(arch.linears())))


def ratio_of_weights(arch: Architecture, recipe: Recipe) -> float:
    """`ratio_of` less what the added biases take."""
    return ratio_of(arch, recipe) - _added_biases(arch, recipe) / arch.projection_parameters()


def kept_width(arch: Architecture, recipe: Recipe) -> int:
    """The kept width of a recipe whose whole stream has one (skips cs and householder, structure slice).

    Raises UsageError when even the smallest is too much.
    """
    unit, ratio = width_unit(arch, recipe), ratio_of_weights(arch, recipe)
    return kept_for_ratio(arch, ratio, recipe.skip, unit=unit, reflections=recipe.reflections)


def overhead_of(arch: Architecture, recipe: Recipe) -> int:
    """Parameters of the skips in their form, of the map before a tied head, and of the biases that are added."""
    skips = None
    if recipe.keeps_one_width():
        kept, reflections = kept_width(arch, recipe), recipe.reflections
        skips = parameters_of(recipe.skip, arch.hidden_size, arch.num_layers, kept=kept, reflections=reflections)
    return overhead_parameters(arch, recipe.rotation, skips) + _added_biases(arch, recipe)


def budget_parameters(arch: Architecture, recipe: Recipe) -> float:
    """What the projections may cost, in parameters, so that they and what a rotation and bias correction add keep to
    `ratio` or `budget_bytes`.

    Raises UsageError when the overhead alone exceeds the budget, ValueError as `ratio_of`.
    """
    if recipe.budget_latency is not None:
        raise ValueError("a budget in seconds is none in parameters")
    overhead = overhead_of(arch, recipe)
    allowed = recipe.ratio * arch.projection_parameters()
    asked = f"--ratio {recipe.ratio}"
    if recipe.budget_bytes is not None:
        allowed = recipe.budget_bytes / getattr(torch, recipe.checkpoint_dtype).itemsize
        asked = f"--budget-bytes {recipe.budget_bytes}"
    budget = allowed - overhead
    if budget <= 0:
        biases = "and inner bias " if "bias" in recipe.inner else ""
        other = {"block": " or choose --rotation shared", "shared": " or choose --rotation none"}.get(
            recipe.rotation, ""
        )
        raise UsageError(
            f"{asked} keeps {allowed:,.0f} projection parameters, but rotation {recipe.rotation!r} {biases}alone adds "
            f"{overhead:,}: raise it{other}"
        )
    return budget


def budget_of(arch: Architecture, recipe: Recipe) -> float:
    """The budget in the unit of `cost_of`: parameters, or seconds with `--budget-latency`.

    What the rotation adds, the d x d skips and the map before a tied head, is paid from it either way. Raises
    UsageError when that alone exceeds the budget.
    """
    if recipe.budget_latency is None:
        return budget_parameters(arch, recipe)
    d = arch.hidden_size
    products = overhead_parameters(arch, recipe.rotation) // (d * d)
    overhead = products * latency_table(recipe).dense(d, d) if products else 0.0
    if overhead >= recipe.budget_latency:
        raise UsageError(
            f"--budget-latency {recipe.budget_latency:g} is not above the {overhead:.4g} seconds of the {products} "
            f"matrices that rotation {recipe.rotation!r} adds: raise it, or choose --rotation none"
        )
    return recipe.budget_latency - overhead


def most_parameters(arch: Architecture, recipe: Recipe) -> float:
    """What the projections may take at most: `budget_parameters`, or all that dense ones have where the budget is in
    seconds, which determines no parameters before the plan is made. Raises as `budget_parameters`."""
    if not recipe.compresses() or recipe.budget_latency is not None:
        return float(arch.projection_parameters())
    return budget_parameters(arch, recipe)


def cost_of(recipe: Recipe) -> Cost:
    """What a structure costs: its parameters, or its measured seconds with `--budget-latency`."""
    if recipe.budget_latency is None:
        return lambda structure: float(structure.parameter_count())
    return latency_table(recipe).seconds


def latency_table(recipe: Recipe) -> LatencyTable:
    """The recipe's table. Raises UsageError when there is none, or it cannot be read."""
    if recipe.latency_table is None:
        raise UsageError("--budget-latency needs --latency-table, which `python -m validate.latency` measures")
    return LatencyTable.read(Path(recipe.latency_table))


def uses_leading_mix(recipe: Recipe) -> bool:
    """True if the mix of each Kronecker sum is absorbed in the rotation, so that only kept widths are to choose."""
    return "kron" in kinds_of(recipe) and recipe.absorbs_mixes()

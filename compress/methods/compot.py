"""One-shot pooled allocation (COMPOT): one threshold on the singular values of all matrices decides what each keeps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from compress.allocation.budget import (
    budget_parameters,
    ratio_of,
)
from compress.allocation.paying import where_it_helps
from compress.allocation.plan import Plan
from compress.artifact.ledger import Keeper
from compress.errors import UsageError
from compress.methods.layered import Planning
from compress.methods.uniform import Uniform
from compress.progress import track
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.structures import Structure, registry


def normalised_spectrum(weight: Tensor) -> Tensor:
    """Singular values of weight / |weight|_F, descending, float64 (min(out, in),); zeros for a zero matrix."""
    values: Tensor = torch.linalg.svdvals(weight.detach().double())
    norm = torch.linalg.vector_norm(values)
    return values / norm if norm > 0 else values


def pooled_allocation(
    spectra: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, int]],
    ratio: float,
    *,
    least: float | None = None,
    most: float = 1.0,
) -> dict[str, float]:
    """Name -> kept ratio, with sum kept_i m_i n_i <= ratio sum m_i n_i, at the smallest threshold that allows it.

    spectra: normalised singular values (`normalised_spectrum`); sizes: (out, in). At a threshold t matrix i keeps
    r_i (m_i + n_i) / (m_i n_i), r_i the number of its singular values above t, clipped to [least, most]. The default
    of `least` is 1 - min(0.6, 2.5 (1 - ratio)), or the ratio where that is less (the paper's guards are not published;
    this bound is ours). Raises UsageError when even `least` exceeds the budget, or arguments do not belong together.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"the kept ratio must be above 0 and at most 1, not {ratio}")
    if spectra.keys() != sizes.keys() or not spectra:
        raise UsageError(f"the spectra are of {sorted(spectra)} but the sizes of {sorted(sizes)}; give both for each")
    floor = min(ratio, 1 - min(0.6, 2.5 * (1 - ratio))) if least is None else least
    if not 0 <= floor <= most <= 1:
        raise UsageError(f"the bounds of a pooled allocation must satisfy 0 <= least <= most <= 1, not {floor}, {most}")
    if floor > ratio:
        raise UsageError(
            f"every matrix keeps at least {floor:g}, which is above the ratio {ratio:g}; lower `least` to {ratio:g}"
        )
    ascending = {name: values.detach().cpu().double().sort().values for name, values in spectra.items()}
    weights = {name: m * n for name, (m, n) in sizes.items()}
    budget = ratio * sum(weights.values()) * (1 + 1e-12)

    def kept(threshold: Tensor) -> dict[str, float]:
        ranks = {n: len(s) - int(torch.searchsorted(s, threshold, right=True)) for n, s in ascending.items()}
        shares = {name: ranks[name] * (m + n) / (m * n) for name, (m, n) in sizes.items()}
        return {name: min(max(share, floor), most) for name, share in shares.items()}

    # Only the values themselves matter as thresholds. At the largest of them every rank is 0, which is feasible.
    pooled = torch.cat([torch.zeros(1, dtype=torch.float64), *ascending.values()]).sort().values
    low, high = 0, len(pooled) - 1  # the answer is in low ... high, and high is feasible
    while low < high:
        middle = (low + high) // 2
        shares = kept(pooled[middle])
        if sum(shares[name] * weights[name] for name in shares) <= budget:
            high = middle
        else:
            low = middle + 1
    return kept(pooled[high])


def pooled_structures(model: FoldedModel, recipe: Recipe, unit: int, keeper: Keeper) -> dict[str, Structure]:
    """COMPOT's one-shot allocation: the kept ratio of each linear from the pooled spectra of the weights."""
    arch, kind = model.arch, registry()[recipe.structure]
    names = {f"layers.{i}.{role}": shape for i in range(arch.num_layers) for role, shape in arch.linears().items()}
    spectra = dict[str, Tensor]()
    for layer in track(range(arch.num_layers), description="plan"):
        found = keeper.tensors(f"plan-spectra-{layer}", partial(_spectra, model, layer))
        spectra |= {f"layers.{layer}.{role}": found[role] for role in arch.linears()}

    def chosen_of(wanted: list[str], left: float) -> tuple[dict[str, Structure], list[str]]:
        shapes = {name: names[name] for name in wanted}
        share = min(1.0, left / sum(n * m for n, m in shapes.values()))
        ratios = pooled_allocation({name: spectra[name] for name in wanted}, shapes, share)
        chosen, stuck = dict[str, Structure](), list[str]()
        for name, (n, m) in shapes.items():
            try:
                if ratios[name] < 1:
                    chosen[name] = kind.for_ratio(m, n, arch.side(name.split(".", 2)[2]), ratios[name], unit)
            except UsageError:
                stuck.append(name)
        return chosen, stuck

    dense = {name: n * m for name, (n, m) in names.items()}
    chosen = where_it_helps(dense, budget_parameters(arch, recipe), chosen_of)
    if chosen is not None:
        return chosen
    raise UsageError(
        f"no linear of this model has an aligned {recipe.structure} of ratio {ratio_of(arch, recipe):g}: "
        f"lower --unit or raise --ratio"
    )


def _spectra(model: FoldedModel, layer: int) -> dict[str, Tensor]:
    weights = model.block(layer)
    return {role: normalised_spectrum(weights[f"{role}.weight"]) for role in model.arch.linears()}


class Compot(Uniform):
    """Pooled sizes under `--allocation global`, one ratio for all otherwise."""

    name = "compot"

    def plan(self, planning: Planning) -> Plan:
        """See `Layered.plan`."""
        if planning.recipe.allocation == "uniform":
            return super().plan(planning)
        structures = pooled_structures(planning.model, planning.recipe, planning.unit, planning.keeper)
        return Plan(Rotations.none(), structures, {})

"""One-shot pooled allocation (COMPOT): one threshold on the singular values of all matrices decides what each keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import UsageError


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

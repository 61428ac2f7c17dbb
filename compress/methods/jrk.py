"""Joint rank-k (arXiv 2402.16319): low rank without any data, the matrices that belong together sharing a factor.

Q with K, and gate with up, are inter-connected: they read one input, and their outputs meet in a product. Each pair is
stacked along its outputs and truncated as one matrix by its SVD, What_i = U_i V; v, o and down are truncated alone. No
text is read, no Gram matrix formed: errors count in the Frobenius norm. The ranks follow from a kept fraction, the
same for every group, or from a share of the energy (derived here: the full text of the paper was not at hand).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.errors import UsageError
from compress.structures import LowRankStructure, Structure
from compress.structures.joint import joint_error_by_rank, joint_fit, joint_ranks, joint_structures

GROUPS = (("attn.q", "attn.k"), ("attn.v",), ("attn.o",), ("mlp.gate", "mlp.up"), ("mlp.down",))

Group = dict[str, tuple[int, int]]
"""Role -> (out_features, in_features) of the linears that share a factor, the leader first."""


def jrk_groups(arch: Architecture) -> list[Group]:
    """The groups of one block; a group of which the architecture has one linear only is that linear alone."""
    linears = arch.linears()
    groups = [{role: linears[role] for role in roles if role in linears} for roles in GROUPS]
    return [group for group in groups if group]


def jrk_structures(arch: Architecture, ratio: float, unit: int) -> dict[str, Structure]:
    """Linear name -> structure at a kept fraction `ratio` of the projection parameters, dense ones left out.

    A group of t matrices (n_i, m) keeps the rank k = c m sum(n_i) / (m + sum(n_i)), c the same for all groups, rounded
    down to a multiple of `unit`; what rounding leaves over buys further units where most was lost. A group that no
    aligned rank makes smaller stays dense and the others pay for it. Raises UsageError when no group can pay.
    """
    if ratio >= 1:
        return {}
    left = ratio * arch.projection_parameters() / arch.num_layers
    open_groups = jrk_groups(arch)
    while open_groups:
        share = left / sum(_dense(group) for group in open_groups)
        wanted = [share * _dense(group) / _per_rank(group) for group in open_groups]
        fitting = [[k for k in joint_ranks(g, unit) if k <= w] for g, w in zip(open_groups, wanted, strict=True)]
        stuck = [group for group, ranks in zip(open_groups, fitting, strict=True) if not ranks]
        if not stuck:
            break
        left -= sum(map(_dense, stuck))
        open_groups = [group for group in open_groups if group not in stuck]
    else:
        raise UsageError(
            f"no group of this model has an aligned joint rank at --ratio {ratio:g}: lower --unit, which is {unit}, "
            f"or raise --ratio"
        )
    ranks = [max(fit) for fit in fitting]
    left -= sum(k * _per_rank(group) for k, group in zip(ranks, open_groups, strict=True))
    for i in sorted(range(len(ranks)), key=lambda i: ranks[i] / wanted[i]):
        price = unit * _per_rank(open_groups[i])
        if price <= left and ranks[i] + unit in joint_ranks(open_groups[i], unit):
            ranks[i] += unit
            left -= price
    return {
        f"layers.{layer}.{role}": structure
        for layer in range(arch.num_layers)
        for group, rank in zip(open_groups, ranks, strict=True)
        for role, structure in joint_structures(group, rank).items()
    }


def energy_structures(
    weights: Mapping[str, Tensor], arch: Architecture, threshold: float, unit: int
) -> dict[str, Structure]:
    """Role -> structure for one block: the smallest aligned rank with sum_{i <= k} s_i^2 >= threshold sum s_i^2.

    weights: "{role}.weight" (out, in). Groups whose rank would save nothing are left out, that is, dense. Raises
    UsageError for a threshold that is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the share of the energy to keep must be above 0 and at most 1, not {threshold}")
    chosen: dict[str, Structure] = {}
    for group in jrk_groups(arch):
        curve = joint_error_by_rank([weights[f"{role}.weight"] for role in group])
        enough = next(
            (k for k in joint_ranks(group, unit) if float(curve[k]) <= (1 - threshold) * float(curve[0])), None
        )
        if enough is not None:
            chosen |= joint_structures(group, enough)
    return chosen


def jrk_fit_block(weights: Mapping[str, Tensor], structures: Mapping[str, Structure]) -> dict[str, dict[str, Tensor]]:
    """Role -> factors for one block, all fitted in the Frobenius norm, and those that share a V together.

    weights: "{role}.weight" (out, in); structures: role -> structure. Raises UsageError, see `Structure.fit`.
    """
    fitted: dict[str, dict[str, Tensor]] = {}
    for role, structure in structures.items():
        if role in fitted:
            continue
        followers = [r for r, s in structures.items() if isinstance(s, LowRankStructure) and s.shares == role]
        if isinstance(structure, LowRankStructure) and followers:
            V, parts = joint_fit([weights[f"{r}.weight"] for r in (role, *followers)], structure.rank)
            fitted[role] = {"V": V, "U": parts[0]}
            fitted |= {r: {"U": U} for r, U in zip(followers, parts[1:], strict=True)}
        else:
            fitted[role] = structure.fit(weights[f"{role}.weight"])
    return {role: fitted[role] for role in structures}


def frobenius_error(weight: Tensor, structure: Structure, factors: Mapping[str, Tensor]) -> float:
    """|W - What| / |W|, 0 for a zero weight; factors with the V of the leader where it is shared."""
    lost = torch.linalg.matrix_norm(weight.double() - structure.dense(factors).double())
    return float(lost / torch.linalg.matrix_norm(weight.double()).clamp(min=1e-300))


def _dense(group: Group) -> int:
    return sum(n * m for n, m in group.values())


def _per_rank(group: Group) -> int:
    """Parameters of one more rank: m + sum n_i."""
    return next(iter(group.values()))[1] + sum(n for n, _ in group.values())

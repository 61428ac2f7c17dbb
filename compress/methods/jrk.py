"""Joint rank-k (arXiv 2402.16319): low rank without any data, the matrices that belong together sharing a factor.

Q with K, and gate with up, are inter-connected: they read one input, and their outputs meet in a product. Each pair is
stacked along its outputs and truncated as one matrix by its SVD, What_i = U_i V; v, o and down are truncated alone. No
text is read, no Gram matrix formed: errors count in the Frobenius norm. The ranks follow from a kept fraction, the
same for every group, or from a share of the energy (derived here: the full text of the paper was not at hand).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compress.allocation.budget import ratio_of, unit_of
from compress.allocation.paying import where_it_helps
from compress.architecture import Architecture
from compress.errors import UsageError
from compress.methods.base import Context, Fitted, Space
from compress.methods.textless import fit_without_text, named_structures, space_without_text
from compress.recipe import Recipe
from compress.structures import Structure
from compress.structures.joint import joint_error_by_rank, joint_ranks, joint_structures

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
    groups = dict(enumerate(jrk_groups(arch)))

    def ranks_of(names: list[int], left: float) -> tuple[dict[int, int], list[int]]:
        return _joint_ranks({i: groups[i] for i in names}, left, unit)

    budget = ratio * arch.projection_parameters() / arch.num_layers
    ranks = where_it_helps({i: _dense(group) for i, group in groups.items()}, budget, ranks_of)
    if ranks is None:
        raise UsageError(
            f"no group of this model has an aligned joint rank at --ratio {ratio:g}: lower --unit, which is {unit}, "
            f"or raise --ratio"
        )
    return {
        f"layers.{layer}.{role}": structure
        for layer in range(arch.num_layers)
        for i, rank in ranks.items()
        for role, structure in joint_structures(groups[i], rank).items()
    }


def _joint_ranks(groups: Mapping[int, Group], left: float, unit: int) -> tuple[dict[int, int], list[int]]:
    """The rank of every group for `left` parameters; or none, and the groups that have no aligned one."""
    share = left / sum(_dense(group) for group in groups.values())
    wanted = {i: share * _dense(group) / _per_rank(group) for i, group in groups.items()}
    fitting = {i: [k for k in joint_ranks(group, unit) if k <= wanted[i]] for i, group in groups.items()}
    stuck = [i for i, ranks in fitting.items() if not ranks]
    if stuck:
        return {}, stuck
    ranks = {i: max(fit) for i, fit in fitting.items()}
    left -= sum(k * _per_rank(groups[i]) for i, k in ranks.items())
    for i in sorted(ranks, key=lambda i: ranks[i] / wanted[i]):
        price = unit * _per_rank(groups[i])
        if price <= left and ranks[i] + unit in joint_ranks(groups[i], unit):
            ranks[i] += unit
            left -= price
    return ranks, []


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


class JointRank:
    """Joint rank-k, every block from its weights alone."""

    name = "joint-rank-k"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError for an impossible ratio, and for names that do not hold together."""
        self._structures(arch, recipe)

    def space(self, arch: Architecture, recipe: Recipe) -> Space:
        """See `Method.space`."""
        return space_without_text(arch, recipe)

    def fit(self, context: Context) -> Fitted:
        """See `Method.fit`."""
        return fit_without_text(context, self._structures(context.arch, context.recipe))

    def _structures(self, arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
        return named_structures(arch, recipe, jrk_structures(arch, ratio_of(arch, recipe), unit_of(arch, recipe)))


def _dense(group: Group) -> int:
    return sum(n * m for n, m in group.values())


def _per_rank(group: Group) -> int:
    """Parameters of one more rank: m + sum n_i."""
    return next(iter(group.values()))[1] + sum(n for n, _ in group.values())

"""Linears that read the same input become one node where their structures allow it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.structures import LowRankStructure, Structure
from export.graph.ops import family_of

Compared = Mapping[str, Mapping[str, Tensor]]
"""Role -> the factors of its structure that are compared (`Family.compared`), where it has any."""


@dataclass(frozen=True)
class Fused:
    """Roles computed by one chain of nodes: `structure` has the outputs of all of them, in this order."""

    roles: tuple[str, ...]
    structure: Structure
    out_features: tuple[int, ...]
    bias: bool = False


def fuse(structures: Mapping[str, Structure], compared: Compared, biased: Collection[str] = ()) -> list[Fused]:
    """Group the readers of one input, in order. `biased`: the roles that have a bias; those that have one and those
    that have none stay apart.

    Linears of one structure stack where its family allows it (`Family.stacks`) and the factors that it compares are
    equal. The U of low-rank matrices that share a V stack whatever their biases: the V must be multiplied once.
    Everything else stays alone.
    """
    groups: list[list[str]] = []
    for role, structure in structures.items():
        for group in groups:
            first = group[0]
            alike = _same_input(structures[first], structure, compared.get(first, {}), compared.get(role, {}))
            if _shared(structure) == first or (alike and (first in biased) == (role in biased)):
                group.append(role)
                break
        else:
            groups.append([role])
    return [_fused(group, structures, any(role in biased for role in group)) for group in groups]


def _fused(roles: list[str], structures: Mapping[str, Structure], bias: bool) -> Fused:
    first = structures[roles[0]]
    sizes = tuple(structures[role].out_features for role in roles)
    whole = first if len(roles) == 1 else replace(first, out_features=sum(sizes))
    return Fused(tuple(roles), whole, sizes, bias)


def _shared(structure: Structure) -> str | None:
    """The role whose V a low-rank structure uses."""
    return structure.shares if isinstance(structure, LowRankStructure) else None


def _same_input(
    one: Structure, other: Structure, one_compared: Mapping[str, Tensor], other_compared: Mapping[str, Tensor]
) -> bool:
    if one.name != other.name or not family_of(one).stacks(one, other):
        return False
    return one_compared.keys() == other_compared.keys() and all(
        torch.equal(factor, other_compared[name]) for name, factor in one_compared.items()
    )

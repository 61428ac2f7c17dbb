"""Structure -> chain of ONNX nodes: which op_type, which factors in which order, which attributes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.structures import (
    CompotStructure,
    DenseStructure,
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    SelectStructure,
    Structure,
    core_of,
)
from export.graph.ops import BIAS_SUFFIX, DOMAIN, GROUP_SHUFFLE_GRIDS, PLUGIN_VERSION, Attributes

COEFFICIENTS = "S"
"""The one factor that is not stored as it is multiplied: a graph holds S with its zeros, so that an engine sees their
pattern along the reduction dimension (2:4), a checkpoint its values and mask. See `packed`."""


STORED_TYPES = {"A": torch.float32, "order": torch.int32}
"""Factors whose type is not that of the graph."""


@dataclass(frozen=True)
class Call:
    """One node. Its first input is the activation, then come constants (int64 vectors) and the named factors ("bias"
    for the bias)."""

    op_type: str
    domain: str
    factors: tuple[str, ...]
    attributes: Attributes = field(default_factory=dict)
    constants: tuple[tuple[int, ...], ...] = ()


def lower(structure: Structure, bias: bool) -> tuple[Call, ...]:
    """The nodes that compute `structure` on x (tokens, in_features); each feeds the next.

    Raises ArtifactError for a structure that this version cannot export.
    """
    if isinstance(structure, DenseStructure):
        return (_gemm("weight", bias),)
    if isinstance(structure, LowRankStructure):
        return (_gemm("V", False), _gemm("U", bias))
    if isinstance(structure, CompotStructure):
        return (_gemm("D", False), _gemm(COEFFICIENTS, bias))
    if isinstance(structure, KroneckerStructure):
        return (_kronecker(structure, bias),)
    if isinstance(structure, GroupShuffleStructure):
        return (_group_shuffle(structure, bias),)
    if isinstance(structure, PivotedStructure):
        return (_pivoted(structure, bias),)
    if isinstance(structure, SelectStructure):
        return _select(structure, bias)
    raise ArtifactError(f"structure {structure.name!r} has no ONNX op; compress with pifa, kron, gs, lowrank or dense")


def packed(structure: Structure) -> CompotStructure:
    """Whose `coefficients` the factor COEFFICIENTS of a lowered structure is."""
    core = core_of(structure)
    if not isinstance(core, CompotStructure):
        raise ArtifactError(f"structure {core.name!r} has no sparse coefficients; this is a bug, please report it")
    return core


def _gemm(weight: str, bias: bool) -> Call:
    return Call("Gemm", "", (weight, "bias") if bias else (weight,), {"transB": 1})


def _standard(op_type: str, *constants: tuple[int, ...], factors: tuple[str, ...] = ()) -> Call:
    return Call(op_type, "", factors, {}, constants)


def _select(s: SelectStructure, bias: bool) -> tuple[Call, ...]:
    """The core between a cut of its input or a padding of its output; groups are an axis of their own."""
    axis, groups = 1 if s.groups == 1 else 2, s.groups
    if s.side == "in":
        cut = [_standard("Slice", (0,), (s.kept,), (axis,))]  # (tokens, [groups,] kept)
        if groups > 1:
            cut = [_standard("Reshape", (-1, groups, s.group_size)), *cut, _standard("Reshape", (-1, groups * s.kept))]
        return (*cut, *lower(s.reduced, bias))
    padded = [_standard("Pad", (0,) * (2 * axis + 1) + (s.group_size - s.kept,))]  # (tokens, [groups,] group_size)
    if groups > 1:
        padded = [_standard("Reshape", (-1, groups, s.kept)), *padded, _standard("Reshape", (-1, s.out_features))]
    added = [_standard("Add", factors=("bias",))] if bias else []
    return (*lower(s.reduced, False), *padded, *added)


def _custom(op_type: str, structure: Structure, factors: tuple[str, ...], bias: bool, attributes: Attributes) -> Call:
    sizes: Attributes = {"in_features": structure.in_features, "out_features": structure.out_features}
    plugin: Attributes = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": DOMAIN}
    if bias:
        op_type, factors = op_type + BIAS_SUFFIX, (*factors, "bias")
    return Call(op_type, DOMAIN, factors, {**sizes, **attributes, **plugin})


def _kronecker(s: KroneckerStructure, bias: bool) -> Call:
    m, n = s.in_features, s.out_features
    if s.side == "both":
        return _general(s, bias)
    common: Attributes = {"terms": s.terms, "blocks": s.blocks, "side": s.side}
    if s.side == "in":
        if s.mix == "leading":
            return _custom("KroneckerLeadingLinear", s, ("B",), bias, {**common, "leading": [s.kept]})
        shapes: Attributes = {"grid": [-1, s.blocks, m // s.blocks], "flat": [-1, s.kept]}
        return _custom("KroneckerLinear", s, ("B", "A"), bias, {**common, **shapes})
    if s.mix == "leading":
        return _custom("KroneckerLeadingLinearOut", s, ("B",), bias, {**common, "padding": [n - s.kept]})
    shapes = {"grid": [-1, s.terms, n // s.blocks], "flat": [-1, n]}
    return _custom("KroneckerLinearOut", s, ("B", "A"), bias, {**common, **shapes})


def _general(s: KroneckerStructure, bias: bool) -> Call:
    terms, (n1, m1), (n2, m2) = s.terms, s.left, s.right
    attributes: Attributes = {
        "terms": terms,
        "side": s.side,
        "a_shape": [n1, m1],
        "b_shape": [n2, m2],
        "flat": [-1, s.out_features],
    }
    # Multiply-accumulates per token: B first terms m1 n2 (m2 + n1), A first terms n1 m2 (m1 + n2).
    if 1 / n1 + 1 / m2 < 1 / n2 + 1 / m1:
        attributes |= {
            "grid": [-1, m2],
            "b_rows": [terms * n2, m2],
            "inner": [-1, m1 * terms, n2],
            "a_rows": [n1, m1 * terms],
        }
        return _custom("KroneckerLinearGeneral", s, ("B", "A"), bias, attributes)
    attributes |= {
        "grid": [-1, m1, m2],
        "a_rows": [n1 * terms, m1],
        "inner": [-1, terms * m2],
        "b_rows": [n2, terms * m2],
    }
    return _custom("KroneckerLinearGeneralMixFirst", s, ("B", "A"), bias, attributes)


def _group_shuffle(s: GroupShuffleStructure, bias: bool) -> Call:
    left, right = s.left_blocks, s.right_blocks
    if (left, right) not in GROUP_SHUFFLE_GRIDS:
        raise ArtifactError(f"a {left} x {right} grid of blocks is beyond the op contract: at most 64 x 64")
    attributes: Attributes = {
        "left_blocks": left,
        "right_blocks": right,
        "rank": s.rank,
        "grid": [-1, left, right, s.rank],
        "flat": [-1, left * right * s.rank],
    }
    return _custom(f"GroupShuffleLinear_{left}x{right}", s, ("L", "R"), bias, attributes)


def _pivoted(s: PivotedStructure, bias: bool) -> Call:
    if s.side == "out":
        return _custom("PivotedLinear", s, ("V", "C", "order"), bias, {"rank": s.rank})
    ends: Attributes = {"rank": s.rank, "pivots": [s.rank], "rest": [s.in_features]}
    return _custom("PivotedLinearIn", s, ("C", "U", "order"), bias, ends)


# --- Fusion: linears that read the same input become one node where their structures allow it. ---


@dataclass(frozen=True)
class Fused:
    """Roles computed by one chain of nodes: `structure` has the outputs of all of them, in this order."""

    roles: tuple[str, ...]
    structure: Structure
    out_features: tuple[int, ...]
    bias: bool = False


def fuse(structures: Mapping[str, Structure], mixes: Mapping[str, Tensor], biased: Collection[str] = ()) -> list[Fused]:
    """Group the readers of one input, in order. `mixes`: role -> its explicit A, where it has one. `biased`: the roles
    that have a bias; those that have one and those that have none stay apart.

    Dense weights stack; so do the B of one-sided Kronecker matrices that read the same mix of the input, that
    is, of the same blocks and terms with mix "leading" or with equal A. The U of low-rank matrices that share a V stack
    whatever their biases: the V must be multiplied once. Everything else stays alone.
    """
    groups: list[list[str]] = []
    for role, structure in structures.items():
        for group in groups:
            first = group[0]
            alike = _same_input(structures[first], structure, mixes.get(first), mixes.get(role))
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


def _same_input(one: Structure, other: Structure, one_mix: Tensor | None, other_mix: Tensor | None) -> bool:
    if isinstance(one, DenseStructure) and isinstance(other, DenseStructure):
        return True
    if not (isinstance(one, KroneckerStructure) and isinstance(other, KroneckerStructure)):
        return False
    if one.side != "in" or replace(one, out_features=other.out_features) != other:
        return False
    if one_mix is None or other_mix is None:
        return one_mix is None and other_mix is None
    return torch.equal(one_mix, other_mix)

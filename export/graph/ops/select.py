"""A selection of inner features: the nodes of its core between a cut of the input or a padding of the output."""

from __future__ import annotations

from compress.structures import SelectStructure
from export.graph.ops.base import Call, Family, lower, register, standard


def _lower(s: SelectStructure, bias: bool) -> tuple[Call, ...]:
    """The core between a cut of its input or a padding of its output; groups are an axis of their own."""
    axis, groups = 1 if s.groups == 1 else 2, s.groups
    if s.side == "in":
        cut = [standard("Slice", (0,), (s.kept,), (axis,))]  # (tokens, [groups,] kept)
        if groups > 1:
            cut = [standard("Reshape", (-1, groups, s.group_size)), *cut, standard("Reshape", (-1, groups * s.kept))]
        return (*cut, *lower(s.reduced, bias))
    padded = [standard("Pad", (0,) * (2 * axis + 1) + (s.group_size - s.kept,))]  # (tokens, [groups,] group_size)
    if groups > 1:
        padded = [standard("Reshape", (-1, groups, s.kept)), *padded, standard("Reshape", (-1, s.out_features))]
    added = [standard("Add", factors=("bias",))] if bias else []
    return (*lower(s.reduced, False), *padded, *added)


register("select", Family(_lower))

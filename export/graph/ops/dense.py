"""A matrix as it is: one Gemm node. Those of linears that read one input stack."""

from __future__ import annotations

from compress.structures import DenseStructure
from export.graph.ops.base import Call, Family, gemm, register


def _lower(s: DenseStructure, bias: bool) -> tuple[Call, ...]:
    return (gemm("weight", bias),)


def _stacks(one: DenseStructure, other: DenseStructure) -> bool:
    return True


register("dense", Family(_lower, stacks=_stacks))

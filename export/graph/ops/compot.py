"""Sparse dictionaries: two Gemm nodes, the second with S as a dense engine multiplies it, its zeros included.

A checkpoint holds the values and the mask of S, a graph S itself, so that an engine sees the pattern of the zeros along
the reduction dimension (2:4).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compress.structures import CompotStructure
from export.graph.ops.base import Call, Derived, Family, gemm, register


def _lower(s: CompotStructure, bias: bool) -> tuple[Call, ...]:
    return gemm("D", False), gemm("S", bias)


def _shape(s: CompotStructure) -> tuple[int, ...]:
    return s.out_features, s.atoms


def _coefficients(s: CompotStructure, factors: Mapping[str, Tensor]) -> Tensor:
    return s.coefficients(factors)


_FAMILY = Family(_lower, derived={"S": Derived(("values", "mask"), _shape, _coefficients)})

register("compot", _FAMILY)
register("compot24", _FAMILY)

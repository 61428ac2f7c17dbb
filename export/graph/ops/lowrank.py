"""Low rank: two Gemm nodes. Linears that share a V are one chain of nodes (`export.graph.fusion`)."""

from __future__ import annotations

from compress.structures import LowRankStructure
from export.graph.ops.base import Call, Family, gemm, register


def _lower(s: LowRankStructure, bias: bool) -> tuple[Call, ...]:
    return gemm("V", False), gemm("U", bias)


register("lowrank", Family(_lower, once=("V",)))

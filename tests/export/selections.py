"""Graphs whose linears keep a selection of their inner features."""

from __future__ import annotations

from compress.architecture import WRITERS, Architecture
from compress.structures import KroneckerStructure, LowRankStructure, PivotedStructure, SelectStructure, Structure
from compress.structures.select import with_core


def selection(arch: Architecture, role: str, kept: int) -> SelectStructure:
    n, m = arch.linears()[role]
    groups = {"attn.v": arch.num_kv_heads, "attn.o": arch.num_heads}.get(role, 1)
    return SelectStructure(m, n, kept, groups, "in" if role in WRITERS.values() else "out")


def neurons(arch: Architecture, layer: int, role: str) -> Structure | None:
    return selection(arch, role, 20 + layer) if role.startswith("mlp.") else None


def values(arch: Architecture, layer: int, role: str) -> Structure | None:
    return selection(arch, role, 5 + layer) if role in ("attn.v", "attn.o") else None


def both(arch: Architecture, layer: int, role: str) -> Structure | None:
    return neurons(arch, layer, role) or values(arch, layer, role)


def unlike(arch: Architecture, layer: int, role: str) -> Structure | None:
    """Nobody agrees: every selection needs its own cut or padding."""
    if role == "attn.o" or role in ("mlp.up", "attn.v"):
        return selection(arch, role, 6)
    return selection(arch, role, 30) if role == "mlp.down" else None


def around_cores(arch: Architecture, layer: int, role: str) -> Structure | None:
    """Leading coordinates of the stream on one side, kept features on the other; a low rank in between for v and o."""
    plain = both(arch, layer, role)
    if not isinstance(plain, SelectStructure):
        n, m = arch.linears()[role]
        return KroneckerStructure(m, n, 4, 3, "in", "leading")
    n, m = plain.reduced.out_features, plain.reduced.in_features
    if role.startswith("attn."):
        return with_core(plain, LowRankStructure(m, n, 4))
    return with_core(plain, KroneckerStructure(m, n, 4, 3, "out" if plain.side == "in" else "in", "leading"))


def around_pivots(arch: Architecture, layer: int, role: str) -> Structure | None:
    """Pivoted low rank between what is kept, the pivots on either side."""
    plain = both(arch, layer, role)
    if not isinstance(plain, SelectStructure):
        return None
    n, m = plain.reduced.out_features, plain.reduced.in_features
    return with_core(plain, PivotedStructure(m, n, 4, "in" if m < n else "out"))

"""The structures of ProcrustesGPT's configurations: appendix D of the paper, and the shipped configuration files.

A compressed matrix keeps 3/4, 5/8 or 1/2 of its parameters. Kronecker sums mix q blocks of the stream's side into p
terms; group-and-shuffle matrices have a grid of blocks for each kind of linear. v is never compressed.
"""

from __future__ import annotations

from math import lcm
from typing import Literal

from compress.architecture import Architecture
from compress.errors import UsageError
from compress.structures import KroneckerStructure, Structure
from compress.structures.gs import GroupShuffleStructure

Kind = Literal["kron", "gs"]

DENSE_ROLES = ("attn.v",)
"""Never compressed by the paper, and left out of the weighted rotation (`cut_values` of its code)."""

# Kept fraction -> (terms, blocks). The paper's text has the two swapped for 5/8 and 1/2; these are its configurations.
KRON: dict[float, tuple[int, int]] = {0.75: (3, 4), 0.625: (5, 8), 0.5: (1, 2)}

# Kept fraction -> (left blocks, on the inputs; right blocks, on the outputs) of q and k, of o, of gate and up, of down.
GRIDS: dict[float, tuple[tuple[int, int], ...]] = {
    0.75: ((4, 2), (2, 4), (4, 8), (8, 4)),
    0.625: ((8, 2), (2, 8), (4, 4), (4, 4)),
    0.5: ((4, 4), (4, 4), (4, 2), (2, 4)),
}
_CLASSES = {"attn.q": 0, "attn.k": 0, "attn.o": 1, "mlp.gate": 2, "mlp.up": 2, "mlp.down": 3}


def grid(role: str, kept: float) -> tuple[int, int]:
    """(left blocks, right blocks) of the group-and-shuffle matrix of a linear such as "attn.q"."""
    return GRIDS[kept][_CLASSES[role]]


def check_kept(kept: float) -> None:
    """Raise UsageError for a fraction that the paper has no shapes for."""
    if kept not in KRON:
        raise UsageError(
            f"the paper has shapes that keep {', '.join(f'{k:g}' for k in KRON)} of a matrix, not {kept:g}; "
            f"choose one of these"
        )


def paper_structures(arch: Architecture, kind: Kind, kept: float) -> dict[str, Structure]:
    """Linear name ("layers.0.attn.q") -> the paper's structure; what stays dense is left out.

    Where a grid of blocks does not divide a matrix (grouped keys of few features, odd widths), the next smaller
    divisor takes its place, and the rank of a group-and-shuffle matrix is rounded down where the paper gives one more
    to some of its parts (Llama-2's gate, up and down). Raises UsageError for another `kept`, and where the stream's
    width is no multiple of the blocks of a Kronecker sum.
    """
    check_kept(kept)
    chosen: dict[str, Structure] = {}
    for role, (n, m) in arch.linears().items():
        if role in DENSE_ROLES:
            continue
        structure: Structure
        if kind == "kron":
            terms, blocks = KRON[kept]
            side: Literal["in", "out"] = "out" if arch.side(role) == "out" else "in"
            structure = KroneckerStructure(m, n, blocks, terms, side, "explicit")
        else:
            structure = _group_shuffle(n, m, kept, grid(role, kept))
        chosen.update({f"layers.{layer}.{role}": structure for layer in range(arch.num_layers)})
    return chosen


def _group_shuffle(n: int, m: int, kept: float, blocks: tuple[int, int]) -> GroupShuffleStructure:
    left, right = divisor(m, blocks[0]), divisor(n, blocks[1])
    rank = int(inner_size(n, m, kept, left, right) / (left * right))
    return GroupShuffleStructure(m, n, left, right, max(1, min(rank, n // right, m // left)))


def inner_size(n: int, m: int, kept: float, left: int, right: int) -> float:
    """Inner features s that keep this fraction: s (m / left + n / right) parameters of n m."""
    return kept * n * m / (m / left + n / right)


def rounded_inner_size(n: int, m: int, kept: float, left: int, right: int) -> int:
    """s of the paper's configurations: the nearest that both factors' blocks divide."""
    step = lcm(left, right)
    return round(inner_size(n, m, kept, left, right) / step) * step


def divisor(size: int, wanted: int) -> int:
    """The largest divisor of `size` that is at most `wanted`."""
    return next(d for d in range(min(wanted, size), 0, -1) if size % d == 0)

"""Where a graph runs at the width that a selection of inner features leaves: no zeros are padded in or cut out."""

from __future__ import annotations

from collections.abc import Callable

from compress.architecture import WRITERS, Architecture
from compress.structures import SelectStructure, Structure


def narrow_width(arch: Architecture, structure: Callable[[str], Structure], sub_block: str) -> int | None:
    """Features kept of each group, where all linears on the inner side of `sub_block` keep the same; else None.

    For "mlp" these are gate, up and down with one group, so the products in between need only the kept neurons. For
    "attn" they are v with a group for each key-value head and o with one for each head: the projections are narrow, and
    attention puts in the zeros where it splits the heads. `structure`: role -> its structure.
    """
    if sub_block == "mlp":
        groups = dict.fromkeys((*arch.readers("mlp"), WRITERS["mlp"]), 1)
    else:
        groups = {"attn.v": arch.num_kv_heads, WRITERS["attn"]: arch.num_heads}
    widths = set()
    for role, count in groups.items():
        found = structure(role)
        inner = "in" if role in WRITERS.values() else "out"
        if not isinstance(found, SelectStructure) or (found.side, found.groups) != (inner, count):
            return None
        widths.add(found.kept)
    return widths.pop() if len(widths) == 1 else None

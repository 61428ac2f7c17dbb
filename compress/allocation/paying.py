"""Sizes under one budget where some linears have none: what no aligned size makes smaller stays dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Size = TypeVar("Size")


def where_it_helps(
    dense: Mapping[Name, int],
    budget: float,
    choose: Callable[[list[Name], float], tuple[dict[Name, Size], Collection[Name]]],
) -> dict[Name, Size] | None:
    """The sizes of those that have one; the others stay dense, and those pay for it.

    dense: name -> parameters of the dense matrix. `choose(names, left)` gives the sizes of all names within `left`
    parameters, and the names that no aligned size makes small enough: these stay dense, and it is asked again for the
    rest. A name without a size that it does not report is content to be dense. None where no name is left, or nothing
    to share among them.
    """
    left, open_names = budget, dict(dense)
    while open_names and left > 0:
        sizes, stuck = choose(list(open_names), left)
        if not stuck:
            return sizes
        left -= sum(open_names.pop(name) for name in stuck)
    return None

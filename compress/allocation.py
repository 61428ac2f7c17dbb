"""One budget for all linears: each group chooses a size from its menu so that the total predicted loss is smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """One entry of a menu: an opaque label, its cost in parameters and its predicted loss."""

    label: int
    cost: float
    loss: float


def convex_hull(menu: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (cost, loss), cheapest first; only these can be optimal for some multiplier."""
    hull: list[Choice] = []
    for choice in sorted(menu, key=lambda c: (c.cost, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (b.loss - a.loss) * (choice.cost - a.cost) < (choice.loss - a.loss) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(choice)
    return hull


def allocate(menus: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice per menu with total cost <= budget and the least total loss on the hulls.

    Greedy along the hulls by loss saved per parameter, which is the Lagrangian solution: exact up to the one step
    that no longer fits; what is left of the budget then goes to the best steps that still fit. Raises UsageError
    when even the cheapest choices cost more than the budget.
    """
    hulls = [convex_hull(menu) for menu in menus]
    at = [0] * len(hulls)
    left = budget - sum(hull[0].cost for hull in hulls)
    if left < 0:
        raise UsageError(
            f"the budget of {budget:,.0f} parameters is below the smallest possible {budget - left:,.0f}: raise --ratio"
        )
    # On a hull the savings per parameter fall along each menu, so one sorted list of steps serves all menus.
    steps = sorted(
        ((b.loss - a.loss) / (b.cost - a.cost), index, position)
        for index, hull in enumerate(hulls)
        for position, (a, b) in enumerate(pairwise(hull))
    )
    for _, index, position in steps:
        hull = hulls[index]
        price = hull[position + 1].cost - hull[position].cost
        if at[index] == position and price <= left:
            at[index] += 1
            left -= price
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]

"""One budget for all linears: each group chooses a size from its menu so that the total predicted loss is smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from compress.errors import UsageError
from compress.structures import (
    Structure,
)


@dataclass(frozen=True)
class Choice:
    """One entry of a menu: an opaque label, its cost (in parameters, bytes or seconds) and its predicted loss."""

    label: Any
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
    """One choice per menu with total cost <= budget and the smallest total loss on the hulls.

    Greedy along the hulls by loss saved per parameter, which is the Lagrangian solution: exact up to the one step
    that no longer fits; what is left of the budget then goes to the best steps that still fit. Raises UsageError
    when even the cheapest choices cost more than the budget.
    """
    hulls = [convex_hull(menu) for menu in menus]
    at = [0] * len(hulls)
    left = budget - sum(hull[0].cost for hull in hulls)
    if left < 0:
        raise UsageError(
            f"the budget of {budget:,.6g} is below the smallest possible {budget - left:,.6g}: raise --ratio or the "
            f"budget, or lower --unit"
        )
    # The best next step of each menu; a menu whose next step does not fit is done, for the steps after it cannot be
    # taken without it. (Not one sorted list: rounding may swap the steps of a nearly straight hull.)
    waiting = [_step(hull, index, 0) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapify(waiting)
    while waiting:
        _, index, position = heappop(waiting)
        hull = hulls[index]
        price = hull[position + 1].cost - hull[position].cost
        if price <= left:
            at[index] += 1
            left -= price
            if position + 2 < len(hull):
                heappush(waiting, _step(hull, index, position + 1))
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]


def _step(hull: Sequence[Choice], index: int, position: int) -> tuple[float, int, int]:
    """(loss per parameter, negative; menu; position) of the step from `position` to the next choice."""
    a, b = hull[position], hull[position + 1]
    return (b.loss - a.loss) / (b.cost - a.cost), index, position


def allocate_uniformly(menus: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice per menu: of those that keep at most a share of the menu's largest cost, the one of smallest loss; the
    share is the same for all, and the largest whose total meets the budget. Raises UsageError as `allocate`.
    """
    low, high = 0.0, 1.0
    share = high  # first of all whether the whole of each menu fits
    for _ in range(40):
        chosen = [_within(menu, share) for menu in menus]
        if sum(c.cost for c in chosen) <= budget:
            low = share
        else:
            high = share
        share = (low + high) / 2
    chosen = [_within(menu, low) for menu in menus]
    total = sum(c.cost for c in chosen)
    if total > budget:
        raise UsageError(
            f"the budget of {budget:,.6g} is below the smallest possible {total:,.6g}: raise --ratio or the "
            f"budget, or lower --unit"
        )
    return chosen


def _within(menu: Sequence[Choice], share: float) -> Choice:
    """The smallest loss at no more than `share` of the largest cost; the cheapest where all cost more."""
    limit = share * max(c.cost for c in menu)
    return min((c for c in menu if c.cost <= limit), key=lambda c: c.loss, default=min(menu, key=lambda c: c.cost))


Cost = Callable[[Structure], float]

"""The budget: hulls and greedy steps against exhaustive search on small menus."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocation.choose import Choice, allocate, allocate_uniformly, convex_hull
from compress.errors import UsageError

Menus = list[list[Choice]]


def random_menus(seed: int, count: int = 4, size: int = 5) -> Menus:
    """Menus as curves give them: dearer choices lose less, by no particular law."""
    rng = random.Random(seed)
    menus = []
    for _ in range(count):
        costs = sorted(rng.sample(range(1, 60), size))
        losses = sorted((rng.random() for _ in range(size)), reverse=True)
        menus.append([Choice(i, c, loss) for i, (c, loss) in enumerate(zip(costs, losses, strict=True))])
    return menus


def total(choices: Sequence[Choice]) -> tuple[float, float]:
    return sum(c.cost for c in choices), sum(c.loss for c in choices)


def exhaustive(menus: Menus, budget: float) -> float:
    """The least loss within the budget over all combinations."""
    return min(loss for cost, loss in map(total, itertools.product(*menus)) if cost <= budget)


def steps(menus: Menus) -> list[tuple[float, float, float]]:
    """(gain per cost, gain, price) of every step along the hulls, best first."""
    found = []
    for menu in menus:
        for a, b in itertools.pairwise(convex_hull(menu)):
            found.append(((a.loss - b.loss) / (b.cost - a.cost), a.loss - b.loss, b.cost - a.cost))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(40))
def test_within_one_step_of_the_optimum(seed: int) -> None:
    """Greedy = the linear relaxation up to the first step that does not fit, so that step's gain bounds the gap."""
    menus = random_menus(seed)
    smallest = sum(min(c.cost for c in menu) for menu in menus)
    budget = smallest + random.Random(seed).random() * (sum(max(c.cost for c in menu) for menu in menus) - smallest)
    cost, loss = total(allocate(menus, budget))
    best = exhaustive(menus, budget)
    left, bound = budget - smallest, 0.0
    for _, gain, price in steps(menus):
        if price > left:
            bound = gain
            break
        left -= price
    assert cost <= budget
    assert best - 1e-12 <= loss <= best + bound + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_optimal_where_the_budget_ends_with_a_step(seed: int) -> None:
    menus = random_menus(seed)
    budget = float(sum(min(c.cost for c in menu) for menu in menus))
    for _, _, price in [(0.0, 0.0, 0.0), *steps(menus)]:
        budget += price
        assert total(allocate(menus, budget))[1] == pytest.approx(exhaustive(menus, budget), abs=1e-12)


def test_the_rest_of_the_budget_is_used() -> None:
    menus = [[Choice(0, 10, 10.0), Choice(1, 100, 0.0)], [Choice(0, 10, 1.0), Choice(1, 20, 0.5)]]
    assert [c.label for c in allocate(menus, 50)] == [0, 1]  # the better step does not fit, the other one does


def test_the_cheapest_is_not_always_the_start() -> None:
    menus = [[Choice(0, 10, 5.0), Choice(1, 10, 4.0), Choice(2, 5, 9.0)]]
    assert allocate(menus, 5)[0].label == 2
    assert allocate(menus, 10)[0].label == 1


def test_infeasible() -> None:
    with pytest.raises(UsageError, match=r"budget of 9 .* smallest possible 10"):
        allocate([[Choice(0, 4, 1.0)], [Choice(0, 6, 1.0)]], 9)


points = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0, 10, allow_nan=False, allow_subnormal=False)), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(points)
def test_hull_is_the_lower_envelope(raw: list[tuple[int, float]]) -> None:
    menu = [Choice(i, cost, loss) for i, (cost, loss) in enumerate(raw)]
    hull = convex_hull(menu)
    assert hull[0].cost == min(c.cost for c in menu)
    assert hull[-1].loss == min(c.loss for c in menu)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(hull))
    # No chord between any two choices passes below the hull, and no choice lies below it.
    for choice in menu:
        assert choice.loss >= envelope(hull, choice.cost) - 1e-9
    for multiplier in (0.0, 0.01, 0.1, 1.0, 10.0):
        assert min(c.loss + multiplier * c.cost for c in hull) == pytest.approx(
            min(c.loss + multiplier * c.cost for c in menu), abs=1e-9
        )


def envelope(hull: list[Choice], cost: float) -> float:
    for a, b in itertools.pairwise(hull):
        if a.cost <= cost <= b.cost:
            return a.loss + (b.loss - a.loss) * (cost - a.cost) / (b.cost - a.cost)
    return hull[-1].loss


@settings(max_examples=100, deadline=None)
@given(st.lists(points, min_size=1, max_size=4), st.floats(0, 1))
def test_budget_is_never_exceeded(raw: list[list[tuple[int, float]]], share: float) -> None:
    menus = [[Choice(i, cost, loss) for i, (cost, loss) in enumerate(menu)] for menu in raw]
    low = sum(min(c.cost for c in menu) for menu in menus)
    high = sum(max(c.cost for c in menu) for menu in menus)
    budget = low + share * (high - low)
    chosen = allocate(menus, budget)
    assert len(chosen) == len(menus)
    assert all(choice in menu for choice, menu in zip(chosen, menus, strict=True))
    assert total(chosen)[0] <= budget


def test_the_whole_budget_buys_everything() -> None:
    menus = random_menus(3, count=6, size=8)
    everything = sum(max(c.cost for c in menu) for menu in menus)
    assert total(allocate(menus, everything))[1] == pytest.approx(sum(min(c.loss for c in m) for m in menus))


@pytest.mark.parametrize("seed", range(60))
def test_nearly_straight_menus_are_walked_to_the_end(seed: int) -> None:
    """Rounding must not lose a step: slopes along a hull that is straight up to rounding may come out unsorted."""
    rng = random.Random(seed)
    menus = []
    for _ in range(20):
        slope, size, cost = rng.random(), rng.randint(3, 12), rng.choice([192, 576, 960, 1536])
        losses = [0.1 * slope * (size - k) * (1 + 1e-15 * rng.random()) for k in range(1, size + 1)]
        menus.append([Choice(k, k * cost, loss) for k, loss in enumerate(losses, start=1)])
    everything = sum(max(c.cost for c in menu) for menu in menus)
    assert total(allocate(menus, everything))[0] == everything


# ---- the same share for all


def within(menu: list[Choice], share: float) -> Choice:
    """The least loss at no more than `share` of the largest cost, else the cheapest."""
    fitting = [c for c in menu if c.cost <= share * max(c.cost for c in menu)]
    return min(fitting, key=lambda c: c.loss) if fitting else min(menu, key=lambda c: c.cost)


@pytest.mark.parametrize("seed", range(40))
def test_uniform_takes_the_largest_share_that_fits(seed: int) -> None:
    menus = random_menus(seed)
    low, high = (sum(f(c.cost for c in menu) for menu in menus) for f in (min, max))
    budget = low + random.Random(seed).random() * (high - low)
    shares = sorted({0.0, *(c.cost / max(c.cost for c in menu) * (1 + 1e-9) for menu in menus for c in menu)})
    fitting = [s for s in shares if total([within(menu, s) for menu in menus])[0] <= budget]
    chosen = allocate_uniformly(menus, budget)
    assert chosen == [within(menu, max(fitting)) for menu in menus]
    assert total(chosen)[0] <= budget
    assert total(chosen)[1] >= total(allocate(menus, budget))[1] - max(g for _, g, _ in steps(menus)) - 1e-12


def test_uniform_keeps_the_same_share_of_equal_menus() -> None:
    menus = [[Choice(k, scale * k, weight / k) for k in range(1, 11)] for scale, weight in ((1, 1.0), (7, 100.0))]
    assert [c.label for c in allocate_uniformly(menus, 0.6 * 80)] == [6, 6]
    assert [c.label for c in allocate_uniformly(menus, 80)] == [10, 10]  # all of it
    assert [c.label for c in allocate_uniformly(menus, 8)] == [1, 1]
    with pytest.raises(UsageError, match=r"budget of 7 .* smallest possible 8: raise --ratio"):
        allocate_uniformly(menus, 7)

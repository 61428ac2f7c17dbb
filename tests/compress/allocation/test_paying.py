"""What no size makes smaller stays dense, and the others pay for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress.allocation.paying import where_it_helps

DENSE = {"a": 100, "b": 100, "c": 40}


Choose = Callable[[list[str], float], tuple[dict[str, int], list[str]]]


def shares(steps: dict[str, int], asked: list[tuple[list[str], float]]) -> Choose:
    """A choice of the same share for all, rounded down to whole steps: a name without one is stuck."""

    def choose(names: list[str], left: float) -> tuple[dict[str, int], list[str]]:
        asked.append((names, left))
        share = left / sum(DENSE[name] for name in names)
        sizes = {name: int(share * DENSE[name]) // steps[name] * steps[name] for name in names}
        return sizes, [name for name, size in sizes.items() if size <= 0]

    return choose


def test_all_have_a_size() -> None:
    asked: list[tuple[list[str], float]] = []
    assert where_it_helps(DENSE, 120, shares({"a": 10, "b": 25, "c": 20}, asked)) == {"a": 50, "b": 50, "c": 20}
    assert asked == [(["a", "b", "c"], 120)]


def test_others_pay_until_all_that_are_left_have_one() -> None:
    """First c is stuck; what its 40 leave is too little for b, which had a size before."""
    asked: list[tuple[list[str], float]] = []
    assert where_it_helps(DENSE, 160, shares({"a": 10, "b": 65, "c": 30}, asked)) == {"a": 20}
    assert asked == [(["a", "b", "c"], 160), (["a", "b"], 120), (["a"], 20)]


@pytest.mark.parametrize("budget", [40, 5, 0, -1])
def test_nobody_can_pay(budget: float) -> None:
    asked: list[tuple[list[str], float]] = []
    assert where_it_helps(DENSE, budget, shares({"a": 60, "b": 60, "c": 60}, asked)) is None
    assert len(asked) == (1 if budget > 0 else 0)


def test_one_that_is_content_to_be_dense_is_left_out() -> None:
    assert where_it_helps(DENSE, 240, lambda names, left: ({}, [])) == {}
    assert where_it_helps({}, 240, lambda names, left: ({}, [])) is None

"""How often a linear is fitted: once where a closed form is the optimum, twice where a search may have missed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.fit.fallback import Linear, fit_linears
from compress.linalg import Problem, weighted_error
from compress.structures import (
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    SelectStructure,
    Structure,
)
from compress.structures.lowrank import best_factors
from compress.structures.pifa import pivot_rows
from tests.compress.helpers import normal

CLOSED: list[Structure] = [
    LowRankStructure(16, 24, 5),
    PivotedStructure(16, 24, 5, "out"),
    PivotedStructure(16, 24, 5, "in"),
    KroneckerStructure(16, 24, 4, 3, "in", "leading"),
    SelectStructure(16, 24, 8, 1, "in", PivotedStructure(8, 24, 5, "out")),
]


def problem(structure: Structure, seed: int = 0) -> tuple[Linear, Tensor]:
    n, m = structure.out_features, structure.in_features
    x, g = normal(4 * m, m, seed=seed), normal(4 * n, n, seed=seed + 1)
    weight = normal(n, m, seed=seed + 2)
    return Linear(structure, weight, weight, g.T @ g / len(g)), x.T @ x / len(x)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each fit that is made is weighted."""
    made: list[bool] = []
    for kind in {type(s) for s in CLOSED} | {GroupShuffleStructure}:
        plain = kind.fit

        def fit(self: Structure, weight: Tensor, gram: Any = None, metric: Any = None, plain: Any = plain) -> Any:
            if isinstance(self, SelectStructure) or not made or made[-1] != (gram is not None):
                made.append(gram is not None)
            return plain(self, weight, gram, metric)

        monkeypatch.setattr(kind, "fit", fit)
    return made


@pytest.mark.parametrize("structure", CLOSED, ids=lambda s: f"{s.name}-{getattr(s, 'side', '')}")
def test_a_closed_form_is_fitted_once(structure: Structure, fits: list[bool]) -> None:
    linear, gram = problem(structure)
    [found] = fit_linears([linear], gram)
    assert set(fits) == {True}
    assert (found.note, found.failed) == (None, False)


def test_a_search_is_fitted_twice(fits: list[bool]) -> None:
    linear, gram = problem(GroupShuffleStructure(16, 24, 2, 2, 3))
    fit_linears([linear], gram)
    assert fits == [True, False]


def test_a_closed_form_in_a_damped_moment_is_fitted_twice(fits: list[bool]) -> None:
    linear, gram = problem(LowRankStructure(16, 24, 5))
    gram[:, 9:] = 0
    gram[9:] = 0
    fit_linears([linear], gram)
    assert fits == [True, False]


@pytest.mark.parametrize("scale", [0.0, 0.99, 1.01, -1.0, torch.nan])
def test_a_closed_form_that_went_wrong_is_found_out(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = LowRankStructure(16, 24, 5)
    linear, gram = problem(structure)
    plain = LowRankStructure.fit

    def fit(self: Any, weight: Tensor, gram: Any = None, metric: Any = None) -> dict[str, Tensor]:
        factors = plain(self, weight, gram, metric)
        return factors if gram is None else {"V": factors["V"] * scale, "U": factors["U"]}

    best = weighted_error(linear.weight, structure.dense(plain(structure, linear.weight)), gram, linear.metric)
    monkeypatch.setattr(LowRankStructure, "fit", fit)
    [found] = fit_linears([linear], gram)
    if scale != scale:
        assert found.failed
        return
    error = weighted_error(linear.weight, structure.dense(found.factors), gram, linear.metric)
    assert error <= best * (1 + 1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("n", "m"), [(24, 16), (16, 24)])
def test_pivots_are_those_of_the_whole_matrix(side: Any, n: int, m: int) -> None:
    """As an LU factorisation of What C_G, or of (C_H^T What)^T, takes them in the basis of a QR factorisation."""
    structure = PivotedStructure(m, n, 5, side)
    linear, gram = problem(structure, seed=3)
    factors = structure.fit(linear.weight, gram, linear.metric)
    U, V = best_factors(Problem.of(linear.weight, gram, linear.metric, m, n), 5)
    torch.testing.assert_close(structure.dense(factors), U @ V, rtol=1e-9, atol=1e-10)
    assert linear.metric is not None
    left, right = (U, (V @ torch.linalg.cholesky(gram)).T)
    if side == "in":
        left, right = V.T, torch.linalg.cholesky(linear.metric).T @ U
    pivots, rest, combine = pivot_rows(left @ torch.linalg.qr(right).R.T)
    order = torch.cat((pivots, rest)) if side == "in" else torch.cat((pivots, rest)).argsort()
    assert factors["order"].tolist() == order.tolist()
    torch.testing.assert_close(factors["C"], combine.T if side == "in" else combine, rtol=1e-9, atol=1e-10)

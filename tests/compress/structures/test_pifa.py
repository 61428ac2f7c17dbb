"""Pivoted low rank: the battery, the optimum, pivots that are good to compute with, and orders that are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ArtifactError, UsageError
from compress.structures import LowRankStructure, PivotedStructure, Structure
from compress.structures.base import Side
from compress.structures.pifa import pivot_rows
from tests.compress.structures.battery import (
    StructureBattery,
    bounded,
    floating,
    generator,
    random_factors,
    random_weight,
    weightings,
)
from tests.compress.structures.bounds import best_error


@st.composite
def pivoted_specs(draw: st.DrawFn) -> PivotedStructure:
    m, n = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    side: Side = draw(st.sampled_from(["in", "out"]))
    most = min(m, n, (m if side == "in" else n) - 1)
    return PivotedStructure(m, n, draw(st.integers(1, most)), side)


class TestPivoted(StructureBattery):
    structure = PivotedStructure
    exact = True

    def specs(self) -> st.SearchStrategy[Structure]:
        return pivoted_specs()

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        assert isinstance(spec, PivotedStructure)
        return best_error(W, spec.rank, gram, metric)

    @bounded
    @given(spec=pivoted_specs())
    def test_the_matrix_is_that_of_low_rank(self, spec: PivotedStructure) -> None:
        W, plain = random_weight(spec), LowRankStructure(spec.in_features, spec.out_features, spec.rank)
        for gram, metric in weightings(spec):
            expected = plain.dense(plain.fit(W, gram, metric))
            torch.testing.assert_close(spec.dense(spec.fit(W, gram, metric)), expected, rtol=1e-7, atol=1e-7)

    @bounded
    @given(spec=pivoted_specs())
    def test_pivots_are_rows_or_columns_of_the_matrix(self, spec: PivotedStructure) -> None:
        factors = spec.fit(random_weight(spec))
        dense, order = spec.dense(factors), factors["order"].long()
        if spec.side == "in":
            torch.testing.assert_close(dense[:, order[: spec.rank]], factors["U"])
        else:
            torch.testing.assert_close(dense[order.argsort()[: spec.rank]], factors["V"])


@pytest.mark.parametrize("side", ["in", "out"])
def test_parameters_are_those_of_a_matrix_of_that_rank(side: Side) -> None:
    """Below dense at every rank, where U V is above it from half of the rank on."""
    sizes = {rank: PivotedStructure(64, 48, rank, side) for rank in range(1, 48)}
    order = 2 * (64 if side == "in" else 48)
    for rank, spec in sizes.items():
        assert spec.parameter_count() == rank * (64 + 48 - rank) + order
        assert spec.macs(10) == 10 * rank * (64 + 48 - rank)
    assert sizes[47].macs(1) < 64 * 48 < LowRankStructure(64, 48, 28).macs(1)


def half_noise(spec: PivotedStructure, factors: dict[str, Tensor]) -> float:
    """What rounding the factors to float16 changes, as a share of the matrix, in the Frobenius norm."""
    stored = {name: f.half().double() for name, f in floating(factors).items()}
    dense = spec.dense(factors)
    return float((spec.dense({**factors, **stored}) - dense).norm() / dense.norm())


@pytest.mark.parametrize("side", ["in", "out"])
def test_rounding_to_half_precision_is_harmless(side: Side) -> None:
    """The matrix is smooth along the pivots' side: neighbours there are nearly the same, and bad pivots."""
    spec = PivotedStructure(160, 160, 60, side)
    smooth = torch.linalg.qr(torch.randn(160, 60, generator=generator(3), dtype=torch.float64).cumsum(0)).Q
    W = smooth @ torch.randn(60, 160, generator=generator(4), dtype=torch.float64)
    factors = spec.fit(W if side == "out" else W.T.contiguous())
    assert float(factors["C"].abs().max()) < 8
    assert half_noise(spec, factors) < 3e-3
    first = PivotedStructure(160, 160, 60, "out")
    bad = {"V": W[:60], "C": W[60:] @ torch.linalg.pinv(W[:60]), "order": torch.arange(160)}
    torch.testing.assert_close(first.dense(bad), W)
    assert half_noise(first, bad) > 10 * half_noise(spec, factors)


def test_pivot_rows() -> None:
    rows = torch.randn(9, 4, generator=generator(), dtype=torch.float64)
    rows[2] = 0
    rows[5] *= 1e-3
    pivots, rest, combine = pivot_rows(rows)
    assert sorted([*pivots.tolist(), *rest.tolist()]) == list(range(9))
    assert 2 in rest.tolist()
    assert pivots.tolist() == sorted(pivots.tolist())
    torch.testing.assert_close(combine @ rows[pivots], rows[rest])
    dependent = rows[:, :1] @ torch.ones(1, 4, dtype=torch.float64)  # of rank 1
    pivots, rest, combine = pivot_rows(dependent)
    torch.testing.assert_close(combine @ dependent[pivots], dependent[rest])
    assert float(combine.abs().max()) < 10


def test_impossible_ranks_are_refused() -> None:
    for m, n, side, rank in ((8, 4, "out", 4), (8, 4, "in", 5), (4, 8, "in", 4), (8, 8, "out", 8), (8, 4, "out", 0)):
        with pytest.raises(UsageError, match="rank"):
            PivotedStructure(m, n, rank, side)  # type: ignore[arg-type]
    PivotedStructure(8, 4, 4, "in")  # of full rank, and still 4 * 8 numbers


def test_orders_that_are_none_are_refused() -> None:
    spec = PivotedStructure(6, 5, 2)
    factors = random_factors(spec)
    spec.check_factors(factors)
    for order in ([0, 1, 2, 3, 3], [1, 2, 3, 4, 5], [-1, 0, 1, 2, 3]):
        with pytest.raises(ArtifactError, match="no permutation"):
            spec.check_factors({**factors, "order": torch.tensor(order, dtype=torch.int32)})


def test_menu_has_ranks_above_half() -> None:
    menu = PivotedStructure.menu(576, 1536, "in", unit=64)
    assert [spec.rank for spec in menu] == [64, 128, 192, 256, 320, 384, 448, 512]
    assert {spec.side for spec in menu} == {"in"}
    assert {spec.side for spec in PivotedStructure.menu(1536, 576, "out", unit=64)} == {"out"}

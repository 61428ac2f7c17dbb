"""Group-and-shuffle: the battery, the shuffle against its definition, monotone sweeps, speed of a fit."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import UsageError
from compress.linalg import Problem, low_rank, weighted_error
from compress.structures import GroupShuffleStructure, LowRankStructure, Structure, gs_fit
from tests.compress.structures.battery import (
    StructureBattery,
    bounded,
    fit_error,
    random_factors,
    random_weight,
    second_moment,
    weightings,
)


@st.composite
def group_shuffle_specs(draw: st.DrawFn) -> GroupShuffleStructure:
    left, right = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    columns, rows = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rank = draw(st.integers(1, min(rows, columns)))
    return GroupShuffleStructure(left * columns, right * rows, left, right, rank)


class TestGroupShuffle(StructureBattery):
    structure = GroupShuffleStructure
    slack = 0.15  # sweeps stop early on purpose, and on these tiny random matrices the valleys are long

    def specs(self) -> st.SearchStrategy[Structure]:
        return group_shuffle_specs()

    def menu_sizes(self) -> tuple[int, int, int]:
        return 576, 1536, 64

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        """Truncated SVD of each part of the grid, one by one."""
        assert isinstance(spec, GroupShuffleStructure)
        rows, columns = spec.part
        What = torch.zeros_like(W)
        for r in range(spec.right_blocks):
            for c in range(spec.left_blocks):
                part = (slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns))
                U, s, Vh = torch.linalg.svd(W[part])
                What[part] = (U[:, : spec.rank] * s[: spec.rank]) @ Vh[: spec.rank]
        return weighted_error(W, What, gram, metric)

    @bounded
    @given(spec=group_shuffle_specs())
    def test_is_a_perfect_shuffle_between_block_diagonals(self, spec: GroupShuffleStructure) -> None:
        """What = blockdiag(R) P blockdiag(L), P a permutation: ProcrustesGPT, Def. 4.2."""
        factors = random_factors(spec)
        left, right, rank = spec.left_blocks, spec.right_blocks, spec.rank
        order = torch.arange(left * right * rank).reshape(left, right, rank).transpose(0, 1).flatten()
        P = torch.eye(left * right * rank, dtype=torch.float64)[order]
        What = torch.block_diag(*factors["R"]) @ P @ torch.block_diag(*factors["L"])
        torch.testing.assert_close(spec.dense(factors), What)

    @bounded
    @given(spec=group_shuffle_specs())
    def test_frobenius_fit_is_the_exact_optimum(self, spec: GroupShuffleStructure) -> None:
        W = random_weight(spec)
        assert fit_error(spec, W, None, None) == pytest.approx(self.reference_error(spec, W, None, None), abs=1e-12)

    @bounded
    @given(spec=group_shuffle_specs())
    def test_every_sweep_lowers_the_error(self, spec: GroupShuffleStructure) -> None:
        for gram, metric in weightings(spec):
            if gram is None:
                continue
            problem = Problem.of(random_weight(spec), gram, metric, spec.in_features, spec.out_features)
            U, V = low_rank(gs_fit.cut(problem.weight, spec.right_blocks, spec.left_blocks), spec.rank)
            grams = gs_fit.blocks(problem.gram, spec.left_blocks)
            metrics = gs_fit.blocks(problem.metric, spec.right_blocks)
            error = problem.error(gs_fit.join(U @ V))
            for _ in range(5):
                U, V = gs_fit.sweep(problem, U, V, grams, metrics)
                before, error = error, problem.error(gs_fit.join(U @ V))
                assert error <= before * (1 + 1e-9) + 1e-14

    def test_one_part_is_low_rank(self) -> None:
        """A 1 x 1 grid is a low-rank matrix, whose weighted optimum is known."""
        spec, low = GroupShuffleStructure(12, 9, 1, 1, 3), LowRankStructure(12, 9, 3)
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            assert fit_error(spec, W, gram, metric) == pytest.approx(fit_error(low, W, gram, metric), rel=1e-8)

    def test_weighting_pays_on_correlated_inputs(self) -> None:
        spec = GroupShuffleStructure(96, 64, 4, 2, 8)
        W = random_weight(spec)
        for gram, metric in list(weightings(spec))[1:]:
            plain = weighted_error(W, spec.dense(spec.fit(W)), gram, metric)
            assert fit_error(spec, W, gram, metric) < 0.7 * plain

    def test_menu_is_aligned(self) -> None:
        for spec in GroupShuffleStructure.menu(576, 1536, "in", unit=64):
            assert all(side % 64 == 0 for side in spec.part)
            assert spec.rank % 8 == 0
        for spec in GroupShuffleStructure.menu(96, 160, "in", unit=64):
            assert all(side % 16 == 0 for side in spec.part)
        assert GroupShuffleStructure.menu(50, 70, "in", unit=64) == []

    def test_impossible_grids_are_refused(self) -> None:
        for left, right, rank in ((3, 2, 1), (2, 3, 1), (2, 2, 5), (0, 2, 1), (2, 2, 0)):
            with pytest.raises(UsageError):
                GroupShuffleStructure(8, 8, left, right, rank)

    def test_fit_of_a_real_shape_takes_seconds(self) -> None:
        """1536 x 576, grid (4, 2), 0.75 kept: 0.15 s a sweep on one core. The limit leaves room for a busy machine."""
        spec = GroupShuffleStructure(576, 1536, 4, 2, 88)
        W, gram = random_weight(spec).float(), second_moment(576, 1)
        started = time.thread_time()
        spec.fit(W, gram)
        assert time.thread_time() - started < 10

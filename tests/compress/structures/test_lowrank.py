"""Low rank: the battery, and the optimum against an independent SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from compress.errors import UsageError
from compress.linalg import weighted_error
from compress.structures import LowRankStructure
from compress.structures.lowrank import error_by_rank
from tests.compress.structures.battery import (
    bounded,
    random_weight,
    second_moment,
    weightings,
)
from tests.compress.structures.bounds import best_error
from tests.compress.structures.lowrank_battery import LowRankBattery, low_rank_specs


class TestLowRank(LowRankBattery):
    @bounded
    @given(spec=low_rank_specs())
    def test_error_is_exactly_the_optimum(self, spec: LowRankStructure) -> None:
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            error = weighted_error(W, spec.dense(spec.fit(W, gram, metric)), gram, metric)
            assert error == pytest.approx(best_error(W, spec.rank, gram, metric), rel=1e-8, abs=1e-12)

    @bounded
    @given(spec=low_rank_specs())
    def test_error_by_rank(self, spec: LowRankStructure) -> None:
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            errors = error_by_rank(W, gram, metric)
            assert errors.shape == (min(W.shape) + 1,)
            expected = [best_error(W, k, gram, metric) for k in range(min(W.shape) + 1)]
            torch.testing.assert_close(errors, torch.tensor(expected, dtype=torch.float64))

    @bounded
    @given(spec=low_rank_specs())
    def test_the_factors_share_the_scale(self, spec: LowRankStructure) -> None:
        W = 1e6 * random_weight(spec)
        factors = spec.fit(W, 1e-8 * second_moment(spec.in_features, 1))
        torch.testing.assert_close(factors["U"].norm(dim=0), factors["V"].norm(dim=1))

    def test_full_rank_is_lossless(self) -> None:
        spec = LowRankStructure(6, 4, 4)
        W = random_weight(spec)
        assert weighted_error(W, spec.dense(spec.fit(W, second_moment(6, 1)))) < 1e-20

    def test_menu_is_aligned(self) -> None:
        ranks = [spec.rank for spec in LowRankStructure.menu(576, 576, "in", unit=64)]
        assert ranks == [64, 128, 192, 256]

    def test_impossible_ranks_are_refused(self) -> None:
        for rank in (0, -1, 5):
            with pytest.raises(UsageError, match="rank"):
                LowRankStructure(8, 4, rank)

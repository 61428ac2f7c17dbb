"""COMPOT: the battery, and every step of the fit against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ArtifactError, UsageError
from compress.linalg import Problem, weighted_error
from compress.structures import CompotStructure, LowRankStructure, Structure, compot_fit, registry
from compress.structures.compot import Compot24Structure, pack, unpack
from tests.compress.structures.battery import (
    StructureBattery,
    bounded,
    fit_error,
    generator,
    random_weight,
    second_moment,
    weightings,
)


@st.composite
def compot_specs(draw: st.DrawFn) -> CompotStructure:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    atoms = draw(st.integers(1, m))
    return CompotStructure(m, n, atoms, draw(st.integers(1, atoms)))


@st.composite
def compot24_specs(draw: st.DrawFn) -> Compot24Structure:
    atoms = 4 * draw(st.integers(1, 3))
    return Compot24Structure(draw(st.integers(atoms, 14)), draw(st.integers(1, 12)), atoms, atoms // 2)


def best_support(row: Tensor, spec: CompotStructure) -> set[int]:
    """The support of largest energy that the pattern allows, by looking at all of them."""
    squares = row.square().tolist()
    if spec.pattern == "free":
        choices = itertools.combinations(range(spec.atoms), spec.kept)
        return set(max(choices, key=lambda c: sum(squares[i] for i in c)))
    groups = [range(g, g + 4) for g in range(0, spec.atoms, 4)]
    pairs = (max(itertools.combinations(g, 2), key=lambda c: sum(squares[i] for i in c)) for g in groups)
    return {i for pair in pairs for i in pair}


def start(
    spec: CompotStructure, W: Tensor, gram: Tensor | None, metric: Tensor | None
) -> tuple[Tensor, Tensor, Problem]:
    """T, the row weights, and the problem."""
    problem = Problem.of(W, gram, metric, spec.in_features, spec.out_features)
    T = problem.weight if problem.gram is None else problem.weight @ problem.gram.factor
    rows = torch.ones(len(W), dtype=W.dtype) if problem.metric is None else problem.metric.matrix.diagonal()
    return T, rows, problem


class CompotBattery(StructureBattery):
    __test__ = False
    slack = 0.05  # the refit stops early on purpose

    def comparable_specs(self) -> st.SearchStrategy[Structure]:
        """On a handful of atoms the choice of supports is a lottery."""
        return st.just(self.structure.for_ratio(48, 64, "in", 0.75, 16))

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        """No alternation: the leading singular vectors, and the largest coefficients of each row, row by row."""
        assert isinstance(spec, CompotStructure)
        T, rows, _ = start(spec, W, gram, metric)
        D = torch.linalg.svd(rows.sqrt()[:, None] * T).Vh[: spec.atoms][spec._order()]
        Z, S = T @ D.T, torch.zeros(spec.out_features, spec.atoms, dtype=W.dtype)
        for i, row in enumerate(Z):
            for j in best_support(row, spec):
                S[i, j] = row[j]
        What = S @ (D if gram is None else D @ torch.linalg.inv(torch.linalg.cholesky(gram)))
        return weighted_error(W, What, gram, metric)

    @bounded
    @given(data=st.data())
    def test_fit_recovers_a_matrix_of_the_structure(self, data: st.DataObject) -> None:
        """Sparse coding has no guarantee on a general matrix; where the atoms are singular vectors it is exact."""
        spec = data.draw(self.specs())
        assert isinstance(spec, CompotStructure)
        used = min(spec.atoms, spec.out_features)
        for gram, metric in weightings(spec):
            D = torch.linalg.qr(torch.randn(spec.in_features, used, generator=generator(), dtype=torch.float64)).Q.T
            if gram is not None:
                D = D @ torch.linalg.inv(torch.linalg.cholesky(gram))
            S = torch.zeros(spec.out_features, used, dtype=torch.float64)
            for i in range(spec.out_features):
                S[i, i % used] = (2.0 + i % used) ** 2  # one atom a row: the columns are orthogonal
            W = S @ D
            total = weighted_error(W, torch.zeros_like(W), gram, metric)
            assert fit_error(spec, W, gram, metric) <= 1e-14 * total

    @bounded
    @given(data=st.data())
    def test_the_support_is_the_best_of_all(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        assert isinstance(spec, CompotStructure)
        Z = torch.randn(spec.out_features, spec.atoms, generator=generator(), dtype=torch.float64)
        found = spec._support(Z.abs())
        assert found.sum(1).tolist() == [spec.kept] * spec.out_features
        for row, keep in zip(Z, found, strict=True):
            assert set(keep.nonzero().flatten().tolist()) == best_support(row, spec)

    @bounded
    @given(data=st.data())
    def test_every_round_lowers_the_error(self, data: st.DataObject) -> None:
        """Of the alternation in the diagonal metric, then of the refit in the full one."""
        spec = data.draw(self.specs())
        assert isinstance(spec, CompotStructure)
        for gram, metric in weightings(spec):
            T, rows, problem = start(spec, random_weight(spec), gram, metric)

            def diagonal_error(S: Tensor, D: Tensor, T: Tensor = T, rows: Tensor = rows) -> float:
                return float((rows[:, None] * (T - S @ D).square()).sum())

            D = compot_fit.start(T, rows, spec.atoms)[spec._order()]
            error = diagonal_error(torch.zeros(spec.out_features, spec.atoms, dtype=T.dtype), D)
            rounding = 1e-13 * error
            for _ in range(6):
                S, keep = compot_fit.code(T, D, spec._support)
                before, error = error, diagonal_error(S, D)
                assert error <= before + rounding
                D = compot_fit.dictionary(T, rows, S, D)
                torch.testing.assert_close(D @ D.T, torch.eye(spec.atoms, dtype=D.dtype))
                before, error = error, diagonal_error(S, D)
                assert error <= before + rounding
            S, keep = compot_fit.code(T, D, spec._support)
            error = compot_fit._error(T, problem.metric, S, D)
            for _ in range(4):
                D = compot_fit.free_dictionary(T, problem.metric, S, D)
                before, error = error, compot_fit._error(T, problem.metric, S, D)
                assert error <= before + rounding
                S = compot_fit.values(T, problem.metric, S, keep, D)
                before, error = error, compot_fit._error(T, problem.metric, S, D)
                assert error <= before + rounding
                assert not bool(S[~keep].any())

    @bounded
    @given(data=st.data())
    def test_refit_is_the_least_squares_optimum(self, data: st.DataObject) -> None:
        """D and the values against lstsq on the whole problem, written out in all its unknowns."""
        spec = data.draw(self.specs())
        assert isinstance(spec, CompotStructure)
        for gram, metric in weightings(spec):
            T, rows, problem = start(spec, random_weight(spec), gram, metric)
            D = compot_fit.start(T, rows, spec.atoms)[spec._order()]
            S, keep = compot_fit.code(T, D, spec._support)
            left = torch.eye(len(T), dtype=T.dtype) if problem.metric is None else problem.metric.factor.T
            total = float((left @ T).square().sum())

            best_D = torch.linalg.lstsq(left @ S, left @ T, driver="gelsd").solution
            D = compot_fit.free_dictionary(T, problem.metric, S, D)
            error = float((left @ (T - S @ D)).square().sum())
            assert error == pytest.approx(float((left @ (T - S @ best_D)).square().sum()), rel=1e-8, abs=1e-9 * total)

            # vec(left S D): one column per kept coefficient.
            design = torch.einsum("oi,kj->ojik", left, D).reshape(T.numel(), -1)[:, keep.flatten()]
            unknowns = torch.linalg.lstsq(design, (left @ T).reshape(-1, 1), driver="gelsd").solution
            S = compot_fit.values(T, problem.metric, S, keep, D, iterations=2000, tolerance=1e-12)
            error = float((left @ (T - S @ D)).square().sum())
            best = float(((left @ T).reshape(-1, 1) - design @ unknowns).square().sum())
            assert error == pytest.approx(best, rel=1e-8, abs=1e-9 * total)

    @bounded
    @given(data=st.data())
    def test_mask_and_values_are_the_coefficients(self, data: st.DataObject) -> None:
        """Unpacked by hand, bit by bit."""
        spec = data.draw(self.specs())
        assert isinstance(spec, CompotStructure)
        factors = spec.fit(random_weight(spec), second_moment(spec.in_features, 1))
        spec.check_factors(factors)
        S = torch.zeros(spec.out_features, spec.atoms, dtype=torch.float64)
        for i in range(spec.out_features):
            atoms = [a for a in range(spec.atoms) if int(factors["mask"][i, a // 8]) >> (a % 8) & 1]
            assert len(atoms) == spec.kept
            if spec.pattern == "2:4":
                assert all(sum(a // 4 == g for a in atoms) == 2 for g in range(spec.atoms // 4))
            S[i, atoms] = factors["values"][i]
        assert torch.equal(spec.coefficients(factors), S)
        assert torch.equal(spec.dense(factors), S @ factors["D"])
        support = unpack(factors["mask"], spec.atoms)
        assert torch.equal(pack(support), factors["mask"])

    @bounded
    @given(data=st.data())
    def test_damaged_masks_are_refused(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        factors = spec.fit(random_weight(spec))
        for bit in range(8 * factors["mask"].shape[1]):  # atoms and spare bits alike
            mask = factors["mask"].clone()
            mask[0, bit // 8] ^= 1 << bit % 8
            with pytest.raises(ArtifactError, match="mask"):
                spec.check_factors({**factors, "mask": mask})


class TestCompot(CompotBattery):
    __test__ = True
    structure = CompotStructure

    def specs(self) -> st.SearchStrategy[Structure]:
        return compot_specs()

    @bounded
    @given(m=st.integers(1, 12), n=st.integers(1, 12), data=st.data())
    def test_with_all_coefficients_it_is_low_rank(self, m: int, n: int, data: st.DataObject) -> None:
        k = data.draw(st.integers(1, min(m, n)))
        spec, low = CompotStructure(m, n, k, k), LowRankStructure(m, n, k)
        W, gram = random_weight(spec), second_moment(m, 1)
        metric = second_moment(n, 2).diagonal().diag()
        for h in (None, metric):
            expected = fit_error(low, W, gram, h)
            assert fit_error(spec, W, gram, h) == pytest.approx(expected, rel=1e-6, abs=1e-12)


class TestCompot24(CompotBattery):
    __test__ = True
    structure = Compot24Structure

    def specs(self) -> st.SearchStrategy[Structure]:
        return compot24_specs()

    def test_atoms_start_interleaved(self) -> None:
        """Group i holds the singular vectors i, i + k/4, i + k/2, i + 3k/4."""
        spec = Compot24Structure(16, 16, 12, 6)
        assert spec._order().tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]

    def test_a_mask_of_another_pattern_is_refused(self) -> None:
        free, spec = CompotStructure(8, 1, 8, 4), Compot24Structure(8, 1, 8, 4)
        support = torch.tensor([[True] * 4 + [False] * 4])
        factors = {"D": torch.ones(8, 8), "values": torch.ones(1, 4), "mask": pack(support)}
        free.check_factors(factors)
        with pytest.raises(ArtifactError, match="2:4 pattern"):
            spec.check_factors(factors)

    def test_other_ratios_are_refused(self) -> None:
        for atoms, kept in ((8, 3), (8, 5), (6, 3), (2, 1)):
            with pytest.raises(UsageError, match="2 of every 4"):
                Compot24Structure(16, 8, atoms, kept)


def same_bytes_low_rank(spec: CompotStructure) -> LowRankStructure:
    """The largest low-rank matrix with no fewer parameters."""
    rank = -(-spec.parameter_count() // (spec.in_features + spec.out_features))
    return LowRankStructure(spec.in_features, spec.out_features, rank)


@pytest.mark.parametrize("name", ["compot", "compot24"])
@pytest.mark.parametrize("weighted", [False, True])
def test_beats_low_rank_on_a_sparse_dictionary(name: str, weighted: bool) -> None:
    """W = S D + noise, S half full at random: nearly full rank, so that low rank has nothing to hold on to."""
    g = generator()
    spec = registry()[name].for_ratio(96, 256, "in", 0.75, 16)
    assert isinstance(spec, CompotStructure)
    D = torch.linalg.qr(torch.randn(96, spec.atoms, generator=g, dtype=torch.float64)).Q.T
    S = torch.randn(256, spec.atoms, generator=g, dtype=torch.float64)
    W = S * spec._support(torch.rand(S.shape, generator=g, dtype=torch.float64)) @ D
    W += 0.05 * torch.randn(W.shape, generator=g, dtype=torch.float64)
    gram, metric = (second_moment(96, 1), second_moment(256, 2)) if weighted else (None, None)
    error, low = fit_error(spec, W, gram, metric), fit_error(same_bytes_low_rank(spec), W, gram, metric)
    assert error < 0.8 * low


@pytest.mark.parametrize("name", ["compot", "compot24"])
def test_estimates_bound_the_fit_and_fall_with_size(name: str) -> None:
    W = random_weight(CompotStructure(96, 128, 96, 48))
    gram, metric = second_moment(96, 1), second_moment(128, 2)
    before = weighted_error(W, torch.zeros_like(W), gram, metric)
    for spec in registry()[name].menu(96, 128, "in", unit=16):
        assert isinstance(spec, CompotStructure)
        estimate = spec.estimate(W, gram, metric)
        assert fit_error(spec, W, gram, metric) <= estimate < before
        before = estimate


def test_free_pattern_beats_2_to_4() -> None:
    free, fixed = CompotStructure(64, 96, 32, 16), Compot24Structure(64, 96, 32, 16)
    W = random_weight(free)
    assert fit_error(free, W, None, None) < fit_error(fixed, W, None, None)


def test_weighting_pays_on_correlated_inputs_and_outputs() -> None:
    spec = CompotStructure(48, 64, 32, 16)
    W = random_weight(spec)
    plain = spec.dense(spec.fit(W))
    for gram, metric in list(weightings(spec))[1:]:
        assert fit_error(spec, W, gram, metric) < 0.8 * weighted_error(W, plain, gram, metric)


@pytest.mark.parametrize("name", ["compot", "compot24"])
def test_menu_is_aligned(name: str) -> None:
    cls = registry()[name]
    menu = cls.menu(576, 1536, "in", unit=64)
    assert [(s.atoms, s.kept) for s in menu] == [(k, k // 2) for k in range(64, 577, 64)]  # type: ignore[attr-defined]
    # k m + k n / 2 + k n / 16 < m n
    assert [s.atoms for s in cls.menu(576, 576, "in", unit=64)] == [64, 128, 192, 256, 320]  # type: ignore[attr-defined]
    for unit in (0, -4, 6):
        with pytest.raises(UsageError, match="multiple of 4"):
            cls.menu(576, 576, "in", unit=unit)


def test_sizes_count_the_mask() -> None:
    spec = CompotStructure(10, 3, 9, 4)  # 3 x 2 bytes of mask: 3 parameters of 16 bits
    assert spec.parameter_count() == 9 * 10 + 3 * 4 + 3
    assert spec.bytes(torch.float16) == 2 * (9 * 10 + 3 * 4) + 6
    assert spec.bytes(torch.float32) == 4 * (9 * 10 + 3 * 4) + 6
    assert spec.macs(7) == 7 * 9 * (10 + 3)
    assert spec.sparse_macs(7) == 7 * (9 * 10 + 3 * 4)
    assert CompotStructure(10, 1, 8, 4).parameter_count() == 8 * 10 + 4 + 1  # one byte of mask: rounded up


def test_impossible_sizes_are_refused() -> None:
    for atoms, kept in ((0, 1), (9, 1), (4, 5), (4, 0), (-4, 2)):
        with pytest.raises(UsageError):
            CompotStructure(8, 16, atoms, kept)

"""Kronecker sums: the battery for the three forms, closed forms against least squares, the contraction order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from compress.errors import ArtifactError, UsageError
from compress.linalg import Problem, weighted_error
from compress.structures import KroneckerStructure, Structure, kron_fit, structure_from_config
from compress.structures.kron import error_by_kept
from tests.compress.structures.battery import (
    StructureBattery,
    bounded,
    fit_error,
    random_factors,
    random_weight,
    second_moment,
    weightings,
)


def least_squares(basis: Tensor, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
    """The least tr(H E G E^T) over all What in the span of basis (k, out, in), by a dense least-squares solve."""
    left = torch.eye(len(W), dtype=W.dtype) if metric is None else torch.linalg.cholesky(metric).T
    right = torch.eye(W.shape[1], dtype=W.dtype) if gram is None else torch.linalg.cholesky(gram)
    columns = (left @ basis @ right).flatten(1).T
    target = (left @ W @ right).flatten()
    solution = torch.linalg.lstsq(columns, target.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return float((target - columns @ solution).square().sum())


def span_of(spec: KroneckerStructure, factors: dict[str, Tensor], free: str) -> Tensor:
    """The dense matrix of every unit value of one factor, the others fixed: (k, out, in)."""
    units = torch.eye(factors[free].numel(), dtype=torch.float64)
    return torch.stack([spec.dense({**factors, free: unit.reshape(factors[free].shape)}) for unit in units])


@st.composite
def one_sided_specs(draw: st.DrawFn, mix: str) -> KroneckerStructure:
    side = draw(st.sampled_from(["in", "out"]))
    blocks = draw(st.integers(1, 5))
    rotated, other = blocks * draw(st.integers(1, 4)), draw(st.integers(1, 12))
    m, n = (rotated, other) if side == "in" else (other, rotated)
    terms = draw(st.integers(1, min(blocks, m * n // blocks)))
    return KroneckerStructure(m, n, blocks, terms, side, mix)  # type: ignore[arg-type]


@st.composite
def two_sided_specs(draw: st.DrawFn) -> KroneckerStructure:
    n1, m1, n2, m2 = (draw(st.integers(1, 4)) for _ in range(4))
    terms = draw(st.integers(1, min(n1 * m1, n2 * m2)))
    return KroneckerStructure(m1 * m2, n1 * n2, n1 * m1, terms, "both", "explicit", n1, m1)


class TestLeading(StructureBattery):
    structure = KroneckerStructure
    exact = True

    def specs(self) -> st.SearchStrategy[Structure]:
        return one_sided_specs("leading")

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        assert isinstance(spec, KroneckerStructure)
        return least_squares(span_of(spec, random_factors(spec), "B"), W, gram, metric)

    @bounded
    @given(spec=one_sided_specs("leading"))
    def test_error_is_exactly_the_optimum(self, spec: KroneckerStructure) -> None:
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            optimum = self.reference_error(spec, W, gram, metric)
            assert fit_error(spec, W, gram, metric) == pytest.approx(optimum, rel=1e-8, abs=1e-12)

    def test_the_other_weighting_makes_no_difference(self) -> None:
        """Side in: B is the same for every metric. Side out: the same for every Gram matrix, and W cut for H = I."""
        reader, writer = (KroneckerStructure(12, 12, 4, 3, side, "leading") for side in ("in", "out"))
        W, G, H = random_weight(reader), second_moment(12, 1), second_moment(12, 2)
        torch.testing.assert_close(reader.fit(W, G, H)["B"], reader.fit(W, G)["B"])
        torch.testing.assert_close(writer.fit(W, G, H)["B"], writer.fit(W, None, H)["B"])
        torch.testing.assert_close(writer.fit(W, G)["B"], W[:9])

    @pytest.mark.parametrize("side", ["in", "out"])
    def test_error_by_kept(self, side: str) -> None:
        m, n = 12, 8
        W = torch.randn(n, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        blocks = m if side == "in" else n
        for gram, metric in weightings(KroneckerStructure(m, n, blocks, 1, side, "leading")):  # type: ignore[arg-type]
            errors = error_by_kept(W, side, gram, metric)  # type: ignore[arg-type]
            assert errors[-1] == 0
            assert float(errors[0]) == pytest.approx(weighted_error(W, torch.zeros_like(W), gram, metric))
            for kept in range(1, min(blocks, m * n // blocks) + 1):
                spec = KroneckerStructure(m, n, blocks, kept, side, "leading")  # type: ignore[arg-type]
                assert fit_error(spec, W, gram, metric) == pytest.approx(float(errors[kept]), rel=1e-8, abs=1e-12)


class TestExplicit(StructureBattery):
    structure = KroneckerStructure
    slack = 1e-3

    def specs(self) -> st.SearchStrategy[Structure]:
        return one_sided_specs("explicit")

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        """The leading choice, and the Frobenius mix (Van Loan's SVD) with its B solved again for this weighting."""
        assert isinstance(spec, KroneckerStructure)
        leading = fit_error(replace(spec, mix="leading"), W, gram, metric)
        van_loan = least_squares(span_of(spec, spec.fit(W), "B"), W, gram, metric)
        return min(leading, van_loan)

    @bounded
    @given(spec=one_sided_specs("explicit"))
    def test_the_mix_has_orthonormal_rows(self, spec: KroneckerStructure) -> None:
        for gram, metric in weightings(spec):
            A = spec.fit(random_weight(spec), gram, metric)["A"]
            torch.testing.assert_close(A @ A.T, torch.eye(spec.terms, dtype=A.dtype))

    @bounded
    @given(spec=one_sided_specs("explicit"))
    def test_each_factor_is_optimal_given_the_other(self, spec: KroneckerStructure) -> None:
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            factors = spec.fit(W, gram, metric)
            error = weighted_error(W, spec.dense(factors), gram, metric)
            assert error <= least_squares(span_of(spec, factors, "B"), W, gram, metric) * (1 + 1e-8) + 1e-12
            assert error <= least_squares(span_of(spec, factors, "A"), W, gram, metric) * (1 + 1e-4) + 1e-12

    def test_not_worse_than_many_alternating_sweeps(self) -> None:
        """Variable projection against 200 exact alternating steps from the same start."""
        spec = KroneckerStructure(24, 16, 6, 4, "in", "explicit")
        W, gram, metric = random_weight(spec), second_moment(24, 1), second_moment(16, 2)
        problem = Problem.of(W, gram, metric, 24, 16)
        factors = spec.fit(W)
        G4, BH = gram.reshape(6, 4, 6, 4), metric
        for _ in range(200):
            A = torch.linalg.qr(factors["A"].T).Q.T
            B = kron_fit.fit_given_mix(problem, A, 4)
            B3 = B.reshape(16, 4, 4)
            normal = torch.einsum("tpus,bpcs->tbuc", (B.T @ BH @ B).reshape(4, 4, 4, 4), G4).reshape(24, 24)
            right = torch.einsum("ntp,nbp->tb", B3, (metric @ W @ gram).reshape(16, 6, 4)).flatten()
            factors = {"A": torch.linalg.solve(normal, right).reshape(4, 6), "B": B}
        alternating = weighted_error(W, spec.dense(factors), gram, metric)
        assert fit_error(spec, W, gram, metric) <= alternating * (1 + 1e-6)

    @pytest.mark.parametrize("columns", [1, 2, 3])
    def test_gradient_of_the_trace_ratio(self, columns: int) -> None:
        u = torch.randn(4, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        P, M = second_moment(12, 1), second_moment(12, 2)

        def value(u: Tensor) -> Tensor:
            N = torch.kron(u, torch.eye(3, dtype=u.dtype))
            return 0.5 * torch.linalg.solve(N.T @ P @ N, N.T @ M @ N).trace()

        leaf = u.clone().requires_grad_()
        value(leaf).backward()
        found, gradient = kron_fit.trace_ratio(u, P, M, 0.5)
        assert found == pytest.approx(float(value(u)))
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad)

    def test_is_the_two_sided_form_with_one_row(self) -> None:
        spec = KroneckerStructure(12, 8, 4, 3, "in", "explicit")
        factors = random_factors(spec)
        B = factors["B"].reshape(8, 3, 3).transpose(0, 1)
        torch.testing.assert_close(
            spec.dense(factors), sum(torch.kron(factors["A"][i : i + 1], B[i]) for i in range(3))
        )
        spec = KroneckerStructure(12, 8, 4, 3, "out", "explicit")
        factors = random_factors(spec)
        B = factors["B"].reshape(3, 2, 12)
        expected = sum(torch.kron(factors["A"][i].unsqueeze(1), B[i]) for i in range(3))
        torch.testing.assert_close(spec.dense(factors), expected)

    def test_the_mix_stays_in_float32(self) -> None:
        spec = KroneckerStructure(64, 32, 4, 3, "in", "explicit")
        assert spec.storage_dtypes(torch.bfloat16) == {"A": torch.float32, "B": torch.bfloat16}
        assert spec.bytes(torch.bfloat16) == 4 * 12 + 2 * 32 * 48


class TestTwoSided(StructureBattery):
    structure = KroneckerStructure
    slack = 0.15  # alternating steps are slow in long valleys

    def specs(self) -> st.SearchStrategy[Structure]:
        return two_sided_specs()

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        """One exact step in B from Van Loan's SVD, by dense least squares."""
        assert isinstance(spec, KroneckerStructure)
        return least_squares(span_of(spec, spec.fit(W), "B"), W, gram, metric)

    @bounded
    @given(spec=two_sided_specs())
    def test_frobenius_fit_is_the_optimum_of_van_loan(self, spec: KroneckerStructure) -> None:
        W = random_weight(spec)
        (n1, m1), (n2, m2) = spec.left, spec.right
        rows = [W[k * n2 : (k + 1) * n2, c * m2 : (c + 1) * m2].flatten() for k in range(n1) for c in range(m1)]
        optimum = float(torch.linalg.svdvals(torch.stack(rows))[spec.terms :].square().sum())
        assert fit_error(spec, W, None, None) == pytest.approx(optimum, rel=1e-8, abs=1e-12)

    @bounded
    @given(spec=two_sided_specs())
    def test_dense_is_the_sum_of_kronecker_products(self, spec: KroneckerStructure) -> None:
        factors = random_factors(spec)
        expected = sum(torch.kron(A, B) for A, B in zip(factors["A"], factors["B"], strict=True))
        torch.testing.assert_close(spec.dense(factors), expected)

    @bounded
    @given(spec=two_sided_specs())
    def test_each_factor_is_optimal_given_the_other(self, spec: KroneckerStructure) -> None:
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            factors = spec.fit(W, gram, metric)
            error = weighted_error(W, spec.dense(factors), gram, metric)
            for free in ("A", "B"):
                best = least_squares(span_of(spec, factors, free), W, gram, metric)
                assert error <= best * (1 + 1e-2) + 1e-10

    @pytest.mark.parametrize(
        ("n1", "n2", "m1", "m2"), [(2, 8, 2, 8), (8, 2, 2, 8), (2, 8, 8, 2), (4, 4, 4, 4), (1, 9, 4, 3), (6, 2, 1, 7)]
    )
    def test_the_cheaper_order_is_taken(self, n1: int, n2: int, m1: int, m2: int) -> None:
        spec = KroneckerStructure(m1 * m2, n1 * n2, n1 * m1, 1, "both", "explicit", n1, m1)
        right_first = m1 * m2 * n2 + n1 * m1 * n2  # X B^T, then A Z
        left_first = n1 * m1 * m2 + n1 * m2 * n2  # A X, then Z B^T
        assert spec.macs(3) == 3 * min(right_first, left_first)
        assert spec.right_first == (1 / n1 + 1 / m2 < 1 / n2 + 1 / m1)

    def test_one_sided_shapes_cost_their_parameters(self) -> None:
        """The four OPT-13B shapes of speed.md at 3 terms of 4 blocks: 0.75 of dense, not 3.0, in either form."""
        for n, m in ((5120, 5120), (20480, 5120)):
            dense = n * m
            reader = KroneckerStructure(m, n, 4, 3, "both", "explicit", 1, 4)
            writer = KroneckerStructure(n, m, 4, 3, "both", "explicit", 4, 1)
            for spec in (reader, writer, KroneckerStructure(m, n, 4, 3), KroneckerStructure(n, m, 4, 3, "out")):
                assert spec.macs(1) < 0.755 * dense


def test_explicit_beats_leading_on_an_unrotated_matrix() -> None:
    """The dropped direction here is a mix of blocks, which no cut finds."""
    direction = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    others = torch.linalg.svd(direction.unsqueeze(0)).Vh[1:].contiguous()
    K = torch.kron(others, torch.eye(4, dtype=torch.float64))
    W = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ K
    gram = second_moment(16, 1)
    explicit = KroneckerStructure(16, 8, 4, 3, "in", "explicit")
    leading = KroneckerStructure(16, 8, 4, 3, "in", "leading")
    assert fit_error(explicit, W, gram, None) < 1e-12 * fit_error(leading, W, gram, None)


def test_a_cut_of_the_weight_is_not_the_optimum() -> None:
    spec = KroneckerStructure(12, 8, 4, 3, "in", "leading")
    W, gram = random_weight(spec), second_moment(12, 1)
    assert fit_error(spec, W, gram, None) < 0.7 * weighted_error(W, pad(W[:, :9], (0, 3)), gram)


def test_menu_offers_both_mixes() -> None:
    leading = KroneckerStructure.menu(576, 192, "in", unit=64)
    assert [(s.blocks, s.terms, s.kept) for s in leading] == [(9, t, 64 * t) for t in range(1, 9)]
    assert {s.mix for s in leading} == {"leading"}
    explicit = KroneckerStructure.menu(576, 192, "in", unit=64, mix="explicit")
    assert explicit == [replace(s, mix="explicit") for s in leading]
    assert {s.blocks for s in KroneckerStructure.menu(576, 192, "out", unit=64)} == {3}
    assert KroneckerStructure.for_ratio(576, 192, "in", 0.75, 64).terms == 6
    assert KroneckerStructure.for_ratio(576, 192, "in", 0.75, 64, mix="explicit").mix == "explicit"
    with pytest.raises(UsageError, match="576"):
        KroneckerStructure.menu(576, 192, "in", unit=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 5}, "divide"),
        ({"blocks": 0}, "at least 1"),
        ({"terms": 0}, "at least 1"),
        ({"terms": 5}, "terms"),
        ({"side": "up"}, "side"),
        ({"mix": "other"}, "mix"),
        ({"n1": 2, "m1": 2}, "side both"),
        ({"side": "both"}, "n1"),
        ({"side": "both", "n1": 2, "m1": 3}, "n1"),
        ({"side": "both", "n1": -2, "m1": -2}, "n1"),
        ({"side": "both", "n1": 2, "m1": 2, "mix": "leading"}, "leading"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], message: str) -> None:
    spec = KroneckerStructure(12, 8, 4, 3, "in", "explicit")
    with pytest.raises(UsageError, match=message):
        replace(spec, **change)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError):
        structure_from_config({**spec.to_config(), **change})

"""Rotations: closed forms against brute force, gradients against differences, and problems with a known answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compress.linalg import damped, geometric_mean, polar
from compress.rotation.majorised import Member, frobenius_rotation, majorised_rotation
from compress.rotation.nested import Dropped, StreamTerm, dropped_loss, nested_rotation, nested_start
from compress.structures import GroupShuffleStructure, KroneckerStructure, LowRankStructure, Structure

D = 12


class Draw:
    """Random float64 matrices of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def orthogonal(self, width: int = D) -> Tensor:
        return torch.linalg.qr(self.matrix(width, width)).Q

    def moment(self, width: int = D, decay: float = 0.5) -> Tensor:
        """Positive definite, with eigenvalues that fall by `decay` from one to the next."""
        vectors = self.orthogonal(width)
        return (vectors * decay ** torch.arange(width, dtype=torch.float64)) @ vectors.T

    def term(self, name: str = "t", cost: int = 1) -> StreamTerm:
        return StreamTerm(name, self.moment(decay=0.7), self.moment(decay=0.6), cost)


def orthogonality(q: Tensor) -> float:
    return float((q.T @ q - torch.eye(len(q), dtype=q.dtype)).abs().max())


def kept_loss(terms: list[StreamTerm], kept: list[int], q: Tensor) -> float:
    return sum(float(t.curve(q)[k]) for t, k in zip(terms, kept, strict=True))


# ---- Procrustes


@pytest.mark.parametrize("seed", range(5))
def test_polar_is_the_best_orthogonal_matrix(seed: int) -> None:
    draw = Draw(seed)
    M = draw.matrix(D, D)
    Q = polar(M)
    best = float((Q * M).sum())
    assert orthogonality(Q) < 1e-12
    assert best == pytest.approx(float(torch.linalg.matrix_norm(M, "nuc")))  # the sum of the singular values
    for _ in range(50):
        skew = draw.matrix(D, D)
        near = Q @ torch.matrix_exp(0.05 * (skew - skew.T))
        assert float((draw.orthogonal() * M).sum()) < best
        assert float((near * M).sum()) < best


def test_polar_finds_the_rotation_between_two_sets_of_points() -> None:
    draw = Draw(0)
    X, Q = draw.matrix(100, D), draw.orthogonal()
    torch.testing.assert_close(polar(X.T @ (X @ Q)), Q)


def test_damped_adds_to_the_diagonal_and_survives_zero() -> None:
    G = Draw(0).moment()
    expected = G + 0.1 * G.trace() / D * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(damped(G, 0.1), expected)
    torch.testing.assert_close(damped(torch.zeros(D, D), 0.1), torch.eye(D, dtype=torch.float64))
    assert damped(G.float(), 0.1).dtype == torch.float64


@pytest.mark.parametrize("seed", range(3))
def test_geometric_mean_solves_its_equation(seed: int) -> None:
    draw = Draw(seed)
    P, M = draw.moment(), draw.moment()
    X = geometric_mean(P, M)
    torch.testing.assert_close(X @ torch.linalg.inv(P) @ X, M, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(X, X.T)
    torch.testing.assert_close(geometric_mean(M, P), X, atol=1e-8, rtol=1e-6)  # P # M = M # P
    assert float(torch.linalg.eigvalsh(X).min()) > 0


def test_geometric_mean_of_a_singular_m() -> None:
    draw = Draw(3)
    half = draw.matrix(D, 4)
    P, M = draw.moment(), half @ half.T
    X = geometric_mean(P, M)
    assert torch.isfinite(X).all()
    torch.testing.assert_close(X @ torch.linalg.inv(P) @ X, M, atol=1e-6, rtol=1e-6)


# ---- nested subspaces


def test_curve_of_readers_is_the_best_b() -> None:
    draw = Draw(1)
    W, G, q = draw.matrix(20, D), draw.moment(), draw.orthogonal()
    curve = StreamTerm("read", G, W.T @ W, 1).curve(q)
    half = torch.linalg.cholesky(G)
    assert curve.shape == (D + 1,)
    for k in range(D + 1):
        K = q[:, :k]
        # min_B ||(W - B K^T) C||_F, G = C C^T, as one least-squares problem with rows as right-hand sides.
        B = torch.linalg.lstsq(half.T @ K, half.T @ W.T).solution.T if k else torch.zeros(20, 0, dtype=W.dtype)
        best = float(((W - B @ K.T) @ half).square().sum())
        assert float(curve[k]) == pytest.approx(best, rel=1e-8, abs=1e-10)


def test_curve_of_writers_is_the_best_b() -> None:
    draw = Draw(2)
    Y, H, q = draw.matrix(D, 40), draw.moment(), draw.orthogonal()  # 40 outputs
    curve = StreamTerm("write", H, Y @ Y.T, 1).curve(q)
    half = torch.linalg.cholesky(H)
    for k in range(D + 1):
        K = q[:, :k]
        Z = torch.linalg.lstsq(half.T @ K, half.T @ Y).solution if k else torch.zeros(0, 40, dtype=Y.dtype)
        best = float((half.T @ (Y - K @ Z)).square().sum())
        assert float(curve[k]) == pytest.approx(best, rel=1e-8, abs=1e-10)


def test_curve_is_what_the_structures_fit_loses() -> None:
    """The planner's curve and the fitter's Kronecker factors speak of the same error."""
    draw = Draw(3)
    W, G, H, q = draw.matrix(20, D), draw.moment(), draw.moment(), draw.orthogonal()
    V, A = draw.matrix(D, 20), draw.moment(20, 0.8)
    read = StreamTerm("read", G, W.T @ W, 1).curve(q)
    write = StreamTerm("write", H, V @ A @ V.T, 1).curve(q)
    for terms in (1, 2, 3):
        structure = KroneckerStructure(in_features=D, out_features=20, blocks=4, terms=terms, side="in", mix="leading")
        E = W @ q - structure.dense(structure.fit(W @ q, q.T @ G @ q))
        assert float(((E @ q.T @ G @ q) * E).sum()) == pytest.approx(float(read[3 * terms]), rel=1e-8)
        structure = KroneckerStructure(in_features=20, out_features=D, blocks=4, terms=terms, side="out", mix="leading")
        metric = q.T @ H @ q
        E = q.T @ V - structure.dense(structure.fit(q.T @ V, A, metric))
        assert float(((metric @ E @ A) * E).sum()) == pytest.approx(float(write[3 * terms]), rel=1e-8)


def test_curve_falls_to_zero() -> None:
    draw = Draw(4)
    curve = draw.term().curve(draw.orthogonal())
    assert float(curve[-1]) == 0
    assert bool((curve.diff() <= 0).all())


@pytest.mark.parametrize("kept", [[0, 4, 9], [3, 3, 11]])
def test_gradient_of_the_dropped_loss(kept: list[int]) -> None:
    draw = Draw(5)
    terms, q = [draw.term() for _ in kept], draw.orthogonal()
    active = Dropped.of(list(zip(terms, kept, strict=True)), torch.float64)
    value, slope = dropped_loss(active, q)
    assert value == pytest.approx(kept_loss(terms, kept, q))
    for _ in range(5):
        direction = draw.matrix(D, D)
        step = 1e-6
        difference = dropped_loss(active, q + step * direction)[0] - dropped_loss(active, q - step * direction)[0]
        assert float((slope * direction).sum()) == pytest.approx(difference / (2 * step), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_nested_rotation_improves_and_stays_orthogonal(seed: int) -> None:
    draw = Draw(seed)
    terms, kept, start = [draw.term() for _ in range(3)], [3, 6, 9], draw.orthogonal()
    q = nested_rotation(terms, kept, start, iterations=60)
    assert orthogonality(q) < 1e-10
    assert kept_loss(terms, kept, q) < 0.7 * kept_loss(terms, kept, start)
    again = nested_rotation(terms, kept, q, iterations=10)
    assert kept_loss(terms, kept, again) <= kept_loss(terms, kept, q) * (1 + 1e-9)


def test_nested_rotation_recovers_a_planted_subspace() -> None:
    """Every term lives in the first coordinates of one planted basis: the loss can be driven to nothing."""
    draw = Draw(6)
    planted, kept = draw.orthogonal(), [4, 7]
    terms = []
    for k in kept:
        half = planted[:, :k] @ draw.matrix(k, k)
        terms.append(StreamTerm("t", draw.moment(), half @ half.T, 1))
    whole = kept_loss(terms, [0, 0], planted)
    assert kept_loss(terms, kept, planted) < 1e-9 * whole
    start = draw.orthogonal()
    assert kept_loss(terms, kept, start) > 1e-2 * whole
    q = nested_rotation(terms, kept, start, iterations=300, tolerance=1e-9)
    assert kept_loss(terms, kept, q) < 1e-4 * whole


def test_closed_form_start_is_optimal_where_the_moments_commute() -> None:
    draw = Draw(7)
    basis, weights = draw.orthogonal(), torch.tensor([0.8**i for i in range(D)], dtype=torch.float64)
    P, M = (basis * weights) @ basis.T, (basis * weights.square()) @ basis.T
    term = StreamTerm("t", P, M, 1)
    start = nested_start([term])
    dropped = (weights * weights.square())[6:].sum()  # p * m of the directions with the least p * m
    assert kept_loss([term], [6], start) == pytest.approx(float(dropped))
    for _ in range(20):
        assert kept_loss([term], [6], draw.orthogonal()) > float(dropped)


def test_full_width_terms_do_not_count() -> None:
    draw = Draw(8)
    terms, start = [draw.term(), draw.term()], draw.orthogonal()
    assert nested_rotation(terms, [D, D], start) is start
    alone = nested_rotation(terms[:1], [5], start, iterations=20)
    both = nested_rotation(terms, [5, D], start, iterations=20)
    torch.testing.assert_close(alone, both)


def test_never_worse_than_the_start_even_by_rounding() -> None:
    """Nothing is to be gained at the optimum, and the search in float32 does not see that."""
    draw = Draw(10)
    for _ in range(5):
        terms, kept = [draw.term(), draw.term()], [4, 8]
        start = nested_rotation(terms, kept, draw.orthogonal(), iterations=200, tolerance=1e-12)
        q = nested_rotation(terms, kept, start, iterations=10, dtype=torch.float32)
        assert kept_loss(terms, kept, q) <= kept_loss(terms, kept, start)
        assert orthogonality(q) < 1e-10


def test_steps_are_reported() -> None:
    draw = Draw(9)
    seen: list[float] = []
    nested_rotation([draw.term()], [4], draw.orthogonal(), iterations=15, on_step=lambda _, value: seen.append(value))
    assert len(seen) > 3
    assert seen == sorted(seen, reverse=True)


# ---- any structure


def error_of(members: Callable[[], Iterator[Member]], q: Tensor, weighted: bool) -> float:
    total = 0.0
    for member in members():
        target, gram = member.rotated(q), member.rotated_gram(q) if weighted else None
        E = target - member.structure.dense(member.structure.fit(target, gram))
        total += member.scale * float(((E if gram is None else E @ gram) * E).sum())
    return total


def members_of(
    structures: list[Structure], weights: list[Tensor], grams: list[Tensor]
) -> Callable[[], Iterator[Member]]:
    """Readers and writers in turn."""

    def members() -> Iterator[Member]:
        for i, (structure, weight, gram) in enumerate(zip(structures, weights, grams, strict=True)):
            yield Member(weight, gram, "out" if i % 2 else "in", structure, 1 / float(weight.square().sum()))

    return members


GS = GroupShuffleStructure(in_features=16, out_features=16, left_blocks=2, right_blocks=2, rank=3)
LOW_RANK = LowRankStructure(in_features=16, out_features=16, rank=5)


def planted(structure: Structure, noise: float, seed: int) -> tuple[Callable[[], Iterator[Member]], Tensor]:
    """Weights that are `structure` in a hidden basis Q, up to noise."""
    draw = Draw(seed)
    q, weights, grams = draw.orthogonal(16), [], []
    for i in range(6):
        exact = structure.dense({name: draw.matrix(*shape) for name, shape in structure.shapes().items()})
        exact = exact + noise * exact.std() * draw.matrix(16, 16)
        weights.append(q @ exact if i % 2 else exact @ q.T)
        grams.append(draw.moment(16, 0.9))
    return members_of([structure] * 6, weights, grams), q


def test_planted_rotation_is_exact() -> None:
    members, q = planted(GS, 0, 0)
    identity = torch.eye(16, dtype=torch.float64)
    assert error_of(members, q, weighted=False) < 1e-20
    assert error_of(members, identity, weighted=False) > 0.1


def test_frobenius_rotation_never_rises_and_beats_the_identity() -> None:
    members, _ = planted(GS, 0.02, 1)
    q = torch.eye(16, dtype=torch.float64)
    errors = [error_of(members, q, weighted=False)]
    for _ in range(12):
        q = frobenius_rotation(members, q, 1)
        errors.append(error_of(members, q, weighted=False))
    assert all(later <= earlier * (1 + 1e-10) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    assert orthogonality(q) < 1e-12


@pytest.mark.parametrize("structure", [GS, LOW_RANK], ids=["gs", "lowrank"])
def test_majorised_rotation_never_rises(structure: Structure) -> None:
    draw = Draw(2)
    weights, grams = [draw.matrix(16, 16) for _ in range(4)], [draw.moment(16, 0.8) for _ in range(4)]
    members = members_of([structure] * 4, weights, grams)
    q, errors = majorised_rotation(members, torch.eye(16, dtype=torch.float64), 8)
    assert len(errors) == 8
    assert errors[0] == pytest.approx(error_of(members, torch.eye(16, dtype=torch.float64), weighted=True))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert error_of(members, q, weighted=True) <= errors[-1] * (1 + 1e-9)
    assert orthogonality(q) < 1e-12


class Fixed(LowRankStructure):
    """Always the same approximation, so that only the rotation moves."""

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        return {"V": torch.eye(16, dtype=torch.float64), "U": Draw(20 + self.rank).matrix(16, 16)}


@pytest.mark.parametrize("seed", range(5))
def test_polar_steps_alone_never_rise(seed: int) -> None:
    """The Gram-weighted Procrustes problem with What held fixed: each step lowers it, down to a stationary point."""
    draw = Draw(seed)
    structures: list[Structure] = [Fixed(in_features=16, out_features=16, rank=1 + i) for i in range(2)]
    weights, grams = [draw.matrix(16, 16) for _ in range(2)], [draw.moment(16, 0.3) for _ in range(2)]
    members = members_of(structures, weights, grams)
    q, errors = majorised_rotation(members, draw.orthogonal(16), 60, polar_steps=1)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    # One step more: it moves less and less.
    _, more = majorised_rotation(members, q, 60, polar_steps=5)
    assert errors[-1] - more[-1] < 0.2 * (errors[0] - errors[-1])


def test_majorised_rotation_recovers_a_planted_rotation_from_nearby() -> None:
    members, hidden = planted(GS, 0.0, 3)
    draw = Draw(4)
    skew = draw.matrix(16, 16)
    near = hidden @ torch.matrix_exp(0.02 * (skew - skew.T))
    q, errors = majorised_rotation(members, near, 30)
    assert error_of(members, q, weighted=True) < 0.1 * errors[0]


def test_majorised_rotation_beats_the_identity_on_the_weighted_error() -> None:
    members, _ = planted(GS, 0.02, 5)
    identity = torch.eye(16, dtype=torch.float64)
    q = frobenius_rotation(members, identity, 4)
    q, _ = majorised_rotation(members, q, 8)
    assert error_of(members, q, weighted=True) < 0.9 * error_of(members, identity, weighted=True)

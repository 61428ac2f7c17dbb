"""The paper's rotation solver: its terms, its gradient, and that it never goes up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compress.methods.paper.descent import Norm, cayley, pull_back, total_norm, weighted_rotation

WIDTH, OUT, INNER = 10, 7, 6
EYE = torch.eye(WIDTH, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, width: int) -> Tensor:
    x = normal(seed, 3 * width, width) * torch.linspace(0.1, 2, width, dtype=torch.float64)
    return x.T @ x / len(x)


READERS = [(normal(i, OUT, WIDTH), normal(i + 10, OUT, WIDTH)) for i in range(2)]
WRITER = (normal(5, WIDTH, INNER), normal(15, WIDTH, INNER))
READ, WRITTEN, ALPHA = gram(20, WIDTH), gram(21, INNER), 0.7


def terms(dtype: torch.dtype = torch.float64) -> list[Norm]:
    shared = READ.to(dtype)
    readers = [Norm.reader(w.to(dtype), a.to(dtype), shared) for w, a in READERS]
    return [*readers, Norm.writer(WRITER[0].to(dtype), WRITER[1].to(dtype), WRITTEN.to(dtype), ALPHA)]


def paper_loss(S: Tensor) -> Tensor:
    """F as the paper's code computes it, from roots of the Gram matrices, for autograd."""
    Q = 2 * torch.linalg.inv(EYE + S - S.T) - EYE
    root, inner_root = (torch.linalg.cholesky(g) for g in (READ, WRITTEN))
    reading = sum(torch.linalg.norm((w - a @ Q.T) @ root) for w, a in READERS)
    return reading + ALPHA * torch.linalg.norm((Q.T @ WRITER[0] - WRITER[1]) @ inner_root)


def test_value_and_gradient_are_those_of_autograd() -> None:
    S = (EYE + 0.1 * normal(30, WIDTH, WIDTH)).requires_grad_(True)
    expected = paper_loss(S)
    (gradient,) = torch.autograd.grad(expected, S)
    D = cayley(S.detach())
    value, slope = total_norm(terms(), D)
    assert value == pytest.approx(float(expected.detach()))
    torch.testing.assert_close(pull_back(D, slope), gradient)


def test_gradient_against_finite_differences() -> None:
    S, toward, h = 0.2 * normal(31, WIDTH, WIDTH), normal(32, WIDTH, WIDTH), 1e-6
    D = cayley(S)
    slope = float((pull_back(D, total_norm(terms(), D)[1]) * toward).sum())
    ahead, behind = (total_norm(terms(), cayley(S + step * toward))[0] for step in (h, -h))
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


def test_cayley_is_orthogonal_and_starts_at_the_identity() -> None:
    Q = EYE + cayley(3 * normal(33, WIDTH, WIDTH))
    torch.testing.assert_close(Q.T @ Q, EYE)
    assert not cayley(EYE).any()  # the paper's start, S = I


def test_an_exact_fit_has_a_subgradient() -> None:
    weight = READERS[0][0]
    value, slope = total_norm([Norm.reader(weight, weight, READ)], torch.zeros_like(EYE))
    assert value == 0
    assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_the_loss_never_rises(dtype: torch.dtype, scale: float) -> None:
    """Whatever the scale of the problem, which the first step of 1 does not know of."""
    scaled = [
        Norm(scale**2 * t.constant, scale**2 * t.linear, scale**2 * t.left, t.right, t.scale) for t in terms(dtype)
    ]
    q, values = weighted_rotation(scaled, WIDTH, 200)
    assert all(after <= before for before, after in pairwise(values))
    assert values[-1] < (0.98 if scale <= 1 else 0.995) * values[0]  # a large first step is never made up for
    assert q.dtype == dtype
    torch.testing.assert_close(q.T @ q, EYE.to(dtype), atol=1e-5, rtol=0)
    q = q.double()
    S = torch.linalg.solve(EYE + q, EYE - q) / 2  # K = (I + Q)^{-1} (I - Q) = S - S^T
    assert values[-1] == pytest.approx(scale * float(paper_loss(S)), rel=1e-5)


def test_a_known_rotation_is_found() -> None:
    """What was rotated by a known Q: nothing is left, though the norms are not smooth where they are zero."""
    K = 0.15 * normal(40, WIDTH, WIDTH)
    Q = EYE + cayley(K)
    shared, weights = gram(20, WIDTH), [normal(i, 30, WIDTH) for i in range(2)]
    exact = [Norm.reader(w, w @ Q, shared) for w in weights]
    found, values = weighted_rotation(exact, WIDTH, 2000)
    assert values[-1] < 0.02 * values[0]
    assert float((found - Q).norm()) < 0.05 * float((EYE - Q).norm())


def test_no_iterations_leave_the_identity() -> None:
    q, values = weighted_rotation(terms(), WIDTH, 0)
    assert torch.equal(q, EYE)
    assert len(values) == 1

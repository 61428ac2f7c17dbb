"""The formulas of docs/method.md, each against brute force or against the code that the document cites for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.linalg import Problem, geometric_mean
from compress.model.skips import CSSkip, nearest_chain
from compress.rotation.gauge import gauge_fix
from compress.rotation.nested import Dropped, StreamTerm, dropped_loss

OUT, IN, KEPT = 7, 10, 6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moment(size: int) -> Tensor:
    rows = normal(size, 2 * size)
    return rows @ rows.T / size


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(normal(size, size)).Q


def loss(E: Tensor, G: Tensor, H: Tensor) -> Tensor:
    return torch.trace(H @ E @ G @ E.T)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_objective_is_symmetric_and_whitened() -> None:
    E, G, H = normal(OUT, IN), moment(IN), moment(OUT)
    close(loss(E, G, H), loss(E.T, H, G))
    problem = Problem.of(E, G, H, IN, OUT)
    close(loss(E, G, H), problem.whiten(E).square().sum())


def nested(P: Tensor, M: Tensor, N: Tensor) -> Tensor:
    return torch.trace(torch.linalg.inv(N.T @ torch.linalg.inv(P) @ N) @ N.T @ M @ N)


def test_nested_subspaces_of_readers_and_writers() -> None:
    G, H, Q = moment(IN), moment(OUT), rotation(IN)
    W, K, N = normal(OUT, IN), Q[:, :KEPT], Q[:, KEPT:]
    best = W @ G @ K @ torch.linalg.inv(K.T @ G @ K) @ K.T
    M = W.T @ H @ W
    close(loss(W - best, G, H), nested(G, M, N))
    close(StreamTerm("reader", G, M, 1).curve(Q)[KEPT], nested(G, M, N))
    W, G, H = normal(IN, OUT), moment(OUT), moment(IN)
    best = K @ torch.linalg.inv(K.T @ H @ K) @ K.T @ H @ W
    close(loss(W - best, G, H), nested(H, W @ G @ W.T, N))


def test_the_gradient_of_the_nested_loss() -> None:
    P, M, Q = moment(IN), moment(IN), rotation(IN).requires_grad_(True)
    (slope,) = torch.autograd.grad(nested(P, M, Q[:, KEPT:]), Q)
    close(dropped_loss(Dropped.of([(StreamTerm("x", P, M, 1), KEPT)], torch.float64), Q.detach())[1], slope)


def test_a_direction_costs_the_square_of_its_eigenvalue_where_both_moments_commute() -> None:
    p, m = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64) + 0.1
    close(geometric_mean(torch.diag(p), torch.diag(m)).diagonal().square(), p * m)


def test_the_majorised_form_of_a_readers_error() -> None:
    W, What, G = normal(OUT, IN), normal(OUT, IN), moment(IN)
    A, one = What.T @ What, torch.eye(IN, dtype=torch.float64)
    b = torch.linalg.eigvalsh(A)[-1]
    constant = torch.trace(W @ G @ W.T)
    for Q in (rotation(IN), rotation(IN)):
        error = loss(W @ Q - What, Q.T @ G @ Q, torch.eye(OUT, dtype=torch.float64))
        quadratic = torch.trace(Q.T @ G @ Q @ A)
        close(error, quadratic - 2 * torch.trace(Q.T @ G @ W.T @ What) + constant)
        close(quadratic, b * torch.trace(G) - torch.trace(Q.T @ G @ Q @ (b * one - A)))


def test_cheap_skips_have_the_sizes_that_the_document_gives() -> None:
    skip = CSSkip.between(*gauge_fix([rotation(IN), rotation(IN)], KEPT), KEPT)
    p, t = IN - KEPT, skip.turned
    assert (skip.parameter_count(), skip.macs(1)) == ((KEPT + 1) * t + p * p, 2 * KEPT * t + p * p)
    chain = nearest_chain(rotation(IN), 4)
    S = torch.eye(IN, dtype=torch.float64) - chain["V"] @ chain["T"] @ chain["V"].T
    close(S @ S.T, torch.eye(IN, dtype=torch.float64))


def test_dropping_inputs_and_refitting_the_others() -> None:
    W, G, H = normal(OUT, IN), moment(IN), moment(OUT)
    S, D = torch.arange(KEPT), torch.arange(KEPT, IN)
    P, M, G_S = torch.linalg.inv(G), W.T @ H @ W, G[S][:, S]
    C = W @ G[:, S] @ torch.linalg.inv(G_S)
    best = torch.zeros_like(W).index_copy(1, S, C)
    P_D = torch.linalg.inv(P[D][:, D])
    close(loss(W - best, G, H), torch.trace(M[D][:, D] @ P_D))
    close(W[:, S] - W[:, D] @ P_D @ P[D][:, S], C)
    close(P[S][:, S] - P[S][:, D] @ P_D @ P[D][:, S], torch.linalg.inv(G_S))
    other = normal(OUT, KEPT)  # a core that is not the best one
    more = loss(W - torch.zeros_like(W).index_copy(1, S, other), G, H) - loss(W - best, G, H)
    close(more, loss(other - C, G_S, H))


def test_all_sizes_from_one_factorisation() -> None:
    W, G, k = normal(OUT, IN), moment(IN), KEPT
    L = torch.linalg.cholesky(G)
    C = W @ G[:, :k] @ torch.linalg.inv(G[:k, :k])
    close((W @ L)[:, :k] @ (W @ L)[:, :k].T, C @ G[:k, :k] @ C.T)
    rows, V = W.T, (2 * G.tril(-1) + G.diagonal().diag()) @ W.T  # (inner, d)
    half = rows[:k].T @ V[:k]
    close((half + half.T) / 2, rows[:k].T @ G[:k, :k] @ rows[:k])


def test_one_part_of_a_grid() -> None:
    W, Z, G, H = normal(8, IN), normal(8, IN), moment(IN), moment(8)
    r, c = slice(4, 8), slice(0, 5)
    H_r, G_c = H[r, r], G[c, c]
    T = Z[r, c] + torch.linalg.inv(H_r) @ (H @ (W - Z) @ G)[r, c] @ torch.linalg.inv(G_c)

    def at(part: Tensor) -> Tensor:
        whole = Z.clone()
        whole[r, c] = part
        return loss(W - whole, G, H)

    part = normal(4, 5)
    close(at(part) - at(T), loss(part - T, G_c, H_r))


def test_the_dictionary_for_given_coefficients() -> None:
    W, S, G, H = normal(OUT, IN), normal(OUT, 4), moment(IN), moment(OUT)
    D = (torch.linalg.inv(S.T @ H @ S) @ S.T @ H @ W).requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(W - S @ D, G, H), D)
    close(slope, torch.zeros_like(slope))


def test_the_factors_of_an_embedding() -> None:
    table, w, M, rank = normal(20, IN), torch.rand(20, dtype=torch.float64) + 1, moment(IN), 4
    C = torch.linalg.cholesky(M)
    values, vectors = torch.linalg.eigh(C.T @ table.T @ torch.diag(w) @ table @ C)
    P = vectors[:, -rank:]
    E = table - (table @ C @ P) @ (P.T @ torch.linalg.inv(C))
    close((w * ((E @ M) * E).sum(1)).sum(), values[:-rank].sum())

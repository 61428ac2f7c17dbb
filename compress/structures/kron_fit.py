"""Fits of Kronecker sums: closed form for leading coordinates, variable projection for a mix, ALS for the general form.

One-sided fits are written for side "in" (What = B K, K = A (x) I); side "out" is the same problem transposed, where
the Gram matrix and the metric change places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.linalg import Moment, Problem, conjugate_gradient, low_rank, tails

DESCENT_ROUNDS = 3  # each starts a fresh chart of the Grassmannian at the best point so far
DESCENT_STEPS = 25
SWEEPS = 60
SWEEP_TOLERANCE = 1e-5  # stop when a sweep lowers the error by less than this fraction
CG_STEPS = 60
CG_TOLERANCE = 1e-6


def fit_leading(problem: Problem, kept: int) -> Tensor:
    """B (out, kept) that minimises tr(H E G E^T) for What = B K, K the first `kept` rows of the identity.

    Setting the derivative H (W - B K) G K^T to zero gives B = W G[:, K] G[K, K]^{-1}, whatever H. A plain cut,
    B = W[:, K], is the optimum only for G = I or where the kept and the dropped inputs are uncorrelated.
    """
    W, gram = problem.weight, problem.gram
    if gram is None:
        return W[:, :kept]
    # The leading block of the Cholesky factor is the factor of the leading block.
    return torch.cholesky_solve((W @ gram.matrix[:, :kept]).T, gram.factor[:kept, :kept]).T


def leading_errors(problem: Problem) -> Tensor:
    """The error of `fit_leading` for every number of kept inputs 0 ... in, (in + 1,), from one product.

    With G = C C^T, E G E^T = (E C)(E C)^T and the optimal E C is W C with its first `kept` columns zeroed: the rest
    of W C is what the kept inputs cannot predict. (Derived here.)
    """
    return tails(problem.whiten(problem.weight).square().sum(0))


def fit_mix(problem: Problem, blocks: int, terms: int) -> tuple[Tensor, Tensor]:
    """A (terms, blocks) with orthonormal rows and B (out, terms * in / blocks) for What = B (A (x) I).

    B is eliminated exactly (variable projection, derived here): for given A it is W G K^T (K G K^T)^{-1}, K = A (x) I,
    and the error left is

        tr((N^T G^{-1} N)^{-1} N^T M N) = tr(M G) - tr((K G K^T)^{-1} K G M G K^T),   M = W^T H W,

    N = u (x) I, u the orthonormal complement of the rows of A. Without a Gram matrix this is tr(u^T m u) with m the
    block traces of M, minimised by eigenvectors (Van Loan's SVD). With one, the smaller of the two forms is minimised
    over the Grassmannian, from the best of three starts.
    """
    size = problem.weight.shape[1] // blocks
    half = problem.weight if problem.metric is None else problem.metric.factor.T @ problem.weight
    M = half.T @ half
    frobenius = _top_eigenvectors(_block_traces(M, blocks), terms)
    A = frobenius if problem.gram is None or terms == blocks else _best_mix(problem.gram, M, frobenius)
    return A, fit_given_mix(problem, A, size)


def fit_given_mix(problem: Problem, A: Tensor, size: int) -> Tensor:
    """The exact optimum B (out, terms * size) for given A (terms, blocks) with orthonormal rows."""
    W = problem.weight if problem.gram is None else problem.weight @ problem.gram.matrix
    # (out, blocks, size) -> (out, terms, size) -> (out, terms * size)
    right = torch.einsum("nbp,tb->ntp", W.reshape(W.shape[0], A.shape[1], size), A).flatten(1)
    if problem.gram is None:
        return right
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(_mixed(problem.gram.matrix, A.T))).T


def _best_mix(gram: Moment, M: Tensor, frobenius: Tensor) -> Tensor:
    """The A (terms, blocks) that leaves the least error, see `fit_mix`."""
    terms, blocks = frobenius.shape
    G = gram.matrix
    GMG = G @ M @ G
    # Starts: the Frobenius optimum; the optimum if K G K^T were replaced by its block traces; the leading blocks.
    g, gmg = _block_traces(G, blocks), _block_traces(GMG, blocks)
    c = torch.linalg.cholesky(g)
    whitened = torch.linalg.solve_triangular(c, torch.linalg.solve_triangular(c, gmg, upper=False).T, upper=False)
    generalised = torch.linalg.solve_triangular(c.T, _top_eigenvectors(whitened, terms).T, upper=True)
    starts = [frobenius.T, torch.linalg.qr(generalised).Q, torch.eye(blocks, terms, dtype=G.dtype, device=G.device)]
    if terms <= blocks - terms:
        scale = 1 / float((M * G).sum().clamp(min=torch.finfo(G.dtype).tiny))
        return _descend(starts, lambda a: trace_ratio(a, G, GMG, -scale)).T
    P = gram.inverse()
    scale = 1 / float((M * G).sum().clamp(min=torch.finfo(G.dtype).tiny))
    complements = [_complement(a) for a in starts]
    return _complement(_descend(complements, lambda u: trace_ratio(u, P, M, scale))).T


def trace_ratio(u: Tensor, P: Tensor, M: Tensor, scale: float) -> tuple[float, Tensor]:
    """f = scale * tr((N^T P N)^{-1} N^T M N), N = u (x) I, and its gradient in u (blocks, columns).

    With X = (N^T P N)^{-1} and Y = X (N^T M N) X, df = 2 tr(X N^T M dN) - 2 tr(Y N^T P dN).
    """
    blocks, columns = u.shape
    PN, MN = _right_mixed(P, u), _right_mixed(M, u)  # (blocks, size, columns * size)
    C = torch.linalg.cholesky(_left_mixed(PN, u))
    D = _left_mixed(MN, u)
    X = torch.cholesky_inverse(C)
    XD = X @ D
    size = P.shape[0] // blocks

    def pull(image: Tensor, weights: Tensor) -> Tensor:
        """(q, a) entry: sum over p, j of image[q, p, j] weights[j, (a, p)]."""
        by_column = weights.reshape(-1, columns, size).permute(2, 0, 1)  # (size, columns * size, columns)
        return image.flatten(1) @ by_column.flatten(0, 1)  # (blocks, columns)

    gradient = pull(MN, X) - pull(PN, XD @ X)
    return scale * float(XD.trace()), 2 * scale * gradient


def _descend(starts: list[Tensor], objective: Callable[[Tensor], tuple[float, Tensor]]) -> Tensor:
    """Minimise a function of the column space of u (blocks, columns), orthonormal; L-BFGS from the best start.

    The chart u0 + V Y, V the complement of u0, covers the neighbourhood of u0 with free parameters Y: the objective
    does not change when the columns are recombined, so no retraction is needed inside a round.
    """
    best = min(starts, key=lambda u: objective(u)[0])
    for _ in range(DESCENT_ROUNDS):
        base, V = best, _complement(best)
        Y = torch.zeros(V.shape[1], base.shape[1], dtype=base.dtype, device=base.device)
        optimizer = torch.optim.LBFGS(
            [Y],
            max_iter=DESCENT_STEPS,
            history_size=DESCENT_STEPS,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )
        before = objective(base)[0]

        def closure(Y: Tensor = Y, base: Tensor = base, V: Tensor = V) -> float:
            value, gradient = objective(base + V @ Y)
            Y.grad = V.T @ gradient
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        candidate = torch.linalg.qr(base + V @ Y).Q
        after = objective(candidate)[0]
        if after < before:
            best = candidate
        if not after < before - SWEEP_TOLERANCE * abs(before):
            break
    return best


def van_loan(W: Tensor, n1: int, m1: int, terms: int) -> tuple[Tensor, Tensor]:
    """The Frobenius optimum of W = sum_i A_i (x) B_i: A (terms, n1, m1) orthonormal as vectors, B (terms, n2, m2)."""
    n2, m2 = W.shape[0] // n1, W.shape[1] // m1
    blocks = W.reshape(n1, n2, m1, m2).permute(0, 2, 1, 3).reshape(n1 * m1, n2 * m2)
    if n1 * m1 <= n2 * m2:
        A, B = low_rank(blocks, terms)
        return A.T.reshape(terms, n1, m1), B.reshape(terms, n2, m2)
    B_rows, A_columns = low_rank(blocks.T, terms)  # (n2 m2, terms), (terms, n1 m1)
    return _orthonormal(A_columns.reshape(terms, n1, m1), B_rows.T.reshape(terms, n2, m2))


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    """sum_i A_i (x) B_i, (n1 n2, m1 m2)."""
    return torch.einsum("ikc,ioa->koca", A, B).flatten(2, 3).flatten(0, 1)


def fit_general(problem: Problem, n1: int, m1: int, terms: int) -> tuple[Tensor, Tensor]:
    """A (terms, n1, m1) orthonormal as vectors, B (terms, n2, m2): alternating exact steps from Van Loan's SVD.

    Each step is linear least squares in one factor (ProcrustesGPT, App. A), so the error falls with every step.
    """
    W = problem.weight
    n, m = W.shape
    n2, m2 = n // n1, m // m1
    A, B = van_loan(W, n1, m1, terms)
    if problem.gram is None and problem.metric is None:
        return A, B
    G = torch.eye(m, dtype=W.dtype, device=W.device) if problem.gram is None else problem.gram.matrix
    H = None if problem.metric is None else problem.metric.matrix
    target = problem.gradient(W).reshape(n1, n2, m1, m2)  # H W G
    # kron(B, A) is kron(A, B) with rows and columns re-ordered, so that one function solves for either factor.
    swapped = target.permute(1, 0, 3, 2)
    swapped_G = _swap(G, m1, m2)
    swapped_H = None if H is None else _swap(H, n1, n2)
    error = problem.error(kronecker_sum(A, B))
    for _ in range(SWEEPS):
        B = _solve_second(A, B, target, G, H)
        A = _solve_second(B, A, swapped, swapped_G, swapped_H)
        A, B = _orthonormal(A, B)
        before, error = error, problem.error(kronecker_sum(A, B))
        if error > before * (1 - SWEEP_TOLERANCE):
            break
    return A, B


def _solve_second(A: Tensor, start: Tensor, target: Tensor, G: Tensor, H: Tensor | None) -> Tensor:
    """The B (terms, n2, m2) that minimises tr(H E G E^T) for given A (terms, n1, m1); target H W G (n1, n2, m1, m2).

    With H = I the unknowns B[i, o, a] meet the same matrix for every o, a direct solution:
    C[(i, a), (j, b)] = sum_kcd A_i[k, c] G[(c, a), (d, b)] A_j[k, d].
    With a metric all unknowns are coupled: conjugate gradients from `start`, preconditioned by C and
    the average n2 x n2 block of H.
    """
    terms, n1, m1 = A.shape
    n2, m2 = start.shape[1:]
    C = torch.einsum("icjd,cadb->iajb", torch.einsum("ikc,jkd->icjd", A, A), G.reshape(m1, m2, m1, m2))
    C = C.reshape(terms * m2, terms * m2)
    # Terms that have become dependent leave C singular; this picks a small solution among the equally good ones.
    C.diagonal().add_(float(C.diagonal().mean()) * 1e-12 or 1.0)
    factor = torch.linalg.cholesky(C)

    def solve(right: Tensor) -> Tensor:
        """C^{-1} along (term, m2); right (terms, n2, m2)."""
        columns = right.permute(0, 2, 1).reshape(terms * m2, n2)
        return torch.cholesky_solve(columns, factor).reshape(terms, m2, n2).permute(0, 2, 1)

    right = torch.einsum("ikc,koca->ioa", A, target)
    if H is None:
        return solve(right)
    average = torch.linalg.cholesky(H.reshape(n1, n2, n1, n2).diagonal(dim1=0, dim2=2).mean(-1))

    def operator(B: Tensor) -> Tensor:
        image = H @ kronecker_sum(A, B) @ G
        return torch.einsum("ikc,koca->ioa", A, image.reshape(n1, n2, m1, m2))

    return conjugate_gradient(
        operator,
        right,
        start,
        lambda residual: torch.cholesky_solve(solve(residual), average),
        iterations=CG_STEPS,
        tolerance=CG_TOLERANCE,
    )


def _swap(matrix: Tensor, first: int, second: int) -> Tensor:
    """Re-order a symmetric matrix from (first, second) to (second, first) coordinates."""
    view = matrix.reshape(first, second, first, second).permute(1, 0, 3, 2)
    return view.reshape(first * second, first * second)


def _orthonormal(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Make the A_i orthonormal as vectors; sum_i A_i (x) B_i does not change. A (t, n1, m1), B (t, n2, m2)."""
    Q, R = torch.linalg.qr(A.flatten(1).T)  # (n1 m1, t), (t, t): A_i = sum_j R[j, i] Q_j
    return Q.T.reshape(A.shape), torch.einsum("ji,ioa->joa", R, B)


def _block_traces(M: Tensor, blocks: int) -> Tensor:
    """(blocks, blocks): the traces of the blocks of M."""
    size = M.shape[0] // blocks
    return M.reshape(blocks, size, blocks, size).diagonal(dim1=1, dim2=3).sum(-1)


def _top_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """(count, k), orthonormal rows, largest eigenvalue first."""
    eigenvectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return eigenvectors.flip(-1)[:, :count].T


def _complement(u: Tensor) -> Tensor:
    """An orthonormal basis (blocks, blocks - columns) of the complement of the orthonormal columns of u."""
    Q: Tensor = torch.linalg.qr(u, mode="complete").Q
    return Q[:, u.shape[1] :]


def _right_mixed(P: Tensor, u: Tensor) -> Tensor:
    """P (u (x) I) as (blocks, size, columns * size); P (blocks * size, blocks * size), u (blocks, columns)."""
    blocks, columns = u.shape
    size = P.shape[0] // blocks
    mixed = torch.einsum("xrs,ra->xas", P.reshape(-1, blocks, size), u)  # (blocks * size, columns, size)
    return mixed.reshape(blocks, size, columns * size)


def _left_mixed(image: Tensor, u: Tensor) -> Tensor:
    """(u (x) I)^T times a `_right_mixed` image: (columns * size, columns * size)."""
    return torch.einsum("qa,qpj->apj", u, image).flatten(0, 1)


def _mixed(P: Tensor, u: Tensor) -> Tensor:
    """(u (x) I)^T P (u (x) I)."""
    return _left_mixed(_right_mixed(P, u), u)

"""Weighted fits of group-and-shuffle matrices by exact block updates; no conjugate gradients, no inner iterations.

A grid of right x left parts (rows x columns each); part (r, l) of What is U[r, l] V[r, l]:
U (right, left, rows, rank), V (right, left, rank, columns). The error is tr(H E G E^T), E = W - What. Two closed-form
updates (derived here), both of which can only lower it:

- a part at a time, U and V together: with all other parts fixed, the error in the part's value Z is
  tr(H_rr (Z - T) G_ll (Z - T)^T) + const, T = Z_old + H_rr^{-1} [H E G]_rl G_ll^{-1}; the best Z of the given rank is
  the two-sided whitened truncated SVD of T;
- the U of a whole row of parts, V fixed: with D_r (left * rank, in) the block diagonal of the V[r, :],
  U_r <- U_r + H_rr^{-1} [H E G]_r D_r^T (D_r G D_r^T)^{-1}; transposed, the V of a column of parts.

Without a metric the rows of parts do not interact and are updated as one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg import Moment, Problem, low_rank

SWEEPS = 30
SWEEP_TOLERANCE = 3e-3  # stop when a sweep lowers the error by less than this fraction


def cut(W: Tensor, right: int, left: int) -> Tensor:
    """(out, in) -> (right, left, rows, columns)."""
    return W.reshape(right, W.shape[0] // right, left, W.shape[1] // left).transpose(1, 2)


def join(parts: Tensor) -> Tensor:
    """(right, left, rows, columns) -> (out, in)."""
    right, left, rows, columns = parts.shape
    return parts.transpose(1, 2).reshape(right * rows, left * columns)


def fit(problem: Problem, right: int, left: int, rank: int) -> tuple[Tensor, Tensor]:
    """U (right, left, rows, rank) and V (right, left, rank, columns), from the Frobenius optimum downwards."""
    if problem.gram is None and problem.metric is not None:
        V, U = fit(problem.transposed, left, right, rank)
        return _transposed(U), _transposed(V)
    U, V = low_rank(cut(problem.weight, right, left), rank)
    if problem.gram is None:
        return U, V
    grams, metrics = blocks(problem.gram, left), blocks(problem.metric, right)
    error = problem.error(join(U @ V))
    for _ in range(SWEEPS):
        U, V = sweep(problem, U, V, grams, metrics)
        before, error = error, problem.error(join(U @ V))
        if error >= before * (1 - SWEEP_TOLERANCE):
            break
    return U, V


def sweep(problem: Problem, U: Tensor, V: Tensor, grams: list[Moment], metrics: list[Moment]) -> tuple[Tensor, Tensor]:
    """Every part once, then every row of parts and, with a metric, every column of parts.

    grams and metrics are the diagonal blocks of G and H; metrics is empty for H = I.
    """
    U, V = _update_parts(problem, U, V, grams, metrics)
    U = _update_rows(problem, U, V, metrics)
    if metrics:
        V = _transposed(_update_rows(problem.transposed, _transposed(V), _transposed(U), grams))
    return U, V


def _update_parts(
    problem: Problem, U: Tensor, V: Tensor, grams: list[Moment], metrics: list[Moment]
) -> tuple[Tensor, Tensor]:
    """Each part's U and V together, one column of parts after another."""
    right, _, rows, rank = U.shape
    columns = V.shape[3]
    U, V = U.clone(), V.clone()
    assert problem.gram is not None  # `fit` sees to it
    E = problem.weight - join(U @ V)
    for column, gram in enumerate(grams):
        C = gram.factor
        span = slice(column * columns, (column + 1) * columns)
        EG = (E @ problem.gram.matrix[:, span]).reshape(right, rows, columns)
        for r, group in enumerate(_groups(right, metrics)):
            HEG = _weigh(problem, EG, group)  # (parts, rows, columns)
            old = U[group, column] @ V[group, column]
            # C_H^T T C = C_H^T Z_old C + C_H^{-1} [H E G] C^{-T}, with H_rr = C_H C_H^T and G_ll = C C^T.
            current = old @ C
            correction = torch.linalg.solve_triangular(C.T, HEG, upper=True, left=False)
            if metrics:
                current = metrics[r].factor.T @ current
                correction = torch.linalg.solve_triangular(metrics[r].factor, correction, upper=False)
            u, v = low_rank(current + correction, rank)
            if metrics:
                u = torch.linalg.solve_triangular(metrics[r].factor.T, u, upper=True)
            U[group, column], V[group, column] = u, torch.linalg.solve_triangular(C, v, upper=False, left=False)
            change = U[group, column] @ V[group, column] - old
            EG[group] -= change @ gram.matrix
            E.reshape(right, rows, -1)[group, :, span] -= change
    return U, V


def _update_rows(problem: Problem, U: Tensor, V: Tensor, metrics: list[Moment]) -> Tensor:
    """The U of each row of parts, exactly, V fixed."""
    right, left, rows, rank = U.shape
    assert problem.gram is not None
    G = problem.gram.matrix
    # D_r G, then its transpose and D_r G D_r^T.
    DG = torch.einsum("rlkc,lcm->rlkm", V, G.reshape(left, V.shape[3], -1)).flatten(1, 2)  # (right, left * rank, in)
    normal = torch.einsum("rxlc,rlkc->rxlk", DG.reshape(right, left * rank, left, V.shape[3]), V).flatten(2)
    # Dependent rows of V leave it singular; this picks a small step among the equally good ones.
    floor = normal.diagonal(dim1=1, dim2=2).mean(1).mul(1e-12)  # (right,)
    normal.diagonal(dim1=1, dim2=2).add_(torch.where(floor > 0, floor, 1).unsqueeze(1))
    factor = torch.linalg.cholesky(normal)
    U = U.clone()
    E = (problem.weight - join(U @ V)).reshape(right, rows, -1)
    for r, group in enumerate(_groups(right, metrics)):
        step = _weigh(problem, E, group) @ DG[group].mT  # [H E G]_r D_r^T, (parts, rows, left * rank)
        if metrics:
            step = torch.cholesky_solve(step, metrics[r].factor)
        step = torch.cholesky_solve(step.mT, factor[group]).mT
        step = step.reshape(-1, rows, left, rank).transpose(1, 2)  # (parts, left, rows, rank)
        U[group] += step
        E[group] -= (step @ V[group]).transpose(1, 2).flatten(2)
    return U


def blocks(moment: Moment | None, count: int) -> list[Moment]:
    """The diagonal blocks with their Cholesky factors; none for the identity."""
    if moment is None:
        return []
    size = moment.matrix.shape[0] // count
    return [moment.block(i * size, (i + 1) * size) for i in range(count)]


def _groups(right: int, metrics: list[Moment]) -> list[slice]:
    """Rows of parts to update at once: all when nothing couples them, else one after another."""
    return [slice(r, r + 1) for r in range(right)] if metrics else [slice(0, right)]


def _weigh(problem: Problem, E: Tensor, group: slice) -> Tensor:
    """Rows `group` of H E; E (right, rows, k) -> (parts, rows, k)."""
    if problem.metric is None:
        return E[group]
    rows = E.shape[1]
    return (problem.metric.matrix[group.start * rows : group.stop * rows] @ E.flatten(0, 1)).reshape(-1, *E.shape[1:])


def _transposed(parts: Tensor) -> Tensor:
    """(right, left, a, b) -> (left, right, b, a)."""
    return parts.permute(1, 0, 3, 2)

"""Which inner features to keep: neurons of an MLP, value coordinates of heads; with the loss predicted at every count.

Both drop inputs of a writer y = x W^T (down, or o) and let the others make up for it. With G the second moment of x,
H the metric of y, D the dropped inputs, S the others, E = W - What, What zero on D (derived here; the elimination is
that of Optimal Brain Surgeon, with G in place of the Hessian):

    min over What_S of 1/2 tr(H E G E^T) = 1/2 tr(M_DD (P_DD)^{-1}),    M = W^T H W,  P = G^{-1}

since the Schur complement of G_SS in G is (P_DD)^{-1}. Dropping D leaves a problem of the same form on S, with

    W <- W_S - W_D (P_DD)^{-1} P_DS,    P <- P_SS - P_SD (P_DD)^{-1} P_DS

(the refitted weight, and the inverse of G_SS), so losses of successive drops add up exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.linalg import Problem, block_diagonal

BLOCKS = 64  # neurons are dropped in this many rounds, each of which updates everything once
BLOCKS_OF_VALUES = 16  # value coordinates of each head in this many
POOL = 4  # neurons: each round chooses among so many times those that it drops


@dataclass
class _Remaining:
    """The problem on the inputs that are left: Y = C_H^T W (out, n) with H = C_H C_H^T, so M = Y^T Y; P (n, n)."""

    whitened: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, metric: Tensor | None) -> _Remaining:
        problem = Problem.of(weight, gram, metric, weight.shape[1], weight.shape[0])
        assert problem.gram is not None
        # A copy: what is left is changed in place, and the weight is the caller's.
        y = problem.weight.clone() if problem.metric is None else problem.metric.factor.T @ problem.weight
        return cls(y, problem.gram.inverse())

    def drop(self, gone: Tensor, stay: Tensor) -> float:
        """Drop the inputs at the indices `gone`; returns the loss that this adds."""
        factor = torch.linalg.cholesky(self.inverse[gone][:, gone])
        lost = torch.linalg.solve_triangular(factor, self.whitened[:, gone].T, upper=False)  # (gone, out)
        shared = torch.linalg.solve_triangular(factor, self.inverse[gone][:, stay], upper=False)  # (gone, stay)
        self.whitened = self.whitened[:, stay] - lost.T @ shared
        self.inverse = self.inverse[stay][:, stay] - shared.T @ shared
        return float(lost.square().sum()) / 2


def neuron_order(weight_down: Tensor, gram: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Neurons from the most to the least needed, and the predicted loss at every number kept.

    weight_down W (out, inner); gram G (inner, inner) of what `down` reads, damped by the caller; metric H (out, out) of
    its output, None for the identity. Returns `order` (inner,), int64: order[:k] are the k to keep; and `curve`
    (inner + 1,), float64: curve[k] = 1/2 min tr(H E G E^T) when these k are kept and W is refitted, exact for this
    order. Backward elimination: the neuron of least loss 1/2 M_jj / P_jj goes first. The order is greedy within pools
    of candidates, which are renewed after each of `BLOCKS` rounds. Time O(inner^3), in matrix products.
    Raises UsageError when a shape does not match or a value is not finite.
    """
    left = _Remaining.of(weight_down, gram, metric)
    inner = weight_down.shape[1]
    # P is left as it is. With S (inner, dropped so far) the `shared` of `drop`, what the drops have made of it is
    # P - S S^T, of which a round needs the diagonal and a few rows; Y^T <- Y^T - S lost. Features are rows here, so
    # that picking some of them reads whole lines of memory.
    start, y = left.inverse, left.whitened.T.contiguous()
    diagonal, scaled = start.diagonal().clone(), torch.empty_like(start)
    open_, done, step = torch.ones(inner, dtype=torch.bool, device=start.device), 0, max(1, inner // BLOCKS)
    dropped: list[Tensor] = []
    losses: list[float] = []
    while done < inner:
        scores = (torch.linalg.vector_norm(y, dim=1).square() / diagonal).where(open_, torch.inf)
        count = min(step, inner - done)
        pool = scores.argsort()[: min(POOL * step, inner - done)]
        part, before = (x.index_select(0, pool) for x in (y, scaled[:, :done]))  # many times faster than x[pool]
        p = start.index_select(0, pool).index_select(1, pool) - before @ before.T
        places, lost = _cheapest(part @ part.T, p, count)
        places = places.to(p.device)
        gone, factor = pool[places], torch.linalg.cholesky(p[places][:, places])
        open_[gone] = False
        rows = start.index_select(0, gone) - before[places] @ scaled[:, :done].T  # (count, inner)
        shared = torch.linalg.solve_triangular(factor, rows, upper=False).T.where(open_[:, None], 0)  # (inner, count)
        y.addmm_(shared, torch.linalg.solve_triangular(factor, part[places], upper=False), alpha=-1)
        diagonal = (diagonal - shared.square().sum(1)).where(open_, 1)
        scaled[:, done : done + count] = shared
        dropped.append(gone)
        losses.extend(lost)
        done += count
    curve = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0).flip(0)
    return torch.cat(dropped).flip(0), curve


def _cheapest(m: Tensor, p: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Greedily drop `count` of the candidates with M and P (pool, pool): their indices in turn, and each one's loss.

    Dropping j makes M <- (I - u e_j^T) M (I - e_j u^T) and P <- P - P_jj u u^T, u = P_:j / P_jj. Only the diagonals and
    the columns of what is dropped are kept up: with s_t the columns sqrt(P_jj) u of the drops t so far, as rows of S,
    and y_i the vectors with M_ij = y_i^T y_j, y_i <- y_i - sum_t S_ti l_t, so that with B_it = y_i^T l_t of the first
    y and C = (l_t^T l_u)

        P_:j = P0_:j - S^T S_:j        M_:j = M0_:j - B S_:j - S^T (B_j: - C S_:j)

    Pool x drops so far for each drop. On the host and in NumPy: every step is small and waits for the one before.
    """
    m0, p0 = m.cpu().numpy(), p.cpu().numpy()
    m_diagonal, p_diagonal = m0.diagonal().copy(), p0.diagonal().copy()
    s, b, c = np.zeros((count, len(m0))), np.zeros((len(m0), count)), np.zeros((count, count))
    taken: list[int] = []
    losses: list[float] = []
    closed = np.zeros(len(m0))
    for t in range(count):
        scores = m_diagonal / p_diagonal + closed
        j = int(scores.argmin())
        taken.append(j)
        losses.append(max(float(scores[j]) / 2, 0.0))
        ahead = b[:, :t] @ s[:t, j]
        along = b[j, :t] - c[:t, :t] @ s[:t, j]  # y_j^T l_t
        column = m0[:, j] - ahead - s[:t].T @ along
        root = math.sqrt(p_diagonal[j])
        row = (p0[:, j] - s[:t].T @ s[:t, j]) / root
        s[t], b[:, t] = row, (m0[:, j] - ahead) / root
        c[t, :t] = c[:t, t] = along / root
        c[t, t] = m_diagonal[j] / root**2
        u = row / root
        m_diagonal += u * (u * m_diagonal[j] - 2 * column)
        p_diagonal -= row * row
        closed[j], m_diagonal[j], p_diagonal[j] = np.inf, 0, 1
    return torch.tensor(taken, dtype=torch.int64), losses


def value_output_basis(
    weight_o: Tensor, gram: Tensor, metric: Tensor | None, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """For each key-value head an orthogonal basis of its values in which the last coordinates matter least.

    weight_o W (out, heads * head_dim); gram G of what `o` reads, damped by the caller; metric H (out, out) of its
    output, None for the identity. Returns R (kv_heads, head_dim, head_dim), float64: the rows of v become R W_v, the
    columns of o for every head of the group W_o^h R^T (`inner.change_value_basis`), which changes nothing; and `curve`
    (head_dim + 1,): curve[k] = 1/2 min tr(H E G E^T) when every head keeps its first k coordinates and W is refitted,
    exact for this basis.

    Dropping the span of N (head_dim, p) from the values of a group drops the inputs (I (x) N) of its heads. For one
    head, all other inputs of o making up for it, the loss is 1/2 tr((N^T M N)(N^T P N)^{-1}) with the head's blocks of
    M = W^T H W and P = G^{-1}; by Ky Fan its least value is half the sum of the p smallest eigenvalues of M x = t P x,
    attained by their eigenvectors: exact for one group of one head, for all p at once. Where a group has several heads
    M is the sum and P the mean of their blocks (exact where P is the same for all and zero between them). Groups drop
    their coordinates in turn, head_dim / `BLOCKS_OF_VALUES` at a time, each in the problem that the drops before have
    left: greedy, no optimum. The eigenvectors are not orthogonal, but only the spans of the last p matter, because what
    is kept is refitted: a QR factorisation from the last to the first makes them orthonormal.
    Raises UsageError when a shape does not match or a value is not finite.
    """
    inner = weight_o.shape[1]
    if inner % (kv_heads * head_dim):
        raise UsageError(f"o reads {inner} features, which is no multiple of {kv_heads} heads of {head_dim} values")
    per_group = inner // (kv_heads * head_dim)
    left = _Remaining.of(weight_o, gram, metric)
    device = left.inverse.device
    group = torch.arange(kv_heads, device=device).repeat_interleave(per_group * head_dim)  # of each remaining input
    basis = torch.eye(head_dim, dtype=torch.float64, device=device).repeat(kv_heads, 1, 1)
    kept, step = head_dim, max(1, head_dim // BLOCKS_OF_VALUES)
    while kept > 0:
        count = min(step, kept)
        for g in range(kv_heads):
            own = (group == g).nonzero()[:, 0]  # (per_group * kept,): its heads one after the other
            turn = _least_last(left, own, per_group)
            basis[g, :kept] = turn @ basis[g, :kept]
            whole = block_diagonal(turn.expand(per_group, -1, -1))
            left.whitened[:, own] = left.whitened[:, own] @ whole.T
            left.inverse[own] = whole @ left.inverse[own]
            left.inverse[:, own] = left.inverse[:, own] @ whole.T
            ends = own.reshape(per_group, kept)[:, kept - count :].reshape(-1)
            stays = torch.ones(len(group), dtype=torch.bool, device=device)
            stays[ends] = False
            left.drop(ends, stays.nonzero()[:, 0])
            group = group[stays]
        kept -= count
    return basis, _value_curve(_Remaining.of(weight_o, gram, metric), basis, inner // head_dim, per_group)


def _least_last(left: _Remaining, own: Tensor, heads: int) -> Tensor:
    """Rows (k, k), orthonormal, that turn the values of one group so that the least needed come last."""
    kept = len(own) // heads
    y = left.whitened[:, own].reshape(-1, heads, kept)
    m = torch.einsum("ohi,ohj->ij", y, y)
    p = left.inverse[own][:, own].reshape(heads, kept, heads, kept).diagonal(dim1=0, dim2=2).mean(-1)  # (kept, kept)
    # M x = t P x with P = C C^T: x = C^{-T} v, v the eigenvectors of C^{-1} M C^{-T}.
    c = torch.linalg.cholesky(p)
    inside = torch.linalg.solve_triangular(c, m, upper=False)
    inside = torch.linalg.solve_triangular(c, inside.T, upper=False)
    v = torch.linalg.eigh((inside + inside.T) / 2).eigenvectors  # least first
    x = torch.linalg.solve_triangular(c.T, v, upper=True)
    q: Tensor = torch.linalg.qr(x).Q
    return q.flip(1).T.contiguous()


def _value_curve(left: _Remaining, basis: Tensor, heads: int, per_group: int) -> Tensor:
    """1/2 the optimal error when all heads keep their first k coordinates in `basis`, k = 0 ... head_dim."""
    head_dim = basis.shape[-1]
    turn = block_diagonal(basis.repeat_interleave(per_group, dim=0))  # x <- x turn^T
    left = _Remaining(left.whitened @ turn.T, turn @ left.inverse @ turn.T)
    losses = [0.0]
    for k in range(head_dim, 0, -1):
        ends = torch.arange(heads, device=basis.device) * k + k - 1
        stays = torch.ones(heads * k, dtype=torch.bool, device=basis.device)
        stays[ends] = False
        losses.append(left.drop(ends, stays.nonzero()[:, 0]))
    return torch.tensor(losses, dtype=torch.float64).cumsum(0).flip(0)

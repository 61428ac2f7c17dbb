"""Solvers for the rotations of the residual stream.

Two problems, both over orthogonal Q:

nested_rotation      structures that keep the first k_t rotated coordinates (one-sided Kronecker sums with the mix
                     absorbed in Q). The kept factors are eliminated in closed form (variable projection), and what
                     remains is a smooth function on the flag manifold.
majorised_rotation   any structure, with its factors held fixed: the Gram-weighted orthogonal Procrustes problem of
                     ProcrustesGPT (eq. 3), by majorisation with closed-form polar steps, monotone and without a step
                     size. `frobenius_rotation` is its unweighted start (Algorithm 2 of the paper).

Conventions: weights are (out, in), the stream is a row vector, readers become W Q and writers Q^T W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.linalg import geometric_mean, polar


@dataclass(frozen=True)
class StreamTerm:
    """One group of linears at the residual stream and what it loses when only k rotated coordinates are kept.

    loss(N) = tr((N^T P^-1 N)^-1 N^T M N), N = the dropped columns of Q (derived here; docs/method.md#nested-subspaces).
    Readers: P = Gram matrix of what they read, M = W^T W (or the Gram matrix of the loss gradient there): the error
    of the best B in B K^T. Writers: P = metric of their output (identity, or the Gram matrix of the loss gradient),
    M = Gram matrix of their output: the error of the best K B.
    """

    name: str
    p: Tensor  # (d, d) float64, positive definite
    m: Tensor  # (d, d) float64, semi-definite
    cost: int  # parameters per kept coordinate

    def curve(self, q: Tensor) -> Tensor:
        """loss for k = 0 .. d kept coordinates, shape (d + 1,), for all k at the price of one Cholesky.

        With columns in reverse order, Q^T P^-1 Q = L L^T nests, so that the loss with p columns dropped is the sum
        of the first p diagonal entries of L^-1 (Q^T M Q) L^-T.
        """
        backwards = q.flip(1)
        precision = backwards.T @ torch.cholesky_solve(backwards, torch.linalg.cholesky(self.p))
        factor = torch.linalg.cholesky((precision + precision.T) / 2)
        half = torch.linalg.solve_triangular(factor, backwards.T @ self.m @ backwards, upper=False)
        gains: Tensor = torch.linalg.solve_triangular(factor, half.T, upper=False).diagonal()
        return curve_of(gains)


def whitened_columns(p: Tensor, q: Tensor) -> Tensor:
    """Z (d, d): for every M, `curve_of` the diagonal of Z M Z^T is the curve of a term with this P at rotation q.

    Z = L^-1 B^T with B the columns of q from the last to the first and B^T P^-1 B = L L^T: it depends on P and q alone,
    and with M = A A^T the diagonal is that of row sums of (Z A)^2. See `StreamTerm.curve`.
    """
    backwards = q.flip(1)
    precision = backwards.T @ torch.cholesky_solve(backwards, torch.linalg.cholesky(p))
    factor = torch.linalg.cholesky((precision + precision.T) / 2)
    z: Tensor = torch.linalg.solve_triangular(factor, backwards.T, upper=False)
    return z


def curve_of(gains: Tensor) -> Tensor:
    """What each further dropped column costs, (..., d), last column first -> loss by number kept, (..., d + 1)."""
    zero = torch.zeros_like(gains[..., :1])
    return torch.cat((zero, gains.clamp(min=0).cumsum(-1)), dim=-1).flip(-1)


def nested_start(terms: Sequence[StreamTerm]) -> Tensor:
    """Closed-form start: eigenvectors, in descending order, of the sum of the geometric means P_t # M_t.

    When P and M commute, a dropped direction costs p * m, the square of the eigenvalue of P # M.
    """
    total = torch.zeros_like(terms[0].p)
    for term in terms:
        total += geometric_mean(term.p, term.m)
    vectors: Tensor = torch.linalg.eigh(total).eigenvectors
    return vectors.flip(1)


@dataclass(frozen=True)
class Dropped:
    """Terms that share P, `precision` = P^-1 (d, d), each with all but its first `kept` rotated coordinates dropped."""

    precision: Tensor
    members: tuple[tuple[Tensor, int], ...]  # (M, kept), M (d, d)

    @classmethod
    def of(cls, terms: Sequence[tuple[StreamTerm, int]], dtype: torch.dtype) -> list[Dropped]:
        """Group (term, kept) by P; P is inverted in float64 whatever `dtype` the search runs in."""
        shared: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        for term, kept in terms:
            _, sums = shared.setdefault(id(term.p), (term.p, {}))
            sums[kept] = sums[kept] + term.m if kept in sums else term.m  # a loss is linear in M
        return [
            cls(
                torch.cholesky_inverse(torch.linalg.cholesky(p)).to(dtype),
                tuple((m.to(dtype), kept) for kept, m in sums.items()),
            )
            for p, sums in shared.values()
        ]


def dropped_loss(active: Sequence[Dropped], q: Tensor) -> tuple[float, Tensor]:
    """sum_t loss_t(N_t), N_t = q[:, kept_t:], and its Euclidean gradient in q, (d, d).

    With S = (N^T P^-1 N)^-1: d tr(S N^T M N) = 2 tr(S N^T M dN) - 2 tr(S (N^T M N) S N^T P^-1 dN).
    """
    slope, total = torch.zeros_like(q), 0.0
    for group in active:
        first = min(kept for _, kept in group.members)
        pq = group.precision @ q[:, first:]  # (d, d - first): serves every member
        block = q[:, first:].T @ pq
        for m, kept in group.members:
            n, at = q[:, kept:], kept - first  # (d, p)
            mn = m @ n
            s = torch.linalg.inv(block[at:, at:])
            sx = s @ (n.T @ mn)
            total += float(sx.diagonal().sum())
            slope[:, kept:] += 2 * (mn @ s - pq[:, at:] @ (sx @ s))
    return total, slope


def nested_rotation(
    terms: Sequence[StreamTerm],
    kept: Sequence[int],
    start: Tensor,
    *,
    iterations: int = 40,
    tolerance: float = 1e-4,
    dtype: torch.dtype = torch.float64,
    on_step: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Minimise sum_t loss_t(Q[:, kept_t:]) over orthogonal Q from `start`; never worse than `start`.

    Descent on O(d) along Cayley curves with Barzilai-Borwein steps and a non-monotone Armijo rule (Wen and Yin 2013),
    here preconditioned by the curvature of each plane rotation (`plane_curvatures`): without it the few directions
    that carry most of the stream dictate the step. `kept` gives k_t in 0 .. d; terms with k_t = d do not count.
    Stops when the loss falls by less than `tolerance` (relative) over five steps. (d, d) float64 in and out; the
    search itself runs in `dtype`, and its result is judged against `start` in float64.
    """
    wanted = [(t, k) for t, k in zip(terms, kept, strict=True) if k < len(start)]
    if not wanted:
        return start
    active = Dropped.of(wanted, dtype)

    def value_and_slope(q: Tensor) -> tuple[float, Tensor]:
        value, slope = dropped_loss(active, q)
        inner = q.T @ slope
        return value, (inner - inner.T) / 2  # skew (d, d): the direction in the tangent space is q @ skew

    identity = torch.eye(len(start), dtype=dtype, device=start.device)

    def move(q: Tensor, skew: Tensor, step: float) -> Tensor:
        half = skew * (step / 2)
        moved: Tensor = q @ torch.linalg.solve(identity + half, identity - half)
        return moved

    q = best = start.to(dtype)
    value, skew = value_and_slope(q)
    best_value, history, step = value, [value], 0.25
    for iteration in range(iterations):
        if iteration % 10 == 0:
            scale = plane_curvatures(active, q)
        direction = skew / scale
        descent, reference = float((skew * direction).sum()), max(history[-5:])
        for _ in range(12):
            candidate = move(q, direction, step)
            new_value, new_skew = value_and_slope(candidate)
            if new_value <= reference - 1e-4 * step * descent:
                break
            step /= 4
        else:
            break
        change, curvature = -step * direction, new_skew - skew
        inner = abs(float((change * curvature).sum()))
        q, value, skew = candidate, new_value, new_skew
        # The two Barzilai-Borwein steps in turn, in the metric of `scale`; bounded, to keep the Cayley curve sensible.
        long = float((scale * change.square()).sum()) / max(inner, 1e-300)
        short = inner / max(float((curvature.square() / scale).sum()), 1e-300)
        step = min(long if iteration % 2 else short, 10 * step)
        history.append(value)
        if value < best_value:
            best, best_value = q, value
        if on_step is not None:
            on_step(iteration, best_value)
        if len(history) > 5 and history[-6] - value < tolerance * abs(value) and value <= history[-6]:
            break
    found = polar(best.double())  # removes the rounding that accumulates over the steps
    return found if summed_loss(wanted, found) < summed_loss(wanted, start) else start


def summed_loss(terms: Sequence[tuple[StreamTerm, int]], q: Tensor) -> float:
    """sum_t loss_t(q[:, kept_t:]) in float64; see `StreamTerm.curve`."""
    columns: dict[int, Tensor] = {}
    total = 0.0
    for term, kept in terms:
        if id(term.p) not in columns:
            columns[id(term.p)] = whitened_columns(term.p, q)
        z = columns[id(term.p)]
        total += float(curve_of(((z @ term.m) * z).sum(1))[kept])
    return total


def plane_curvatures(active: Sequence[Dropped], q: Tensor) -> Tensor:
    """A positive estimate (d, d), symmetric, of the loss's curvature when columns i and j of q turn into each other.

    Dropping column j alone costs a_j = (q^T M q)_jj / (q^T P^-1 q)_jj; turning a kept i into a dropped j by an angle t
    changes the loss by about t^2 (a_i - a_j), and a_i + a_j bounds the size of it. Pairs that no term
    distinguishes have no slope either, and may have any scale.
    """
    total = q.new_zeros(q.shape)
    for group in active:
        precision = (q * (group.precision @ q)).sum(0)
        for m, kept in group.members:
            alone = (q * (m @ q)).sum(0) / precision
            total[:kept, kept:] += alone[:kept, None] + alone[None, kept:]
    total = total + total.T
    return total.clamp(min=float(total.max()) * 1e-7)

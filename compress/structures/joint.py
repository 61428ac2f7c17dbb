"""Low rank with one input factor for all linears that read the same input: What_i = U_i V.

q, k, v (and gate, up) share their Gram matrix G, so the best common V is closed form even under a metric H_i per
linear (derived here; without metrics and Gram it is the joint rank-k of arXiv 2402.16319). Stack W = [W_1; ...; W_t],
H = blkdiag(s_i H_i), with Cholesky factors G = C_G C_G^T and H_i = C_i C_i^T; then

    sum_i s_i tr(H_i E_i G E_i^T) = |T - T^|^2,   T = [sqrt(s_1) C_1^T W_1; ...; sqrt(s_t) C_t^T W_t] C_G

and every stack of matrices U_i V is a T^ of rank k and the other way round: the optimum is the truncated SVD of T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.architecture import READERS
from compress.errors import ArtifactError, UsageError
from compress.linalg import Moment, Problem, balance, low_rank, result_dtype, tails
from compress.structures.base import Structure
from compress.structures.lowrank import LowRankStructure


def joint_fit(
    weights: Sequence[Tensor],
    rank: int,
    gram: Tensor | None = None,
    metrics: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """V (rank, m) and one U_i (n_i, rank) per weight (n_i, m) that minimise sum_i s_i tr(H_i E_i G E_i^T).

    gram G (m, m); metrics H_i (n_i, n_i); scales s_i > 0; None stands for the identity and for 1. Float64 inside, in
    the types of `Structure.fit` outside; singular moments are damped as there. V and the stacked U have equal norms
    term by term. Raises UsageError when shapes do not match, a value is not finite, or the rank is above the full one.
    """
    whole = _Stack(weights, gram, metrics, scales)
    n, m = whole.whitened.shape
    if not 1 <= rank <= min(n, m):
        raise UsageError(f"a joint rank of {rank} for matrices of {n} x {m} together; choose 1 to {min(n, m)}")
    U, V = low_rank(whole.whitened, rank)
    parts = []
    for part, metric, root in zip(torch.split(U, whole.heights), whole.metrics, whole.roots, strict=True):
        own = part / root
        parts.append(own if metric is None else torch.linalg.solve_triangular(metric.factor.T, own, upper=True))
    if whole.gram is not None:
        V = torch.linalg.solve_triangular(whole.gram.factor, V, upper=False, left=False)
    U, V = balance(torch.cat(parts), V)
    dtype = result_dtype(weights[0])
    return V.to(dtype).contiguous(), [part.to(dtype).contiguous() for part in torch.split(U, whole.heights)]


def joint_error_by_rank(
    weights: Sequence[Tensor],
    gram: Tensor | None = None,
    metrics: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
) -> Tensor:
    """The optimal sum_i s_i tr(H_i E_i G E_i^T) at every rank 0 ... min(sum n_i, m), in float64."""
    return tails(torch.linalg.svdvals(_Stack(weights, gram, metrics, scales).whitened).square())


class _Stack:
    """The stacked problem: T (sum n_i, m) and what undoes its whitening."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        gram: Tensor | None,
        metrics: Sequence[Tensor | None] | None,
        scales: Sequence[float] | None,
    ) -> None:
        if not weights:
            raise UsageError("a joint fit needs at least one weight")
        m = weights[0].shape[1]
        self.heights = [len(weight) for weight in weights]
        given = [None] * len(weights) if metrics is None else list(metrics)
        factors = [1.0] * len(weights) if scales is None else list(scales)
        if len(given) != len(weights) or len(factors) != len(weights) or min(factors) <= 0:
            raise UsageError(
                f"a joint fit of {len(weights)} weights needs as many metrics ({len(given)}) and scales ({factors}), "
                f"the scales above 0"
            )
        self.roots = [factor**0.5 for factor in factors]
        problems = [Problem.of(w, None, h, m, len(w)) for w, h in zip(weights, given, strict=True)]
        self.metrics = [problem.metric for problem in problems]
        T = torch.cat([root * p.whiten(p.weight) for root, p in zip(self.roots, problems, strict=True)])
        self.gram = None if gram is None else Moment.of(gram.detach(), m, "Gram matrix", T)
        self.whitened = T if self.gram is None else T @ self.gram.factor


def joint_structures(linears: Mapping[str, tuple[int, int]], rank: int) -> dict[str, LowRankStructure]:
    """Role -> its structure of a group that shares the V of its first member; linears: role -> (out, in)."""
    leader = next(iter(linears))
    return {role: LowRankStructure(m, n, rank, None if role == leader else leader) for role, (n, m) in linears.items()}


def joint_ranks(linears: Mapping[str, tuple[int, int]], unit: int) -> list[int]:
    """The ranks unit, 2 unit, ... at which the group is smaller than dense: k (m + sum n_i) < m sum n_i.

    None is above the out_features of the leader, the first: its V and U are a low-rank matrix of their own.
    """
    (first, m), total = next(iter(linears.values())), sum(n for n, _ in linears.values())
    return [k for k in range(unit, min(first, m) + 1, unit) if k * (m + total) < m * total]


def leader_of(structures: Mapping[str, Structure], linear: str) -> str | None:
    """The linear "layers.{i}.{role}" whose V `linear` uses; None where it has its own, or is not low rank.

    `structures` need only hold linears that are not dense. Raises ArtifactError when that leader does not read the
    same input before it, is not low rank with a V of its own, or has another shape of V.
    """
    structure = structures.get(linear)
    if not isinstance(structure, LowRankStructure) or structure.shares is None:
        return None
    _, layer, role = linear.split(".", 2)
    readers = READERS.get(role.partition(".")[0], ())
    if role not in readers or structure.shares not in readers[: readers.index(role)]:
        raise ArtifactError(
            f"{linear} shares the V of {structure.shares!r}, which is no earlier reader of the same input; "
            f"compress the model again"
        )
    name = f"layers.{layer}.{structure.shares}"
    leader = structures.get(name)
    if not isinstance(leader, LowRankStructure) or leader.shares is not None:
        raise ArtifactError(
            f"{linear} shares the V of {name}, which is {leader or 'dense'} and has none; compress the model again"
        )
    if (leader.rank, leader.in_features) != (structure.rank, structure.in_features):
        raise ArtifactError(
            f"{linear} needs a V of {structure.rank} x {structure.in_features}, but {name}, whose V it shares, has "
            f"{leader.rank} x {leader.in_features}; compress the model again"
        )
    return name

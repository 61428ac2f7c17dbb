"""What = U V with inner dimension `rank`: two plain matrix products, the structure that every other has to beat.

Linears that read the same input may share one V (compress/structures/joint.py): the leader stores it, a follower
names the leader in `shares` and stores its own U only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Self

from compress.errors import UsageError
from compress.linalg import Problem, balance, low_rank, result_dtype, tails, whitened_spectrum
from compress.structures.base import Side, Structure, register


@register
@dataclass(frozen=True)
class LowRankStructure(Structure):
    """U (out_features, rank), V (rank, in_features): y = (x V^T) U^T.

    `shares` is None, or the role of the linear of the same block whose V this one uses, e.g. "attn.q". V is then
    stored, counted and multiplied there, and `shapes`, `parameter_count` and `macs` are those of U alone; `apply` and
    `dense` are still given both factors.
    """

    name: ClassVar[str] = "lowrank"
    predicts_loss: ClassVar[bool] = True

    rank: int
    shares: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("rank")
        # A shared V serves the stacked matrix of its group, whose rank no single follower limits.
        full = self.in_features if self.shares else min(self.in_features, self.out_features)
        if self.rank > full:
            raise UsageError(
                f"rank {self.rank} is above the full rank {full} of a "
                f"{self.out_features} x {self.in_features} matrix; choose a smaller rank"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        own: dict[str, tuple[int, ...]] = {"U": (self.out_features, self.rank)}
        return own if self.shares else {"V": (self.rank, self.in_features), **own}

    @property
    def closed_form(self) -> bool:
        return True

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """See `Structure.fit`: the optimum, `best_factors`.

        Raises UsageError for a follower, which only `joint.joint_fit` can fit, together with its leader.
        """
        if self.shares:
            raise UsageError(
                f"a low-rank structure that shares the V of {self.shares} cannot be fitted alone; "
                f"fit the group as one (joint_fit), or leave out `shares`"
            )
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        U, V = best_factors(problem, self.rank)
        dtype = result_dtype(weight)
        return {"V": V.to(dtype).contiguous(), "U": U.to(dtype).contiguous()}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return linear(linear(x, factors["V"]), factors["U"])

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return factors["U"] @ factors["V"]

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        """Ranks unit, 2 unit, ... that save parameters: rank (in + out) < in out."""
        ranks = range(unit, min(in_features, out_features) + 1, unit)
        saving = [r for r in ranks if r * (in_features + out_features) < in_features * out_features]
        return [cls(in_features, out_features, r) for r in saving]

    @classmethod
    def curve(cls, weight: Tensor, gram: Tensor, metric: Tensor, side: Side, *, unit: int) -> list[tuple[Self, float]]:
        """See `Structure.curve`: exact."""
        out_features, in_features = weight.shape
        losses = tails(whitened_spectrum(weight, gram, metric)).tolist()
        return [(s, losses[s.rank]) for s in cls.menu(in_features, out_features, side, unit=unit)]


def best_factors(problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) and V (rank, in), float64, that minimise tr(H E G E^T), E = W - U V, in closed form.

    With G = C_G C_G^T and H = C_H C_H^T that is |C_H^T E C_G|^2, so the best U V is C_H^{-T} T_k C_G^{-1}, T_k the
    truncated SVD of T = C_H^T W C_G. U and V have equal norms term by term. Derived here; with H = I it is the whitened
    SVD of SVD-LLM (arXiv 2403.07378).
    """
    return balance(*best_parts(problem, rank)[:2])


def best_parts(problem: Problem, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`best_factors` before they are balanced, and the norms (rank,) of the columns of C_H^T U and the rows of V C_G:
    both are orthogonal, being the two sides of a truncated SVD up to their scale."""
    U, V = low_rank(problem.whiten(problem.weight), rank)
    norms = torch.linalg.vector_norm(U, dim=0), torch.linalg.vector_norm(V, dim=1)
    if problem.metric is not None:
        U = torch.linalg.solve_triangular(problem.metric.factor.T, U, upper=True)
    if problem.gram is not None:
        V = torch.linalg.solve_triangular(problem.gram.factor, V, upper=False, left=False)
    return U, V, *norms


def error_by_rank(weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> Tensor:
    """The optimal tr(H E G E^T) at every rank 0 ... min(out, in), from one decomposition; float64.

    Entry k is the sum of the squares of all singular values of C_H^T W C_G after the k-th.
    """
    problem = Problem.of(weight, gram, metric, weight.shape[1], weight.shape[0])
    return tails(torch.linalg.svdvals(problem.whiten(problem.weight)).square())

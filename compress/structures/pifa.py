"""Pivoted low rank (PIFA): What has rank `rank`, and every row is a combination of `rank` of its own rows, the pivots.

A product U V leaves rank^2 numbers free: U T and T^-1 V are the same matrix. Here T makes the pivot rows of U the
identity, which is neither stored nor multiplied, so that rank (in + out - rank) numbers are left: fewer than dense at
every rank below the full one, where U V saves only below half of it. Source: Zhao et al., "Pivoting Factorization",
arXiv 2501.19090; the choice of pivots in the metric of the outputs, and pivots among the inputs, are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Self

from compress.errors import ArtifactError, UsageError
from compress.linalg import Problem, result_dtype, tails, whitened_spectrum
from compress.structures.base import Side, Structure, cast, register
from compress.structures.lowrank import best_parts

INDEX = torch.int32
INDEX_SIZE = 2  # in parameters of 16 bits


@register
@dataclass(frozen=True)
class PivotedStructure(Structure):
    """`side` says where the pivots are; the rest are combinations of them, C.

    "out": V (rank, in) are the pivot rows of What, C (out - rank, rank) makes the other rows from them;
           z = x V^T, y = [z, z C^T] with its entries in the order of the outputs.
    "in":  U (out, rank) are the pivot columns, C (rank, in - rank) makes the other columns from them;
           x = [p, q] pivots first, y = (p + q C^T) U^T.

    `order` int32 (of the pivots' side): output j is entry order[j] of [z, z C^T]; entry i of [p, q] is input order[i].
    """

    name: ClassVar[str] = "pifa"
    predicts_loss: ClassVar[bool] = True
    may_be_core: ClassVar[bool] = True
    """It took the predicted loss of SmolLM2-135M at 0.75 from 0.166 to 0.150 inside selections; plain low rank gains
    nothing there (0.1810 to 0.1806)."""

    rank: int
    side: Side = "out"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("rank")
        if self.side not in ("in", "out"):
            raise UsageError(f"side of a pifa structure must be in or out, not {self.side!r}")
        most = min(self.in_features, self.out_features, self.cut - 1)
        if self.rank > most:
            raise UsageError(
                f"rank {self.rank} of a pifa structure with pivots on side {self.side!r} is above {most}, where "
                f"nothing of a {self.out_features} x {self.in_features} matrix is left to combine; use a smaller one"
            )

    @property
    def cut(self) -> int:
        """Features of the side on which the pivots are."""
        return self.in_features if self.side == "in" else self.out_features

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rest = self.cut - self.rank
        if self.side == "in":
            return {"C": (self.rank, rest), "U": (self.out_features, self.rank), "order": (self.cut,)}
        return {"V": (self.rank, self.in_features), "C": (rest, self.rank), "order": (self.cut,)}

    def storage_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {**super().storage_dtypes(dtype), "order": INDEX}

    def parameter_count(self) -> int:
        """Storage in parameters of 16 bits, which is what the allocator's budget counts: an index is two."""
        return self._products() + INDEX_SIZE * self.cut

    def macs(self, tokens: int) -> int:
        """rank (in + out - rank) a token; an order costs none."""
        return tokens * self._products()

    def _products(self) -> int:
        return sum(math.prod(shape) for name, shape in self.shapes().items() if name != "order")

    @property
    def closed_form(self) -> bool:
        return True

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """`lowrank.best_factors` in other coordinates: exact.

        Pivots come from an LU factorisation with partial pivoting of What C_G (side "out": as large and as independent
        as outputs can be on what the linear reads, G = C_G C_G^T) or of (C_H^T What)^T. Entries of C are then about 1
        at most (3.6 in all linears of SmolLM2-135M that were tried), so that rounding to float16 adds 1e-3 of the
        error of a typical rank or less.
        """
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        U, V, left_norms, right_norms = best_parts(problem, self.rank)
        # Rows of U V C_G have the norms and angles of U's once its columns are scaled by the orthogonal rows of V C_G.
        rows = V.T * left_norms if self.side == "in" else U * right_norms
        pivots, rest, combine = pivot_rows(rows)
        dtype, order = result_dtype(weight), torch.cat((pivots, rest))
        if self.side == "in":
            factors = {"C": combine.T, "U": U @ V[:, pivots]}
        else:
            factors, order = {"V": U[pivots] @ V, "C": combine}, order.argsort()
        return {**{name: f.contiguous() for name, f in cast(factors, dtype).items()}, "order": order.to(INDEX)}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        order = factors["order"]
        if self.side == "in":
            pivots, rest = torch.split(x.index_select(-1, order), [self.rank, self.cut - self.rank], dim=-1)
            return linear(pivots + linear(rest, factors["C"]), factors["U"])
        z = linear(x, factors["V"])
        return torch.cat((z, linear(z, factors["C"])), dim=-1).index_select(-1, order)

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        order = factors["order"].long()
        if self.side == "in":
            return torch.cat((factors["U"], factors["U"] @ factors["C"]), dim=1)[:, order.argsort()]
        return torch.cat((factors["V"], factors["C"] @ factors["V"]), dim=0)[order]

    def random_factors(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """See `Structure.random_factors`; the order is a permutation."""
        order = torch.randperm(self.cut, generator=generator, dtype=INDEX)
        return {**super().random_factors(generator, dtype), "order": order}

    def check_values(self, name: str, factor: Tensor) -> None:
        """See `Structure.check_values`: the order (cut,) is a permutation."""
        places = torch.arange(self.cut, device=factor.device)
        if name == "order" and not torch.equal(factor.long().sort().values, places):
            raise ArtifactError(f"the order of {self} is no permutation; compress the model again")

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        """Ranks unit, 2 unit, ... that save parameters. The pivots are on the smaller side, where fewer features change
        places; `side`, that of the residual stream, makes no difference."""
        pivots: Side = "in" if in_features < out_features else "out"
        ranks = range(unit, min(in_features, out_features), unit)
        sizes = [cls(in_features, out_features, rank, pivots) for rank in ranks]
        return [s for s in sizes if s.parameter_count() < in_features * out_features]

    @classmethod
    def curve(cls, weight: Tensor, gram: Tensor, metric: Tensor, side: Side, *, unit: int) -> list[tuple[Self, float]]:
        """See `Structure.curve`: exact, that of the same rank as a product U V."""
        out_features, in_features = weight.shape
        return cls.ranked(in_features, out_features, side, whitened_spectrum(weight, gram, metric), unit=unit)

    @classmethod
    def ranked(
        cls, in_features: int, out_features: int, side: Side, squares: Tensor, *, unit: int
    ) -> list[tuple[Self, float]]:
        """See `Structure.ranked`."""
        losses = tails(squares).tolist()
        return [(s, losses[s.rank]) for s in cls.menu(in_features, out_features, side, unit=unit)]


def pivot_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pivots, rest, C) of a (n, r) matrix, r < n: the indices (r,) of the rows that an LU factorisation with partial
    pivoting takes first, those (n - r,) of the others, both ascending, and C (n - r, r): rows[rest] = C rows[pivots].

    C is finite whatever the rank of the matrix: it is made of the factor L alone, whose entries are at most 1.
    """
    n, r = rows.shape
    factors, swaps, _ = torch.linalg.lu_factor_ex(rows)
    places = list(range(n))
    for i, j in enumerate((swaps - 1).tolist()):
        places[i], places[j] = places[j], places[i]
    taken, left = torch.tensor(places[:r]).sort(), torch.tensor(places[r:]).sort()
    combine = torch.linalg.solve_triangular(factors[:r], factors[r:], upper=False, left=False, unitriangular=True)
    pivots, rest = (found.indices.to(rows.device) for found in (taken, left))
    return taken.values.to(rows.device), left.values.to(rows.device), combine[rest][:, pivots]

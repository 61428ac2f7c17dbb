"""Group-and-shuffle matrices: two block-diagonal factors with a perfect shuffle between them (ProcrustesGPT, Def. 4.2).

Cut What into right_blocks x left_blocks equal parts: part (r, l) is R_rl L_lr, of rank `rank`. All parameters are used
once per token, in left_blocks + right_blocks ordinary products; the shuffle is a transposition of (left, right).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from compress.errors import UsageError
from compress.linalg import Problem, balance, result_dtype, tails, whitened_spectrum
from compress.structures import gs_fit
from compress.structures.base import Side, Structure, register

# (left_blocks, right_blocks) in the order of preference: fewer and larger products first. 3 is for widths like
# 576 = 9 * 64.
GRIDS = [(2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2), (3, 4), (4, 3), (4, 4), (2, 8), (8, 2), (4, 8), (8, 4), (8, 8)]


@register
@dataclass(frozen=True)
class GroupShuffleStructure(Structure):
    """With s = left_blocks * right_blocks * rank:

    L (left_blocks, s / left_blocks, in / left_blocks), rows of block l in the order (right, rank);
    R (right_blocks, out / right_blocks, s / right_blocks), columns of block r in the order (left, rank).
    """

    name: ClassVar[str] = "gs"
    predicts_loss: ClassVar[bool] = True

    left_blocks: int
    right_blocks: int
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("left_blocks", "right_blocks", "rank"):
            self._require_positive(field)
        self._require_divides("left_blocks", self.left_blocks, self.in_features)
        self._require_divides("right_blocks", self.right_blocks, self.out_features)
        rows, columns = self.part
        if self.rank > min(rows, columns):
            raise UsageError(
                f"rank {self.rank} is above the full rank of the {rows} x {columns} parts of a gs structure with "
                f"{self.left_blocks} left and {self.right_blocks} right blocks; choose a smaller rank"
            )

    @property
    def part(self) -> tuple[int, int]:
        """(rows, columns) of one part of the grid."""
        return self.out_features // self.right_blocks, self.in_features // self.left_blocks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.part
        return {
            "L": (self.left_blocks, self.right_blocks * self.rank, columns),
            "R": (self.right_blocks, rows, self.left_blocks * self.rank),
        }

    @property
    def variant(self) -> str:
        """ "gs 4x2"."""
        return f"{self.name} {self.left_blocks}x{self.right_blocks}"

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """See `Structure.fit`. Exact without a Gram matrix and metric; else a local optimum, see `gs_fit`."""
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        U, V = balance(*gs_fit.fit(problem, self.right_blocks, self.left_blocks, self.rank))
        L = V.transpose(0, 1).reshape(self.shapes()["L"])  # from (left, right, rank, columns)
        R = U.transpose(1, 2).reshape(self.shapes()["R"])  # from (right, rows, left, rank)
        return {name: factor.to(result_dtype(weight)).contiguous() for name, factor in (("L", L), ("R", R))}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        left, right, (rows, columns) = self.left_blocks, self.right_blocks, self.part
        tokens = x.numel() // self.in_features
        z = x.reshape(tokens, left, columns).transpose(0, 1) @ factors["L"].mT  # (left, tokens, right * rank)
        z = z.reshape(left, tokens, right, self.rank).permute(2, 1, 0, 3)  # (right, tokens, left, rank)
        y = z.reshape(right, tokens, left * self.rank) @ factors["R"].mT  # (right, tokens, rows)
        return y.transpose(0, 1).reshape(*x.shape[:-1], right * rows)

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        left, right, (rows, columns) = self.left_blocks, self.right_blocks, self.part
        U = factors["R"].reshape(right, rows, left, self.rank).transpose(1, 2)  # (right, left, rows, rank)
        V = factors["L"].reshape(left, right, self.rank, columns).transpose(0, 1)  # (right, left, rank, columns)
        return gs_fit.join(U @ V)

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        """Grids whose parts have sides that are multiples of `unit` (of 16 where no grid has), and ranks in steps of 16
        (8 where a part's side is below 256), that save parameters. Fewest blocks first. `side` makes no difference."""
        for step in (unit, 16):
            grids = [
                (left, right)
                for left, right in GRIDS
                if in_features % (left * step) == 0 and out_features % (right * step) == 0
            ]
            if grids:
                break
        menu: list[Self] = []
        for left, right in grids:
            rows, columns = out_features // right, in_features // left
            step = 16 if min(rows, columns) >= 256 else 8
            # Parameters left * right * rank * (rows + columns) against left * right * rows * columns.
            ranks = (r for r in range(step, min(rows, columns) + 1, step) if r * (rows + columns) < rows * columns)
            menu.extend(cls(in_features, out_features, left, right, rank) for rank in ranks)
        return menu

    @classmethod
    def curve(cls, weight: Tensor, gram: Tensor, metric: Tensor, side: Side, *, unit: int) -> list[tuple[Self, float]]:
        """See `Structure.curve`. Each part of the grid by itself, in the diagonal blocks of both moments: exact when
        nothing couples the parts, an estimate otherwise (derived here). With D these blocks of H (x) G, the optimum
        lies between the least and the largest eigenvalue of H (x) G relative to D, times the estimate; `fit` takes the
        coupling into account."""
        out_features, in_features = weight.shape
        losses: dict[tuple[int, int], Tensor] = {}
        found: list[tuple[Self, float]] = []
        for s in cls.menu(in_features, out_features, side, unit=unit):
            grid = (s.left_blocks, s.right_blocks)
            if grid not in losses:
                grams = _diagonal_blocks(gram, s.left_blocks)[None]  # (1, left, columns, columns)
                metrics = _diagonal_blocks(metric, s.right_blocks)[:, None]  # (right, 1, rows, rows)
                parts = gs_fit.cut(weight, s.right_blocks, s.left_blocks)  # (right, left, rows, columns)
                losses[grid] = tails(whitened_spectrum(parts, grams, metrics)).sum((0, 1))
            found.append((s, float(losses[grid][s.rank])))
        return found


def _diagonal_blocks(moment: Tensor, count: int) -> Tensor:
    size = len(moment) // count
    return torch.stack([moment[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])

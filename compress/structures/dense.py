"""The matrix itself: what an allocator keeps where no structure pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Self

from compress.linalg import Problem, result_dtype
from compress.structures.base import Side, Structure, register


@register
@dataclass(frozen=True)
class DenseStructure(Structure):
    """weight (out_features, in_features), unchanged."""

    name: ClassVar[str] = "dense"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_features, self.in_features)}

    @property
    def closed_form(self) -> bool:
        return True

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """The weight itself; the error is zero for every Gram matrix and metric."""
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        return {"weight": problem.weight.to(result_dtype(weight))}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return linear(x, factors["weight"])

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return factors["weight"]

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        """Itself, the only size there is."""
        return [cls(in_features, out_features)]

"""A structure in one file, as somebody else would add it: what CONTRIBUTING's "Add a structure" asks for.

What = B P: P keeps `kept` of the inputs, B (out, kept) is the best use of those. In the project the first part would be
compress/structures/columns.py, the second export/graph/ops/columns.py, and the third an entry of compress/catalog.py;
`tests/test_toy_structure.py` drives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Self

from compress import catalog
from compress.errors import ArtifactError, UsageError
from compress.linalg import Problem, result_dtype
from compress.structures import Structure
from compress.structures.base import Side, register
from compress.structures.kron import error_by_kept
from compress.structures.select import refit
from export.graph import ops
from export.graph.ops import Array, Arrays, Attributes, Body, Call, Family, Op, custom

# --- The matrix ---


@dataclass(frozen=True)
class ColumnsStructure(Structure):
    """B (out_features, kept), index int32 (kept,): y = x[index] B^T."""

    name: ClassVar[str] = "columns"
    predicts_loss: ClassVar[bool] = True

    kept: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.kept <= self.in_features:
            raise UsageError(f"columns: {self.kept} inputs are not 1 to {self.in_features}; choose a number in between")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"B": (self.out_features, self.kept), "index": (self.kept,)}

    def storage_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"B": dtype, "index": torch.int32}

    def random_factors(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        index = torch.randperm(self.in_features, generator=generator, dtype=torch.int32)[: self.kept]
        return {**super().random_factors(generator, dtype), "index": index}

    def check_values(self, name: str, factor: Tensor) -> None:
        if name == "index" and not set(factor.tolist()) <= set(range(self.in_features)):
            raise ArtifactError(f"the index of {self} is not of its inputs; compress the model again")

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        G = torch.eye(self.in_features).to(problem.weight) if problem.gram is None else problem.gram.matrix
        index = ranked_inputs(problem.weight, G)[: self.kept]
        B = refit(problem.weight, G, index)
        return {"B": B.to(result_dtype(weight)).contiguous(), "index": index.to(torch.int32)}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return linear(x.index_select(-1, factors["index"]), factors["B"])

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        whole = factors["B"].new_zeros(self.out_features, self.in_features)
        return whole.index_copy(1, factors["index"].long(), factors["B"])

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        return [cls(in_features, out_features, kept) for kept in range(unit, in_features, unit)]

    @classmethod
    def curve(cls, weight: Tensor, gram: Tensor, metric: Tensor, side: Side, *, unit: int) -> list[tuple[Self, float]]:
        order = ranked_inputs(weight, gram)
        errors = error_by_kept(weight[:, order], "in", gram[order][:, order], metric).tolist()
        return [(s, errors[s.kept]) for s in cls.menu(weight.shape[1], weight.shape[0], side, unit=unit)]


def ranked_inputs(weight: Tensor, gram: Tensor) -> Tensor:
    """The inputs (in,), what contributes most to the outputs first."""
    return (gram.diagonal() * weight.square().sum(0)).argsort(descending=True, stable=True)


# --- Its op ---


def _body(body: Body, bias: tuple[str, ...]) -> None:
    body.gemm(body.op("Gather", "x", "index", axis=1), "B", *bias, output="y")


def _dense(p: Arrays, attributes: Attributes) -> Array:
    places = np.eye(int(attributes["in_features"]))[p["index"].astype(int)]  # type: ignore[arg-type]
    return np.asarray(p["B"] @ places)


def _lower(s: ColumnsStructure, bias: bool) -> tuple[Call, ...]:
    return (custom("ColumnsLinear", s, ("B", "index"), bias, {"kept": s.kept}),)


NO_PLUGIN = None
COLUMNS = Family(
    _lower,
    (
        Op(
            "ColumnsLinear",
            ("x", "B", "index"),
            ("in_features", "out_features", "kept"),
            _body,
            _dense,
            plugin=NO_PLUGIN,
            types={"index": "int32"},
        ),
    ),
)

# --- Its choice ---

ENTRY = catalog.Entry(
    structure="columns",
    variants=(catalog.Variant("planned", menus=True),),
    help="some of the inputs",
    quality=catalog.QualityLine("columns", "some of the inputs"),
)


def add() -> None:
    """Make `--structure columns` known."""
    register(ColumnsStructure)
    ops.register("columns", COLUMNS)
    catalog.add(ENTRY)

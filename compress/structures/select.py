"""Leading features of each group of the inner side: what is left after dropping neurons, or value coordinates of heads.

The inner side is the one that does not lie on the residual stream: the outputs of v, gate and up, the inputs of o and
down. It is cut into `groups` equal groups (heads, or 1 for neurons) of which the first `kept` features stay. An exact
rewrite (compress/rewrites/inner.py) has brought those that matter to the front. Dropped features are exact zeros: a
head's zero coordinate stays zero through attention, and what reads the others does not read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from compress.architecture import WRITERS, Architecture
from compress.errors import UsageError
from compress.linalg import Problem, result_dtype
from compress.structures.base import Side, Structure, cast, register
from compress.structures.dense import DenseStructure


@register
@dataclass(frozen=True)
class SelectStructure(Structure):
    """The structure `core` (dense where None) between the features that stay; its factors are the only ones.

    side "in":  x is cut to its kept features (groups * kept), then y = core(x).
    side "out": y is core(x) (groups * kept) with zeros at the features that were dropped.
    """

    name: ClassVar[str] = "select"

    kept: int
    groups: int = 1
    side: Side = "in"
    core: Structure | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("kept")
        self._require_positive("groups")
        if self.side not in ("in", "out"):
            raise UsageError(f"side of a select structure must be in or out, not {self.side!r}")
        self._require_divides("groups", self.groups, self._cut)
        if self.kept > self.group_size:
            raise UsageError(f"{self.kept} kept features are above the {self.group_size} of a group; keep fewer")
        m, n = self.reduced_sizes
        if self.core is not None and (self.core.in_features, self.core.out_features) != (m, n):
            raise UsageError(
                f"the core of a select structure must be {n} x {m}, what is kept; it is "
                f"{self.core.out_features} x {self.core.in_features}"
            )
        if getattr(self.core, "shares", None) is not None:
            raise UsageError("the core of a select structure cannot share the V of another linear")

    @property
    def _cut(self) -> int:
        return self.in_features if self.side == "in" else self.out_features

    @property
    def group_size(self) -> int:
        """Features of one group before the cut."""
        return self._cut // self.groups

    @property
    def reduced_sizes(self) -> tuple[int, int]:
        """(in, out) of what is kept."""
        inner = self.groups * self.kept
        return (inner, self.out_features) if self.side == "in" else (self.in_features, inner)

    @property
    def reduced(self) -> Structure:
        """The structure between the kept features alone, which is what is stored."""
        return self.core or DenseStructure(*self.reduced_sizes)

    def features(self) -> Tensor:
        """Indices (groups * kept,) of the features that stay."""
        starts = torch.arange(self.groups) * self.group_size
        return (starts[:, None] + torch.arange(self.kept)).reshape(-1)

    def kept_bias(self, bias: Tensor) -> Tensor:
        """The bias (out,) of such a linear: zero where a feature was dropped (side "out"), else unchanged."""
        if self.side == "in":
            return bias
        kept = torch.zeros_like(bias)
        kept[self.features()] = bias[self.features()]
        return kept

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.reduced.shapes()

    def storage_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """As the core."""
        return self.reduced.storage_dtypes(dtype)

    def random_factors(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """As the core."""
        return self.reduced.random_factors(generator, dtype)

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """See `Structure.fit`. Exact whenever the fit of the core is (derived here).

        Side "in", S the kept inputs: with C* = W G_:S G_SS^{-1} (Nystroem; least squares on what is left to read),

            tr(H (W - C P) G (W - C P)^T) = tr(H (C - C*) G_SS (C - C*)^T) + what dropping costs, whatever C,

        P the rows S of the identity, so the core is fitted to C* in the metric of G_SS. Side "out" is the transpose:
        C* = H_SS^{-1} H_S: W. Give no metric there when the reader of these outputs is refitted afterwards: the same
        loss would be made up for twice.
        """
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        reader = problem if self.side == "in" else problem.transposed
        stay = self.features().to(weight.device)
        target, moment = reader.weight[:, stay], None
        if reader.gram is not None:
            moment = reader.gram.matrix[stay][:, stay]
            target = refit(reader.weight, reader.gram.matrix, stay)
        other = None if reader.metric is None else reader.metric.matrix
        if self.side == "out":
            factors = self.reduced.fit(target.T, other, moment)
        else:
            factors = self.reduced.fit(target, moment, other)
        dtype = result_dtype(weight)
        return {name: f.contiguous() for name, f in cast(factors, dtype).items()}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        lead, kept, size = x.shape[:-1], self.kept, self.group_size
        if self.side == "in":
            x = x.reshape(*lead, self.groups, size)[..., :kept]  # (..., groups, kept)
            return self.reduced.apply(factors, x.reshape(*lead, self.groups * kept))
        y = self.reduced.apply(factors, x).reshape(*lead, self.groups, kept)
        return pad(y, (0, size - kept)).reshape(*lead, self.out_features)

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        core = self.reduced.dense(factors)
        whole = core.new_zeros(self.out_features, self.in_features)
        stay = self.features().to(core.device)
        # Out of place: differentiable in the factors.
        return whole.index_copy(1 if self.side == "in" else 0, stay, core)

    def parameter_count(self) -> int:
        """As the core."""
        return self.reduced.parameter_count()

    def check_factors(self, factors: Mapping[str, Tensor]) -> None:
        """As the core."""
        self.reduced.check_factors(factors)

    def check_values(self, name: str, factor: Tensor) -> None:
        """As the core."""
        self.reduced.check_values(name, factor)

    def macs(self, tokens: int) -> int:
        """Those of the core; a cut or a padding costs none."""
        return self.reduced.macs(tokens)

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int, groups: int = 1) -> list[Self]:
        """Kept features unit, 2 unit, ... of each group, with a dense core. `side` is that of the residual stream."""
        inner: Side = "out" if side == "in" else "in"
        size = (in_features if inner == "in" else out_features) // groups
        return [cls(in_features, out_features, kept, groups, inner) for kept in range(unit, size, unit)]


def refit(weight: Tensor, gram: Tensor, stay: Tensor) -> Tensor:
    """W G_:S G_SS^{-1} (out, |S|): the best use of the inputs `stay` (indices) for all of weight (out, in).

    gram G (in, in), positive definite; float64.
    """
    factor = torch.linalg.cholesky(gram[stay][:, stay])
    return torch.cholesky_solve(gram[stay] @ weight.T, factor).T


def with_core(structure: SelectStructure, core: Structure) -> SelectStructure:
    """The same selection around another structure of the kept features."""
    return replace(structure, core=core)


def core_of(structure: Structure) -> Structure:
    """Whose factors those of `structure` are: its own, or those of what lies between the features that it keeps."""
    return structure.reduced if isinstance(structure, SelectStructure) else structure


def selection(arch: Architecture, role: str, kept: int, core: Structure | None = None) -> SelectStructure:
    """The structure of `role` when `kept` neurons (gate, up, down), or coordinates of every value head (v, o), stay.

    `core` is a structure between what is kept (see `SelectStructure.reduced` for its sizes). Raises UsageError for the
    roles q and k, whose features meet in scores and not in a linear.
    """
    groups = {"attn.v": arch.num_kv_heads, "attn.o": arch.num_heads}.get(role, 1)
    if role in ("attn.q", "attn.k"):
        raise UsageError(f"{role} has no inner features to select: neurons and value coordinates are others'")
    n, m = arch.linears()[role]
    return SelectStructure(m, n, kept, groups, "in" if role in WRITERS.values() else "out", core)


def selected_roles(arch: Architecture, sub_block: str) -> tuple[str, ...]:
    """The linears that one choice of kept neurons ("mlp") or value coordinates ("attn") makes smaller together."""
    return (*arch.readers("mlp"), "mlp.down") if sub_block == "mlp" else ("attn.v", "attn.o")

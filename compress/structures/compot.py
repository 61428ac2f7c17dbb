"""What = S D: a dense dictionary D and a sparse coefficient matrix S, half of whose entries are kept (COMPOT).

S is stored packed: the kept coefficients of each row in the order of their atoms, and one bit per coefficient that
says which atoms they belong to. A dense engine multiplies with the unpacked S and gains nothing in arithmetic; in the
2:4 pattern (two of every four consecutive atoms) sparse tensor cores run S at half the cost, at the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from typing_extensions import Self

from compress.errors import ArtifactError, UsageError
from compress.linalg import Problem, balance, result_dtype
from compress.structures import compot_fit
from compress.structures.base import Side, Structure, register

BITS = 8


@register
@dataclass(frozen=True)
class CompotStructure(Structure):
    """D (atoms, in_features), values (out_features, kept), mask uint8 (out_features, ceil(atoms / 8)).

    y = (x D^T) S^T, S (out_features, atoms) with exactly `kept` coefficients in every row. Bit j of byte i of a row of
    `mask` stands for atom 8 i + j; spare bits are 0.
    """

    name: ClassVar[str] = "compot"
    pattern: ClassVar[Literal["free", "2:4"]] = "free"
    slow_fit: ClassVar[bool] = True

    atoms: int
    kept: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("atoms", "kept"):
            self._require_positive(field)
        if self.atoms > self.in_features:
            raise UsageError(
                f"{self.atoms} atoms are more than the {self.in_features} inputs of a {self.out_features} x "
                f"{self.in_features} matrix; choose {self.in_features} or fewer, for the fit keeps them orthogonal"
            )
        if self.kept > self.atoms:
            raise UsageError(f"{self.name} cannot keep {self.kept} coefficients of {self.atoms} atoms; choose fewer")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "D": (self.atoms, self.in_features),
            "values": (self.out_features, self.kept),
            "mask": (self.out_features, -(-self.atoms // BITS)),
        }

    def storage_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {**super().storage_dtypes(dtype), "mask": torch.uint8}

    def parameter_count(self) -> int:
        """Storage in parameters of 16 bits, which is what the allocator's budget counts: D and `values` one each, and
        16 mask bits one, rounded up (COMPOT, Eq. 11). `bytes` is exact for every type."""
        shapes = self.shapes()
        mask_bytes = shapes["mask"][0] * shapes["mask"][1]
        return self.atoms * self.in_features + self.out_features * self.kept + -(-mask_bytes // 2)

    def macs(self, tokens: int) -> int:
        """Of a dense engine, which multiplies with the zeros of S as well."""
        return tokens * self.atoms * (self.in_features + self.out_features)

    def sparse_macs(self, tokens: int) -> int:
        """Of an engine that skips the zeros of S; for the 2:4 pattern that of sparse tensor cores."""
        return tokens * (self.atoms * self.in_features + self.out_features * self.kept)

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """See `Structure.fit`; a local optimum, see `compot_fit`. D and S have equal norms atom by atom.

        A row of S mixes no outputs, so the alternation that finds the supports sees of the metric H only its diagonal,
        as row weights (which a support does not depend on, but the dictionary does); the refit sees all of it.
        """
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        S, support, D = compot_fit.fit(problem, self.atoms, self._support, self._order())
        S, D = balance(S, D)
        dtype = result_dtype(weight)
        return {
            "D": D.to(dtype).contiguous(),
            "values": S[support].reshape(self.out_features, self.kept).to(dtype),  # row by row, in the order of atoms
            "mask": pack(support),
        }

    def estimate(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> float:
        """tr(H E G E^T) after a short fit, for an allocator that compares sizes: above that of `fit`, in a fifth of the
        time. Raises as `fit`."""
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        S, _, D = compot_fit.fit(problem, self.atoms, self._support, self._order(), rounds=3, refits=1)
        return problem.error(S @ D)

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return linear(linear(x, factors["D"]), self.coefficients(factors))

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return self.coefficients(factors) @ factors["D"]

    def random_factors(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """See `Structure.random_factors`; the mask follows the pattern."""
        size = torch.rand(self.out_features, self.atoms, generator=generator)
        return {**super().random_factors(generator, dtype), "mask": pack(self._support(size))}

    def coefficients(self, factors: Mapping[str, Tensor]) -> Tensor:
        """S (out_features, atoms) from `values` and `mask`, with its zeros."""
        values = factors["values"]
        zeros = values.new_zeros(self.out_features, self.atoms)
        return zeros.masked_scatter(unpack(factors["mask"], self.atoms), values)

    def check_values(self, name: str, factor: Tensor) -> None:
        """See `Structure.check_values`: the mask, uint8 (out_features, ceil(atoms / 8)), keeps `kept` atoms of every
        row in the pattern, and its spare bits are 0."""
        if name != "mask":
            return
        support = unpack(factor, BITS * factor.shape[1])
        spare = bool(support[:, self.atoms :].any())
        if spare or bool((support.sum(1) != self.kept).any()) or not self._follows_pattern(support[:, : self.atoms]):
            raise ArtifactError(
                f"the mask of {self} does not select {self.kept} of {self.atoms} atoms in every row "
                f"({self.pattern} pattern); compress the model again"
            )

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        """Atoms in steps of `unit`, half of the coefficients kept (the best ratio in COMPOT's ablation), as far as that
        saves parameters. `side` makes no difference. Raises UsageError for a unit that is no multiple of 4."""
        if unit < 1 or unit % 4:
            raise UsageError(f"{cls.name} needs a unit that is a multiple of 4, not {unit}; choose 16 or more")
        menu = [cls(in_features, out_features, k, k // 2) for k in range(unit, in_features + 1, unit)]
        return [s for s in menu if s.parameter_count() < in_features * out_features]

    def _support(self, size: Tensor) -> Tensor:
        """Which coefficients to keep, given their absolute values (out, atoms): bool, `kept` in every row."""
        best = size.topk(self.kept, dim=1).indices
        return torch.zeros_like(size, dtype=torch.bool).scatter_(1, best, True)

    def _order(self) -> Tensor:
        """The singular vectors that the atoms start from, in the order of the atoms."""
        return torch.arange(self.atoms)

    def _follows_pattern(self, support: Tensor) -> bool:
        return True


@register
@dataclass(frozen=True)
class Compot24Structure(CompotStructure):
    """The same with exactly two of every four consecutive atoms in every row: atoms a multiple of 4, kept = atoms / 2.

    Consecutive atoms lie along the reduction dimension of y = z S^T, where sparse tensor cores want them.
    """

    name: ClassVar[str] = "compot24"
    pattern: ClassVar[Literal["free", "2:4"]] = "2:4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atoms % 4 or self.atoms != 2 * self.kept:
            raise UsageError(
                f"{self.name} keeps 2 of every 4 atoms: atoms = {self.atoms} must be a multiple of 4 and "
                f"kept = {self.kept} half of it"
            )

    def _support(self, size: Tensor) -> Tensor:
        groups = size.reshape(len(size), -1, 4)  # (out, atoms / 4, 4)
        best = groups.topk(2, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).reshape(size.shape)

    def _order(self) -> Tensor:
        """Group i starts as singular vectors i, i + k/4, i + k/2, i + 3k/4: neighbours in the order of singular values
        would compete for the same two places, and waste the pattern."""
        return torch.arange(self.atoms).reshape(4, -1).T.reshape(-1)

    def _follows_pattern(self, support: Tensor) -> bool:
        return bool((support.reshape(len(support), -1, 4).sum(2) == 2).all())


def pack(support: Tensor) -> Tensor:
    """bool (rows, atoms) -> uint8 (rows, ceil(atoms / 8)), the first atom in the lowest bit."""
    rows, atoms = support.shape
    bits = pad(support.to(torch.uint8), (0, -atoms % BITS)).reshape(rows, -1, BITS)  # (rows, bytes, 8)
    return (bits << _shifts(support)).sum(2, dtype=torch.uint8)


def unpack(mask: Tensor, atoms: int) -> Tensor:
    """The inverse of `pack`; a mask that was cast to another type along with its neighbours will do."""
    bits = (mask.to(torch.uint8).unsqueeze(2) >> _shifts(mask)) & 1  # (rows, bytes, 8)
    return bits.flatten(1)[:, :atoms].bool()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=like.device)

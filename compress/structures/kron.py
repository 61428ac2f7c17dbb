"""Sums of Kronecker products: a small mix of blocks and one dense matrix of terms / blocks of the size.

One-sided (side "in" or "out"; the canonical case, ProcrustesGPT's configurations): A mixes `blocks` equal blocks of the
residual stream into `terms`, and B is the weight of the one product that is left. Two-sided (side "both"): What =
sum_i A_i (x) B_i with A_i (n1, m1), B_i (n2, m2). At a kept fraction c of the parameters it takes about
c * min(n1, m1, n2, m2) times the work of the dense product, so it pays, if at all, where bytes count and work does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from typing_extensions import Self

from compress.errors import UsageError
from compress.linalg import Problem, result_dtype
from compress.structures import kron_fit
from compress.structures.base import Side, Structure, register

Mix = Literal["leading", "explicit"]


@register
@dataclass(frozen=True)
class KroneckerStructure(Structure):
    """`blocks` = n1 * m1 blocks of the matrix are spanned by `terms` of them.

    side "in":  B (out, terms * in / blocks); block t of the mixed input is sum_b A[t, b] x_b; y = mixed B^T.
    side "out": B (terms * out / blocks, in); z = x B^T; block b of the output is sum_t A[t, b] z_t.
    side "both": A (terms, n1, m1), B (terms, n2, m2), n1 n2 = out, m1 m2 = in; needs n1 and m1.
    mix "explicit": A (terms, blocks) has orthonormal rows (as vectors when two-sided) and stays in float32.
    mix "leading": A is the first `terms` rows of the identity and is not stored: x is cut, or y padded with zeros. It
    asks for a residual stream that is rotated so that its last coordinates matter least.
    """

    name: ClassVar[str] = "kron"

    blocks: int
    terms: int
    side: Literal["in", "out", "both"] = "in"
    mix: Mix = "explicit"
    n1: int | None = None
    m1: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("blocks")
        self._require_positive("terms")
        if self.side not in ("in", "out", "both"):
            raise UsageError(f"side of a kron structure must be in, out or both, not {self.side!r}")
        if self.mix not in ("leading", "explicit"):
            raise UsageError(f"mix of a kron structure must be leading or explicit, not {self.mix!r}")
        if self.side != "both":
            if (self.n1, self.m1) != (None, None):
                raise UsageError(f"n1 and m1 are for side both; side {self.side} has only blocks")
            self._require_divides("blocks", self.blocks, self.in_features if self.side == "in" else self.out_features)
        else:
            if self.mix == "leading":
                raise UsageError("mix leading is for sides in and out; use mix explicit with side both")
            if self.n1 is None or self.m1 is None or self.n1 < 1 or self.n1 * self.m1 != self.blocks:
                raise UsageError(
                    f"side both needs n1 and m1 with n1 * m1 = blocks, not n1={self.n1}, m1={self.m1}, "
                    f"blocks={self.blocks}"
                )
            self._require_divides("n1", self.n1, self.out_features)
            self._require_divides("m1", self.m1, self.in_features)
        full = min(self.blocks, self.in_features * self.out_features // self.blocks)
        if self.terms > full:
            raise UsageError(f"{self.terms} terms are above the {full} that make a full matrix; choose fewer")

    @property
    def left(self) -> tuple[int, int]:
        """(n1, m1), the shape of the A_i."""
        if self.side == "both":
            assert self.n1 is not None
            assert self.m1 is not None
            return self.n1, self.m1
        return (1, self.blocks) if self.side == "in" else (self.blocks, 1)

    @property
    def right(self) -> tuple[int, int]:
        """(n2, m2), the shape of the B_i."""
        n1, m1 = self.left
        return self.out_features // n1, self.in_features // m1

    @property
    def kept(self) -> int:
        """The inner dimension of a one-sided product: terms * in / blocks or terms * out / blocks."""
        return self.terms * (self.in_features if self.side == "in" else self.out_features) // self.blocks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.side == "both":
            return {"A": (self.terms, *self.left), "B": (self.terms, *self.right)}
        B = (self.out_features, self.kept) if self.side == "in" else (self.kept, self.in_features)
        return {"B": B} if self.mix == "leading" else {"A": (self.terms, self.blocks), "B": B}

    @property
    def closed_form(self) -> bool:
        return self.mix == "leading"

    @property
    def variant(self) -> str:
        """ "kron in leading"."""
        return f"{self.name} {self.side} {self.mix}"

    def storage_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """A stays in float32: it is tiny, and its rounding would hit every input alike."""
        return {name: torch.float32 if name == "A" else dtype for name in self.shapes()}

    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """See `Structure.fit`. Leading: the exact optimum. Explicit one-sided: exact in B, a local optimum in A that is
        never worse than the Frobenius or the leading choice. Two-sided: alternating exact steps, a local optimum."""
        problem = Problem.of(weight, gram, metric, self.in_features, self.out_features)
        if self.side == "both":
            A, B = kron_fit.fit_general(problem, *self.left, self.terms)
            factors = {"A": A, "B": B}
        else:
            reader = problem if self.side == "in" else problem.transposed
            if self.mix == "leading":
                factors = {"B": kron_fit.fit_leading(reader, self.kept)}
            else:
                A, B = kron_fit.fit_mix(reader, self.blocks, self.terms)
                factors = {"A": A, "B": B}
            if self.side == "out":
                factors["B"] = factors["B"].T
        return {name: factor.to(result_dtype(weight)).contiguous() for name, factor in factors.items()}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        B = factors["B"]
        if self.mix == "leading":
            if self.side == "in":
                return linear(x[..., : self.kept], B)
            return pad(linear(x, B), (0, self.out_features - self.kept))
        A = factors["A"].to(x.dtype)
        if self.side == "both":
            return self._apply_two_sided(A, B, x)
        lead, size = x.shape[:-1], self.kept // self.terms
        if self.side == "in":
            z = A @ x.reshape(*lead, self.blocks, size)  # (..., terms, in / blocks)
            return linear(z.reshape(*lead, self.kept), B)
        y = A.T @ linear(x, B).reshape(*lead, self.terms, size)  # (..., blocks, out / blocks)
        return y.reshape(*lead, self.out_features)

    def _apply_two_sided(self, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        """y = vec(sum_i A_i X B_i^T), X the (m1, m2) view of x, in the cheaper of the two orders."""
        (n1, m1), (n2, m2), lead, terms = self.left, self.right, x.shape[:-1], self.terms
        X = x.reshape(*lead, m1, m2)
        if self.right_first:
            Z = linear(X, B.reshape(terms * n2, m2)).reshape(*lead, m1, terms, n2)
            Z = Z.transpose(-3, -2).reshape(*lead, terms * m1, n2)
            Y = A.transpose(0, 1).reshape(n1, terms * m1) @ Z  # (..., n1, n2)
        else:
            Z = (A.reshape(terms * n1, m1) @ X).reshape(*lead, terms, n1, m2)
            Z = Z.transpose(-3, -2).reshape(*lead, n1, terms * m2)
            Y = linear(Z, B.transpose(0, 1).reshape(n2, terms * m2))  # (..., n1, n2)
        return Y.reshape(*lead, self.out_features)

    @property
    def right_first(self) -> bool:
        """Whether `apply` contracts B before A.

        Per token and term, B first takes m1 m2 n2 + m1 n1 n2 multiplications and A first n1 m1 m2 + n1 m2 n2. Divided
        by n1 n2 m1 m2: B first iff 1 / n1 + 1 / m2 < 1 / n2 + 1 / m1. One-sided, the mix goes where the terms are.
        """
        (n1, m1), (n2, m2) = self.left, self.right
        if self.side == "both":
            return m1 * n2 * (m2 + n1) < n1 * m2 * (m1 + n2)
        return self.side == "out"

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        B = factors["B"]
        if self.mix == "leading":
            if self.side == "in":
                return pad(B, (0, self.in_features - self.kept))
            return pad(B, (0, 0, 0, self.out_features - self.kept))
        A = factors["A"].to(B.dtype)
        if self.side == "both":
            return kron_fit.kronecker_sum(A, B)
        if self.side == "in":
            n, size = self.out_features, self.kept // self.terms
            return torch.einsum("ntp,tb->nbp", B.reshape(n, self.terms, size), A).reshape(n, self.in_features)
        m, size = self.in_features, self.kept // self.terms
        return torch.einsum("tpm,tb->bpm", B.reshape(self.terms, size, m), A).reshape(self.out_features, m)

    def macs(self, tokens: int) -> int:
        """Mix and product, in the order of `apply`; a cut or a padding costs none."""
        (n1, m1), (n2, m2) = self.left, self.right
        if self.mix == "leading":
            return tokens * self.parameter_count()
        per_term = m1 * n2 * (m2 + n1) if self.right_first else n1 * m2 * (m1 + n2)
        return tokens * self.terms * per_term

    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int, mix: Mix = "leading") -> list[Self]:
        """One-sided on the rotated side in blocks of `unit` features, 1 ... blocks - 1 terms.

        Raises UsageError when `unit` does not divide that side.
        """
        rotated = in_features if side == "in" else out_features
        if rotated % unit:
            raise UsageError(
                f"kron: blocks of {unit} features do not divide the {rotated} of the residual stream "
                f"(a {out_features} x {in_features} matrix, side {side}); choose a divisor of {rotated}"
            )
        blocks = rotated // unit
        menu = [cls(in_features, out_features, blocks, terms, side, mix) for terms in range(1, blocks)]
        return [s for s in menu if s.parameter_count() < in_features * out_features]

    @classmethod
    def for_ratio(
        cls, in_features: int, out_features: int, side: Side, ratio: float, unit: int, *, mix: Mix = "leading"
    ) -> Self:
        """See `Structure.for_ratio`."""
        menu = cls.menu(in_features, out_features, side, unit=unit, mix=mix)
        return cls._largest(menu, in_features, out_features, ratio, unit)


def error_by_kept(weight: Tensor, side: Side, gram: Tensor | None = None, metric: Tensor | None = None) -> Tensor:
    """The optimal tr(H E G E^T) of mix "leading" at every kept dimension 0 ... rotated side, in one pass; float64."""
    problem = Problem.of(weight, gram, metric, weight.shape[1], weight.shape[0])
    return kron_fit.leading_errors(problem if side == "in" else problem.transposed)

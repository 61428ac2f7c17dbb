"""What a fit sees of the streams."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from compress.calibration.gram import GramSum
from compress.linalg import is_singular


@dataclass(frozen=True)
class FitMoments:
    """What a fit sees, float64: G = E[x x^T] (in, in), E[x] (in,) of the inputs x of the compressed model; and of the
    error r made so far, E[r x^T] (rows, in) and E[r] (rows,): r = h_f - h_c for readers, y_f - W a_c + s_f - s_c for
    writers."""

    gram: Tensor
    mean: Tensor
    gap: Tensor
    gap_mean: Tensor

    @cached_property
    def singular(self) -> bool:
        """True if G is singular before any damping."""
        return is_singular(self.gram)

    @classmethod
    def of(cls, gram: GramSum, gap: GramSum) -> FitMoments:
        """From the sums over all batches."""
        return cls(gram.mean(), gram.first(), gap.mean(), gap.first())

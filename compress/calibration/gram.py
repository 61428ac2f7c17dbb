"""Second moments summed over batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SYMMETRIC_BLOCK = 384  # columns of a second moment at a time: 1536 features take 5/8 of the products


class GramSum:
    """Accumulates sum of x^T y / tokens: float32 products of each batch, a float64 sum. (rows, columns).

    fast: the numbers are rounded to bfloat16, as where a product of `Runner.computing` reads them, so that G is exactly
    the one of what the linears see; the products of such numbers are exact and are still summed in float32.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, fast: bool = False) -> None:
        self.fast = fast
        self.total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros(rows, dtype=torch.float64, device=device)
        self.tokens, self.symmetric = 0, False

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """x (..., rows) and y (..., columns), y = x when not given."""
        left = self._rows(x)
        right = left if y is None else self._rows(y)
        with torch.autocast(left.device.type, enabled=False), float32_products(exact=self.fast):
            if y is None:  # symmetric: the lower blocks are enough
                for start in range(0, left.shape[1], SYMMETRIC_BLOCK):
                    block = slice(start, start + SYMMETRIC_BLOCK)
                    self.total[start:, block] += (left[:, start:].T @ left[:, block]).double()
            else:
                self.total += (left.T @ right).double()
        self.symmetric = y is None
        self.sums += left.sum(0).double()  # float32 within a batch: seven times as fast as float64
        self.tokens += len(left)

    def mean(self) -> Tensor:
        """The second moment per token, float64."""
        whole = self.total
        if self.symmetric:
            lower = whole.tril()
            whole = lower + lower.T - lower.diagonal().diag()
        return whole / max(self.tokens, 1)

    def first(self) -> Tensor:
        """The mean of x (rows,), float64."""
        return self.sums / max(self.tokens, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """(tokens, features), float32 or wider."""
        x = x.reshape(-1, x.shape[-1])
        x = x.bfloat16() if self.fast else x
        return x.float() if x.dtype.itemsize < 4 else x


@contextmanager
def float32_products(exact: bool) -> Iterator[None]:
    """Products of float32 matrices. `exact`: of numbers that bfloat16 holds, so that its units may multiply them: the
    products are the same, and their sums are float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

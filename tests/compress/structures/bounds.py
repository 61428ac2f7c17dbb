"""Bounds that a fit is held against, computed independently."""

from __future__ import annotations

import torch
from torch import Tensor


def square_root(matrix: Tensor | None, size: int) -> Tensor:
    """The symmetric square root, where `fit` uses Cholesky factors."""
    if matrix is None:
        return torch.eye(size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def best_error(W: Tensor, rank: int, gram: Tensor | None, metric: Tensor | None) -> float:
    """Eckart-Young in the whitened coordinates."""
    whitened = square_root(metric, len(W)) @ W @ square_root(gram, W.shape[1])
    return float(torch.linalg.svdvals(whitened)[rank:].square().sum())

"""The head of a folded model, and labels sampled from it: where the backward pass begins."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.model.blocks import rms_normalise
from compress.rewrites.rotations import Weights


def sample(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index (n,) from each row of probabilities (n, k), by the inverse of the distribution function: one random
    number a row, where `torch.multinomial` draws one for each entry (30 times slower at 49,152 entries)."""
    reached = probabilities.cumsum(-1)
    total = reached[:, -1:]
    drawn = torch.rand(total.shape, dtype=total.dtype, device=total.device, generator=generator) * total
    below = torch.nextafter(total, torch.zeros_like(total))  # the first entry above `drawn` has a probability above 0
    return torch.searchsorted(reached, torch.minimum(drawn, below), right=True)[:, 0]


def head_input(ends: Weights, eps: float, x: Tensor) -> Tensor:
    """Last norm and head map of a folded model: (..., d) -> (..., d)."""
    h = rms_normalise(x, eps)
    if "model.head_map.weight" in ends:
        weight = ends["model.head_map.weight"]
        h = h @ weight.T if weight.dim() == 2 else h * weight
        if "model.head_map.bias" in ends:
            h = h + ends["model.head_map.bias"]
    return h


def head_of(ends: Weights, h: Tensor) -> Tensor:
    """The head itself: what `head_input` gives -> (..., vocabulary)."""
    logits = h @ ends.get("lm_head.weight", ends["model.embed_tokens.weight"]).T
    return logits + ends["lm_head.bias"] if "lm_head.bias" in ends else logits


def head_logits(ends: Weights, eps: float, x: Tensor) -> Tensor:
    """Last norm, head map and head of a folded model: (..., d) -> (..., vocabulary)."""
    return head_of(ends, head_input(ends, eps, x))

"""Windows of text for perplexity."""

from __future__ import annotations

import torch

from validate.perplexity.windows import Windows


def windows_of(tokens: int, length: int, stride: int | None = None, seed: int = 0) -> Windows:
    ids = torch.randint(199, (tokens,), generator=torch.Generator().manual_seed(seed))
    stride = length if stride is None else stride
    return Windows(ids, length, stride, 1 + (tokens - length) // stride, False)

"""One pass through the network by itself: whether what a client sends for it fits together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import UsageError

LARGEST_LOGITS = 1 << 30
"""Bytes of logits that one pass may make: beside them there are as many in the response."""


def check_feeds(feeds: Mapping[str, npt.NDArray[Any]], *, vocabulary: int, positions: int) -> None:
    """Raises UsageError where sizes contradict each other, and for numbers that are no tokens or no positions.

    input_ids and position_ids are (batch, new), attention_mask (batch, past + new), each cache (batch, heads, past,
    head_dim).
    """
    ids, mask, places = (feeds[name] for name in ("input_ids", "attention_mask", "position_ids"))
    caches = {name: value for name, value in feeds.items() if name.startswith("past_key_values.")}
    if ids.ndim != 2 or ids.size == 0:
        raise UsageError(f"input_ids must be (batch, new) with at least one token, not {ids.shape}")
    batch, new = ids.shape
    if places.shape != ids.shape:
        raise UsageError(f"position_ids must have the shape of input_ids, {ids.shape}, not {places.shape}")
    if mask.ndim != 2 or len(mask) != batch or mask.shape[1] < new:
        raise UsageError(
            f"attention_mask must be ({batch}, past + {new}), of past and new tokens, as input_ids have it, not "
            f"{mask.shape}"
        )
    past = mask.shape[1] - new
    for name, cache in caches.items():
        if cache.ndim != 4 or (cache.shape[0], cache.shape[2]) != (batch, past):
            raise UsageError(
                f"{name} must be ({batch}, heads, {past}, head_dim), as attention_mask and input_ids have it, not "
                f"{cache.shape}"
            )
    _within("input_ids", ids, vocabulary)
    _within("position_ids", places, positions)
    if not np.isin(mask, (0, 1)).all():
        raise UsageError("attention_mask must hold 0 and 1 alone")
    size = batch * new * vocabulary * 4
    if size > LARGEST_LOGITS:
        raise UsageError(
            f"{batch} x {new} tokens make {size} bytes of logits, more than {LARGEST_LOGITS}; send fewer at a time"
        )


def _within(name: str, values: npt.NDArray[Any], end: int) -> None:
    if values.min() < 0 or values.max() >= end:
        raise UsageError(f"{name} must be 0 to {end - 1}; found {values.min()} to {values.max()}")

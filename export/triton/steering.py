"""What a request changes in the model's logits before a token is chosen, and what it gets of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.triton.settings import Settings


def steered(
    logits: npt.NDArray[np.floating[Any]],
    settings: Settings,
    *,
    prompt: Sequence[int],
    made: Sequence[int],
    ends: Collection[int],
) -> npt.NDArray[np.floating[Any]]:
    """Logits (vocabulary,) with the penalties of `Settings`, and -inf for end tokens that would come too early.

    In float64 where anything changes: no penalty that Settings takes makes a finite float32 logit overflow there. All
    tokens are below the size of the vocabulary.
    """
    early = len(made) < settings.min_tokens and bool(ends)
    additive = bool(made) and (settings.frequency_penalty != 0 or settings.presence_penalty != 0)
    if settings.repetition_penalty == 1.0 and not early and not additive:
        return logits
    changed = logits.astype(np.float64)
    if settings.repetition_penalty != 1.0:
        there = np.unique(np.array([*prompt, *made], np.int64))
        values, r = changed[there], settings.repetition_penalty
        changed[there] = np.where(values > 0, values / r, values * r)
    if additive:
        there, counts = np.unique(np.array(made, np.int64), return_counts=True)
        changed[there] -= settings.frequency_penalty * counts + settings.presence_penalty
    if early:
        changed[list(ends)] = -np.inf
    return changed


def log_probabilities(
    logits: npt.NDArray[np.floating[Any]], token: int, count: int | None
) -> tuple[tuple[float, ...], tuple[dict[int, float], ...]]:
    """(that of `token`,), ({token: log-probability} of the `count` likeliest,): of the model itself, before temperature
    and penalties. Both are empty where count is None."""
    if count is None:
        return (), ()
    wide = logits.astype(np.float64)
    log = wide - wide.max()
    log -= np.log(np.exp(log).sum())
    best = np.argsort(-log, kind="stable")[:count]
    return (float(log[token]),), ({int(i): float(log[i]) for i in best},)

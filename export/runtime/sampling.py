"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import UsageError


class Sampler:
    """Picks one token a row. temperature 0 is greedy; the same seed draws the same tokens.

    Total for every finite option: whatever the temperature, a row with at least one finite logit and no NaN or +inf
    (-inf is a token that must not come) has a token. Raises UsageError for a temperature below 0 or not finite, a top_k
    below 1, a top_p outside 0 ... 1, and for other rows.
    """

    def __init__(
        self, *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
    ) -> None:
        if not 0 <= temperature < np.inf:
            raise UsageError(f"temperature must be 0 (greedy) or more, and finite, not {temperature}")
        if top_k is not None and top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """logits (batch, vocabulary) -> tokens (batch,)."""
        if not np.isfinite(logits.max(axis=-1)).all():  # NaN and +inf come through a maximum, -inf is one alone
            raise UsageError("logits are NaN or infinite, or no token is left to choose from")
        if self.temperature == 0:
            return np.asarray(logits.argmax(axis=-1), np.int64)
        return np.array([self._random.choice(len(p), p=p) for p in map(self.probabilities, logits)], np.int64)

    def probabilities(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The distribution that one row (vocabulary,) is drawn from; temperature must be above 0."""
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):  # to -inf, and to a probability of 0
            p = np.exp((wide - wide.max()) / self.temperature)  # 1 at the maximum
        if self.top_k is not None and self.top_k < len(p):
            least = np.partition(p, len(p) - self.top_k)[len(p) - self.top_k]
            ties = np.flatnonzero(p == least)
            p[p < least] = 0
            p[ties[self.top_k - np.count_nonzero(p > least) :]] = 0  # of equals the first ones stay
        p /= p.sum()
        if self.top_p is not None:
            # Tokens of at most (1 - top_p) / vocabulary have 1 - top_p in all: the likelier ones alone reach top_p.
            # The likeliest always stays: where top_p is below the rounding of 1 - top_p, no token is above the bound.
            able = np.flatnonzero(p >= min((1 - self.top_p) / len(p), p.max()))
            order = able[np.argsort(-p[able], kind="stable")]  # likeliest first
            before = np.cumsum(p[order]) - p[order]  # probability of all likelier tokens
            kept = order[before < self.top_p]
            nucleus = np.zeros_like(p)
            nucleus[kept] = p[kept]
            p = nucleus / nucleus.sum()
        return np.asarray(p)

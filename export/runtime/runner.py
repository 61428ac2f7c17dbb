"""What every engine's runner has in common: prompts in, tokens out, through a prefill and steps that decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compress.errors import UsageError
from export.runtime.sampling import Sampler

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating[Any]]


class Tokenizer(Protocol):
    """The two methods of a Hugging Face tokenizer that generation uses."""

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""


class Runner(ABC):
    """One exported model with its key-value cache inside. `metadata` is what the export wrote into the graph."""

    metadata: dict[str, Any]
    vocabulary: int

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens in the cache, padding included; 0 before `prefill`."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the cache."""

    @abstractmethod
    def prefill(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """Start anew with prompts (batch, length), padded on the left where attention_mask is 0.

        Returns logits (batch, length, vocabulary); (batch, 1, vocabulary) from a graph with last logits only.
        """

    @abstractmethod
    def decode(self, token_ids: npt.ArrayLike) -> Logits:
        """Append tokens (batch,) or (batch, new) to the cache -> logits (batch, new, vocabulary)."""

    @abstractmethod
    def run_full(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """One forward pass over whole sequences, as for perplexity; the cache of `decode` stays as it is."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        max_new_tokens: int,
        tokenizer: Tokenizer | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt (ids, or text with a tokenizer), up to and including the end token.

        Greedy by default. temperature > 0 samples, from the top_k likeliest tokens and from the smallest set
        whose probability reaches top_p. `eos` defaults to the model's own end token(s). Prompts of unlike length
        are padded on the left. Raises UsageError for prompts or options that make no sense.
        """
        ids = [_encode(prompt, tokenizer) for prompt in prompts]
        if not ids or not all(ids):
            raise UsageError("generate needs at least one prompt, and every prompt at least one token")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        longest = max(map(len, ids)) + max_new_tokens
        if longest > self.metadata["max_positions"]:
            raise UsageError(
                f"{longest} tokens are more than the {self.metadata['max_positions']} positions of this model"
            )
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ends = _ends(self.metadata["eos_token_id"] if eos is None else eos)
        made: list[list[int]] = [[] for _ in ids]
        running = np.ones(len(ids), bool)
        logits = self.prefill(*left_pad(ids, self.metadata["pad_token_id"] or 0))
        while True:
            tokens = sampler(logits[:, -1])  # (batch,)
            for row in np.flatnonzero(running):
                made[row].append(int(tokens[row]))
                running[row] = tokens[row] not in ends
            if not running.any() or max(map(len, made)) >= max_new_tokens:
                return made
            logits = self.decode(tokens)

    def generate_text(self, prompts: Sequence[str], tokenizer: Tokenizer, **options: Any) -> list[str]:
        """`generate`, text in and text out, without the special tokens."""
        made = self.generate(prompts, tokenizer=tokenizer, **options)
        return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]

    def _checked(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None) -> tuple[Ids, Ids]:
        ids = np.ascontiguousarray(input_ids, np.int64)
        if ids.ndim != 2 or ids.size == 0:
            raise UsageError(f"input_ids must be (batch, length) with at least one token, not {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise UsageError(f"token ids must be in 0 ... {self.vocabulary - 1}, found {ids.min()} ... {ids.max()}")
        mask = np.ones_like(ids) if attention_mask is None else np.ascontiguousarray(attention_mask, np.int64)
        if mask.shape != ids.shape:
            raise UsageError(f"attention_mask is {mask.shape} where input_ids are {ids.shape}")
        return ids, mask

    def _continued(self, token_ids: npt.ArrayLike, batch: int) -> Ids:
        """What `decode` appends, (batch, new), checked. `batch`: sequences in the cache, 0 for none."""
        if not batch:
            raise UsageError("decode needs a cache: call prefill first")
        ids = np.asarray(token_ids, np.int64)
        ids = ids[:, None] if ids.ndim == 1 else ids
        if len(ids) != batch:
            raise UsageError(f"decode got {len(ids)} sequences where the cache holds {batch}")
        return self._checked(ids, None)[0]

    def _positions(self, mask: Ids, new: int) -> Ids:
        """Positions (batch, new) of the last `new` tokens of sequences with this mask (batch, past + new)."""
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -new:]
        if positions.max() >= self.metadata["max_positions"]:
            raise UsageError(f"this model has {self.metadata['max_positions']} positions; the sequence is longer")
        return np.ascontiguousarray(positions)


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Ids, Ids]:
    """input_ids and attention_mask (batch, longest), the shorter prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _encode(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise UsageError("prompts are text: give a tokenizer, or token ids")
    return tokenizer.encode(prompt)


def _ends(eos: int | Sequence[int] | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)

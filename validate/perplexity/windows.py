"""Text -> tokens -> windows, for perplexity. The texts themselves are in compress/calibration/text.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibration.text import TextData
from compress.calibration.tokens import A_TOKEN, BYTES_A_CHARACTER, CHARACTERS, MARGIN, more_characters
from compress.cli.shortages import free_memory
from compress.errors import MissingDependencyError, UsageError
from compress.source.vocabulary import check_ids


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length over one text.

    `ids` is the whole text, tokenised once, or a long enough beginning of it (`whole` is false): (tokens,). Window w is
    ids[w * stride : w * stride + length]. Its first token is context only; where windows overlap, so are the tokens
    that the one before has scored.
    """

    ids: Tensor
    length: int
    stride: int
    count: int
    begins_with_bos: bool
    whole: bool = True

    def scored_from(self, window: int) -> int:
        """The first position of `window` whose token is predicted and scored: every token at most once."""
        return 1 if window == 0 else max(1, self.length - self.stride)

    def predicted(self) -> int:
        """How many tokens are scored in all."""
        return sum(self.length - self.scored_from(w) for w in range(self.count))

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(index of the first window, ids (at most size, length)), in order."""
        for first in range(0, self.count, size):
            starts = range(first * self.stride, min(first + size, self.count) * self.stride, self.stride)
            yield first, torch.stack([self.ids[s : s + self.length] for s in starts])


def make_windows(
    text: TextData,
    tokenizer: Any,
    *,
    length: int,
    stride: int | None = None,
    max_windows: int | None = None,
    vocab_size: int | None = None,
) -> Windows:
    """Tokenise `text` as a whole, with the tokenizer's own choice of special tokens (BOS once, or none).

    A last, incomplete window is left out. Raises UsageError when the text is shorter than one window, or the
    tokenizer gives ids that are not in the model's vocabulary.
    """
    stride = length if stride is None else stride
    if length < 2 or not 1 <= stride <= length or (max_windows is not None and max_windows < 1):
        raise UsageError(
            f"windows of {length} tokens (--sequence-length), {stride} apart (--stride), at most {max_windows} "
            "(--max-windows): the length must be at least 2, the stride from 1 to the length, the number of windows at "
            "least 1"
        )
    needed = None if max_windows is None else (max_windows - 1) * stride + length
    ids, whole = _ids(text, tokenizer, needed)
    if len(ids) < length:
        raise UsageError(
            f"the text {text.name!r} is too short: {len(ids)} tokens, and one window takes {length}; "
            "give a longer text or a smaller --sequence-length"
        )
    if vocab_size is not None:
        check_ids([int(ids.max())], tokenizer, vocab_size, f"the text {text.name!r}")
    count = 1 + (len(ids) - length) // stride
    bos = getattr(tokenizer, "bos_token_id", None)
    return Windows(
        ids=ids,
        length=length,
        stride=stride,
        count=count if max_windows is None else min(count, max_windows),
        begins_with_bos=bos is not None and int(ids[0]) == bos,
        whole=whole,
    )


def _ids(text: TextData, tokenizer: Any, needed: int | None) -> tuple[Tensor, bool]:
    """The ids of the text tokenised as a whole, or where `needed` are enough those of its beginning, up to a line's
    end; whether it is the whole."""
    characters = sys.maxsize if needed is None else max(CHARACTERS, A_TOKEN * needed)
    while True:
        part, whole = text.beginning(characters)
        if not whole:
            part = part[: part.rfind("\n") + 1] or part
        _check_memory(len(part), text.name)
        ids = torch.tensor(tokenizer(part, verbose=False)["input_ids"], dtype=torch.long)
        if whole or needed is None or len(ids) >= needed + MARGIN:
            return ids, whole
        characters = more_characters(characters, needed, len(ids), f"the text {text.name!r}")


def _check_memory(characters: int, name: str) -> None:
    """Raise MissingDependencyError where a tokenizer would end the process for want of memory, as Rust code does."""
    takes, free = BYTES_A_CHARACTER * characters, free_memory()
    if free is not None and takes > free:
        raise MissingDependencyError(
            f"tokenising {characters:,} characters of the text {name!r} takes some {takes / 1e9:,.1f} GB of memory, "
            f"and {free / 1e9:,.1f} GB are free: give --max-windows, which reads as much as the windows take, or a "
            "shorter text"
        )

"""Calibration text -> token sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.textdata import ROW_SEPARATOR, TextData
from compress.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHARACTERS = 4 << 20
"""Of text that are tokenised at a time, at the most where they are enough: a row may have gigabytes."""


def token_sequences(
    text: TextData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
) -> Tensor:
    """`samples` sequences of `length` tokens, int64 (samples, length).

    The rows are shuffled with `seed`, joined by blank lines and tokenised once, as far as they are needed; the
    sequences follow one another without overlap. Raises UsageError when the text is too short, or holds tokens that
    the model does not have.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"{samples} samples of {length} tokens cannot calibrate anything: give at least 1 of 2")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(text.rows), generator=generator).tolist()
    needed = samples * length
    ids = _first_ids(text, order, tokenizer, needed)
    if len(ids) < needed:
        raise UsageError(
            f"the calibration text {text.name!r} has {len(ids):,} tokens, {samples} x {length} = {needed:,} are asked "
            f"for: lower --calibration-samples or --sequence-length, or give a longer --calibration-data"
        )
    tokens = torch.tensor(ids[:needed], dtype=torch.int64).view(samples, length)
    check_ids(ids[:needed], tokenizer, vocab_size, f"the calibration text {text.name!r}")
    return tokens


def _first_ids(text: TextData, order: list[int], tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """The token ids of the rows in this order: `needed` of them or more, or all."""
    characters = max(CHARACTERS, 32 * needed)
    while True:
        ids: list[int] = []
        whole = True
        for at in range(0, len(order), 512):
            piece, complete = text.beginning(characters, order[at : at + 512])
            whole &= complete
            # verbose=False: the text is longer than the model's context, and is cut by the caller.
            encoded = tokenizer(f"{piece}{ROW_SEPARATOR}", add_special_tokens=False, verbose=False)["input_ids"]
            ids.extend(encoded)
            if len(ids) >= needed:
                return ids
        if whole:
            return ids
        characters *= 8  # tokens of more than 32 characters: long runs of one

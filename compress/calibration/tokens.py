"""Calibration text -> token sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.calibration.text import ROW_SEPARATOR, TextData
from compress.errors import UsageError
from compress.source.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHARACTERS = 1 << 16
"""Minimum of text that is tokenised at a time. A row may have gigabytes, and a tokenizer takes 250 bytes of
memory for each character."""
A_TOKEN, MOST_A_TOKEN = 16, 1024
"""Characters that are tokenised for each token that is needed, at first and as a maximum. English has 4 to 5, long
runs of one character 100."""
BYTES_A_CHARACTER = 250
"""Memory that a tokenizer takes, measured with one of byte-level BPE."""
MARGIN = 64
"""Tokens at the end of a beginning that are not used: they may be others where the text goes on."""


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
    order = torch.randperm(len(text.rows), generator=generator)
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


def _first_ids(text: TextData, order: Tensor, tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """The token ids of the rows in this order: `needed` of them or more, or all."""
    ids: list[int] = []
    for at in range(0, len(order), 512):
        ids += _ids_of_rows(text, order[at : at + 512].tolist(), tokenizer, needed - len(ids))
        if len(ids) >= needed:
            break
    return ids


def _ids_of_rows(text: TextData, rows: list[int], tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """The token ids of these rows: `needed` of them or more, or all."""
    characters = max(CHARACTERS, A_TOKEN * needed)
    while True:
        piece, whole = text.beginning(characters, rows)
        # verbose=False: the text is longer than the model's context, and is cut by the caller.
        end = ROW_SEPARATOR if whole else ""
        ids: list[int] = tokenizer(f"{piece}{end}", add_special_tokens=False, verbose=False)["input_ids"]
        if whole:
            return ids
        if len(ids) >= needed + MARGIN:
            return ids[:-MARGIN]
        characters = more_characters(characters, needed, len(ids), f"the calibration text {text.name!r}")


def more_characters(characters: int, needed: int, found: int, what: str) -> int:
    """How much of a text to read when that many characters gave `found` tokens where `needed` are.

    Raises UsageError when so few tokens must not be had at any price: a tokenizer that takes a word for one unknown
    token would be given all of a text without spaces.
    """
    if characters >= max(CHARACTERS, MOST_A_TOKEN * needed):
        raise UsageError(
            f"the first {characters:,} characters of {what} give {found:,} tokens, and {needed:,} are needed: it has "
            "long runs of one character or no spaces, or is not what the tokenizer is made for; give another text"
        )
    return 4 * characters

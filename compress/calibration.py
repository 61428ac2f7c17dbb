"""Calibration text -> token sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.textdata import TextData
from compress.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    The rows are shuffled with `seed`, joined by blank lines and tokenised once; the sequences follow one another
    without overlap. Raises UsageError when the text is too short, or holds tokens that the model does not have.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"{samples} samples of {length} tokens cannot calibrate anything: give at least 1 of 2")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(text.rows), generator=generator).tolist()
    needed, at = samples * length, 0
    ids: list[int] = []
    while len(ids) < needed and at < len(order):
        # Tokenise in pieces, so that a corpus of gigabytes is not tokenised for a few thousand tokens.
        piece = [text.rows[i] for i in order[at : at + 512]]
        at += len(piece)
        # verbose=False: the text is longer than the model's context, and is cut below.
        text_ids = tokenizer("\n\n".join(piece) + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(text_ids)
    if len(ids) < needed:
        raise UsageError(
            f"the calibration text {text.name!r} has {len(ids):,} tokens, {samples} x {length} = {needed:,} are asked "
            f"for: lower --calibration-samples or --sequence-length, or give a longer --calibration-data"
        )
    tokens = torch.tensor(ids[:needed], dtype=torch.int64).view(samples, length)
    check_ids(ids[:needed], tokenizer, vocab_size, f"the calibration text {text.name!r}")
    return tokens

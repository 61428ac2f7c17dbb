"""Token ids that a tokenizer gives and the model may not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compress.errors import UsageError
from compress.progress import log


def longest_id(tokenizer: Any) -> int:
    """The largest token id that `tokenizer` knows, -1 for none. Ids may have gaps, so the count alone is no bound."""
    return max(len(tokenizer) - 1, max(tokenizer.get_vocab().values(), default=-1))


def warn_beyond(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Say on stderr that the tokenizer of model `name` knows tokens that the model does not have, if so."""
    beyond = longest_id(tokenizer) + 1 - vocab_size
    if beyond > 0:
        first = tokenizer.convert_ids_to_tokens(vocab_size)
        log(
            f"warning: the tokenizer of {name!r} knows {beyond} more tokens than the model has ({vocab_size}), the "
            f"first of them {first!r}; a text that holds one of them is refused"
        )


def check_ids(ids: Iterable[int], tokenizer: Any, vocab_size: int, what: str) -> None:
    """Raise UsageError when `ids`, the tokens of `what`, hold one that a model of `vocab_size` tokens does not have.

    Tokenizers may know more tokens than their model (a padding token added later): such a model runs as long as no
    text has them.
    """
    wrong = max(ids, default=-1)
    if wrong >= vocab_size:
        raise UsageError(
            f"{what} holds the token {tokenizer.convert_ids_to_tokens(wrong)!r} (id {wrong}), which the tokenizer "
            f"knows and the model, of {vocab_size} tokens, does not: remove it from the text; if it is all over the "
            "text, the tokenizer belongs to another model."
        )

"""Log-likelihoods of continuations, with everything that choices share computed once.

The choices of one item begin with the same context. They are laid out as one sequence, context first, and a mask
keeps them apart:

    tokens     c0 c1 c2 | a0 a1 | b0 b1 b2      position   0 1 2 | 3 4 | 3 4 5
    a token sees the context and the tokens of its own choice that are not after it

so a forward pass over len(context) + sum of len(choice) tokens gives what one pass for each choice would. The head
runs at the positions that predict a token of a choice, and nowhere else. Derived here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.model.decoder import Decoder, ProcrustesForCausalLM

TOKENS_AT_ONCE = 4096
ROWS_AT_ONCE = 512
_PADDING = -1


@dataclass(frozen=True)
class Item:
    """Token ids of one context, which is not empty, and of the continuations that are compared after it."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Score(NamedTuple):
    """`log_likelihood` in nats, summed over the tokens; `greedy`: each of them is the model's first choice."""

    log_likelihood: float
    greedy: bool


def encode(tokenizer: Any, context: str, continuations: Sequence[str]) -> Item:
    """Token ids by the rule of lm-eval-harness (`TemplateLM._encode_pair`).

    White space at the end of the context belongs to the continuation, and context + continuation are tokenised
    together: a continuation is what that has beyond the context's own tokens. The tokenizer adds the special tokens
    that it adds by itself; an empty context becomes BOS, or EOS where there is none.
    """

    def ids(text: str, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    if not context:
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise UsageError("the tokenizer has neither BOS nor EOS, so an empty context cannot be scored")
        return Item((prefix,), tuple(tuple(ids(text, special=False)) for text in continuations))
    kept = context.rstrip()
    space = context[len(kept) :]
    first = ids(kept, special=True)
    return Item(
        tuple(first), tuple(tuple(ids(kept + space + text, special=True)[len(first) :]) for text in continuations)
    )


def score(
    model: ProcrustesForCausalLM, items: Sequence[Item], tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[tuple[int, list[Score]]]:
    """(index of the item, a score for each of its continuations), longest items first.

    Items of similar length run together, `tokens_at_once` with padding. A context that is too long for the model
    loses its first tokens, for each continuation by itself. Raises UsageError for an empty continuation or one that
    is longer than the model's context.
    """
    longest = model.config.parsed_architecture().max_positions
    head = copy.deepcopy(model.lm_head).float()  # bfloat16 rounds a logit of 20 to the nearest 1/8
    pieces = sorted(_pieces(items, longest), key=lambda piece: (-_length(piece.item), piece.index, piece.first))
    waiting: dict[int, dict[int, list[Score]]] = {}
    for group in _groups(pieces, tokens_at_once):
        for piece, scores in zip(group, _run(model.model, head, [piece.item for piece in group]), strict=True):
            found = waiting.setdefault(piece.index, {})
            found[piece.first] = scores
            if sum(map(len, found.values())) == len(items[piece.index].continuations):
                yield piece.index, [s for first in sorted(found) for s in found[first]]
                del waiting[piece.index]


@dataclass(frozen=True)
class _Piece:
    """Some continuations of item `index`, from number `first` on."""

    index: int
    first: int
    item: Item


def _pieces(items: Sequence[Item], longest: int) -> Iterator[_Piece]:
    for index, item in enumerate(items):
        lengths = [len(c) for c in item.continuations]
        if not item.context or not lengths or min(lengths) < 1:
            raise UsageError(f"item {index} has an empty context or an empty continuation, which has no likelihood")
        if max(lengths) > longest:
            raise UsageError(f"item {index} has a continuation of {max(lengths)} tokens; the model takes {longest}")
        # The last token of a continuation is predicted and never read.
        if len(item.context) + max(lengths) - 1 <= longest:
            yield _Piece(index, 0, item)
            continue
        for number, continuation in enumerate(item.continuations):
            context = item.context[-(longest - len(continuation) + 1) :]
            yield _Piece(index, number, Item(context, (continuation,)))


def _length(item: Item) -> int:
    """Tokens that run through the decoder."""
    return len(item.context) + sum(len(c) - 1 for c in item.continuations)


def _groups(pieces: Sequence[_Piece], tokens_at_once: int) -> Iterator[list[_Piece]]:
    """Neighbours in order of falling length, padded to the first one's."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and (len(group) + 1) * _length(group[0].item) > tokens_at_once:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


@torch.inference_mode()
def _run(decoder: Decoder, head: nn.Module, items: Sequence[Item]) -> list[list[Score]]:
    width = max(_length(item) for item in items)
    ids, positions = (torch.zeros(len(items), width, dtype=torch.long) for _ in range(2))
    branch = torch.full((len(items), width), _PADDING)
    rows: list[int] = []  # of the flattened hidden states: what predicts each token of each continuation
    targets: list[int] = []
    for number, item in enumerate(items):
        start = number * width
        at = len(item.context)
        ids[number, :at] = torch.tensor(item.context)
        positions[number, :at] = torch.arange(at)
        branch[number, :at] = 0
        for choice, continuation in enumerate(item.continuations, start=1):
            end = at + len(continuation) - 1
            ids[number, at:end] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions[number, at:end] = len(item.context) + torch.arange(end - at)
            branch[number, at:end] = choice
            rows += [start + len(item.context) - 1, *range(start + at, start + end)]
            targets += continuation
            at = end
    mask = _visible(branch, positions, decoder.arch.sliding_window)
    hidden = decoder(ids, mask, positions, None).flatten(0, 1)  # (batch * width, d)
    likelihoods, greedy = _predict(head, hidden[torch.tensor(rows)], torch.tensor(targets))
    scores: list[list[Score]] = []
    at = 0
    for item in items:
        scores.append([])
        for continuation in item.continuations:
            part = slice(at, at + len(continuation))
            scores[-1].append(Score(float(likelihoods[part].sum()), bool(greedy[part].all())))
            at = part.stop
    return scores


def _visible(branch: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """branch, positions (batch, length) -> bool (batch, 1, query, key). Padding sees padding, so no row is empty."""
    key_branch, key = branch[:, None, :], positions[:, None, :]
    query_branch, query = branch[:, :, None], positions[:, :, None]
    visible = ((key_branch == query_branch) | (key_branch == 0)) & (key <= query)
    if window is not None:
        visible = visible & (key > query - window)
    return visible[:, None]


def _predict(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (tokens, d), targets (tokens,) -> log-probability float64 and "is the first choice", each (tokens,)."""
    likelihoods, greedy = [], []
    for part, target in zip(torch.split(hidden, ROWS_AT_ONCE), torch.split(targets, ROWS_AT_ONCE), strict=True):
        logits = head(part.float())  # (rows, vocabulary)
        likelihoods.append(logits.log_softmax(-1).gather(-1, target[:, None])[:, 0].double())
        greedy.append(logits.argmax(-1) == target)
    return torch.cat(likelihoods), torch.cat(greedy)

"""Attention masks: what callers may give, what attention is given.

As in transformers, a mask of two axes says which tokens are padding, and one of four axes says all by itself: booleans
(True where a query may look) or floats that are added to the scores (0, and -inf or the lowest value where it may not).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.errors import UsageError


def attention_mask_bool(
    attention_mask: Tensor | None,
    batch: int,
    past: int | Tensor,
    length: int,
    window: int | None,
    device: torch.device,
    keys: tuple[int, int] | None = None,
) -> Tensor:
    """Which key each query may see: bool (batch, 1, length, keys).

    attention_mask: (batch, past + length), 0 on padding, or None. `keys`: how many there are, and the position of the
    first, where the cache has others than the past + length of a growing one; they are needed where `past` is a tensor.
    Every query sees itself, so that a row of padding never becomes a softmax over nothing.
    """
    total, offset = _keys(past, length, keys)
    query = (torch.arange(length, device=device) + past)[:, None]  # (length, 1)
    key = torch.arange(offset, offset + total, device=device)[None, :]  # (1, total)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    visible = visible[None, None].expand(batch, 1, length, total)
    if attention_mask is not None:
        tokens = attention_mask.to(device).bool()[:, offset : offset + total]
        rest = tokens.new_zeros(len(tokens), total - tokens.shape[1])  # of a static cache: places not filled yet
        tokens = torch.cat((tokens, rest), dim=1)
        visible = visible & (tokens[:, None, None, :] | (key == query))
    return visible


def mask_unless_causal(
    given: Tensor | None,
    batch: int,
    past: int | Tensor,
    length: int,
    window: int | None,
    device: torch.device,
    keys: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    always: bool = False,
) -> Tensor | None:
    """What attention takes: bool or, of a mask that is added, `dtype` (batch or 1, heads or 1, length, keys).

    None where it is the plain causal one, unless `always`: attention then skips what nobody sees. `given` has passed
    `check_mask`. `past` is a tensor where a static cache is compiled; `keys` are given then.
    """
    total, offset = _keys(past, length, keys)
    if given is not None and given.dim() == 4:
        return _ready(given.to(device), dtype, total)
    if always or given is not None or isinstance(past, Tensor):
        return attention_mask_bool(given, batch, past, length, window, device, (total, offset))
    everything = window is None or window >= past + length
    if everything and ((past == 0 and length > 1) or (length == 1 and total == past + 1)):
        return None
    return attention_mask_bool(given, batch, past, length, window, device, (total, offset))


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position of each token counted from the first one that is not padding; (batch, total) -> the same shape."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def positions_for(
    given: Tensor | None, batch: int, past: int | Tensor, length: int, device: torch.device, learned: bool
) -> Tensor:
    """(batch, length) positions of new tokens when the caller gives none, as in transformers: `learned` ones by a mask
    of two axes as `positions_from_mask`, all others counted from the start of the cache, padding and holes included."""
    new = torch.arange(length, device=device) + past
    if learned and given is not None and given.dim() == 2:
        return positions_from_mask(given.to(device)).index_select(1, new)
    return new.expand(batch, length)


def check_mask(
    given: Tensor, batch: int, past: int, length: int, keys: tuple[int, int], heads: int, window: int | None
) -> None:
    """Raise UsageError for a mask whose shape or values could be read in more than one way.

    With a sliding window a mask of four axes may leave out the keys before it, as transformers' own cache does.
    """
    total, offset = keys
    shape = tuple(given.shape)
    if given.dim() == 2:
        widths = {past + length, offset + total}
        if shape[0] != batch or shape[1] not in widths:
            raise UsageError(
                f"attention_mask is {shape}; for {batch} sequences with {past} tokens in the cache and {length} new "
                f"ones it must be ({batch}, {past + length})"
            )
        if given.dtype != torch.bool and bool(((given != 0) & (given != 1)).any()):
            raise UsageError(
                "attention_mask of two axes has values other than 0 (padding) and 1 (token); a mask that is added to "
                "the scores has four axes: (batch, 1, queries, keys)"
            )
        return
    if given.dim() != 4:
        raise UsageError(
            f"attention_mask has shape {shape}: give (batch, tokens) with 0 on padding, or (batch, 1, queries, keys)"
        )
    widths = {total} if window is None or keys != (past + length, 0) else {total, min(past, window - 1) + length}
    if shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != length or shape[3] not in widths:
        short = "".join(f", or {width} without those before the window" for width in widths - {total})
        raise UsageError(
            f"attention_mask is {shape}; for {batch} sequences, {length} new tokens and {total} keys{short} it must be "
            f"({batch}, 1, {length}, {total}), or have {heads}, a value for each head, in place of 1"
        )
    if given.dtype != torch.bool and not given.is_floating_point():
        raise UsageError(
            f"attention_mask of four axes is {given.dtype}: give booleans, True where a query may look, or floats to "
            f"be added to the scores"
        )
    if given.is_floating_point() and bool((given == 1).any()) and bool(((given == 0) | (given == 1)).all()):
        raise UsageError(
            "attention_mask of four axes has the floats 0 and 1, which would be added to the scores and hide nothing: "
            "give booleans (mask.bool()), or 0 where a query may look and -inf where it may not"
        )


def _keys(past: int | Tensor, length: int, keys: tuple[int, int] | None) -> tuple[int, int]:
    """How many keys there are, and the position of the first."""
    if keys is None:
        assert isinstance(past, int)
        return past + length, 0
    return keys


def _ready(given: Tensor, dtype: torch.dtype, total: int) -> Tensor:
    """A mask of four axes over `total` keys in a form that leaves no query without keys: such a row looks at all that
    the mask has, evenly. Keys at the front that it does not have are hidden."""
    missing = (total - given.shape[-1], 0)
    if given.dtype == torch.bool:
        return F.pad(given | ~given.any(-1, keepdim=True), missing, value=False)
    # In this order: the lowest of a wider type becomes -inf, and that of this one has no value in a narrower type.
    return F.pad(given.to(dtype).clamp(min=torch.finfo(dtype).min), missing, value=-torch.inf)

"""Continuous batching: sequences of unlike length decode together, and come and go between two steps.

Each has a row of one cache on the device; the mask of a row says which of its places hold tokens, so that rows need no
padding to a common length. Active rows are the first ones: a sequence that leaves is replaced by the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import UsageError
from export.runtime.device import SLOTS, Executor, empty_cache, present_of, to_numpy
from export.runtime.profiles import DECODE, PREFILL
from export.runtime.runner import Logits


class Slots:
    """Up to `rows` sequences in one cache. Raises UsageError for what the engine was not built for.

    A model with a sliding window measures distances along the cache, where no gap may be, and is refused.
    """

    def __init__(self, executor: Executor, rows: int) -> None:
        spans = executor.spans
        if executor.metadata.get("sliding_window") is not None:
            raise UsageError("a model with a sliding window cannot be batched continuously: its cache has gaps")
        if not 1 <= rows <= spans.batch.most or spans.batch.least > 1:
            raise UsageError(
                f"{rows} sequences at a time do not fit an engine for {spans.batch.least} to {spans.batch.most}; it "
                "must take one by itself, too"
            )
        self.executor, self.rows = executor, rows
        self.longest = min(spans.cache.most, int(executor.metadata["max_positions"]))
        self.longest_prompt = min(spans.prompt.most, self.longest)
        self._handles: list[int] = []  # of the active rows, in order
        self._lengths: list[int] = []
        self._made = 0
        self._past: dict[str, Tensor] = {}
        self._seen = torch.zeros(rows, 0, dtype=torch.int64)
        self._grow(max(SLOTS, spans.cache.least))

    @property
    def active(self) -> tuple[int, ...]:
        """The handles of the sequences that are there, in the order in which `step` takes and gives them."""
        return tuple(self._handles)

    @property
    def room(self) -> int:
        """Tokens that each row of the cache has place for."""
        return int(self._seen.shape[1]) - 1

    def length(self, handle: int) -> int:
        """Tokens of a sequence that are in the cache."""
        return self._lengths[self._handles.index(handle)]

    def admit(self, ids: Sequence[int]) -> tuple[int, Logits]:
        """Prefill a prompt; returns its handle and the logits (vocabulary,) of what comes next."""
        if len(self._handles) == self.rows:
            raise UsageError(f"all {self.rows} rows are taken; release one first")
        least, most = self.executor.spans.prompt.least, self.longest_prompt
        if not least <= len(ids) <= most:
            raise UsageError(f"a prompt has {least} to {most} tokens here, not {len(ids)}")
        new, device = len(ids), self.executor.device
        feeds = {
            "input_ids": torch.tensor([list(ids)], dtype=torch.int64, device=device),
            "attention_mask": torch.ones(1, new, dtype=torch.int64, device=device),
            "position_ids": torch.arange(new, dtype=torch.int64, device=device)[None],
            **empty_cache(self.executor, 1),
        }
        outputs = self.executor.run(PREFILL, feeds)
        self._grow(new)
        row = len(self._handles)
        for name, past in self._past.items():
            past[row, :, :new] = outputs[present_of(name)][0]
        self._seen[row, :-1] = 0
        self._seen[row, :new] = 1
        self._handles.append(self._made)
        self._lengths.append(new)
        self._made += 1
        return self._handles[-1], to_numpy(outputs["logits"])[0, -1]

    def step(self, tokens: Sequence[int]) -> Logits:
        """One more token for each active sequence, in the order of `active`; logits (active, vocabulary)."""
        count = len(self._handles)
        if not count or len(tokens) != count:
            raise UsageError(f"a step takes a token for each of the {count} active sequences, not {len(tokens)}")
        if max(self._lengths) >= self.longest:
            raise UsageError(f"a sequence has {self.longest} tokens already, which is all that there is room for")
        self._grow(max(self._lengths))
        device = self.executor.device
        slot = torch.tensor(self._lengths, dtype=torch.int64, device=device)[:, None]
        feeds = {
            "input_ids": torch.tensor(list(tokens), dtype=torch.int64, device=device)[:, None],
            "attention_mask": self._seen[:count],
            "position_ids": slot,
            **{name: past[:count] for name, past in self._past.items()},
        }
        outputs = self.executor.run(DECODE, feeds)
        for name, past in self._past.items():
            new = outputs[present_of(name)][:, :, -1:]
            past[:count].scatter_(2, slot[:, :, None, None].expand_as(new), new)
        self._seen[:count].scatter_(1, slot, 1)
        self._lengths = [length + 1 for length in self._lengths]
        return to_numpy(outputs["logits"])[:, -1]

    def release(self, handle: int) -> None:
        """Forget a sequence; its row is free for another."""
        row, last = self._handles.index(handle), len(self._handles) - 1
        if row != last:
            for past in self._past.values():
                past[row] = past[last]
            self._seen[row] = self._seen[last]
        self._handles[row], self._lengths[row] = self._handles[last], self._lengths[last]
        self._handles.pop()
        self._lengths.pop()

    def _grow(self, length: int) -> None:
        """Room for one token more than `length` in every row, as far as the engine goes."""
        most = self.executor.spans.cache.most
        if length < self.room or self.room == most:
            return
        room = min((length // SLOTS + 1) * SLOTS, most)
        device, kept = self.executor.device, max(self.room, 0)
        larger = empty_cache(self.executor, self.rows, room)
        for name, past in self._past.items():
            larger[name][:, :, :kept] = past
        self._past = larger
        seen = torch.zeros(self.rows, room + 1, dtype=torch.int64, device=device)
        seen[:, :kept] = self._seen[:, :kept]
        seen[:, -1] = 1
        self._seen = seen

"""A runner whose cache stays on the device: what a TensorRT engine is driven by.

The cache has room for more tokens than it holds, in steps of `SLOTS`, and the mask says which of them are there: the
shapes of a decode step then stay the same for many tokens, so that one CUDA graph of engine and cache update serves
them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.errors import UsageError
from export.runtime.profiles import DECODE, PREFILL, Spans, shape_at
from export.runtime.runner import Ids, Logits, Runner

SLOTS = 64
"""Tokens by which the cache's room grows."""


class Executor(Protocol):
    """An engine that is loaded. `axes`: of each input; `types`: of each input and output; `spans`: what it takes."""

    device: torch.device
    axes: dict[str, tuple[int | str, ...]]
    types: dict[str, torch.dtype]
    spans: Spans
    metadata: dict[str, Any]
    vocabulary: int

    def run(self, profile: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Enqueue one pass on the current stream; the outputs are new tensors on the device."""
        ...


@dataclass
class _Cache:
    """past: input -> (batch, kv_heads, room, head_dim); `seen` (batch, room + 1) on the device, the mask of a step that
    adds one token; `host` the mask of the tokens that are there, (batch, length)."""

    past: dict[str, Tensor]
    seen: Tensor
    host: Ids
    step: _Step | None = None

    @property
    def room(self) -> int:
        return int(self.seen.shape[1]) - 1

    @property
    def mask(self) -> Tensor:
        """(batch, room)."""
        return self.seen[:, :-1]

    @property
    def length(self) -> int:
        return int(self.host.shape[1])


@dataclass
class _Step:
    """A decode step of one token in fixed tensors, and its CUDA graph once it is captured."""

    feeds: dict[str, Tensor]
    slot: Tensor  # int64 (1,): where the new token goes
    outputs: dict[str, Tensor] = field(default_factory=dict)
    graph: torch.cuda.CUDAGraph | None = None


class DeviceRunner(Runner):
    """See `Runner`. Raises UsageError for sizes that the engine was not built for.

    `graphs`: capture decode steps as CUDA graphs, on a GPU. A model with a sliding window counts distances along the
    cache, where no gap may be: its cache is replaced by the engine's own output at every step, without graphs.
    """

    def __init__(self, executor: Executor, *, graphs: bool = True) -> None:
        self.executor = executor
        self.metadata, self.vocabulary = dict(executor.metadata), executor.vocabulary
        self._names = cache_names(executor)
        self._exact = self.metadata.get("sliding_window") is not None
        self._graphs = graphs and executor.device.type == "cuda" and not self._exact
        self._cache: _Cache | None = None

    @property
    def length(self) -> int:
        """See `Runner.length`."""
        return 0 if self._cache is None else self._cache.length

    def reset(self) -> None:
        """See `Runner.reset`."""
        self._cache = None

    def prefill(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """See `Runner.prefill`."""
        ids, mask = self._checked(input_ids, attention_mask)
        self._cache = None
        outputs = self._from_nothing(ids, mask)
        self._cache = self._make(
            mask, self._room(mask.shape[1]), {name: outputs[present_of(name)] for name in self._names}
        )
        return to_numpy(outputs["logits"])

    def run_full(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """See `Runner.run_full`."""
        return to_numpy(self._from_nothing(*self._checked(input_ids, attention_mask))["logits"])

    def decode(self, token_ids: npt.ArrayLike) -> Logits:
        """See `Runner.decode`."""
        ids = self._continued(token_ids, 0 if self._cache is None else len(self._cache.host))
        cache = self._cache
        assert cache is not None
        new = ids.shape[1]
        mask = np.concatenate([cache.host, np.ones_like(ids)], axis=1)
        positions = self._positions(mask, new)
        if not self._exact and cache.length + new > cache.room:
            cache = self._make(cache.host, self._room(cache.length + new), cache.past)
        if new == 1 and not self._exact:
            logits = self._one_token(cache, ids, positions)
        else:
            logits = self._several(cache, ids, positions)
        cache.host = mask
        self._cache = cache
        return logits

    # -- inside --------------------------------------------------------------------------------------------

    def _room(self, length: int) -> int:
        """Slots of a cache that holds `length` tokens: one more, if the engine takes so many."""
        most = self.executor.spans.cache.most
        if length > most:
            raise UsageError(f"{length} tokens in the cache are more than the {most} that this engine was built for")
        room = length if self._exact else (length // SLOTS + 1) * SLOTS
        return max(min(room, most), length, min(self.executor.spans.cache.least, most))

    def _from_nothing(self, ids: Ids, mask: Ids) -> dict[str, Tensor]:
        batch, new = ids.shape
        self._check_sizes(PREFILL, batch, new)
        feeds = self._feeds(ids, mask, self._positions(mask, new))
        return self.executor.run(PREFILL, {**feeds, **empty_cache(self.executor, batch)})

    def _make(self, host: Ids, room: int, past: Mapping[str, Tensor]) -> _Cache:
        """A cache of that room with what `past` holds of the tokens of `host` at its beginning."""
        batch, length = host.shape
        seen = torch.zeros(batch, room + 1, dtype=torch.int64)
        seen[:, :length], seen[:, -1] = torch.from_numpy(host), 1
        kept = {}
        for name, old in past.items():
            kept[name] = old.new_zeros(batch, old.shape[1], room, old.shape[3])
            kept[name][:, :, :length] = old[:, :, :length]
        return _Cache(kept, seen.to(self.executor.device), host)

    def _several(self, cache: _Cache, ids: Ids, positions: Ids) -> Logits:
        """Tokens appended by the engine's prefill, or by its decode where the cache may have no gap."""
        new, length = ids.shape[1], cache.length
        profile = DECODE if new == 1 else PREFILL
        self._check_sizes(profile, len(ids), new)
        mask = torch.cat([cache.mask, torch.ones(ids.shape, dtype=torch.int64, device=cache.mask.device)], dim=1)
        outputs = self.executor.run(profile, {**self._feeds(ids, mask, positions), **cache.past})
        if self._exact:
            cache.past = {name: outputs[present_of(name)] for name in self._names}
            cache.seen = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        else:
            for name, past in cache.past.items():
                past[:, :, length : length + new] = outputs[present_of(name)][:, :, cache.room :]
            cache.mask[:, length : length + new] = 1
        return to_numpy(outputs["logits"])

    def _one_token(self, cache: _Cache, ids: Ids, positions: Ids) -> Logits:
        """One token a sequence in tensors whose addresses stay: what a CUDA graph can hold."""
        if cache.step is None:
            self._check_sizes(DECODE, len(ids), 1)
            own = {name: value.clone() for name, value in self._feeds(ids, cache.seen, positions).items()}
            feeds = {**own, **cache.past, "attention_mask": cache.seen}
            cache.step = _Step(feeds, torch.zeros(1, dtype=torch.int64, device=cache.seen.device))
        step, length = cache.step, cache.length
        step.feeds["input_ids"].copy_(torch.from_numpy(ids))
        step.feeds["position_ids"].copy_(torch.from_numpy(positions))
        step.slot.fill_(length)
        if self._graphs and step.graph is None:
            self._run_step(step)  # shapes are set and memory is taken outside of the capture
            torch.cuda.synchronize(self.executor.device)
            step.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(step.graph):
                self._run_step(step)
        if step.graph is not None:
            step.graph.replay()
        else:
            self._run_step(step)
        cache.seen[:, length] = 1
        return to_numpy(step.outputs["logits"])

    def _run_step(self, step: _Step) -> None:
        """The engine, and its new keys and values put into their slot: the same again has the same effect."""
        step.outputs = self.executor.run(DECODE, step.feeds)
        for name in self._names:
            step.feeds[name].index_copy_(2, step.slot, step.outputs[present_of(name)][:, :, -1:])

    def _feeds(self, ids: Ids, mask: Ids | Tensor, positions: Ids) -> dict[str, Tensor]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: torch.as_tensor(value).to(self.executor.device) for name, value in given.items()}

    def _check_sizes(self, profile: int, batch: int, new: int) -> None:
        spans = self.executor.spans
        checks = [("sequences", batch, spans.batch)]
        if profile == PREFILL:
            checks.append(("new tokens", new, spans.prompt))
        for what, size, span in checks:
            if not span.least <= size <= span.most:
                raise UsageError(f"this engine was built for {span.least} to {span.most} {what}, not {size}")


def cache_names(executor: Executor) -> list[str]:
    """The inputs that are the cache."""
    return [name for name in executor.axes if name.startswith("past_key_values.")]


def empty_cache(executor: Executor, batch: int, room: int = 0) -> dict[str, Tensor]:
    """The cache inputs for that many sequences, zeros in `room` places."""
    return {
        name: torch.zeros(
            shape_at(executor.axes[name], batch, 1, room), dtype=executor.types[name], device=executor.device
        )
        for name in cache_names(executor)
    }


def present_of(name: str) -> str:
    """The output that has what the input `name` becomes."""
    return name.replace("past_key_values.", "present.")


def to_numpy(logits: Tensor) -> Logits:
    """Logits on the host, float32."""
    found: Logits = logits.float().cpu().numpy()
    return found

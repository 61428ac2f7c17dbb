"""The largest value of every tensor that an exported graph holds: what float16, which ends at 65,504, would lose.

A CPU computes in float32 and never meets that end; a TensorRT engine in float16 does, on the first text. So the
finished checkpoint is run over a few calibration sequences, one block at a time, and the largest value of each result
is noted: of the linears with what lies between their factors, of the attention and the products in the MLP, of the
stream after each block, of the logits. What a graph computes in float32 in every type (norms, rotary angles) is left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from compress.calibration.streams import Runner, embed
from compress.checkpoint.reader import CheckpointReader
from compress.model.blocks import Block, rms_normalise
from compress.model.decoder import Decoder, ProcrustesForCausalLM
from compress.progress import track
from compress.structures import cast

SEQUENCES = 4
"""Number of calibration sequences. The largest activations are those of a few features and of first tokens, in any
text."""

FLOAT16_MAX = 65_504.0
SAFE = FLOAT16_MAX / 2
"""Other texts go further than the one that was watched."""

_RESULTS = frozenset(
    ("mm", "bmm", "addmm", "baddbmm", "_addmm_activation", "linear", "mul", "add", "sub", "silu", "relu", "gelu")
)


@dataclass(frozen=True)
class Largest:
    """`values`: place -> largest absolute value there, on so many `tokens`."""

    tokens: int
    values: dict[str, float]

    def worst(self) -> tuple[str, float]:
        """The place with the largest value; of equal ones the one with the longest name."""
        return max(self.values.items(), key=lambda item: (item[1], len(item[0])))

    def all(self) -> dict[str, Any]:
        """For checkpoint/activations.json."""
        return {"tokens": self.tokens, "largest": {name: _json(size) for name, size in self.values.items()}}

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: the worst place, and all that float16 would be at risk with."""
        place, value = self.worst()
        risky = {name: size for name, size in self.values.items() if not size <= SAFE}
        beyond = {name: _json(size) for name, size in risky.items()}
        return {"tokens": self.tokens, "place": place, "value": _json(value), "beyond": beyond}


class Watch(TorchDispatchMode):
    """While active, notes the results of every product and sum under the name of the linear that is running, and of an
    attention its scores."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: dict[str, float] = {}
        self.place = ""
        self.in_attention = False
        self._attention = _WatchAttention(self)

    def __enter__(self) -> Watch:
        self._attention.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._attention.__exit__(*error)  # type: ignore[no-untyped-call]

    def note(self, place: str, value: Tensor) -> None:
        """NaN counts as infinite."""
        if value.numel():
            low, high = torch.aminmax(value.detach())
            size = float(torch.maximum(high, -low).nan_to_num(torch.inf))
            self.values[place] = max(self.values.get(place, 0.0), size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        known = name in _RESULTS and not self.in_attention
        if known and isinstance(result, Tensor) and result.is_floating_point():
            self.note(self.place, result)
        return result

    def inside(self, name: str, module: torch.nn.Module) -> None:
        """What `module` computes goes by `name`."""
        outer: list[str] = []

        def enter(*_: Any) -> None:
            outer.append(self.place)
            self.place = name

        def leave(*_: Any) -> None:
            self.place = outer.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


class _WatchAttention(TorchFunctionMode):
    """One kernel or, where PyTorch has none for these sizes or its version, many operations, among them the sum with a
    mask of -inf: what is noted are the scores before it, in both cases."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.watch.in_attention = True
        try:
            self.watch.note(f"{self.watch.place}, the attention scores", _scores(args[0], args[1]))
            return func(*args, **(kwargs or {}))
        finally:
            self.watch.in_attention = False


@torch.no_grad()
def largest_activations(checkpoint: Path, tokens: Tensor, device: torch.device, batch: int) -> Largest:
    """Run `checkpoint` over the first of `tokens` (samples, length), one block in memory at a time, in float32."""
    reader = CheckpointReader(checkpoint)
    arch, config = reader.architecture, reader.config
    few = tokens[:SEQUENCES]
    runner = Runner(arch, few.shape[1], device, batch)
    structures, skips, biases = config.parsed_structures(), config.parsed_skips(), config.parsed_extra_biases()
    ends = {name: reader.get(name).float() for name in reader.names() if not name.startswith("model.layers.")}
    x, watch = embed(ends, arch, few).to(device), Watch()
    watch.note("the embeddings", x)
    for layer in track(range(arch.num_layers), description="largest activations"):
        prefix = f"model.layers.{layer}."
        stored = {n.removeprefix(prefix): reader.get(n) for n in reader.names() if n.startswith(prefix)}
        with torch.device("meta"):
            block = Block(arch, structures, layer, skips[2 * layer : 2 * layer + 2], biases)
        block.load_state_dict({n: t.to(device) for n, t in cast(stored, torch.float32).items()}, assign=True)
        x = _through(block.requires_grad_(False).eval(), f"layers.{layer}", x, watch, runner)
    _head(reader, ends, x[:1], watch)
    return Largest(few.numel(), watch.values)


def _through(block: Block, name: str, x: Tensor, watch: Watch, runner: Runner) -> Tensor:
    for role in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "attn_skip", "mlp_skip"):
        try:
            watch.inside(f"{name}.{role}", block.get_submodule(role))
        except AttributeError:  # no gate
            continue
    watch.place = name
    tap = _tap(name, watch)
    parts = []
    for _, (part,) in runner.batches(x):
        with watch:
            parts.append(block(part, runner.rotary, runner.mask, tap=tap))  # (batch, length, d)
        watch.note(f"{name}, the stream after it", parts[-1])
    return torch.cat(parts)


def _tap(name: str, watch: Watch) -> Callable[[str, Tensor], None]:
    said = {"attn.o": "what attn.o reads", "mlp.down": "what mlp.down reads"}

    def tap(place: str, value: Tensor) -> None:
        if place in said:
            watch.note(f"{name}, {said[place]}", value)

    return tap


def _head(reader: CheckpointReader, ends: dict[str, Tensor], x: Tensor, watch: Watch) -> None:
    """Last norm, head map and logits of one sequence."""
    config = reader.config
    with torch.device("meta"):
        model = ProcrustesForCausalLM(config)
    decoder: Decoder = model.model
    h: Tensor = rms_normalise(x, reader.architecture.norm_eps)
    state = {n: t.to(x.device) for n, t in ends.items()}
    if decoder.head_map is not None:
        found = {n.removeprefix("model.head_map."): t for n, t in state.items() if n.startswith("model.head_map.")}
        decoder.head_map.load_state_dict(found, assign=True)
        h = decoder.head_map(h)
        watch.note("the head map", h)
    head = {n.removeprefix("lm_head."): t for n, t in state.items() if n.startswith("lm_head.")}
    if config.tie_word_embeddings:
        table = {n.rpartition(".")[2]: t for n, t in state.items() if n.startswith("model.embed_tokens.")}
        head = {**table, **head}
    model.lm_head.load_state_dict(head, assign=True)
    watch.place = "the head"
    with watch:
        model.lm_head(h)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """The largest |q k^T| / sqrt(head_dim), or a bound of it that is safe; q (batch, heads, length, head_dim), k the
    same with as many heads or fewer."""
    scale = q.shape[-1] ** -0.5
    bound: Tensor = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * scale
    if bound <= SAFE:
        return bound.reshape(1)
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # (batch, groups, heads of a group * length, head_dim)
    largest = [
        (a @ b.T).abs().amax() * scale for one, other in zip(q, k, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return torch.stack(largest)


def _json(value: float) -> float | str:
    return value if value < float("inf") else "inf"

"""The compressed decoder in PyTorch: one pre-norm block for every family, structured linears in factors.

Normalisation is parameter-free RMS everywhere: scales, biases and LayerNorm's mean subtraction have been
folded into the neighbouring weights (compress/invariance.py), which leaves the output unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from compress.architecture import Architecture
from compress.errors import ArtifactError
from compress.families.base import check_sizes
from compress.structures import DenseStructure, Structure, structure_from_config

Tap = Callable[[str, Tensor], None]
"""Called while a block runs with a place and the tensor there: "attn.in" and "mlp.in" (the normalised stream that
the readers see), "attn.o" and "mlp.down" (the inputs of the writers), "attn.out" and "mlp.out" (their outputs)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32 at the least. Shape is kept."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_frequencies(arch: Architecture) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim / 2,) in float32 and the factor on cos and sin, by transformers' own rules."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=arch.num_heads * arch.head_dim,  # not read: head_dim is given
        num_attention_heads=arch.num_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_positions,
        rope_parameters=dict(arch.rope or {}),
    )
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


@dataclass(frozen=True)
class Rotary:
    """cos and sin, each (batch, 1, sequence, head_dim / 2), in the half-split convention."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """x: (batch, heads, sequence, head_dim)."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_mask_bool(
    attention_mask: Tensor | None,
    batch: int,
    past: int,
    length: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Which key each query may see: bool (batch, 1, length, past + length).

    attention_mask: (batch, past + length), 0 on padding, or None. Every query sees itself, so that a row of
    padding never becomes a softmax over nothing.
    """
    query = torch.arange(past, past + length, device=device)[:, None]  # (length, 1)
    key = torch.arange(past + length, device=device)[None, :]  # (1, past + length)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    visible = visible[None, None].expand(batch, 1, length, past + length)
    if attention_mask is not None:
        visible = visible & (attention_mask.bool()[:, None, None, :] | (key == query))
    return visible


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position of each token counted from the first one that is not padding; (batch, total) -> the same shape."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _silent(place: str, value: Tensor) -> None:
    """The tap of a block that nobody listens to."""


class StructuredLinear(nn.Module):
    """A linear layer whose weight is a structure; runs in factors. (..., in_features) -> (..., out_features)."""

    def __init__(self, structure: Structure, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.structure = structure
        self.factor_names = tuple(structure.shapes())
        for name, shape in structure.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.bias = (
            nn.Parameter(torch.empty(structure.out_features, dtype=dtype), requires_grad=False) if bias else None
        )

    def factors(self) -> dict[str, Tensor]:
        """The structure's parameters by name."""
        return {name: getattr(self, name) for name in self.factor_names}

    def forward(self, x: Tensor) -> Tensor:
        y = self.structure.apply(self.factors(), x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return repr(self.structure)


class SkipMatrix(nn.Module):
    """The d x d matrix that turns the residual stream from one rotation into the next (`--rotation block`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class HeadNorm(nn.Module):
    """RMS normalisation of each head's queries or keys with a learned scale (Qwen 3)."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query attention over structured projections."""

    q: StructuredLinear
    k: StructuredLinear
    v: StructuredLinear
    o: StructuredLinear

    def __init__(self, arch: Architecture, structures: Mapping[str, Structure], layer: int) -> None:
        super().__init__()
        self.arch, self.layer = arch, layer
        for role in ("q", "k", "v", "o"):
            self.add_module(role, _linear(arch, structures, layer, f"attn.{role}"))
        if arch.qk_norm:
            self.q_norm = HeadNorm(arch.head_dim, arch.norm_eps)
            self.k_norm = HeadNorm(arch.head_dim, arch.norm_eps)

    def inner(self, h: Tensor, rotary: Rotary | None, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """What `o` reads: the heads' mixed values, (batch, length, heads * head_dim)."""
        batch, length, _ = h.shape

        def heads(x: Tensor, count: int) -> Tensor:
            # (batch, length, heads, head_dim) -> (batch, heads, length, head_dim)
            return x.view(batch, length, count, self.arch.head_dim).transpose(1, 2)

        q = heads(self.q(h), self.arch.num_heads)
        k = heads(self.k(h), self.arch.num_kv_heads)
        v = heads(self.v(h), self.arch.num_kv_heads)
        if self.arch.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary.rotate(q), rotary.rotate(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        grouped = self.arch.num_heads != self.arch.num_kv_heads
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return mixed.transpose(1, 2).reshape(batch, length, self.arch.num_heads * self.arch.head_dim)


class FeedForward(nn.Module):
    """down(act(gate(h)) * up(h)), or down(act(up(h))) where the architecture is not gated."""

    gate: StructuredLinear
    up: StructuredLinear
    down: StructuredLinear

    def __init__(self, arch: Architecture, structures: Mapping[str, Structure], layer: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[arch.activation]
        self.gated = arch.gated
        for role in arch.linears():
            block, _, short = role.partition(".")
            if block == "mlp":
                self.add_module(short, _linear(arch, structures, layer, role))

    def inner(self, h: Tensor) -> Tensor:
        """What `down` reads, (batch, length, intermediate_size)."""
        out: Tensor = self.activation(self.gate(h)) * self.up(h) if self.gated else self.activation(self.up(h))
        return out


class Block(nn.Module):
    """One decoder block. `structures` maps "layers.{i}.{role}" to a structure; what is absent is dense."""

    def __init__(self, arch: Architecture, structures: Mapping[str, Structure], layer: int, skips: bool) -> None:
        super().__init__()
        self.eps = arch.norm_eps
        self.attn = Attention(arch, structures, layer)
        self.mlp = FeedForward(arch, structures, layer)
        self.attn_skip: nn.Module = SkipMatrix(arch.hidden_size) if skips else nn.Identity()
        self.mlp_skip: nn.Module = SkipMatrix(arch.hidden_size) if skips else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor,
        cache: Cache | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """x: (batch, length, d) -> the same shape; mask as `attention_mask_bool`."""
        say = tap or _silent
        say("attn.in", h := rms_normalise(x, self.eps))
        say("attn.o", inner := self.attn.inner(h, rotary, mask, cache))
        say("attn.out", out := self.attn.o(inner))
        x = self.attn_skip(x) + out
        say("mlp.in", h := rms_normalise(x, self.eps))
        say("mlp.down", inner := self.mlp.inner(h))
        say("mlp.out", out := self.mlp.down(inner))
        result: Tensor = self.mlp_skip(x) + out
        return result


def _linear(arch: Architecture, structures: Mapping[str, Structure], layer: int, role: str) -> StructuredLinear:
    n, m = arch.linears()[role]
    structure = structures.get(f"layers.{layer}.{role}") or DenseStructure(in_features=m, out_features=n)
    if (structure.out_features, structure.in_features) != (n, m):
        raise ArtifactError(
            f"layers.{layer}.{role} is {n} x {m} in the architecture but its structure in config.json is "
            f"{structure.out_features} x {structure.in_features}"
        )
    return StructuredLinear(structure, arch.has_bias(role))


class ProcrustesConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """config.json of a compressed checkpoint: the architecture and every linear's structure."""

    model_type = "procrustes"

    architecture: dict[str, Any] | None = None
    structures: dict[str, Any] | None = None
    rotation: str = "none"
    skip: str = "none"
    center_embedding: bool = False
    head_map: bool = False
    head_bias: bool = False
    format_version: int = 1
    num_hidden_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_architecture(
        cls, arch: Architecture, structures: Mapping[str, Structure], **choices: Any
    ) -> ProcrustesConfig:
        """The config of a model.

        `choices` are rotation, skip, center_embedding, head_map, head_bias and tie_word_embeddings.
        """
        return cls(
            architecture=arch.to_dict(),
            structures={name: s.to_config() for name, s in structures.items() if s.name != "dense"},
            num_hidden_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            num_attention_heads=arch.num_heads,
            num_key_value_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            vocab_size=arch.vocab_size,
            max_position_embeddings=arch.max_positions,
            bos_token_id=arch.bos_token_id,
            eos_token_id=arch.eos_token_id,
            pad_token_id=arch.pad_token_id,
            **choices,
        )

    def parsed_architecture(self) -> Architecture:
        """The `Architecture`; raises ArtifactError when config.json lacks it."""
        if not isinstance(self.architecture, dict):
            raise ArtifactError("config.json has model_type procrustes but no `architecture`: compress the model again")
        arch = check_sizes(Architecture.from_dict(self.architecture))
        if arch.activation not in ACTIVATIONS:
            raise ArtifactError(f"config.json gives the activation {arch.activation!r}, which this version has not")
        return arch

    def parsed_structures(self) -> dict[str, Structure]:
        """Linear name -> structure, for the linears that are not dense."""
        structures = self.structures or {}
        if not isinstance(structures, dict):
            raise ArtifactError("config.json has `structures` that are not a JSON object: compress the model again")
        return {name: structure_from_config(c) for name, c in structures.items()}


class HeadMap(nn.Module):
    """What the last norm's scale gamma (and shift) become before a tied head: Q^T diag(gamma) Q, or gamma itself.

    The scale can only be folded into a head of its own; a tied head stays tied and pays this instead: d x d
    where the stream is rotated, a vector (d,) where it is not.
    """

    def __init__(self, width: int, diagonal: bool, bias: bool) -> None:
        super().__init__()
        shape = (width,) if diagonal else (width, width)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        scaled = x * self.weight
        return scaled if self.bias is None else scaled + self.bias


class Decoder(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: ProcrustesConfig) -> None:
        super().__init__()
        self.arch = arch = config.parsed_architecture()
        structures = config.parsed_structures()
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        if arch.positions == "learned":
            self.embed_positions = nn.Embedding(arch.max_positions + arch.position_offset, arch.hidden_size)
        if config.center_embedding:
            self.center = nn.Parameter(torch.empty(arch.hidden_size), requires_grad=False)
        skips = config.skip == "dense"
        self.layers = nn.ModuleList(Block(arch, structures, i, skips) for i in range(arch.num_layers))
        self.head_map: HeadMap | None = None
        if config.head_map:
            self.head_map = HeadMap(arch.hidden_size, config.rotation == "none", arch.norm == "layernorm")

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(batch, length) ids -> (batch, length, d)."""
        x: Tensor = self.embed_tokens(input_ids)
        if self.arch.positions == "learned":
            x = x + self.embed_positions(position_ids + self.arch.position_offset)
        if hasattr(self, "center"):
            x = x - (x @ self.center)[..., None] * self.center
        return x

    def rotary(self, position_ids: Tensor) -> Rotary | None:
        """cos and sin for (batch, length) positions, or None for learned positions."""
        return rotary_for(self.arch, position_ids)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> Tensor:
        batch, length = input_ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        mask = attention_mask_bool(attention_mask, batch, past, length, self.arch.sliding_window, input_ids.device)
        x, rotary = self.embed(input_ids, position_ids), self.rotary(position_ids)
        for block in self.layers:
            x = block(x, rotary, mask, cache)
        x = rms_normalise(x, self.arch.norm_eps)
        return x if self.head_map is None else self.head_map(x)


def rotary_for(arch: Architecture, position_ids: Tensor) -> Rotary | None:
    """cos and sin for (batch, length) positions, in float32; None where positions are learned."""
    if arch.positions != "rope":
        return None
    frequencies, scaling = rope_frequencies(arch)
    angles = position_ids[:, None, :, None].float() * frequencies.to(position_ids.device)
    return Rotary(angles.cos() * scaling, angles.sin() * scaling)


class ProcrustesForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A compressed causal LM that loads with `AutoModelForCausalLM.from_pretrained` after `import compress`."""

    config_class = ProcrustesConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: ProcrustesConfig) -> None:
        super().__init__(config)
        arch = config.parsed_architecture()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=config.head_bias)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """A compressed checkpoint always brings every weight; there is nothing to draw at random."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length, vocabulary), or of the last `logits_to_keep` positions when that is not 0.

        input_ids: (batch, length); attention_mask: (batch, past + length), 0 on (left) padding; position_ids:
        (batch, length), counted from the first token that is not padding when not given.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            length = input_ids.shape[1]
            full = attention_mask if attention_mask is not None else input_ids.new_ones(len(input_ids), past + length)
            position_ids = positions_from_mask(full)[:, -length:]
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

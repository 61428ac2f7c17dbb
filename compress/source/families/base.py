"""What a family describes of a model: its architecture, and where each tensor is in the checkpoint.

A family describes; it has no maths. Nothing here reads a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.architecture import Architecture
from compress.artifact.reading import shown
from compress.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LM_HEAD = "lm_head.weight"
"""Name of the output projection in every Hugging Face causal LM that we support."""

# Hugging Face activation name -> name in Architecture. The two tanh forms are one formula.
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class ParameterNames:
    """Checkpoint names of a linear or a norm; `bias` is None where the model has none."""

    weight: str
    bias: str | None = None

    def all(self) -> tuple[str, ...]:
        """The names that exist."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class LayerNames:
    """Checkpoint names of one block: linears by role of `Architecture.linears()`, pre-norms, q/k norms."""

    linears: dict[str, ParameterNames]
    attn_norm: ParameterNames
    mlp_norm: ParameterNames
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint names of a whole model. `positions` is None with RoPE, `lm_head` with tied embeddings."""

    embed: str
    positions: str | None
    layers: tuple[LayerNames, ...]
    final_norm: ParameterNames
    lm_head: str | None


@dataclass(frozen=True)
class Family:
    """`architecture(config)` raises UsageError for what the family does not support."""

    name: str
    model_types: tuple[str, ...]
    architecture: Callable[[PretrainedConfig], Architecture]
    tensor_names: Callable[[Architecture], TensorNames]


def expected_shapes(architecture: Architecture, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs -> its shape, in checkpoint names."""
    d = architecture.hidden_size
    shapes: dict[str, tuple[int, ...]] = {names.embed: (architecture.vocab_size, d)}
    if names.positions is not None:
        shapes[names.positions] = (architecture.max_positions + architecture.position_offset, d)
    for layer in names.layers:
        for role, (out_features, in_features) in architecture.linears().items():
            linear = layer.linears[role]
            shapes[linear.weight] = (out_features, in_features)
            if linear.bias is not None:
                shapes[linear.bias] = (out_features,)
        for norm in (layer.attn_norm, layer.mlp_norm):
            shapes.update(dict.fromkeys(norm.all(), (d,)))
        for head_norm in (layer.q_norm, layer.k_norm):
            if head_norm is not None:
                shapes[head_norm] = (architecture.head_dim,)
    shapes.update(dict.fromkeys(names.final_norm.all(), (d,)))
    if names.lm_head is not None:
        shapes[names.lm_head] = (architecture.vocab_size, d)
    return shapes


def has_source_bias(architecture: Architecture, role: str) -> bool:
    """True if the source model has a bias on `role`. (`Architecture.has_bias` is about the folded model.)"""
    if role == "attn.o":
        return architecture.output_bias
    return architecture.attention_bias if role.startswith("attn.") else architecture.mlp_bias


def activation(config: PretrainedConfig, field: str) -> str:
    """The activation of `config` under the name that Architecture uses; UsageError when there is none."""
    name = getattr(config, field)
    if name not in ACTIVATIONS:
        raise UsageError(
            f"config.json has {field} = {shown(name)}, which is not supported; supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def refuse_quantized(config: PretrainedConfig) -> None:
    """Raise UsageError when the weights are stored quantised (GPTQ, AWQ, bitsandbytes, FP8)."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise UsageError(
        f"config.json has a quantization_config ({method}): structured matrices are fitted to float weights, "
        "so take the model that this one was quantised from."
    )

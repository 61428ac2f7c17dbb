"""Llama 1/2/3, Mistral, SmolLM2, Qwen2, Qwen2.5 and Qwen3: RMSNorm, RoPE, gated MLP, grouped key/value heads.

SmolLM2 is of model type `llama`, Qwen2.5 of `qwen2`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architecture import Architecture, check_sizes
from compress.artifact.reading import shown
from compress.errors import UsageError
from compress.source.families.base import (
    LM_HEAD,
    Family,
    LayerNames,
    ParameterNames,
    TensorNames,
    activation,
    has_source_bias,
    refuse_quantized,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Types whose frequencies are constants. `dynamic` and `longrope` change theirs with the length of the input.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Role -> name inside `model.layers.{i}`.
_LINEARS = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def architecture(config: PretrainedConfig) -> Architecture:
    """Describe a model of the Llama family.

    `pretraining_tp` is ignored, as transformers does: it only split the same product. Raises UsageError for
    RoPE whose frequencies depend on the input, partial RoPE, layers with and without a sliding window in one
    model, quantised weights and activations other than those of `ACTIVATIONS`.
    """
    refuse_quantized(config)
    kind = config.model_type
    # Where the biases are is in the config for llama and qwen3, and fixed in the model's code for the others.
    projection_bias = bool(config.attention_bias) if kind in ("llama", "qwen3") else False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return check_sizes(
        Architecture(
            family="llama",
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            norm="rmsnorm",
            norm_eps=config.rms_norm_eps,
            positions="rope",
            position_offset=0,
            rope=_rope(config, head_dim),
            activation=activation(config, "hidden_act"),
            gated=True,
            attention_bias=True if kind == "qwen2" else projection_bias,
            output_bias=projection_bias,
            mlp_bias=bool(config.mlp_bias) if kind == "llama" else False,
            qk_norm=kind == "qwen3",
            tied=config.tie_word_embeddings,
            sliding_window=_sliding_window(config),
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )


def _rope(config: PretrainedConfig, head_dim: int) -> dict[str, Any]:
    """The rotary parameters as transformers 5 has them: rope_type, rope_theta and the keys of the scaling."""
    rope = dict(config.rope_parameters or {})
    rope_type = rope.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise UsageError(
            f"This model's rotary positions are of type {shown(rope_type)}, which is not supported (supported: "
            f"{', '.join(ROPE_TYPES)}); types whose frequencies depend on the input's length, such as "
            "dynamic and longrope, cannot be exported as constants."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            "This model rotates a part of each head only (partial_rotary_factor = "
            f"{rope['partial_rotary_factor']}), which is not supported."
        )
    if head_dim % 2:
        raise UsageError(f"Rotary positions need an even head width, but config.json gives head_dim = {head_dim}.")
    return rope


def _sliding_window(config: PretrainedConfig) -> int | None:
    """Keys that a query sees, itself included; None for all. The same for every layer, or UsageError."""
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "llama" and window is not None and window < config.max_position_embeddings:
        raise UsageError(
            f"config.json has sliding_window = {window}, which no llama model of transformers reads; if the model "
            "needs it, its model_type is mistral, and if not, remove the key."
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    # Mistral's code goes by sliding_window alone, Qwen's by layer_types.
    if config.model_type == "mistral" and not kinds:
        return window
    if kinds <= {"full_attention"} and (window is None or config.model_type != "mistral"):
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return window
    raise UsageError(
        f"This model mixes kinds of attention (layer_types has {', '.join(sorted(kinds))}; sliding_window is "
        f"{window}); only models whose layers are all full or all sliding are supported."
    )


def tensor_names(architecture: Architecture) -> TensorNames:
    """Names of `LlamaForCausalLM.state_dict()`, which Mistral and Qwen share."""

    def linear(name: str, role: str) -> ParameterNames:
        has_bias = has_source_bias(architecture, role)
        return ParameterNames(f"{name}.weight", f"{name}.bias" if has_bias else None)

    def layer(index: int) -> LayerNames:
        prefix = f"model.layers.{index}"
        return LayerNames(
            linears={role: linear(f"{prefix}.{name}", role) for role, name in _LINEARS.items()},
            attn_norm=ParameterNames(f"{prefix}.input_layernorm.weight"),
            mlp_norm=ParameterNames(f"{prefix}.post_attention_layernorm.weight"),
            q_norm=f"{prefix}.self_attn.q_norm.weight" if architecture.qk_norm else None,
            k_norm=f"{prefix}.self_attn.k_norm.weight" if architecture.qk_norm else None,
        )

    return TensorNames(
        embed="model.embed_tokens.weight",
        positions=None,
        layers=tuple(layer(i) for i in range(architecture.num_layers)),
        final_norm=ParameterNames("model.norm.weight"),
        lm_head=None if architecture.tied else LM_HEAD,
    )


FAMILY = Family("llama", ("llama", "mistral", "qwen2", "qwen3"), architecture, tensor_names)

"""OPT (125m to 66b): LayerNorm before each sub-block, biases, learned positions that start at row 2, ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.architecture import Architecture, check_sizes
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

POSITION_OFFSET = 2  # rows of the position table before position 0 (OPTLearnedPositionalEmbedding)
LAYER_NORM_EPS = 1e-5  # not in the config: the default of torch.nn.LayerNorm, which the model uses

# Role -> name inside `model.decoder.layers.{i}`.
_LINEARS = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}


def architecture(config: PretrainedConfig) -> Architecture:
    """Describe an OPT model.

    Raises UsageError for opt-350m's post-norm and embedding projections, models fine-tuned without the final
    norm, norms without parameters, quantised weights and activations other than those of `ACTIVATIONS`.
    """
    refuse_quantized(config)
    if not config.do_layer_norm_before:
        raise UsageError(
            "This OPT model normalises after each sub-block (do_layer_norm_before is false, as in "
            "opt-350m): its norms cannot be folded into the weights that follow; choose another size (125m, "
            "1.3b, 2.7b, 6.7b, ...)."
        )
    if config.word_embed_proj_dim != config.hidden_size:
        raise UsageError(
            f"This OPT model projects its embeddings from {config.word_embed_proj_dim} to "
            f"{config.hidden_size} features (word_embed_proj_dim, as in opt-350m), which is not supported; "
            "choose another size."
        )
    if config._remove_final_layer_norm:
        raise UsageError(
            "This OPT model has no final norm (_remove_final_layer_norm is true), which is not supported; "
            "choose a checkpoint that has one."
        )
    if not config.layer_norm_elementwise_affine:
        raise UsageError(
            "This OPT model has norms without parameters (layer_norm_elementwise_affine is false), "
            "which is not supported; choose a checkpoint whose norms have a scale and a bias."
        )
    if config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"config.json gives hidden_size = {config.hidden_size}, which is not a multiple of "
            f"num_attention_heads = {config.num_attention_heads}."
        )
    return check_sizes(
        Architecture(
            family="opt",
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_dim,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            norm="layernorm",
            norm_eps=LAYER_NORM_EPS,
            positions="learned",
            position_offset=POSITION_OFFSET,
            rope=None,
            activation=activation(config, "activation_function"),
            gated=False,
            attention_bias=config.enable_bias,
            output_bias=config.enable_bias,
            mlp_bias=config.enable_bias,
            qk_norm=False,
            tied=config.tie_word_embeddings,
            sliding_window=None,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )


def tensor_names(architecture: Architecture) -> TensorNames:
    """Names of `OPTForCausalLM.state_dict()`."""

    def norm(prefix: str) -> ParameterNames:
        return ParameterNames(f"{prefix}.weight", f"{prefix}.bias")

    def linear(name: str, role: str) -> ParameterNames:
        has_bias = has_source_bias(architecture, role)
        return ParameterNames(f"{name}.weight", f"{name}.bias" if has_bias else None)

    def layer(index: int) -> LayerNames:
        prefix = f"model.decoder.layers.{index}"
        return LayerNames(
            linears={role: linear(f"{prefix}.{name}", role) for role, name in _LINEARS.items()},
            attn_norm=norm(f"{prefix}.self_attn_layer_norm"),
            mlp_norm=norm(f"{prefix}.final_layer_norm"),  # of the block, not of the model
        )

    return TensorNames(
        embed="model.decoder.embed_tokens.weight",
        positions="model.decoder.embed_positions.weight",
        layers=tuple(layer(i) for i in range(architecture.num_layers)),
        final_norm=norm("model.decoder.final_layer_norm"),
        lm_head=None if architecture.tied else LM_HEAD,
    )


FAMILY = Family("opt", ("opt",), architecture, tensor_names)

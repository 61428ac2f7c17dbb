"""Keys of config.json that change what a model computes, and that none of the supported models reads.

transformers passes over a key that it does not know, so that a model with such a key (a scale on its logits, a mixture
of experts, another attention) would be computed as one without, by everything that it is compared with as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.artifact.reading import shown
from compress.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OFF: tuple[Any, ...] = (None, False, 0, 0.0, [])
_ONE: tuple[Any, ...] = (None, 1, 1.0)

# Key -> values that change nothing.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    # scales: Cohere, Granite, MiniCPM, Gemma
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "attention_multiplier": (None,),
    "scale_emb": _ONE,
    "scale_depth": _OFF,
    "dim_model_base": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
    # norms and clipping
    "clip_qkv": _OFF,
    "use_qk_norm": _OFF,
    "qk_norm": _OFF,
    "qk_layernorm": _OFF,
    # positions
    "alibi": _OFF,
    "position_embedding_type": (None, "rope", "rotary", "absolute", "learned"),
    "rotary_pct": _ONE,
    "no_rope_layers": _OFF,
    "no_rope_layer_interval": _OFF,
    "attn_temperature_tuning": _OFF,
    "attention_chunk_size": _OFF,
    # shape of the block
    "use_parallel_residual": _OFF,
    "parallel_attn": _OFF,
    "num_local_experts": _OFF,
    "num_experts": _OFF,
    "n_routed_experts": _OFF,
    "cross_attention_layers": _OFF,
}

# Of the rotary parameters: what transformers computes with, by type, and what it may find beside it.
_ROPE = ("rope_type", "rope_theta", "partial_rotary_factor")
_ROPE_KEYS = {
    "default": _ROPE,
    "linear": (*_ROPE, "factor"),
    "llama3": (*_ROPE, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (*_ROPE, "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
_NEUTRAL_ROPE = ("type", "finetuned", "original_max_position_embeddings")


def refuse_foreign(config: PretrainedConfig) -> None:
    """Raise UsageError when config.json has a key that changes the model and that its class does not read."""
    for key, neutral in _FOREIGN.items():
        value = getattr(config, key, None)
        if value not in neutral:
            raise UsageError(
                f"config.json has {key} = {shown(value)}, which no {config.model_type} model of transformers reads, "
                "so that it would be computed as another model; it is of another kind than its model_type says, and is "
                "not supported."
            )
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in _ROPE_KEYS:
        known = (*_ROPE_KEYS[rope["rope_type"]], *_NEUTRAL_ROPE)
        for key, value in rope.items():
            if key not in known and value is not None:
                raise UsageError(
                    f"config.json has {key} = {shown(value)} among its rotary parameters, which type "
                    f"{rope['rope_type']!r} does not read in transformers; it would be another model, and is not "
                    "supported."
                )

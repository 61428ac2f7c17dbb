"""Tiny models with random weights, written as checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.checkpoint.loading import load_model
from compress.checkpoint.writer import ShardWriter, write_config
from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM
from compress.structures import Structure

VOCABULARY = 61


def llama(**changes: Any) -> Architecture:
    """Two layers, grouped-query attention, tied embeddings."""
    values: dict[str, Any] = {
        "family": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_positions": 64,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "positions": "rope",
        "position_offset": 0,
        "rope": {"rope_type": "default", "rope_theta": 10000.0},
        "activation": "silu",
        "gated": True,
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "tied": True,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Architecture(**{**values, **changes})


def opt(**changes: Any) -> Architecture:
    """Two layers, LayerNorm, biases everywhere, learned positions, ReLU."""
    values: dict[str, Any] = {
        "family": "opt",
        "num_kv_heads": 4,
        "norm": "layernorm",
        "positions": "learned",
        "position_offset": 2,
        "rope": None,
        "activation": "relu",
        "gated": False,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }
    return llama(**{**values, **changes})


def write_checkpoint(
    folder: Path,
    arch: Architecture,
    structures: Mapping[str, Structure] | None = None,
    override: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **choices: Any,
) -> ProcrustesForCausalLM:
    """Random weights of the right scale under `folder`, but for those in `override`; returns the model."""
    choices.setdefault("tie_word_embeddings", arch.tied)
    config = ProcrustesConfig.from_architecture(arch, structures or {}, **choices)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in ProcrustesForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes = {n: s for n, s in shapes.items() if n not in ("lm_head.weight", "lm_head.U", "lm_head.R")}
    with ShardWriter(folder, dtype, structures) as writer:
        for name, shape in shapes.items():
            structure = (structures or {}).get(name.removeprefix("model.").rpartition(".")[0])
            value, factor = _random(name, shape, generator), name.rpartition(".")[2]
            if structure is not None and not structure.storage_dtypes(dtype).get(factor, dtype).is_floating_point:
                value = structure.random_factors(generator)[factor]
            writer.add(name, value if override is None else override.get(name, value))
    write_config(folder, config, dtype)
    return load_model(folder)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    value = torch.randn(shape, generator=generator)
    if name.endswith(".A") and len(shape) == 2:
        return torch.linalg.qr(value.T)[0].T.contiguous()  # orthonormal rows
    if name.endswith("center"):
        return value / value.norm()
    if name.endswith("norm.weight") or (name.endswith("head_map.weight") and len(shape) == 1):
        return 1 + 0.2 * value
    return value / shape[-1] ** 0.5 if len(shape) > 1 else 0.2 * value

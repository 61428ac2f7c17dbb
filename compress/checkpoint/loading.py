"""A checkpoint as a model, and its class under transformers' AutoModelForCausalLM."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.checkpoint.reader import CheckpointReader, storage_types
from compress.errors import ArtifactError
from compress.model.blocks import StructuredLinear
from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> ProcrustesForCausalLM:
    """The whole checkpoint as a PyTorch model in eval mode. Raises ArtifactError on missing or surplus tensors.

    Afterwards transformers' auto classes know the model type too (`register`), AutoTokenizer included.
    """
    register()
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        model = ProcrustesForCausalLM(reader.config)
    state = {name: reader.get(name) for name in reader.names()}
    types = storage_types(reader.config.parsed_structures(), dtype)
    state = {n: t.to(types.get(n, dtype)) if t.is_floating_point() else t for n, t in state.items()}
    if reader.config.tie_word_embeddings:
        tied = {n: t for n, t in state.items() if n.startswith("model.embed_tokens.")}
        state |= {n.replace("model.embed_tokens", "lm_head"): t for n, t in tied.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{folder} does not hold the model its config.json describes: {error}") from error
    for linear in model.modules():
        if isinstance(linear, StructuredLinear):
            linear.structure.check_factors({name: getattr(linear, name) for name in linear.factor_names})
    if reader.config.tie_word_embeddings:
        model.tie_weights()
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the model type procrustes. Safe to call again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(ProcrustesConfig.model_type, ProcrustesConfig, exist_ok=True)
    AutoModelForCausalLM.register(ProcrustesConfig, ProcrustesForCausalLM, exist_ok=True)

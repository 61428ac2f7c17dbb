"""The source model after exact rewrites alone, in the format of a checkpoint: what validation compares with."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import read_rotations
from compress.checkpoint.writer import ShardWriter, config_for, write_config, write_rotations
from compress.model.decoder import ProcrustesForCausalLM
from compress.rewrites.folding import folded
from compress.rewrites.rotations import Rotations, rotate_block
from compress.source.model import ModelSource


def write_dense(source: ModelSource, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The dense, norm-folded, unrotated model in the format of OUT/checkpoint: the baseline for speed."""
    write_rewritten(source, Rotations.none(), folder, dtype)


def write_rewritten(
    source: ModelSource, rotations: Rotations, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """The dense model folded and rotated, nothing approximated, in the format of OUT/checkpoint."""
    model = folded(source, dtype)
    arch = model.arch
    with ShardWriter(folder, dtype) as shards:
        for name, tensor in model.ends(rotations).items():
            shards.add(name, tensor)
        for layer in range(arch.num_layers):
            for name, tensor in rotate_block(model.block(layer), arch, layer, rotations).items():
                shards.add(f"model.layers.{layer}.{name}", tensor)
    write_config(folder, config_for(arch, {}, rotations), dtype, source.generation_config())
    write_rotations(folder, rotations)
    source.tokenizer().save_pretrained(folder)


def rewritten_model(source: ModelSource, checkpoint: Path, folder: Path) -> ProcrustesForCausalLM:
    """The source folded and rotated exactly as `checkpoint` was before its weights were approximated (rung 1).

    Written to `folder`, an empty one, which may go once this has returned.
    """
    write_rewritten(source, read_rotations(checkpoint).exact(), folder)
    return load_model(folder)

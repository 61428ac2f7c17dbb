"""A plain Hugging Face checkpoint of the compressed model: dense weights, the source's class, no import needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS, Architecture, extra_biases
from compress.checkpoint.reader import CheckpointReader, read_rotations
from compress.checkpoint.writer import ShardWriter
from compress.errors import UsageError
from compress.recipe import Recipe, kinds_of
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations, unrotate
from compress.source.families import TensorNames, tensor_names
from compress.source.generation import write_generation_config
from compress.source.model import ModelSource
from compress.structures import cast

SLICED = (
    "{name}: the skips of --structure slice drop part of the stream, which its own class cannot express; do without "
    "--materialize-dense"
)
HEAD_BIAS = (
    "{name}: its compressed head needs a bias that its own class does not have; do without --embedding, or without "
    "--materialize-dense"
)
NO_PLAIN = (
    "Such a model has no plain equivalent: use --structure kron with a rotation, auto, pifa or lowrank, or do without "
    "--materialize-dense"
)


def write_plain(
    source: ModelSource,
    model: FoldedModel,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the dense equivalents of all structured linears of `checkpoint` as the source's own architecture.

    The rotation is undone, so that skip and head maps vanish: W_in = W' Q^T, W_out = Q W'. Pre-norms keep scale 1 and
    shift 0 (theirs are in the weights); embeddings, last norm and head are the source's own, or the products of their
    factors where they are compressed. Raises UsageError for what the source's own class cannot express: biases that it
    has not, and writes that its LayerNorm would change.
    """
    reader, rotations = CheckpointReader(checkpoint), read_rotations(checkpoint)
    arch = reader.architecture
    if reader.config.skip == "slice":
        raise UsageError(SLICED.format(name=source.name))
    names = tensor_names(arch)
    stored = next(reader.get(name).dtype for name in reader.names() if name.startswith("model.embed_tokens."))
    with ShardWriter(folder, dtype) as shards:
        ends = [names.embed, names.positions, names.final_norm.weight, names.final_norm.bias, names.lm_head]
        compressed = _plain_ends(source, reader, rotations, names)
        for name in ends:
            if name is not None:
                shards.add(name, compressed[name] if name in compressed else model.reader.get(name))
        for i, layer in enumerate(names.layers):
            for sub, norm in zip(SUB_BLOCKS, (layer.attn_norm, layer.mlp_norm), strict=True):
                shards.add(norm.weight, torch.ones(arch.hidden_size))
                if norm.bias is not None:
                    shards.add(norm.bias, torch.zeros(arch.hidden_size))
                for role in (*arch.readers(sub), WRITERS[sub]):
                    linear, side = f"layers.{i}.{role}", arch.side(role)
                    q = rotations.at(2 * i + SUB_BLOCKS.index(sub) + (side == "out"))
                    factors = cast(reader.factors(linear), torch.float32)  # before their product, not after it
                    dense = unrotate(reader.structure(linear).dense(factors), side, q)
                    if arch.norm == "layernorm" and side == "out":
                        _check_mean_free(dense, linear, stored)
                    shards.add(layer.linears[role].weight, dense)
                    bias, name = reader.bias(linear), layer.linears[role].bias
                    if bias is None:
                        continue
                    if name is None:
                        raise UsageError(
                            f"{source.name}: {linear} needs a bias that its own class does not have; "
                            f"do without --materialize-dense"
                        )
                    shards.add(name, unrotate(bias.float(), "out", q) if side == "out" else bias)
            for name in (layer.q_norm, layer.k_norm):
                if name is not None:
                    shards.add(name, model.reader.get(name))
    config = type(source.config())(**{k: v for k, v in source.config().to_dict().items() if k != "quantization_config"})
    config.dtype = dtype
    config.save_pretrained(folder)
    write_generation_config(folder, source.generation_config())
    source.tokenizer().save_pretrained(folder)


def check_plain(name: str, arch: Architecture, recipe: Recipe) -> None:
    """Raise UsageError when the recipe's result cannot be written by `write_plain`, or may turn out so after hours of
    fitting: where --structure auto has a structure on its menu that gives a writer a mean.
    """
    if not recipe.has_plain_equivalent():
        raise UsageError(SLICED.format(name=name))
    if recipe.corrects_biases():
        added = extra_biases(arch, tuple(arch.linears()))
        if added:
            raise UsageError(
                f"{name}: --inner bias gives {added[0]} and others a bias that its own class does not have; do without "
                f"it, or without --materialize-dense"
            )
    if recipe.embedding < 1 and arch.norm == "layernorm" and not arch.tied:
        raise UsageError(HEAD_BIAS.format(name=name))
    if arch.norm == "layernorm" and _writes_means(arch, recipe):
        has = "may have" if recipe.entry().chooses else "has"
        raise UsageError(
            f"{name}: what {recipe.flags()} makes of the linears that write into the stream {has} a mean, which the "
            f"source's LayerNorm would remove. {NO_PLAIN}"
        )


def _writes_means(arch: Architecture, recipe: Recipe) -> bool:
    """True if writers mix the coordinates of the stream with no regard to their mean."""

    def structure(config: Mapping[str, Any]) -> str:
        core = config.get("core")
        return structure(core) if isinstance(core, Mapping) else str(config.get("structure"))

    writers = [f"layers.{layer}.{role}" for layer in range(arch.num_layers) for role in WRITERS.values()]
    chosen = {structure(recipe.layers[name]) for name in writers if name in recipe.layers}
    if not all(name in recipe.layers for name in writers):
        chosen |= set(kinds_of(recipe))
    return bool(chosen & {"compot", "compot24", "gs"}) or ("kron" in chosen and not recipe.absorbs_mixes())


def _plain_ends(
    source: ModelSource, reader: CheckpointReader, rotations: Rotations, names: TensorNames
) -> dict[str, Tensor]:
    """Source names -> what a compressed embedding and head are in the source's coordinates; nothing where dense.

    A head of its own has the last norm's scale in its weight, so that the norm gets scale 1.
    """
    arch, plain = reader.architecture, {}
    if reader.config.embedding_rank:
        U, R = (reader.get(f"model.embed_tokens.{factor}").float() for factor in ("U", "R"))
        plain[names.embed] = unrotate(U @ R, "in", rotations.at(0))
    if reader.config.head_rank:
        if reader.config.head_bias:
            raise UsageError(HEAD_BIAS.format(name=source.name))
        U, R = (reader.get(f"lm_head.{factor}").float() for factor in ("U", "R"))
        assert names.lm_head is not None
        plain[names.lm_head] = unrotate(U @ R, "in", rotations.at(2 * arch.num_layers))
        plain[names.final_norm.weight] = torch.ones(arch.hidden_size)
    return plain


def _check_mean_free(weight: Tensor, linear: str, stored: torch.dtype) -> None:
    """Raise UsageError when a writer's output has a mean, which the compressed model keeps and LayerNorm removes."""
    mean = float(weight.double().mean(0).norm()) * len(weight) ** 0.5
    if mean > max(1e-5, 2 * torch.finfo(stored).eps) * float(weight.norm()):
        raise UsageError(
            f"{linear} writes a mean into the stream, which the source's LayerNorm would remove. {NO_PLAIN}"
        )

"""The attention part of the graph: rotary angles, the mask, the cache, and grouped-query attention itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch

from compress.architecture import Architecture
from compress.model.blocks import rope_frequencies
from export.graph.external import ONNX_TYPES
from export.graph.fusion import Fused
from export.graph.writer import GraphWriter, Weight


@dataclass(frozen=True)
class Shared:
    """Values computed once and read by every layer."""

    tokens: str  # int64 (2,): batch, sequence
    mask: str  # bool (batch, 1, sequence, total_sequence), true where a query sees a key
    cos: str | None  # (batch, sequence, head_dim / 2), or None for learned positions
    sin: str | None


def shared_values(g: GraphWriter, arch: Architecture) -> Shared:
    """The nodes before the first layer. Reads the inputs input_ids, attention_mask and position_ids."""
    tokens = g.op("Shape", "input_ids")
    with g.scope("mask"):
        mask = _mask(g, arch.sliding_window)
    with g.scope("rope"):
        cos, sin = _rotary(g, arch) if arch.positions == "rope" else (None, None)
    return Shared(tokens, mask, cos, sin)


def _mask(g: GraphWriter, window: int | None) -> str:
    """causal and (the key is a token, or it is the query itself): no row is empty, so no softmax is NaN."""
    total = g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2))
    length = g.op("Squeeze", g.op("Shape", "input_ids", start=1, end=2))
    past = g.op("Sub", total, length)
    key = g.op("Range", g.scalar(0), total, g.scalar(1))  # (total,)
    query = g.op("Unsqueeze", g.op("Range", past, total, g.scalar(1)), g.ints(-1))  # (sequence, 1)
    causal = g.op("GreaterOrEqual", query, key)  # (sequence, total)
    if window is not None:
        causal = g.op("And", causal, g.op("Greater", key, g.op("Sub", query, g.scalar(window))))
    token = g.op("Cast", "attention_mask", to=onnx.TensorProto.BOOL)  # (batch, total)
    token = g.op("Unsqueeze", token, g.ints(1, 2))  # (batch, 1, 1, total)
    return g.op("And", causal, g.op("Or", token, g.op("Equal", query, key)))  # (batch, 1, sequence, total)


def _rotary(g: GraphWriter, arch: Architecture) -> tuple[str, str]:
    """cos and sin of position x frequency, in float32 until the last cast."""
    frequencies, scaling = rope_frequencies(arch)
    weight = g.weight(Weight("rope.frequencies", tuple(frequencies.shape), lambda: [frequencies], torch.float32))
    positions = g.op("Cast", "position_ids", to=onnx.TensorProto.FLOAT)
    positions = g.op("Unsqueeze", positions, g.ints(-1))  # (batch, sequence, 1)
    angles = g.op("Mul", positions, weight)  # (batch, sequence, head_dim / 2)
    made = []
    for function in ("Cos", "Sin"):
        value = g.op(function, angles)
        if scaling != 1.0:
            factor = Weight("rope.scaling", (1,), lambda: [torch.tensor([scaling])], torch.float32)
            value = g.op("Mul", value, g.weight(factor))
        if g.dtype != torch.float32:
            value = g.op("Cast", value, to=ONNX_TYPES[g.dtype])
        made.append(value)
    return made[0], made[1]


def split_heads(
    g: GraphWriter, arch: Architecture, shared: Shared, fused: Fused, y: str, value_dim: int
) -> dict[str, str]:
    """y (tokens, heads * head_dim) of one projection node as role -> (batch, heads, sequence, head_dim).

    y holds `value_dim` coordinates of every head of v; the others are zeros, which attention leaves zeros. They are put
    in here, for the new tokens alone: TensorRT's attention takes no values that are narrower than queries.
    """
    if "attn.v" in fused.roles and len(fused.roles) > 1 and value_dim != arch.head_dim:
        # Heads of two widths do not share an axis: v, the last role, goes its own way before the reshape.
        others, own = sum(fused.out_features[:-1]), fused.out_features[-1]
        y, values = g.ops("Split", y, g.ints(others, own), outputs=2, axis=1)
        rest = Fused(fused.roles[:-1], fused.structure, fused.out_features[:-1])
        alone = Fused(fused.roles[-1:], fused.structure, fused.out_features[-1:])
        parts = split_heads(g, arch, shared, rest, y, value_dim)
        return parts | split_heads(g, arch, shared, alone, values, value_dim)
    width = value_dim if fused.roles == ("attn.v",) else arch.head_dim
    heads = [size // width for size in fused.out_features]
    # Made where it is first needed and then shared by all layers, so its name has no layer in it.
    name = f"heads_{sum(heads)}" + ("" if width == arch.head_dim else f"_{width}")
    shape = g.once(name, "Concat", shared.tokens, g.ints(sum(heads), width), axis=0)
    y = g.op("Reshape", y, shape)  # (batch, sequence, heads, width)
    if width < arch.head_dim:
        y = g.op("Pad", y, g.ints(0, 0, 0, 0, 0, 0, 0, arch.head_dim - width))
    y = g.op("Transpose", y, perm=[0, 2, 1, 3])  # (batch, heads, sequence, head_dim)
    if len(heads) == 1:
        return {fused.roles[0]: y}
    return dict(zip(fused.roles, g.ops("Split", y, g.ints(*heads), outputs=len(heads), axis=1), strict=True))


def attend(
    g: GraphWriter,
    arch: Architecture,
    shared: Shared,
    layer: int,
    heads: Mapping[str, str],
    scales: tuple[Weight, Weight] | None,
    value_dim: int,
) -> str:
    """Attention over the cache and the new tokens: (tokens, num_heads * value_dim).

    heads: "attn.q", "attn.k", "attn.v" -> (batch, heads, sequence, head_dim); scales: those of the norms of
    q and k, where the family has such norms. Writes present.{layer}.key and .value.
    """
    q, k, v = heads["attn.q"], heads["attn.k"], heads["attn.v"]
    if scales is not None:
        q = g.op("RMSNormalization", q, g.weight(scales[0]), epsilon=arch.norm_eps)
        k = g.op("RMSNormalization", k, g.weight(scales[1]), epsilon=arch.norm_eps)
    if shared.cos is not None and shared.sin is not None:
        q = g.op("RotaryEmbedding", q, shared.cos, shared.sin)
        k = g.op("RotaryEmbedding", k, shared.cos, shared.sin)
    for name, value in (("key", k), ("value", v)):
        g.op("Concat", f"past_key_values.{layer}.{name}", value, result=f"present.{layer}.{name}", axis=2)
    # One output: TensorRT refuses the operator's own cache outputs.
    mixed = g.op("Attention", q, f"present.{layer}.key", f"present.{layer}.value", shared.mask)
    mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])  # (batch, sequence, heads, head_dim)
    if value_dim < arch.head_dim:
        mixed = g.op("Slice", mixed, g.ints(0), g.ints(value_dim), g.ints(3))
    return g.op("Reshape", mixed, g.ints(-1, arch.num_heads * value_dim))

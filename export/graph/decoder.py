"""Checkpoint -> ONNX graph with a key-value cache, dynamic batch and lengths, one node per structured matrix.

Inputs: input_ids, position_ids int64 (batch, sequence); attention_mask int64 (batch, total_sequence), 0 on
padding; past_key_values.{i}.key and .value (batch, kv_heads, past_sequence, head_dim). Outputs: logits (batch,
sequence, vocabulary), present.{i}.key and .value (batch, kv_heads, total_sequence, head_dim): the past with the
new tokens appended. total_sequence = past_sequence + sequence; past_sequence may be 0.

Inside, activations are (tokens, features), tokens = batch * sequence, and every matrix is a Gemm with the
checkpoint's own (out, in) weight: measured faster in ONNX Runtime than MatMul on three axes.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from compress.checkpoint.reader import CheckpointReader
from compress.errors import ArtifactError, UsageError
from compress.structures import SelectStructure, Structure, core_of
from export.graph.attention import Shared, attend, shared_values, split_heads
from export.graph.external import ExternalData
from export.graph.fusion import Fused, fuse
from export.graph.narrow import narrow_width
from export.graph.ops import DOMAIN, OPSET, Derived, family_of, lower
from export.graph.skips import apply_skip
from export.graph.writer import GraphWriter, Weight
from export.memory import peak_rss, reset_peak

MODEL_NAME = "model.onnx"
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LOGITS = ("all", "last")


@dataclass(frozen=True)
class ExportInfo:
    """What an export wrote. `nodes`: count by op_type; `structured_nodes`: those of our own operators, none for
    structures that are plain products (low rank, jrk); `peak_rss_bytes`: memory.peak_rss during it."""

    path: Path
    opset: int
    dtype: str
    logits: str
    nodes: dict[str, int]
    structured_nodes: int
    initializer_bytes: int
    peak_rss_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the path is reduced to its name."""
        return {**asdict(self), "path": self.path.name}


def export_onnx(checkpoint: Path, out: Path, *, dtype: str = "float32", logits: str = "all") -> ExportInfo:
    """Write out/model.onnx and its external data, check them, and say what was written.

    dtype: float32, float16 or bfloat16, the type of all weights, activations and cache entries; norms compute
    in float32 inside, rotary angles and explicit mixes A are float32 in every graph. logits: "all" positions,
    or "last": output (batch, 1, vocabulary), for serving. Raises ArtifactError for a damaged checkpoint or one
    whose weights do not fit the dtype, UsageError for an unknown option.
    """
    for option, value, known in (("dtype", dtype, tuple(DTYPES)), ("logits", logits, LOGITS)):
        if value not in known:
            raise UsageError(f"{option} {value!r} is not one of {', '.join(known)}")
    start = time.monotonic()
    reset_peak()
    reader = CheckpointReader(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    path = out / MODEL_NAME
    with ExternalData(out) as data:
        decoder = _DecoderGraph(reader, GraphWriter(data, DTYPES[dtype]))
        model = decoder.build(last_only=logits == "last")
    path.write_bytes(model.SerializeToString(deterministic=True))
    structured = sum(node.domain == DOMAIN for node in model.graph.node)
    del model
    check(path)
    return ExportInfo(
        path=path,
        opset=OPSET,
        dtype=dtype,
        logits=logits,
        nodes=dict(sorted(decoder.g.counts.items())),
        structured_nodes=structured,
        initializer_bytes=data.bytes_written,
        peak_rss_bytes=peak_rss(),
        seconds=time.monotonic() - start,
    )


def check(path: Path) -> None:
    """onnx.checker's full check and strict shape inference, by path so that size does not matter.

    Raises ArtifactError with the checker's own words.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            inferred = str(Path(scratch) / MODEL_NAME)
            onnx.shape_inference.infer_shapes_path(
                str(path), inferred, check_type=True, strict_mode=True, data_prop=True
            )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path} is not valid ONNX ({str(error).strip()}); export it again") from error


class _DecoderGraph:
    """Builds the graph of one checkpoint; the order of the methods is that of the model."""

    def __init__(self, reader: CheckpointReader, writer: GraphWriter) -> None:
        self.reader, self.g = reader, writer
        self.config, self.arch = reader.config, reader.architecture
        self._names = set(reader.names())
        self._unread = set(self._names)

    def build(self, last_only: bool) -> onnx.ModelProto:
        """The whole model. Raises ArtifactError when the checkpoint holds tensors that the graph does not use."""
        g, arch = self.g, self.arch
        g.input("input_ids", ("batch", "sequence"), torch.int64)
        g.input("attention_mask", ("batch", "total_sequence"), torch.int64)
        g.input("position_ids", ("batch", "sequence"), torch.int64)
        g.output("logits", ("batch", 1 if last_only else "sequence", arch.vocab_size))
        for layer in range(arch.num_layers):
            for name in ("key", "value"):
                axes = ("batch", arch.num_kv_heads, "past_sequence", arch.head_dim)
                g.input(f"past_key_values.{layer}.{name}", axes)
                g.output(f"present.{layer}.{name}", (*axes[:2], "total_sequence", axes[3]))
        shared = shared_values(g, arch)
        x = self._embed()
        for layer in range(arch.num_layers):
            with g.scope(f"layers.{layer}"):
                x = self._block(layer, x, shared)
        self._head(x, shared, last_only)
        if self._unread:
            raise ArtifactError(
                f"{self.reader.folder} holds {sorted(self._unread)[0]}, which its config.json does not account "
                "for; compress the model again"
            )
        return g.model("decoder", self._metadata())

    def _embed(self) -> str:
        """(tokens, d)."""
        g, arch = self.g, self.arch
        with g.scope("embed"):
            rank, flat = self.config.parsed_ranks()[0], g.ints(-1, arch.hidden_size)
            first, *rest = self._table("model.embed_tokens", rank)
            x = g.op("Gather", first, "input_ids")  # (batch, sequence, d or rank)
            for factor in rest:
                x = g.op("Gemm", g.op("Reshape", x, g.ints(-1, rank)), factor)  # (tokens, d)
            if arch.positions == "learned":
                # The first rows of the table belong to no position: they are left out, not skipped over.
                skipped, used = arch.position_offset, (arch.max_positions, arch.hidden_size)
                table = self._stored("model.embed_positions.weight", (used[0] + skipped, used[1]))
                rows = Weight(table.name, used, lambda: (part[skipped:] for part in table.parts()))
                positions = g.op("Gather", g.weight(rows), "position_ids")  # (batch, sequence, d)
                x = g.op("Add", x, g.op("Reshape", positions, flat) if rest else positions)
            x = x if rest else g.op("Reshape", x, flat)  # (tokens, d)
            if self.config.center_embedding:
                # x - (x . u) u, u the unit vector `center`
                center = self._stored("model.center", (arch.hidden_size,))
                u = g.weight(Weight(center.name, (1, arch.hidden_size), center.parts))
                x = g.op("Sub", x, g.op("Mul", g.op("Gemm", x, u, transB=1), u))
        return x

    def _block(self, layer: int, x: str, shared: Shared) -> str:
        g, arch = self.g, self.arch
        with g.scope("attn"):
            h = self._norm(x)
            heads: dict[str, str] = {}
            value_dim = self._value_dim(layer)
            for fused, y in self._read_stream(layer, "attn", h):
                heads |= split_heads(g, arch, shared, fused, y, value_dim)
            mixed = attend(g, arch, shared, layer, heads, self._head_norms(layer), value_dim)
            o = self._linear(layer, self._alone(layer, "attn.o"), mixed)
            x = g.op("Add", self._skip(layer, "attn_skip", x), o)
        with g.scope("mlp"):
            inner = self._feed_forward(layer, self._norm(x))
            down = self._linear(layer, self._alone(layer, "mlp.down"), inner)
            return g.op("Add", self._skip(layer, "mlp_skip", x), down)

    def _feed_forward(self, layer: int, h: str) -> str:
        g = self.g
        made: dict[str, str] = {}
        for fused, y in self._read_stream(layer, "mlp", h):
            count = len(fused.roles)
            parts = g.ops("Split", y, g.ints(*fused.out_features), outputs=count, axis=1) if count > 1 else [y]
            made |= zip(fused.roles, parts, strict=True)
        if not self.arch.gated:
            return self._activate(made["mlp.up"])
        return g.op("Mul", self._activate(made["mlp.gate"]), made["mlp.up"])

    def _activate(self, x: str) -> str:
        g, activation = self.g, self.arch.activation
        if activation == "silu":
            # Not Swish (opset 24): ONNX Runtime expands that late, into more nodes than these, and fuses these.
            return g.op("Mul", x, g.op("Sigmoid", x))
        if activation == "relu":
            return g.op("Relu", x)
        return g.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")

    def _head(self, x: str, shared: Shared, last_only: bool) -> None:
        g, arch = self.g, self.arch
        d, vocabulary = arch.hidden_size, arch.vocab_size
        with g.scope("head"):
            if last_only:
                x = g.op("Reshape", x, g.op("Concat", shared.tokens, g.ints(d), axis=0))  # (batch, sequence, d)
                x = g.op("Slice", x, g.ints(-1), g.ints(2**62), g.ints(1))  # (batch, 1, d)
                x = g.op("Reshape", x, g.ints(-1, d))  # (batch, d)
            x = self._head_map(x) if self.config.head_map else self._norm(x)
            table = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
            last, *rest = self._table(table, self.config.parsed_ranks()[1])
            bias = [g.weight(self._stored("lm_head.bias", (vocabulary,)))] if self.config.head_bias else []
            for factor in rest:
                x = g.op("Gemm", x, factor, transB=1)  # (tokens, rank)
            logits = g.op("Gemm", x, last, *bias, transB=1)  # (tokens, vocabulary)
            if last_only:
                shape = g.ints(-1, 1, vocabulary)
            else:
                shape = g.op("Concat", shared.tokens, g.ints(vocabulary), axis=0)
            g.op("Reshape", logits, shape, result="logits")

    # --- Parts. ---

    def _norm(self, x: str) -> str:
        d = self.arch.hidden_size
        ones = self.g.weight(Weight("ones", (d,), lambda: [torch.ones(d)]))
        return self.g.op("RMSNormalization", x, ones, epsilon=self.arch.norm_eps)

    def _head_map(self, x: str) -> str:
        """The last norm and what its own scale became: a matrix, or the scale itself where nothing is rotated."""
        g, d, shift = self.g, self.arch.hidden_size, self.arch.norm == "layernorm"
        if self.config.rotation != "none":
            return self._matrix("model.head_map", (d, d), shift, self._norm(x))
        scale = g.weight(self._stored("model.head_map.weight", (d,)))
        x = g.op("RMSNormalization", x, scale, epsilon=self.arch.norm_eps)
        return g.op("Add", x, g.weight(self._stored("model.head_map.bias", (d,)))) if shift else x

    def _head_norms(self, layer: int) -> tuple[Weight, Weight] | None:
        if not self.arch.qk_norm:
            return None
        name, shape = f"model.layers.{layer}.attn", (self.arch.head_dim,)
        return self._stored(f"{name}.q_norm.weight", shape), self._stored(f"{name}.k_norm.weight", shape)

    def _skip(self, layer: int, name: str, x: str) -> str:
        form = self.reader.skip(layer, name.removesuffix("_skip"))
        if form is None:
            return x
        factors = {f: self._stored(f"model.layers.{layer}.{name}.{f}", shape) for f, shape in form.shapes().items()}
        return apply_skip(self.g, form, factors, x)

    def _matrix(self, name: str, shape: tuple[int, int], bias: bool, x: str) -> str:
        """x @ weight.T (+ bias) of a matrix that is never structured."""
        stored = [self._stored(f"{name}.weight", shape)]
        if bias:
            stored.append(self._stored(f"{name}.bias", shape[:1]))
        return self.g.op("Gemm", x, *map(self.g.weight, stored), transB=1)

    def _alone(self, layer: int, role: str) -> Fused:
        return fuse({role: self._structure(layer, role)}, {}, self._biased(layer))[0]

    def _biased(self, layer: int) -> list[str]:
        return [role for role in self.arch.linears() if self.reader.has_bias(f"layers.{layer}.{role}")]

    def _stored_structure(self, layer: int, role: str) -> Structure:
        structure = self.reader.structure(f"layers.{layer}.{role}")
        found, expected = (structure.out_features, structure.in_features), self.arch.linears()[role]
        if found != expected:
            raise ArtifactError(
                f"layers.{layer}.{role} is {expected} in the architecture of {self.reader.folder}, but its "
                f"structure is {found}; compress the model again"
            )
        return structure

    def _structure(self, layer: int, role: str) -> Structure:
        """What runs: of a selection that the graph is narrow around, only what it keeps."""
        structure = self._stored_structure(layer, role)
        if isinstance(structure, SelectStructure) and self._narrow_width(layer, role.partition(".")[0]) is not None:
            return structure.reduced
        return structure

    def _narrow_width(self, layer: int, sub_block: str) -> int | None:
        return narrow_width(self.arch, lambda role: self._stored_structure(layer, role), sub_block)

    def _value_dim(self, layer: int) -> int:
        """Coordinates that the projections keep of a value head; the others are zeros in attention and cache."""
        return self._narrow_width(layer, "attn") or self.arch.head_dim

    def _bias(self, layer: int, role: str, size: int) -> Tensor:
        """The bias of what runs (size,); zeros where the role has none, but is beside one that has."""
        if not self.reader.has_bias(f"layers.{layer}.{role}"):
            return torch.zeros(size)
        structure = self._stored_structure(layer, role)
        bias = self._read(f"model.layers.{layer}.{role}.bias", (structure.out_features,))
        return bias if len(bias) == size or not isinstance(structure, SelectStructure) else bias[structure.features()]

    def _read_stream(self, layer: int, sub_block: str, h: str) -> Iterable[tuple[Fused, str]]:
        """The readers of the normalised stream, as few nodes as can be: (which roles, their output)."""
        structures = {role: self._structure(layer, role) for role in self.arch.readers(sub_block)}
        compared = {
            role: {
                factor: self._read(f"model.layers.{layer}.{role}.{factor}", structure.shapes()[factor])
                for factor in family_of(structure).compared
                if factor in structure.shapes()
            }
            for role, structure in structures.items()
        }
        for fused in fuse(structures, compared, self._biased(layer)):
            yield fused, self._linear(layer, fused, h)

    def _linear(self, layer: int, fused: Fused, x: str) -> str:
        for call in lower(fused.structure, fused.bias):
            weights = [self.g.weight(self._factor(layer, fused, factor)) for factor in call.factors]
            x = self.g.call(call, x, weights)
        return x

    def _factor(self, layer: int, fused: Fused, factor: str) -> Weight:
        """One factor of a projection node: its role's, or those of all its roles one below the other."""
        block, family = fused.roles[0].partition(".")[0], family_of(core_of(fused.structure))
        if factor in family.derived:
            return self._derived(layer, fused.roles[0], fused.structure, factor, family.derived[factor])
        shape = fused.structure.shapes().get(factor, (fused.structure.out_features,))  # absent: the bias
        stacked = len(fused.roles) > 1 and factor not in family.once

        def parts() -> Iterable[Tensor]:
            for role, size in zip(fused.roles, fused.out_features, strict=True):
                if factor == "bias":
                    yield self._bias(layer, role, size)
                    continue
                part = self._read(f"model.layers.{layer}.{role}.{factor}", (size, *shape[1:]) if stacked else shape)
                fused.structure.check_values(factor, part)
                yield part
                if not stacked:
                    return

        name = "_".join(role.partition(".")[2] for role in fused.roles)
        stored = fused.structure.storage_dtypes(self.g.dtype).get(factor)
        return Weight(f"layers.{layer}.{block}.{name}.{factor}", shape, parts, stored)

    def _derived(self, layer: int, role: str, structure: Structure, factor: str, derived: Derived) -> Weight:
        """A factor that is stored in another form, made when it is written."""
        core = core_of(structure)

        def parts() -> Iterable[Tensor]:
            shapes = core.shapes()
            found = {name: self._read(f"model.layers.{layer}.{role}.{name}", shapes[name]) for name in derived.sources}
            for name, tensor in found.items():
                core.check_values(name, tensor)
            yield derived.make(core, found)

        return Weight(f"layers.{layer}.{role}.{factor}", derived.shape(core), parts)

    def _table(self, name: str, rank: int) -> list[str]:
        """The matrix (vocabulary, d) of embedding or head: its weight, or U (vocabulary, rank) and R (rank, d)."""
        vocabulary, d = self.arch.vocab_size, self.arch.hidden_size
        shapes = {"U": (vocabulary, rank), "R": (rank, d)} if rank else {"weight": (vocabulary, d)}
        return [self.g.weight(self._stored(f"{name}.{factor}", shape)) for factor, shape in shapes.items()]

    def _stored(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A tensor of the checkpoint as it is; the initializer's name leaves out the leading "model."."""
        return Weight(name.removeprefix("model."), shape, lambda: [self._read(name, shape)])

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.reader.get(name)
        if tuple(tensor.shape) != shape:
            raise ArtifactError(
                f"{name} is {tuple(tensor.shape)} in {self.reader.folder}, expected {shape}; compress the model again"
            )
        self._unread.discard(name)
        return tensor

    def _metadata(self) -> dict[str, str]:
        """What a runner needs beyond the graph, as JSON values."""
        arch = self.arch
        values: Mapping[str, object] = {
            "bos_token_id": arch.bos_token_id,
            "eos_token_id": arch.eos_token_id,
            "pad_token_id": arch.pad_token_id,
            "max_positions": arch.max_positions,
            "sliding_window": arch.sliding_window,
        }
        return {f"procrustes.{name}": json.dumps(value) for name, value in values.items()}

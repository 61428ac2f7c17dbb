"""The whole graph against the PyTorch decoder, on tiny random models of every kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compress.architecture import Architecture
from compress.errors import UsageError
from compress.structures import (
    KroneckerStructure,
    Structure,
)
from export.graph.decoder import export_onnx
from export.graph.ops import DOMAIN
from export.runtime.ort import OrtRunner, executed_nodes
from export.runtime.runner import left_pad
from tests.export.cases import CASES, PADDED, ROUNDING, Case, Chooser, every, export, joint, kron, torch_logits
from tests.export.helpers import VOCABULARY, llama, write_checkpoint


@pytest.mark.parametrize("name", CASES)
def test_parity_with_torch(name: str, tmp_path: Path) -> None:
    """Full forward = PyTorch; prefill and decode with the cache = full forward; padding and length 1 included."""
    model, info = export(CASES[name], tmp_path)
    runner = OrtRunner(info.path)
    generator = np.random.default_rng(0)
    for prompts in (PADDED, ([5],), ([30, 31, 32],)):
        ids, mask = left_pad(prompts, 0)
        start = ids.shape[1]
        following = generator.integers(0, VOCABULARY, (len(prompts), 7))
        ids, mask = np.concatenate([ids, following], 1), np.concatenate([mask, np.ones_like(following)], 1)
        full = runner.run_full(ids, mask)
        expected = torch_logits(model, ids, mask)
        scale = np.abs(expected).max()
        visible = mask.astype(bool)
        np.testing.assert_allclose(full[visible], expected[visible], rtol=0, atol=ROUNDING * scale)
        steps = [runner.prefill(ids[:, :start], mask[:, :start])]
        for width in (1, 1, 3, 2):  # one token at a time, and several
            at = runner.length
            steps.append(runner.decode(ids[:, at : at + width]))
        assert runner.length == ids.shape[1]
        cached = np.concatenate(steps, axis=1)
        np.testing.assert_allclose(cached[visible], full[visible], rtol=0, atol=ROUNDING * scale)


@pytest.mark.parametrize("name", ["kron mixed sizes", "mixture", "opt mixture"])
def test_every_function_is_inlined(name: str, tmp_path: Path) -> None:
    _, info = export(CASES[name], tmp_path)
    model = onnx.load(info.path)
    ours = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert ours == {function.name for function in model.functions}
    assert info.structured_nodes == sum(node.domain == DOMAIN for node in model.graph.node) > 0
    executed = executed_nodes(info.path)
    assert executed["Gemm"] > 0
    assert not ours & set(executed)


def test_inlined_functions_leave_only_their_work(tmp_path: Path) -> None:
    """Constants of the bodies are folded, equal slices shared: dense plus one Slice a norm and one Pad a writer."""
    dense = executed_nodes(export(CASES["dense"], tmp_path / "dense")[1].path)
    leading = executed_nodes(export(CASES["kron leading"], tmp_path / "kron")[1].path)
    assert leading == {**dense, "Slice": 4, "Pad": 4}


def layer_nodes(arch: Architecture, choose: Chooser, folder: Path) -> Counter[str]:
    """op_type -> nodes of one layer: three layers less two."""
    counts = []
    for layers in (2, 3):
        case = Case(Architecture(**{**arch.to_dict(), "num_layers": layers}), choose)
        counts.append(Counter(export(case, folder / str(layers))[1].nodes))
    return counts[1] - counts[0]


LAYER = {
    "RMSNormalization": 2,
    "Reshape": 2,
    "Transpose": 2,
    "Split": 2,
    "RotaryEmbedding": 2,
    "Concat": 2,
    "Attention": 1,
    "Sigmoid": 1,
    "Mul": 2,
    "Add": 2,
}


def test_dense_layer_has_no_node_too_many(tmp_path: Path) -> None:
    assert layer_nodes(llama(), lambda *_: None, tmp_path) == {**LAYER, "Gemm": 4}


def test_leading_kron_layer_is_as_small_as_the_dense_one(tmp_path: Path) -> None:
    """q, k, v are one node and gate, up another; only the pieces that the functions hold are new."""
    expected = {**LAYER, "KroneckerLeadingLinear": 2, "KroneckerLeadingLinearOut": 2}
    assert layer_nodes(llama(), kron("leading"), tmp_path / "plain") == expected
    biased = {**LAYER, "KroneckerLeadingLinear": 1, "KroneckerLeadingLinearBias": 1, "KroneckerLeadingLinearOut": 2}
    assert layer_nodes(llama(attention_bias=True), kron("leading"), tmp_path / "bias") == biased


def test_unlike_widths_share_one_slice(tmp_path: Path) -> None:
    """q, v read the same leading part, k a shorter one: two nodes, and after inlining two slices, not three."""
    arch = llama(num_layers=1)

    def choose(name: str, n: int, m: int, side: str) -> Structure | None:
        if side == "out":
            return None
        # gate is cut where q and v are, up where k is: four nodes on two inputs.
        return KroneckerStructure(m, n, 4, 2 if name.endswith(("attn.k", "mlp.up")) else 3, mix="leading")

    _, info = export(Case(arch, choose), tmp_path)
    assert info.nodes["KroneckerLeadingLinear"] == 4
    assert executed_nodes(info.path)["Slice"] == 4


def test_equal_explicit_mixes_are_fused_and_unlike_ones_are_not(tmp_path: Path) -> None:
    arch = llama(num_layers=1)
    apart, info = export(Case(arch, kron("explicit")), tmp_path / "apart")
    assert (info.nodes["KroneckerLinear"], info.nodes["KroneckerLinearOut"]) == (5, 2)
    shared = {
        f"model.layers.0.{role}.A": torch.eye(4)[[2, 0, 3]]
        for role in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    }
    model = write_checkpoint(tmp_path / "equal", arch, every(arch, kron("explicit")), override=shared)
    info = export_onnx(tmp_path / "equal", tmp_path / "onnx")
    assert (info.nodes["KroneckerLinear"], info.nodes["KroneckerLinearOut"]) == (2, 2)
    ids = np.arange(1, 9)[None]
    got, expected = OrtRunner(info.path).run_full(ids), torch_logits(model, ids, np.ones_like(ids))
    np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    assert not np.allclose(expected, torch_logits(apart, ids, np.ones_like(ids)))


def test_factored_embedding_is_a_gather_and_gemms(tmp_path: Path) -> None:
    """One Gemm more at each end, both factors of a tied embedding stored once."""
    _, dense = export(CASES["dense"], tmp_path / "dense")
    _, info = export(Case(llama(), choices={"embedding_rank": 8}), tmp_path / "factored")
    assert info.nodes == {**dense.nodes, "Gemm": dense.nodes["Gemm"] + 2}
    assert dense.initializer_bytes - info.initializer_bytes == 4 * (VOCABULARY * 32 - 8 * (VOCABULARY + 32))


def test_a_shared_v_is_one_gemm_before_one_gemm(tmp_path: Path) -> None:
    """Of q, k and v: V, then the stacked U and a Split, the same nodes as one low-rank matrix."""
    one_layer = llama(num_layers=1)
    _, shared = export(Case(one_layer, joint), tmp_path / "shared")
    _, dense = export(Case(one_layer), tmp_path / "dense")
    # Dense: qkv, o, gate-up, down, head. Low rank in the first layer: two for each of qkv, o, gate, up and down.
    assert (dense.nodes["Gemm"], shared.nodes["Gemm"]) == (5, 11)
    assert shared.nodes["Split"] == dense.nodes["Split"] - 1  # gate and up do not share here
    stored = {t.name: tuple(t.dims) for t in onnx.load(shared.path, load_external_data=False).graph.initializer}
    assert stored["layers.0.attn.q_k_v.V"] == (20, 32)
    assert stored["layers.0.attn.q_k_v.U"] == (64, 20)
    assert not {name for name in stored if "attn.k." in name or "attn.v." in name}


@pytest.mark.parametrize(
    "name", ["dense", "mixture", "qk norm", "opt mixture", "block skips", "cs skips", "joint", "opt embedding"]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_graphs_are_strongly_typed(name: str, dtype: str, tmp_path: Path) -> None:
    """Beside the rotary angles and the explicit mixes nothing is float32; norms are so only inside."""
    _, info = export(CASES[name], tmp_path, dtype=dtype)
    model = onnx.shape_inference.infer_shapes(onnx.load(info.path), check_type=True, strict_mode=True)
    graph, kinds = model.graph, onnx.TensorProto
    half = {"float16": kinds.FLOAT16, "bfloat16": kinds.BFLOAT16}[dtype]
    values = [*graph.value_info, *graph.input, *graph.output]
    wide = {value.name for value in values if value.type.tensor_type.elem_type == kinds.FLOAT}
    assert all(name.startswith("rope/") for name in wide)
    floats = {t.name: t.data_type for t in graph.initializer if t.data_type != kinds.INT64}
    assert {t for name, t in floats.items() if name.endswith(".order")} <= {kinds.INT32}
    floats = {name: t for name, t in floats.items() if not name.endswith((".A", ".order"))}
    assert {t for name, t in floats.items() if not name.startswith("rope.")} == {half}
    assert all(t == kinds.FLOAT for name, t in floats.items() if name.startswith("rope.") or name.endswith(".A"))
    assert graph.output[0].type.tensor_type.elem_type == half


@pytest.mark.parametrize("name", ["mixture", "opt"])
def test_float16_is_near_float32(name: str, tmp_path: Path) -> None:
    model, info = export(CASES[name], tmp_path, dtype="float16")
    ids, mask = left_pad(PADDED, 0)
    got, expected = OrtRunner(info.path).run_full(ids, mask), torch_logits(model, ids, mask)
    assert got.dtype == np.float16
    visible = mask.astype(bool)
    np.testing.assert_allclose(got[visible], expected[visible], rtol=0, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["dense", "opt", "embedding", "opt embedding, untied"])
def test_last_logits_only(name: str, tmp_path: Path) -> None:
    model, info = export(CASES[name], tmp_path, logits="last")
    runner = OrtRunner(info.path)
    ids, mask = left_pad(PADDED, 0)
    got, expected = runner.prefill(ids, mask), torch_logits(model, ids, mask)
    assert got.shape == (3, 1, VOCABULARY)
    np.testing.assert_allclose(got[:, 0], expected[:, -1], rtol=0, atol=ROUNDING * np.abs(expected).max())
    assert runner.decode([1, 2, 3]).shape == (3, 1, VOCABULARY)


def test_interface_is_as_documented(tmp_path: Path) -> None:
    _, info = export(CASES["dense"], tmp_path)
    graph = onnx.load(info.path, load_external_data=False).graph

    def axes(value: onnx.ValueInfoProto) -> list[str | int]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    found = {value.name: axes(value) for value in (*graph.input, *graph.output)}
    past, present = ["batch", 2, "past_sequence", 8], ["batch", 2, "total_sequence", 8]
    caches = {f"past_key_values.{i}.{kv}": past for i in range(2) for kv in ("key", "value")}
    caches |= {f"present.{i}.{kv}": present for i in range(2) for kv in ("key", "value")}
    assert found == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", "sequence", VOCABULARY],
        **caches,
    }
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    _, first = export(CASES["mixture"], tmp_path)
    second = export_onnx(tmp_path / "checkpoint", tmp_path / "again")
    for file in ("model.onnx", "model.onnx.data"):
        assert (first.path.parent / file).read_bytes() == (second.path.parent / file).read_bytes()


def test_weights_are_external_and_counted(tmp_path: Path) -> None:
    _, info = export(CASES["dense"], tmp_path)
    tensors = onnx.load(info.path, load_external_data=False).graph.initializer
    large = [t for t in tensors if np.prod(t.dims) * 4 >= 1024]
    assert large
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in tensors if t not in large)
    weights = onnx.load(info.path).graph.initializer
    expected = sum(len(t.raw_data) for t in weights if t.data_type == onnx.TensorProto.FLOAT)
    assert info.initializer_bytes == expected
    assert info.peak_rss_bytes > 0
    assert info.to_dict()["path"] == "model.onnx"


@pytest.mark.parametrize(("option", "value"), [("dtype", "float64"), ("logits", "first")])
def test_unknown_options_are_refused(option: str, value: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", llama())
    with pytest.raises(UsageError, match=value):
        export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", **{option: value})

"""Selections of inner features in whole graphs: narrow where both sides agree, padded and cut where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compress.architecture import Architecture
from compress.structures import SelectStructure, Structure
from export.graph.decoder import export_onnx
from export.graph.layer import export_linear
from export.runtime.ort import OrtRunner
from export.runtime.runner import left_pad
from tests.export.helpers import VOCABULARY, llama, opt, write_checkpoint
from tests.export.selections import around_cores, around_pivots, both, neurons, unlike, values

ROUNDING = 3e-5
PADDED = ([7, 8, 9, 10, 11, 12, 13, 14, 15], [3], [20, 21, 22, 23])
Chooser = Callable[[Architecture, int, str], Structure | None]


def one_layer(arch: Architecture, layer: int, role: str) -> Structure | None:
    """A layer that is dense beside one that is not."""
    return both(arch, layer, role) if layer == 1 else None


def every(arch: Architecture, choose: Chooser) -> dict[str, Structure]:
    found = {f"layers.{i}.{r}": choose(arch, i, r) for i in range(arch.num_layers) for r in arch.linears()}
    return {name: structure for name, structure in found.items() if structure is not None}


CASES: dict[str, tuple[Architecture, Chooser, dict[str, Any]]] = {
    "neurons": (llama(), neurons, {}),
    "values": (llama(), values, {}),
    "values, no grouping": (llama(num_kv_heads=4), values, {}),
    "values, qk norm": (llama(qk_norm=True), values, {}),
    "values, some biases": (llama(attention_bias=True), both, {}),
    "both": (llama(), both, {}),
    "one layer": (llama(), one_layer, {}),
    "unlike": (llama(), unlike, {}),
    "around cores": (llama(), around_cores, {}),
    "around pivots": (llama(attention_bias=True), around_pivots, {}),
    "opt": (opt(), both, {"center_embedding": True, "head_map": True}),
    "opt unlike": (opt(), unlike, {"center_embedding": True, "head_map": True}),
    "opt around cores": (opt(), around_cores, {"rotation": "block", "skip": "dense"}),
    "extra biases": (llama(), both, {"extra_biases": [f"layers.0.{role}" for role in llama().linears()]}),
}


@pytest.mark.parametrize("name", CASES)
def test_parity_with_torch(name: str, tmp_path: Path) -> None:
    """Full forward = PyTorch; prefill and decode through the cache = full forward; padding included."""
    arch, choose, choices = CASES[name]
    model = write_checkpoint(tmp_path / "checkpoint", arch, every(arch, choose), **choices)
    runner = OrtRunner(export_onnx(tmp_path / "checkpoint", tmp_path / "onnx").path)
    ids, mask = left_pad(PADDED, 0)
    start = ids.shape[1]
    following = np.random.default_rng(0).integers(0, VOCABULARY, (len(PADDED), 5))
    ids, mask = np.concatenate([ids, following], 1), np.concatenate([mask, np.ones_like(following)], 1)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=False).logits.numpy()
    seen, scale = mask.astype(bool), np.abs(logits).max()
    full = runner.run_full(ids, mask)
    np.testing.assert_allclose(full[seen], logits[seen], rtol=0, atol=ROUNDING * scale)
    steps = [runner.prefill(ids[:, :start], mask[:, :start])]
    for width in (1, 3, 1):
        steps.append(runner.decode(ids[:, runner.length : runner.length + width]))
    np.testing.assert_allclose(np.concatenate(steps, 1)[seen], full[seen], rtol=0, atol=ROUNDING * scale)


def nodes(arch: Architecture, choose: Chooser, folder: Path) -> tuple[Counter[str], onnx.GraphProto]:
    write_checkpoint(folder / "checkpoint", arch, every(arch, choose))
    info = export_onnx(folder / "checkpoint", folder / "onnx")
    return Counter(info.nodes), onnx.load(info.path, load_external_data=False).graph


@pytest.mark.parametrize("arch", [llama(), opt()], ids=["llama", "opt"])
def test_agreeing_selections_add_no_node(arch: Architecture, tmp_path: Path) -> None:
    """Beyond what v needs, whose heads are narrower than those of q and k: its own reshape, zeros in and zeros out."""
    dense, _ = nodes(arch, lambda *_: None, tmp_path / "dense")
    narrow, graph = nodes(arch, neurons, tmp_path / "neurons")
    assert narrow == dense
    with_values, graph = nodes(arch, both, tmp_path / "both")
    assert with_values.keys() - dense.keys() == {"Pad", "Slice"}
    assert (with_values["Pad"], with_values["Slice"]) == (arch.num_layers, arch.num_layers)
    assert with_values["Gemm"] == dense["Gemm"]
    sizes = {t.name: list(t.dims) for t in graph.initializer}
    assert sizes["layers.1.mlp.down.weight"] == [32, 21]
    assert sizes["layers.0.attn.o.weight"] == [32, 4 * 5]


def test_disagreeing_selections_are_padded_and_cut(tmp_path: Path) -> None:
    found, _ = nodes(llama(), unlike, tmp_path)
    # up and down differ, so each has its own, as have the heads of v, which agrees with o.
    assert (found["Pad"], found["Slice"]) == (4, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    arch = llama(attention_bias=True)
    write_checkpoint(tmp_path / "checkpoint", arch, every(arch, around_cores))
    info = export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", dtype=dtype)
    onnx.shape_inference.infer_shapes(onnx.load(info.path), check_type=True, strict_mode=True)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_a_selection_alone(side: Any, groups: int, biased: bool, tmp_path: Path) -> None:
    """One layer, whatever stands on its other side: Slice or Pad, with an axis of their own for groups."""
    m, n = (12, 5) if side == "in" else (5, 12)
    structure = SelectStructure(m, n, 2, groups, side)
    generator = torch.Generator().manual_seed(0)
    factors = {name: torch.randn(shape, generator=generator) for name, shape in structure.shapes().items()}
    bias = torch.randn(n, generator=generator) if biased else None
    x = torch.randn(7, m, generator=generator)
    expected = structure.apply(factors, x) + (0 if bias is None else bias)
    path = export_linear(structure, factors, tmp_path, bias=bias)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected.numpy(), rtol=1e-5, atol=1e-5)

"""A new structure goes all the way from one file (tests/data/toy_structure.py), with no change to the project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import export.graph.ops.base as ops
from compress import catalog
from compress.allocation.choose import allocate
from compress.allocation.menus import Linear, linear_menu
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.errors import ArtifactError
from compress.linalg import weighted_error
from compress.pipeline import compress_model
from compress.structures import Structure, base, registry
from export.graph.decoder import export_onnx
from export.graph.layer import export_linear
from export.runtime.ort import OrtRunner
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import TinyModel, tiny_source
from tests.data import toy_structure
from tests.data.toy_structure import ColumnsStructure

ort = pytest.importorskip("onnxruntime")

UNIT = 8


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy in the registries and in the catalogue, for the time of a test."""
    monkeypatch.setattr(base, "_REGISTRY", dict(registry()))
    monkeypatch.setattr(ops, "_FAMILIES", dict(ops.families()))
    monkeypatch.setattr(catalog, "_ENTRIES", list(catalog.entries()))
    toy_structure.add()


def linear(role: str, n: int, m: int, seed: int) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    weight, x, y = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, m), (3 * m, m), (3 * n, n)))
    return Linear(role, weight, x.T @ x / len(x), y.T @ y / len(y), "in")


def parameters(structure: Structure) -> float:
    return float(structure.parameter_count())


def test_an_allocation_chooses_by_its_curve() -> None:
    """What is predicted is what the fit then leaves, and the budget is kept."""
    linears = [linear("attn.q", 32, 48, 0), linear("mlp.up", 64, 32, 1)]
    budget = 0.6 * sum(x.weight.numel() for x in linears)
    chosen = allocate([linear_menu(x, ("columns",), UNIT, parameters) for x in linears], budget)
    assert sum(choice.cost for choice in chosen) <= budget
    for x, choice in zip(linears, chosen, strict=True):
        structure, loss = choice.label[x.role]
        assert structure.name == "columns"
        approximation = structure.dense(structure.fit(x.weight, x.gram, x.metric))
        assert float(weighted_error(x.weight, approximation, x.gram, x.metric)) == pytest.approx(loss, rel=1e-9)


def test_its_op_computes_what_it_does(tmp_path: Path) -> None:
    """The body in ONNX Runtime, the dense form, and PyTorch; the plugin table has no row for it."""
    structure = ColumnsStructure(12, 7, 5)
    generator = torch.Generator().manual_seed(0)
    factors = structure.random_factors(generator, torch.float64)
    bias, x = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7,), (3, 12)))
    path = export_linear(structure, factors, tmp_path, bias=bias, dtype=torch.float64)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})[0]
    expected = structure.apply(factors, x) + bias
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)
    (call,) = ops.lower(structure, True)
    op = ops.op(call.op_type)
    inputs = {"x": x.numpy(), "bias": bias.numpy(), **{name: f.numpy() for name, f in factors.items()}}
    np.testing.assert_allclose(op.reference(inputs, call.attributes), expected.numpy(), rtol=1e-12, atol=1e-12)
    assert op.plugin is None
    with pytest.raises(ArtifactError, match="not of its inputs"):
        export_linear(structure, {**factors, "index": factors["index"] + 12}, tmp_path)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_a_model_of_it_goes_from_weights_to_onnx_runtime(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, text = tiny_source(tiny_model, name), tmp_path / "text.txt"
    text.write_text("\n".join(tiny.TEXT * 3))
    recipe = helpers.recipe(text, structure="columns", ratio=0.7, unit=UNIT, checkpoint_dtype="float16")
    checkpoint = compress_model(source, recipe, tmp_path / "out").path("checkpoint")

    reader, stored = CheckpointReader(checkpoint), dict[str, torch.Tensor]()
    chosen = {name: s for name in reader.linears() if isinstance(s := reader.structure(name), ColumnsStructure)}
    assert len({s.kept / s.in_features for s in chosen.values()}) > 2  # a size for each, by its predicted loss
    dense = sum(n * m for n, m in source.architecture().linears().values()) * source.architecture().num_layers
    assert 0.65 < sum(reader.structure(name).parameter_count() for name in reader.linears()) / dense <= 0.7
    for file in checkpoint.glob("model-*.safetensors"):
        stored |= load_file(file)
    assert {t.dtype for key, t in stored.items() if key.endswith(".index")} == {torch.int32}
    assert {t.dtype for key, t in stored.items() if key.endswith(".B")} == {torch.float16}

    model, info = load_model(checkpoint), export_onnx(checkpoint, tmp_path / "onnx")
    nodes = [node.op_type for node in onnx.load(info.path, load_external_data=False).graph.node]
    assert sum(node.startswith("ColumnsLinear") for node in nodes) == info.structured_nodes == len(chosen)
    ids = tiny.token_ids(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.float().numpy()
    found = OrtRunner(info.path).run_full(ids.numpy(), np.ones_like(ids.numpy()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())

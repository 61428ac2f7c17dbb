"""COMPOT in a graph: two Gemms, coefficients unpacked with their pattern, the same numbers as PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.writer import ShardWriter
from compress.errors import ArtifactError
from compress.structures import Compot24Structure, CompotStructure, SelectStructure, Structure
from export.graph.decoder import export_onnx
from export.graph.layer import export_linear
from export.runtime.ort import OrtRunner
from export.runtime.runner import left_pad
from tests.export.helpers import VOCABULARY, llama, write_checkpoint

ort = pytest.importorskip("onnxruntime")

SHARD = "model-00001-of-00001.safetensors"
SPECS = {
    "free": CompotStructure(12, 10, 9, 4),
    "2:4": Compot24Structure(24, 10, 20, 10),
    "one": CompotStructure(1, 1, 1, 1),
    "inside a selection": SelectStructure(16, 10, 6, 2, "in", Compot24Structure(12, 10, 8, 4)),
}


def fitted(spec: Structure) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return spec.fit(torch.randn(spec.out_features, spec.in_features, generator=g, dtype=torch.float64))


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", SPECS)
def test_linear_equals_torch(kind: str, biased: bool, tmp_path: Path) -> None:
    spec = SPECS[kind]
    factors = fitted(spec)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, spec.in_features, generator=g, dtype=torch.float64)
    bias = torch.randn(spec.out_features, generator=g, dtype=torch.float64) if biased else None
    path = export_linear(spec, factors, tmp_path, bias=bias, dtype=torch.float64)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = x @ spec.dense(factors).T + (0 if bias is None else bias)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected.numpy(), rtol=1e-12, atol=1e-12)
    gemms = [node for node in onnx.load(path).graph.node if node.op_type == "Gemm"]
    assert [node.input[1] for node in gemms] == ["D", "S"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_written_coefficients_keep_the_2_to_4_pattern(dtype: torch.dtype, tmp_path: Path) -> None:
    """Along the reduction dimension, which is where sparse tensor cores need it."""
    spec = Compot24Structure(24, 10, 20, 10)
    path = export_linear(spec, fitted(spec), tmp_path, dtype=dtype)
    S = initializers(path)["S"].astype(np.float64)
    assert S.shape == (10, 20)
    assert ((S.reshape(10, 5, 4) != 0).sum(2) == 2).all()


def test_export_refuses_a_mask_of_another_pattern(tmp_path: Path) -> None:
    spec = Compot24Structure(8, 4, 8, 4)
    factors = {**fitted(spec), "mask": torch.full((4, 1), 0b1111, dtype=torch.uint8)}
    with pytest.raises(ArtifactError, match="2:4 pattern"):
        export_linear(spec, factors, tmp_path)


# --- A whole model. ---


def structures() -> dict[str, Structure]:
    """COMPOT in every projection, 2:4 or free in turn, and one dense."""
    arch = llama()
    made: dict[str, Structure] = {}
    for i in range(arch.num_layers):
        for j, (role, (n, m)) in enumerate(arch.linears().items()):
            cls = Compot24Structure if (i + j) % 2 else CompotStructure
            made[f"layers.{i}.{role}"] = cls(m, n, 20, 10)
    del made["layers.1.attn.k"]
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("compot") / "checkpoint"
    return write_checkpoint(folder, llama(), structures()), folder


def logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=False).logits
    return np.asarray(found.float().numpy())


def test_whole_export_equals_torch(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = checkpoint
    info = export_onnx(folder, tmp_path)
    ids, mask = left_pad(([7, 8, 9, 10, 11], [3], [20, 21, 22]), 0)
    expected, visible = logits(model, ids, mask), mask.astype(bool)
    full = OrtRunner(info.path).run_full(ids, mask)
    np.testing.assert_allclose(full[visible], expected[visible], rtol=0, atol=3e-5 * np.abs(expected).max())
    written, reader = initializers(info.path), CheckpointReader(folder)
    for linear, spec in structures().items():
        assert isinstance(spec, CompotStructure)
        S = written[f"{linear}.S"]
        assert ((S != 0).sum(1) == spec.kept).all()
        np.testing.assert_allclose(
            S @ written[f"{linear}.D"], spec.dense(reader.factors(linear)).numpy(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masks_stay_bytes_from_model_to_model(dtype: torch.dtype, checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    """Written in any type (even when the mask was cast before), read in any type, through transformers as well."""
    from transformers import AutoModelForCausalLM

    import compress  # noqa: F401  (registers the model type)

    model, folder = checkpoint
    with ShardWriter(tmp_path / "again", dtype, structures()) as writer:
        for name, tensor in state_of(folder).items():
            writer.add(name, tensor.float())
    shutil.copy(folder / "config.json", tmp_path / "again")
    stored = load_file(tmp_path / "again" / SHARD)
    masks = {name: t for name, t in stored.items() if name.endswith(".mask")}
    assert len(masks) == len(structures())
    assert all(t.dtype == (torch.uint8 if name in masks else dtype) for name, t in stored.items())
    original = model.state_dict()
    assert all(torch.equal(t, original[name]) for name, t in masks.items())

    ids = np.arange(1, 9)[None] % VOCABULARY
    expected = logits(model, ids, np.ones_like(ids))
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    for again in (
        load_model(tmp_path / "again"),
        load_model(tmp_path / "again", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32),
        AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32),
    ):
        assert {t.dtype for n, t in again.state_dict().items() if n.endswith(".mask")} == {torch.uint8}
        found = logits(again, ids, np.ones_like(ids))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def state_of(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.get(name) for name in reader.names()}


def test_damaged_masks_are_not_loaded(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(checkpoint[1], tmp_path / "checkpoint"))
    tensors = load_file(damaged / SHARD)
    tensors["model.layers.0.mlp.up.mask"][3, 1] ^= 1
    save_file(tensors, damaged / SHARD, metadata={"format": "pt"})
    for use in (load_model, lambda folder: CheckpointReader(folder).factors("layers.0.mlp.up")):
        with pytest.raises(ArtifactError, match="mask"):
            use(damaged)
    with pytest.raises(ArtifactError, match="mask"):
        export_onnx(damaged, tmp_path / "onnx")

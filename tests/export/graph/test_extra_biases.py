"""Biases that bias correction adds: stored, loaded, counted and exported, beside the architecture's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.allocation.size import model_size
from compress.checkpoint.reader import CheckpointReader
from compress.errors import ArtifactError
from compress.structures import KroneckerStructure, LowRankStructure, Structure
from export.graph.decoder import export_onnx
from export.runtime.ort import OrtRunner
from tests.export.helpers import llama, opt, write_checkpoint

ARCH = llama()
LOW_RANK = {"layers.1.attn.o": LowRankStructure(32, 32, 5), "layers.0.mlp.down": LowRankStructure(48, 32, 7)}
LEADING: dict[str, Structure] = {
    f"layers.0.mlp.{role}": KroneckerStructure(32, 48, 4, 3, mix="leading") for role in ("gate", "up")
}


@pytest.mark.parametrize(
    ("structures", "biases"),
    [
        ({}, ["layers.0.attn.o", "layers.1.mlp.down"]),
        ({}, ["layers.0.attn.k", "layers.1.attn.v", "layers.1.mlp.up"]),  # some of the readers that are one Gemm
        ({}, [f"layers.{i}.{role}" for i in range(2) for role in ARCH.linears()]),
        (LOW_RANK, list(LOW_RANK)),
        (LEADING, ["layers.0.mlp.gate"]),
    ],
    ids=["writers", "some readers", "all", "low rank", "one of two kron"],
)
def test_graph_is_the_torch_model(structures: dict[str, Structure], biases: list[str], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", ARCH, structures, extra_biases=biases)
    plain = write_checkpoint(tmp_path / "plain", ARCH, structures)
    ids = np.arange(1, 12)[None]
    with torch.no_grad():
        expected, without = (m(torch.from_numpy(ids)).logits.numpy() for m in (model, plain))
    info = export_onnx(tmp_path / "checkpoint", tmp_path / "onnx")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(OrtRunner(info.path).run_full(ids), expected, rtol=0, atol=3e-5 * scale)
    assert np.abs(expected - without).max() > 1e-2 * scale
    size = model_size(ARCH, structures, "none", biases)
    stored = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert size.overhead == stored == sum(ARCH.linears()[name.split(".", 2)[2]][0] for name in biases)


def test_a_bias_of_the_architecture_is_counted_once() -> None:
    biases = [f"layers.{i}.{role}" for i in range(2) for role in opt().linears()]
    assert model_size(opt(), {}, "none", biases) == model_size(opt(), {}, "none")


@pytest.mark.parametrize("wrong", [["layers.9.attn.o"], ["attn.o"], "layers.0.attn.o", [1], {}], ids=str)
def test_biases_of_no_linear_are_refused(wrong: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARCH, extra_biases=["layers.0.attn.o"])
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "extra_biases": wrong}))
    with pytest.raises(ArtifactError, match="extra_biases"):
        CheckpointReader(tmp_path)

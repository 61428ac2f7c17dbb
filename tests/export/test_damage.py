"""Checkpoints that do not match their config.json, or the type asked for, are refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ArtifactError
from export.graph.decoder import check, export_onnx
from export.graph.external import ExternalData
from tests.export.cases import every, kron
from tests.export.helpers import llama, write_checkpoint

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arch = llama()
    write_checkpoint(tmp_path / "checkpoint", arch, every(arch, kron("explicit")))
    return tmp_path / "checkpoint"


def edit_tensors(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / SHARD)
    change(tensors)
    save_file(tensors, checkpoint / SHARD, metadata={"format": "pt"})
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, SHARD)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))


NAME = "model.layers.1.mlp.up.B"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[NAME].view(-1)[7].fill_(float("nan")), "layers.1.mlp.up.B.* NaN"),
        (lambda t: t[NAME].view(-1)[7].fill_(float("inf")), "layers.1.mlp.up.B.* NaN"),
        (lambda t: t.update({NAME: t[NAME][1:].contiguous()}), "expected \\(48, 24\\)"),
        (lambda t: t.update({NAME: t[NAME].T.contiguous()}), "expected \\(48, 24\\)"),
        (lambda t: t.pop(NAME), f"no tensor {NAME}"),
        (lambda t: t.update({"model.layers.1.extra": torch.ones(3)}), "model.layers.1.extra"),
        (
            lambda t: t.update({"model.layers.9.extra": torch.ones(3)}),
            "has 2 layers, but .* has tensors of 3",
        ),
    ],
)
def test_changed_tensors(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    edit_tensors(checkpoint, change)
    with pytest.raises(ArtifactError, match=message):
        export_onnx(checkpoint, tmp_path / "onnx")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["structures"]["layers.0.attn.q"].update(terms=2),
        lambda c: c["structures"]["layers.0.attn.q"].update(mix="leading"),
        lambda c: c["structures"]["layers.0.attn.q"].update(structure="unheard-of"),
        lambda c: c["structures"].pop("layers.0.attn.q"),
        lambda c: c["architecture"].update(num_layers=3),
        lambda c: c["architecture"].update(num_layers=1),
        lambda c: c["architecture"].update(hidden_size=64),
        lambda c: c.update(tie_word_embeddings=False),
        lambda c: c.update(head_map=True),
        lambda c: c.update(model_type="llama"),
    ],
)
def test_changed_config(checkpoint: Path, tmp_path: Path, change: Any) -> None:
    edit_config(checkpoint, change)
    with pytest.raises(ArtifactError):
        export_onnx(checkpoint, tmp_path / "onnx")


def test_structure_of_another_size_than_its_linear(checkpoint: Path, tmp_path: Path) -> None:
    """A lower rank checkpoint whose q would be k: shapes agree with the tensors, not with the architecture."""
    tensors = load_file(checkpoint / SHARD)
    structures = json.loads((checkpoint / "config.json").read_text())["structures"]
    edit_tensors(
        checkpoint, lambda t: t.update({"model.layers.0.attn.q.B": tensors["model.layers.0.attn.k.B"].clone()})
    )
    edit_config(checkpoint, lambda c: c["structures"].update({"layers.0.attn.q": structures["layers.0.attn.k"]}))
    with pytest.raises(ArtifactError, match=r"layers.0.attn.q"):
        export_onnx(checkpoint, tmp_path / "onnx")


def test_truncated_shard(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / SHARD).write_bytes((checkpoint / SHARD).read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=SHARD):
        export_onnx(checkpoint, tmp_path / "onnx")


def test_values_beyond_float16(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda t: t[NAME].view(-1)[7].fill_(1e5))
    with pytest.raises(ArtifactError, match=r"1e\+05.*bfloat16"):
        export_onnx(checkpoint, tmp_path / "half", dtype="float16")
    assert export_onnx(checkpoint, tmp_path / "brain", dtype="bfloat16").dtype == "bfloat16"


def test_checker_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0bjunk")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        check(tmp_path / "model.onnx")


def test_external_data_refuses_parts_of_another_size(tmp_path: Path) -> None:
    with ExternalData(tmp_path) as data, pytest.raises(ArtifactError, match="shape"):
        data.add("w", (40, 40), torch.float32, [torch.ones(39, 40)])


def test_external_data_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    with ExternalData(tmp_path) as data, pytest.raises(ArtifactError, match="w has NaN"):
        data.add("w", (4,), torch.float32, [torch.tensor([1.0, float("nan"), 2.0, 3.0])])

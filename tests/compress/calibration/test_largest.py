"""Activations that float16 cannot hold are seen during compression, by their place, and decide the graph's type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.artifact.store import Artifact
from compress.calibration.largest import FLOAT16_MAX, Largest, Watch, largest_activations
from compress.cli.entry import run_cli
from compress.errors import ArtifactError
from compress.model.blocks import StructuredLinear
from compress.source.resolve import resolve
from compress.structures import LowRankStructure
from export.build import main as build
from export.halves import at_risk, graph_dtype
from export.stages import build_info
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import TinyModel, tiny_source


def loud(folder: Path) -> Path:
    """A tiny Llama whose second MLP multiplies to about 1e5 between gate, up and down, and writes what it wrote."""
    model = tiny.model("tiny_llama")
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight.mul_(1e5)
        mlp.down_proj.weight.div_(1e5)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_the_loud_layer_is_named(tmp_path: Path) -> None:
    source = resolve(str(loud(tmp_path / "loud")))
    artifact = helpers.compressed(source, tmp_path, structure="lowrank", ratio=0.9)
    facts = artifact.read_manifest()["stages"]["checkpoint"]["activations"]
    assert facts["value"] > FLOAT16_MAX
    assert facts["beyond"]
    assert all(place.startswith("layers.1") for place in facts["beyond"])
    assert "layers.1, what mlp.down reads" in facts["beyond"]
    every = json.loads((artifact.path("checkpoint") / "activations.json").read_text())
    assert every["tokens"] == facts["tokens"] > 0
    for place in (
        "the embeddings",
        "layers.0.attn.q",
        "layers.2.mlp.down",
        "layers.2, the stream after it",
        "the head",
    ):
        assert 0 < every["largest"][place] < 1e4, place
    artifact.verify(["checkpoint"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("tiny_opt", {"structure": "kron"}), ("tiny_llama_tied", {"structure": "kron", "rotation": "block"})],
)
def test_what_is_watched_is_what_the_model_computes(
    name: str, changes: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The figures of every linear are those of hooks on the whole model."""
    from compress.checkpoint.loading import load_model

    artifact = helpers.compressed(tiny_source(tiny_model, name), tmp_path, **changes)
    model, tokens = load_model(artifact.path("checkpoint")), tiny.token_ids(4, 24)
    found = largest_activations(artifact.path("checkpoint"), tokens, torch.device("cpu"), 3)
    seen: dict[str, float] = {}

    def keep(place: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen[place] = max(seen.get(place, 0.0), float(output.abs().max()))

        return hook

    for place, module in model.model.named_modules():
        if isinstance(module, StructuredLinear):
            module.register_forward_hook(keep(place))
        elif place.count(".") == 1 and place.startswith("layers."):
            module.register_forward_hook(keep(f"{place}, the stream after it"))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert len(seen) == 3 * (len(model.model.arch.linears()) + 1)
    for place, value in seen.items():
        assert found.values[place] >= 0.999 * value, place  # what lies between the factors may be larger
    assert found.values["layers.0, the stream after it"] == pytest.approx(
        seen["layers.0, the stream after it"], rel=1e-4
    )
    assert found.values["the head"] == pytest.approx(float(logits[0].abs().max()), rel=1e-3)


def test_between_factors() -> None:
    """V x is large and U makes it small again: no output shows it."""
    linear = StructuredLinear(LowRankStructure(8, 8, 2), bias=False)
    linear.V.data, linear.U.data = torch.full((2, 8), 1e6), torch.full((8, 2), 1e-6)
    watch = Watch()
    watch.inside("layers.0.attn.q", linear)
    with watch, torch.no_grad():
        y = linear(torch.ones(1, 3, 8))
    assert y.max() < 100
    assert watch.values == {"layers.0.attn.q": 8e6}


def test_attention_scores() -> None:
    """Far beyond float16 although queries and keys are not: exact where the bound is not enough."""
    watch = Watch()
    q, k = torch.zeros(1, 4, 5, 16), torch.zeros(1, 2, 5, 16)
    q[0, 1, 2, 0], k[0, 0, 1, 0], k[0, 1, 3, 1] = 2000.0, 1000.0, 4000.0
    with watch, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert max(watch.values.values()) == pytest.approx(2000 * 1000 / 4)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_of_several_operations(backend: SDPBackend) -> None:
    """Where PyTorch has no kernel (its version 2.6: none of fewer keys than queries), it adds the -inf of a mask."""
    watch = Watch()
    q = torch.ones(1, 2, 5, 16)
    with sdpa_kernel(backend), watch, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert watch.values == {", the attention scores": 4.0}


def test_nan_counts_as_infinite() -> None:
    watch = Watch()
    watch.note("here", torch.tensor([1.0, torch.nan]))
    found = Largest(2, watch.values)
    assert found.worst() == ("here", float("inf"))
    assert found.to_dict()["beyond"] == {"here": "inf"}
    json.dumps(found.to_dict(), allow_nan=False)
    assert at_risk(found.to_dict())


QUIET = {"tokens": 8, "place": "x", "value": 10.0, "beyond": {}}
LOUD = {
    "tokens": 8,
    "place": "x",
    "value": 1e5,
    "beyond": {"layers.1.mlp.down": 4e4, "layers.2, the stream after it": 1e5},
}


@pytest.mark.parametrize(
    ("asked", "half", "watched", "dtype", "said"),
    [
        (None, False, LOUD, "float32", ""),
        (None, True, QUIET, "float16", ""),
        (None, True, LOUD, "bfloat16", "bfloat16 in place of float16: what layers.2, the stream after it (100,000)"),
        (None, True, None, "float16", "no activations were watched"),
        ("float16", False, LOUD, "float16", "warning: float16 as asked for, though what layers.2"),
        ("float16", True, QUIET, "float16", ""),
        ("bfloat16", True, LOUD, "bfloat16", ""),
        ("float32", True, LOUD, "float32", ""),
    ],
)
def test_the_type_that_is_chosen(
    asked: str | None, half: bool, watched: Any, dtype: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graph_dtype(asked, half, watched) == dtype
    printed = capsys.readouterr().err
    assert said in printed
    assert bool(said) == bool(printed)


@pytest.mark.parametrize(
    "watched", [5, {}, {"beyond": 3}, {"beyond": {"x": "many"}}, {"beyond": {"x": True}}], ids=repr
)
def test_a_damaged_record(watched: Any) -> None:
    with pytest.raises(ArtifactError, match="largest activations is damaged"):
        graph_dtype(None, True, watched)


def test_a_tensorrt_graph_of_a_loud_model_is_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No engine is built here: the graph is, in the type that the watched activations need."""
    text = helpers.text_file(tmp_path)
    given = ["--model", str(loud(tmp_path / "loud")), "--structure", "lowrank", "--ratio", "0.9", "--out"]
    given += [str(tmp_path / "out"), "--calibration-data", str(text), "--calibration-samples", "4"]
    given += ["--sequence-length", "32", "--engine", "trt", "--plugin", "native"]
    run_cli(build, given)
    assert "bfloat16 in place of float16: what layers.1" in capsys.readouterr().err
    assert build_info(Artifact(tmp_path / "out"), "onnx")["dtype"] == "bfloat16"

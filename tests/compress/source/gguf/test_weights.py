"""Weights of GGUF files: bit for bit those that transformers reads, one tensor at a time, and nothing passed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from compress.errors import ArtifactError, UsageError
from compress.source.families import tensor_names
from compress.source.gguf import GgufReader, read_header, weights
from compress.source.model import ModelSource
from compress.source.resolve import resolve
from tests import tiny

TINY = ("tiny_llama", "tiny_llama_tied", "tiny_llama_bias", "tiny_mistral", "tiny_qwen2", "tiny_qwen3")


def by_transformers(source: ModelSource) -> dict[str, torch.Tensor]:
    """The state that transformers' own GGUF loading gives."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(source.path), gguf_file=source.gguf_file, config=source.config(), dtype=torch.float32
    )
    return dict(model.state_dict())


def assert_equal_to_transformers(source: ModelSource) -> None:
    reader, expected = source.reader(), by_transformers(source)
    if source.architecture().tied:
        del expected["lm_head.weight"]
    assert sorted(reader.names()) == sorted(expected)
    for name in reader.names():
        tensor = reader.get(name)
        assert tensor.dtype == torch.float32
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("quantize", ["F32", "F16", "Q4_1"])
def test_every_tensor_is_that_of_transformers(name: str, quantize: str, tmp_path: Path) -> None:
    assert_equal_to_transformers(resolve(str(tiny.write_gguf(name, tmp_path / "m.gguf", quantize=quantize))))


@pytest.mark.parametrize("name", TINY)
def test_the_model_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    reference = resolve(str(tiny.write_gguf(name, tmp_path / "m.gguf"))).reference_model(torch.float32)
    ids = tiny.token_ids(2, 8)  # within Mistral's window, which no GGUF file of this architecture keeps
    with torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, tiny.model(name)(ids).logits)


@pytest.mark.slow
def test_every_tensor_of_the_real_model(real_model: ModelSource) -> None:
    assert_equal_to_transformers(real_model)


def test_one_tensor_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = weights.read_tensor

    def spy(header: Any, name: str) -> Any:
        read.append(name)
        return plain(header, name)

    monkeypatch.setattr(weights, "read_tensor", spy)
    reader = resolve(str(tiny.write_gguf("tiny_llama", tmp_path / "m.gguf"))).reader()
    assert read == []
    first = reader.get("model.layers.1.mlp.up_proj.weight")
    assert read == ["blk.1.ffn_up.weight"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(reader.get("model.layers.1.mlp.up_proj.weight"), kept)


def test_dequantisation_in_pieces_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(tiny.write_gguf("tiny_qwen2", tmp_path / "m.gguf", quantize="Q8_0")))
    name = "model.embed_tokens.weight"
    whole = source.reader().get(name)
    monkeypatch.setattr(weights, "_AT_ONCE", 100)
    assert torch.equal(source.reader().get(name), whole)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("tiny_llama", "blk.0.ffn_gate_inp.weight"),
        ("tiny_qwen3", "blk.1.attn_q.bias"),
        ("tiny_qwen2", "rope_freqs.weight"),
        ("tiny_llama", "blk.0.rope_freqs.weight"),
        ("tiny_llama", "my_rope_freqs.weight"),
    ],
)
def test_a_tensor_that_the_model_does_not_read(name: str, stored: str, tmp_path: Path) -> None:
    path = tiny.write_gguf(name, tmp_path / "m.gguf", tensors={stored: np.ones(8, np.float32)})
    with pytest.raises(UsageError, match=stored):
        resolve(str(path)).reader()


def test_a_buffer_of_old_files_is_passed_over(tmp_path: Path) -> None:
    extra = {f"blk.{i}.attn_rot_embd.weight": np.ones(8, np.float32) for i in range(3)}
    reader = resolve(str(tiny.write_gguf("tiny_llama", tmp_path / "m.gguf", tensors=extra))).reader()
    assert len(reader.names()) == 30


def test_a_type_that_cannot_be_read(tmp_path: Path) -> None:
    source = resolve(str(tiny.write_gguf("tiny_llama", tmp_path / "m.gguf")))
    header, architecture = read_header(tmp_path / "m.gguf"), source.architecture()
    wrong = replace(header.tensors["output_norm.weight"], kind=int(gguf.GGMLQuantizationType.I32))
    header = replace(header, tensors=header.tensors | {"output_norm.weight": wrong})
    with pytest.raises(UsageError, match=r"'output_norm\.weight' .* is stored as I32"):
        GgufReader(header, architecture, tensor_names(architecture))


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    path = tiny.write_gguf("tiny_llama", tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(content)
    reader = resolve(str(path)).reader()
    with pytest.raises(ArtifactError, match="NaN"):
        [reader.get(name) for name in reader.names()]


@pytest.mark.parametrize("quantize", ["F32", "Q8_0"])
def test_quantisation_of_another_version(quantize: str, tmp_path: Path) -> None:
    source = resolve(str(tiny.write_gguf("tiny_llama", tmp_path / "m.gguf", quantize=quantize)))
    header, architecture = read_header(tmp_path / "m.gguf"), source.architecture()
    header = replace(header, metadata=header.metadata | {"general.quantization_version": 1})
    if quantize == "F32":
        assert GgufReader(header, architecture, tensor_names(architecture)).names()
        return
    with pytest.raises(UsageError, match="version 1 of the formats"):
        GgufReader(header, architecture, tensor_names(architecture))

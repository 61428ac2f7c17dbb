"""Weight readers: the same tensors whatever the storage, and a sentence for every damaged or hostile file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ArtifactError
from compress.source import families
from compress.source.readers import FileReader, MemoryReader, check_shapes
from compress.source.resolve import resolve
from compress.source.weight_files import weight_files
from tests import tiny

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama in one safetensors file, to be damaged."""
    return Path(shutil.copytree(tiny_model("tiny_llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in several shards with an index, to be damaged."""
    path = tiny.write("tiny_llama", tmp_path / "sharded", max_shard_size="200KB")
    assert len(list(path.glob("model-*.safetensors"))) >= 3
    return path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors of a single-file checkpoint."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def as_pickle(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    """Store a checkpoint as pytorch_model.bin instead of safetensors."""
    (folder / SINGLE).unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **options)


def refused(folder: Path) -> str:
    """The message with which opening and reading the whole checkpoint fails."""
    with pytest.raises(ArtifactError) as caught:
        read_all(folder)
    assert caught.value.exit_code == 5
    return str(caught.value)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    reader = resolve(str(folder)).reader()
    return {name: reader.get(name) for name in reader.names()}


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


# --- what is read


def test_every_tensor_of_every_tiny_model(tiny_model_dir: Path) -> None:
    expected = dict(tiny.model(tiny_model_dir.name).named_parameters())
    assert_same(read_all(tiny_model_dir), {name: p.detach() for name, p in expected.items()})


def test_shards_hold_the_same(folder: Path, sharded: Path) -> None:
    assert_same(read_all(sharded), read_all(folder))
    assert weight_files(folder) == (SINGLE,)
    assert weight_files(sharded) == tuple(sorted(p.name for p in sharded.glob("model-*.safetensors")))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_hold_the_same(folder: Path, zipped: bool) -> None:
    expected = read_all(folder)
    as_pickle(folder, load_file(folder / SINGLE), _use_new_zipfile_serialization=zipped)
    assert_same(read_all(folder), expected)


def test_sharded_pickles_hold_the_same(folder: Path) -> None:
    expected = read_all(folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"pytorch_model-0000{1 + i % 2}-of-00002.bin"
    for file in set(weight_map.values()):
        torch.save({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_all(folder), expected)


@pytest.mark.parametrize("storage", ["safetensors", "bin", "memory"])
def test_what_the_caller_writes_does_not_come_back(folder: Path, storage: str) -> None:
    if storage == "bin":
        as_pickle(folder, load_file(folder / SINGLE))
    reader = MemoryReader(load_file(folder / SINGLE), "x") if storage == "memory" else FileReader(folder)
    name = "model.norm.weight"
    first = reader.get(name)
    expected = first.clone()
    first.fill_(7.0)
    assert torch.equal(reader.get(name), expected)


def test_dtype_and_shape(folder: Path) -> None:
    change(folder, lambda t: t.update({n: v.to(torch.bfloat16) for n, v in t.items()}))
    reader = FileReader(folder)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert reader.shape(name) == (32, 64)
    assert reader.get(name).dtype == torch.bfloat16
    assert reader.get(name, torch.float64).dtype == torch.float64
    assert torch.equal(reader.get(name, torch.float64), reader.get(name).double())


def test_checkpoint_of_the_base_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("tiny_opt"), tmp_path / "base"))
    expected = read_all(folder)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["decoder.version"] = torch.tensor([3.0])

    change(folder, strip)
    assert "decoder.embed_tokens.weight" in load_file(folder / SINGLE)
    tensors = read_all(folder)
    del tensors["model.decoder.version"]
    assert_same(tensors, expected)


@pytest.mark.parametrize("keep_embedding", [True, False], ids=["twice", "head-only"])
def test_tied_matrix_stored_as_the_head(
    tiny_model: Callable[[str], Path], tmp_path: Path, keep_embedding: bool
) -> None:
    folder = Path(shutil.copytree(tiny_model("tiny_llama_tied"), tmp_path / "tied"))
    expected = read_all(folder)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not keep_embedding:
            del tensors["model.embed_tokens.weight"]

    change(folder, move)
    assert_same(read_all(folder), expected)


def test_tied_matrices_that_differ(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("tiny_llama_tied"), tmp_path / "tied"))
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-3}))
    assert "tie_word_embeddings" in refused(folder)
    change_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
    assert "lm_head.weight" in read_all(folder)


def test_buffers_of_old_files_are_no_mismatch(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert len(read_all(folder)) == 31


# --- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers(folder: Path, value: float, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = value

    change(folder, poison)
    message = refused(folder)
    assert name in message
    assert SINGLE in message
    assert "1 values out of 10240" in message


def test_values_that_the_asked_type_cannot_hold(folder: Path) -> None:
    change(folder, lambda t: t["model.norm.weight"].__setitem__(0, 1e6))
    reader = FileReader(folder)
    assert reader.get("model.norm.weight", torch.bfloat16)[0] > 9e5
    with pytest.raises(ArtifactError, match=r"magnitude 1e\+06, which float16 cannot hold"):
        reader.get("model.norm.weight", torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_quantised_values(folder: Path, dtype: torch.dtype) -> None:
    change(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    assert str(dtype).removeprefix("torch.") in refused(folder)


def test_absent_tensor(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="no tensor 'nothing'"):
        FileReader(folder).get("nothing")


# --- damaged and hostile files


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert "has no weights" in refused(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1, -1000])
def test_truncated_safetensors(folder: Path, kept: int) -> None:
    # 0..40: within the header; negative: within the data.
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refused(folder)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 10) + b"0123456789",
        b"<html><body>404 not found</body></html>",
    ],
    ids=["huge-header", "no-json", "html"],
)
def test_files_that_are_not_safetensors(folder: Path, content: bytes) -> None:
    (folder / SINGLE).write_bytes(content)
    assert "cannot be read" in refused(folder)


def test_truncated_pickle(folder: Path) -> None:
    as_pickle(folder, load_file(folder / SINGLE))
    path = folder / "pytorch_model.bin"
    for kept in (0, 10, 1000, -100):
        path.write_bytes(path.read_bytes()[:kept])
        assert str(path) in refused(folder)


class Payload:
    """Unpickles to a call of os.mkdir."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(folder: Path, tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "executed"
    content: Any = {**load_file(folder / SINGLE), "x": Payload(target)}
    as_pickle(folder, content, _use_new_zipfile_serialization=zipped)
    assert "nothing in it was executed" in refused(folder)
    assert not target.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert target.exists()  # the payload is a live one


def test_pickle_of_something_else(folder: Path) -> None:
    content: Any = [torch.ones(3)]
    as_pickle(folder, content)
    assert "not a dictionary of tensors" in refused(folder)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/model.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "..",
        "",
        "config.json",
        5,
        None,
    ],
)
def test_index_that_leads_out_of_the_folder(sharded: Path, file: object) -> None:
    name = "model.norm.weight"
    outside = sharded.parent / "outside.safetensors"
    save_file({name: torch.full((64,), 13.0)}, outside)  # a good file, were it followed
    change_json(sharded / INDEX, lambda index: index["weight_map"].update({name: file}))
    message = refused(sharded)
    assert name in message
    assert "in the same folder" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 9999])
def test_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert INDEX in refused(sharded)


def test_index_that_names_a_tensor_twice(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    line = '"model.norm.weight": "model-00001-of-00009.safetensors",'
    (sharded / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {' + line))
    assert "'model.norm.weight' twice" in refused(sharded)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refused(sharded)
    assert str(shard) in message
    assert "is missing" in message


def test_tensor_missing_from_its_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard)
    message = refused(sharded)
    assert f"places the tensor {name!r} in {shard.name}, which does not hold it" in message


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = sorted(load_file(first))[0]
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    message = refused(sharded)
    assert f"{second.name} holds the tensor {name!r}" in message
    assert f"places it in {first.name}" in message


def test_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    change_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "does not list it" in refused(sharded)


# --- checkpoint against config


def test_wrong_shape(folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    change(folder, lambda t: t.update({name: t[name][:, :-1].contiguous()}))
    message = refused(folder)
    assert name in message
    assert "(64, 159)" in message
    assert "(64, 160)" in message


def test_vocabulary_of_another_size(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c.update(vocab_size=400))
    message = refused(folder)
    assert "model.embed_tokens.weight" in message
    assert "(400, 64)" in message


def test_missing_tensor(folder: Path) -> None:
    change(folder, lambda t: t.__delitem__("lm_head.weight"))
    assert "no tensor 'lm_head.weight'" in refused(folder)


def test_more_layers_than_the_config_says(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c.update(num_hidden_layers=2))
    assert "9 tensors that the model of config.json does not use" in refused(folder)


def test_biases_that_the_config_does_not_mention(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change(folder, lambda t: t.update({name: torch.ones(64)}))
    assert name in refused(folder)


def test_check_shapes_takes_any_reader() -> None:
    architecture = families.architecture(tiny.config("tiny_llama"))
    names = families.tensor_names(architecture)
    tensors = dict(tiny.model("tiny_llama").state_dict())
    check_shapes(MemoryReader(tensors, "memory"), architecture, names)
    tensors["model.norm.weight"] = torch.ones(63)
    with pytest.raises(ArtifactError, match=r"in memory has shape \(63,\)"):
        check_shapes(MemoryReader(tensors, "memory"), architecture, names)

"""OUT/checkpoint: what is written is read back, and nothing damaged or hostile is taken for a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import INDEX, ROTATION, CheckpointReader, read_rotations
from compress.checkpoint.writer import ShardWriter, write_rotations
from compress.errors import ArtifactError
from compress.rewrites.rotations import Rotations
from compress.structures import CompotStructure, DenseStructure, KroneckerStructure
from tests import tiny
from tests.compress.helpers import TinyModel, compressed, logits_of, tiny_source

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def good(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with explicit mixes. Not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    source = tiny_source(tiny_model, "tiny_llama")
    return compressed(source, folder, structure="kron", rotation="none").path("checkpoint")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---- writing and reading


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    with ShardWriter(tmp_path, max_shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 7 * 400
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_one_tensor_larger_than_a_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_shard_bytes=10) as writer:
        writer.add("large", torch.ones(100))
    assert (tmp_path / SHARD).exists()


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    with ShardWriter(tmp_path) as writer:
        writer.add("transposed", base.T)
        writer.add("row", base[1])
    found = load_file(tmp_path / SHARD)
    assert torch.equal(found["transposed"], base.T)
    assert torch.equal(found["row"], base[1])


def test_factors_are_stored_in_the_types_that_their_structure_asks_for(tmp_path: Path) -> None:
    """Whatever they are called: a weight that ends like the mix of a Kronecker sum is a weight."""
    structures = {"layers.0.attn.q": KroneckerStructure(8, 4, 4, 2), "layers.0.attn.k": CompotStructure(8, 4, 8, 4)}
    tensors = {
        f"model.{linear}.{name}": factor.float()  # integers cast along with their neighbours
        for linear, structure in structures.items()
        for name, factor in structure.random_factors(torch.Generator()).items()
    }
    with ShardWriter(tmp_path, torch.float16, structures) as writer:
        for name, tensor in {**tensors, "model.other.A": torch.ones(2, 4), "model.other.mask": torch.ones(2)}.items():
            writer.add(name, tensor)
    found = {name.removeprefix("model."): tensor.dtype for name, tensor in load_file(tmp_path / SHARD).items()}
    assert found == {
        "layers.0.attn.q.A": torch.float32,
        "layers.0.attn.q.B": torch.float16,
        "layers.0.attn.k.D": torch.float16,
        "layers.0.attn.k.values": torch.float16,
        "layers.0.attn.k.mask": torch.uint8,
        "other.A": torch.float16,
        "other.mask": torch.float16,
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_never_written(bad: float, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^x came out with NaN or infinite"), ShardWriter(tmp_path) as writer:
        writer.add("x", torch.tensor([1.0, bad]))
    assert not (tmp_path / INDEX).exists()


def test_what_overflows_float16_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="float16"), ShardWriter(tmp_path, torch.float16) as writer:
        writer.add("x", torch.tensor([1.0, 1e6]))


def test_names_are_written_once(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("x", torch.ones(1))
        with pytest.raises(ValueError, match="already written"):
            writer.add("x", torch.ones(1))


@pytest.mark.parametrize(("kind", "count"), [("none", 0), ("shared", 1), ("block", 12)])
def test_rotations(kind: str, count: int, tmp_path: Path) -> None:
    rotations = Rotations(kind, tuple(torch.randn(4, 4, dtype=torch.float64) for _ in range(count)))
    write_rotations(tmp_path, rotations)
    back = read_rotations(tmp_path)
    assert back.kind == kind
    assert all(torch.equal(a, b) for a, b in zip(back.matrices, rotations.matrices, strict=True))


def test_reader(good: Path) -> None:
    reader = CheckpointReader(good)
    model = load_model(good)
    state = model.state_dict()
    assert set(reader.names()) == set(state)
    assert len(reader.linears()) == 3 * 7
    for name in reader.names():
        assert torch.equal(reader.get(name), state[name])
    structure = reader.structure("layers.1.mlp.down")
    assert isinstance(structure, KroneckerStructure)
    structure.check_factors(reader.factors("layers.1.mlp.down"))
    assert reader.bias("layers.1.mlp.down") is None


def test_reader_of_dense_linears(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_opt")
    reader = CheckpointReader(compressed(source, tmp_path, structure="dense").path("checkpoint"))
    assert isinstance(reader.structure("layers.0.attn.q"), DenseStructure)
    assert reader.factors("layers.0.attn.q")["weight"].shape == (64, 64)
    bias = reader.bias("layers.0.attn.q")
    assert bias is not None
    assert bias.shape == (64,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_load_in_another_type(dtype: torch.dtype, good: Path) -> None:
    model = load_model(good, dtype)
    kinds = {name.rsplit(".", 1)[1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["B"] == kinds["weight"] == dtype
    assert kinds["A"] == torch.float32
    logits = logits_of(model, tiny.token_ids(1, 8))
    torch.testing.assert_close(logits, logits_of(load_model(good), tiny.token_ids(1, 8)), rtol=0.1, atol=0.2)


# ---- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


CONFIG = {
    "no architecture": (lambda c: {k: v for k, v in c.items() if k != "architecture"}, "no `architecture`"),
    "architecture is a list": (lambda c: {**c, "architecture": [1]}, "no `architecture`"),
    "a field is missing": (lambda c: c["architecture"].pop("norm_eps") and None, "norm_eps"),
    "a field too many": (lambda c: c["architecture"].update(extra=1), "extra"),
    "negative size": (lambda c: c["architecture"].update(num_layers=-3), "num_layers = -3"),
    "size of text": (lambda c: c["architecture"].update(hidden_size="64"), "hidden_size = '64'"),
    "unknown activation": (lambda c: c["architecture"].update(activation="swoosh"), "swoosh"),
    "structures are a list": (lambda c: {**c, "structures": [1]}, "not a JSON object"),
    "structure is a text": (lambda c: c["structures"].update({"layers.0.attn.q": "kron"}), "must be a JSON object"),
    "unknown structure": (lambda c: c["structures"]["layers.0.attn.q"].update(structure="magic"), "'magic'"),
    "unknown field": (lambda c: c["structures"]["layers.0.attn.q"].update(magic=1), "unknown field magic"),
    "missing field": (lambda c: c["structures"]["layers.0.attn.q"].pop("blocks") and None, "missing field blocks"),
    "wrong type": (lambda c: c["structures"]["layers.0.attn.q"].update(blocks="8"), "wrong type: '8'"),
    "does not divide": (lambda c: c["structures"]["layers.0.attn.q"].update(blocks=7), "does not divide"),
    "another shape": (
        lambda c: c["structures"]["layers.0.attn.q"].update(out_features=128),
        "layers.0.attn.q a structure of 128 x 64",
    ),
    "a linear too many": (
        lambda c: c["structures"].update({"layers.9.attn.q": c["structures"]["layers.0.attn.q"]}),
        "layers.9",
    ),
    "later format": (lambda c: {**c, "format_version": 2}, "format_version 2"),
    "another model": (lambda c: {**c, "model_type": "llama"}, "'llama', not 'procrustes'"),
    "a list": (lambda c: [1], "not a JSON object"),
}


@pytest.mark.parametrize("damage", CONFIG)
def test_hostile_config(damage: str, folder: Path) -> None:
    change, sentence = CONFIG[damage]
    edit_json(folder / "config.json", change)
    with pytest.raises(ArtifactError) as seen:
        load_model(folder)
    assert sentence in str(seen.value)


INDICES = {
    "outside": (lambda i: i["weight_map"].update({"lm_head.weight": "../../secret.safetensors"}), "points outside"),
    "absolute": (lambda i: i["weight_map"].update({"lm_head.weight": "/etc/passwd"}), "points outside"),
    "no map": (lambda i: {"metadata": {}}, "no weight_map"),
    "a list": (lambda i: [1], "not a JSON object"),
    "numbers": (lambda i: i["weight_map"].update({"lm_head.weight": 3}), "no weight_map of names"),
    "no such file": (lambda i: i["weight_map"].update({"lm_head.weight": "model-9.safetensors"}), "cannot be read"),
    "the folder itself": (lambda i: i["weight_map"].update({"lm_head.weight": ".."}), "cannot be read"),
    "a name too many": (lambda i: i["weight_map"].update({"x": SHARD}), "cannot be read"),
    "a name too few": (lambda i: i["weight_map"].pop("lm_head.weight") and None, "lm_head.weight"),
}


@pytest.mark.parametrize("damage", INDICES)
def test_hostile_index(damage: str, folder: Path) -> None:
    change, sentence = INDICES[damage]
    edit_json(folder / INDEX, change)
    with pytest.raises(ArtifactError) as seen:
        load_model(folder)
    assert sentence in str(seen.value)


NAME = "model.layers.1.mlp.up.B"
TENSORS = {
    "missing": (lambda t: t.pop(NAME), NAME),
    "wrong shape": (lambda t: t.update({NAME: t[NAME][:, 8:].clone()}), NAME),
    "nan": (lambda t: t[NAME].view(-1)[3].fill_(float("nan")), f"{NAME} in"),
    "infinite": (lambda t: t[NAME].view(-1)[3].fill_(float("inf")), f"{NAME} in"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_tensors(damage: str, folder: Path) -> None:
    change, sentence = TENSORS[damage]
    edit_tensors(folder / SHARD, change)
    with pytest.raises(ArtifactError) as seen:
        load_model(folder)
    assert sentence in str(seen.value)
    with pytest.raises(ArtifactError):
        CheckpointReader(folder).factors("layers.1.mlp.up")


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda p: p.write_bytes(b"\xff\x00" * 50)])
def test_damaged_files(name: str, damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / name)
    with pytest.raises(ArtifactError, match=r"again|first"):
        load_model(folder)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_damaged_rotations(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / ROTATION)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_rotations(folder)


@pytest.mark.parametrize(("kind", "names"), [("shared", []), ("none", ["q.0"]), ("shared", ["q.1"]), ("odd", ["q.0"])])
def test_rotations_of_another_kind(kind: str, names: list[str], tmp_path: Path) -> None:
    save_file({name: torch.eye(2) for name in names}, tmp_path / ROTATION, metadata={"kind": kind})
    with pytest.raises(ArtifactError, match="does not hold the rotations"):
        read_rotations(tmp_path)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a compressed checkpoint"):
        load_model(tmp_path / "nothing")

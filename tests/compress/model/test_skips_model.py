"""Whole models with cheap skips: rewritten exactly, written and read back, refused when damaged, counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.allocation.size import model_size, overhead_parameters
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import INDEX, ROTATION, CheckpointReader, read_rotations
from compress.checkpoint.writer import ShardWriter, config_for, write_config, write_rotations
from compress.errors import ArtifactError
from compress.model.skips import SliceSkip, parameters_of
from compress.rewrites.folding import folded
from compress.rewrites.rotations import Rotations, rotate_block
from compress.rotation.gauge import with_skips
from compress.source.model import ModelSource
from tests import tiny
from tests.compress.helpers import TinyModel, logits_of, relative, tiny_source
from validate.cost import ModelCost

KEPT, REFLECTIONS = 40, 10
SKIPS: dict[str, dict[str, int]] = {
    "dense": {},
    "cs": {"kept": KEPT},
    "householder": {"reflections": REFLECTIONS, "kept": KEPT},
}


def rotations_for(source: ModelSource, skip: str) -> Rotations:
    """Random rotations of a tiny model with skips of this form."""
    arch = source.architecture()
    d, generator = arch.hidden_size, torch.Generator().manual_seed(3)
    count = 2 * arch.num_layers + 1
    matrices = [torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in range(count)]
    plain = Rotations("block", tuple(torch.linalg.qr(m).Q for m in matrices))
    if skip == "slice":
        forms = (SliceSkip(d, KEPT, KEPT),) * (count - 2) + (SliceSkip(d, KEPT, d),)
        return Rotations("block", plain.matrices, forms)
    return with_skips(plain, skip, **SKIPS[skip])


def write(source: ModelSource, rotations: Rotations, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """The dense model rotated, as a checkpoint."""
    model = folded(source, dtype)
    with ShardWriter(folder, dtype) as shards:
        for name, tensor in model.ends(rotations).items():
            shards.add(name, tensor)
        for layer in range(model.arch.num_layers):
            for name, tensor in rotate_block(model.block(layer), model.arch, layer, rotations).items():
                shards.add(f"model.layers.{layer}.{name}", tensor)
    config = config_for(model.arch, {}, rotations)
    for name, value in rotations.skip_choices().items():
        setattr(config, name, value)
    write_config(folder, config, dtype)
    write_rotations(folder, rotations)
    return folder


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_opt_untied", "tiny_llama", "tiny_llama_tied"])
@pytest.mark.parametrize("skip", SKIPS)
def test_the_rewrite_is_exact(name: str, skip: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, name)
    plain = load_model(write(source, Rotations.none(), tmp_path / "plain"), torch.float64)
    model = load_model(write(source, rotations_for(source, skip), tmp_path / "skips"), torch.float64)
    ids = tiny.token_ids(2, 20)
    with torch.no_grad():
        assert relative(model(ids).logits, plain(ids).logits) < 1e-11


def test_a_slice_is_not(tiny_model: TinyModel, tmp_path: Path) -> None:
    """It loses what it drops; with the same rotations, exact() is exact, and the slice zeroes an untied embedding."""
    source = tiny_source(tiny_model, "tiny_llama")
    rotations, ids = rotations_for(source, "slice"), tiny.token_ids(2, 20)
    plain = load_model(write(source, Rotations.none(), tmp_path / "plain"))
    sliced = load_model(write(source, rotations, tmp_path / "slice"))
    whole = load_model(write(source, rotations.exact(), tmp_path / "whole"))
    assert relative(logits_of(whole, ids), logits_of(plain, ids)) < 1e-4
    assert relative(logits_of(sliced, ids), logits_of(plain, ids)) > 1e-2
    embedding = sliced.model.embed_tokens.weight
    assert torch.count_nonzero(embedding[:, KEPT:]) == 0
    assert torch.count_nonzero(embedding[:, :KEPT]) == embedding[:, :KEPT].numel()
    tied = tiny_source(tiny_model, "tiny_llama_tied")
    rows = folded(tied).ends(rotations_for(tied, "slice"))["model.embed_tokens.weight"]
    assert torch.count_nonzero(rows[:, KEPT:]) > 0  # the head reads them


@pytest.mark.parametrize("skip", [*SKIPS, "slice"])
def test_written_and_read_back(skip: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    rotations = rotations_for(source, skip)
    folder = write(source, rotations, tmp_path, torch.float32)
    back, reader = read_rotations(folder), CheckpointReader(folder)
    assert back.skips == rotations.skips
    assert back.forms() == rotations.forms()
    assert reader.config.parsed_skips() == rotations.forms()
    assert reader.skip(1, "mlp") == rotations.forms()[3]
    assert reader.config.skip == skip
    # What is stored is what is counted, by all who count.
    arch, stored = reader.architecture, 0
    for file in folder.glob("model-*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored += sum(tensors.get_tensor(n).numel() for n in tensors.keys() if "_skip." in n)  # noqa: SIM118
    counted = sum(form.parameter_count() for form in rotations.forms())
    assert stored == counted == parameters_of(skip, arch.hidden_size, arch.num_layers, **_sizes(skip))
    assert overhead_parameters(arch, "block", counted) == counted
    assert model_size(arch, {}, "block", skip_parameters=counted).overhead == counted
    cost = ModelCost.of(reader.config)
    assert cost.other["skip"] == counted
    assert cost.flops(1, 5)["skip"] == 2 * sum(form.macs(5) for form in rotations.forms())


def _sizes(skip: str) -> dict[str, int]:
    return {"kept": KEPT} if skip == "slice" else SKIPS[skip]


def test_dense_overhead_is_the_default(tiny_model: TinyModel) -> None:
    arch = tiny_source(tiny_model, "tiny_llama_tied").architecture()
    d, layers = arch.hidden_size, arch.num_layers
    assert overhead_parameters(arch, "block") == (2 * layers + 1) * d * d
    assert overhead_parameters(arch, "block", 7) == 7 + d * d
    assert overhead_parameters(arch, "shared", 7) == d * d
    assert overhead_parameters(arch, "none", 7) == 0


def test_checkpoints_of_before_still_load(tiny_model: TinyModel, tmp_path: Path) -> None:
    """config.json with skip "dense" and no skip_config; rotations without metadata of skips."""
    source = tiny_source(tiny_model, "tiny_llama")
    folder = write(source, rotations_for(source, "dense"), tmp_path, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config.pop("skip_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(folder / ROTATION, framework="pt") as file:
        assert file.metadata() == {"kind": "block"}
    assert len(read_rotations(folder).forms()) == 6
    load_model(folder)


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(skip="none"), "'none' skips"),
        (lambda c: c.update(skip="dense"), "'dense' skips"),
        (lambda c: c.update(skip_config=c["skip_config"][:-1]), "skip_config of 6 skips"),
        (lambda c: c["skip_config"][0].update(kept=64), "sizes that do not fit"),
        (lambda c: c["skip_config"][0].update(width=65), "width 64"),
        (lambda c: c["skip_config"][0].pop("turned"), "needs the integers"),
    ],
)
def test_damaged_configs_are_refused(
    change: Callable[[dict[str, Any]], Any], says: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    folder = write(source, rotations_for(source, "cs"), tmp_path, torch.float32)
    _edit(folder, change)
    with pytest.raises(ArtifactError, match=says):
        CheckpointReader(folder)


def test_factors_of_other_sizes_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    folder = write(source, rotations_for(source, "cs"), tmp_path, torch.float32)
    _edit(folder, lambda c: c["skip_config"][1].update(turned=23))
    with pytest.raises(ArtifactError, match=r"mlp_skip\.Y"):
        load_model(folder)


@pytest.mark.parametrize("forms", ['[{"form": "cs"}]', "3", "[", '{"a": 1}'])
def test_damaged_rotations_are_refused(forms: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    folder = write(source, rotations_for(source, "cs"), tmp_path, torch.float32)
    tensors = load_file(folder / ROTATION)
    save_file(tensors, folder / ROTATION, metadata={"kind": "block", "skips": forms})
    with pytest.raises(ArtifactError):
        read_rotations(folder)


def test_a_missing_factor_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    folder = write(source, rotations_for(source, "householder"), tmp_path, torch.float32)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.0.attn_skip.T"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"layers\.0\.attn_skip\.T"):
        load_model(folder)

"""The whole compression: calibrate, plan, fit, write OUT/checkpoint. Resumable at every block."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.allocation.budget import ratio_of
from compress.architecture import Architecture
from compress.artifact.store import Artifact
from compress.artifact.versions import versions
from compress.calibration.largest import largest_activations
from compress.calibration.streams import torch_device
from compress.calibration.text import TextData
from compress.checkpoint.writer import ShardWriter, config_for, write_config, write_rotations
from compress.fit.record import summarise
from compress.methods.base import Context, Fitted
from compress.methods.registry import check_recipe, method_of
from compress.preflight import check, inputs_of, look_at_weights
from compress.progress import log
from compress.recipe import Recipe
from compress.requests import request_digest, statistics_digest
from compress.source.model import ModelSource
from compress.source.provenance import record_of
from compress.structures import DenseStructure


def compress_model(
    source: ModelSource,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    batch: int = 4,
    materialize_dense: bool = False,
    statistics: Path | None = None,
    text: TextData | None = None,
) -> Artifact:
    """Compress `source` into OUT/checkpoint, and OUT/dense when asked for. Returns the artefact.

    A run that was interrupted is resumed from OUT/state when source and recipe are the same. `statistics`: a folder in
    which the calibration's second moments are kept, for other runs with the same model and text. `text`: the
    calibration text where it is in memory (`text_in_memory`); its name is that of the recipe.
    """
    artifact = Artifact(out)
    arch = source.architecture()
    check_recipe(arch, recipe)
    check(artifact, source, recipe, batch=batch, materialize_dense=materialize_dense, statistics=statistics)
    runner_device = torch_device(device)
    with artifact.lock():
        artifact.refuse_others()
        artifact.claim("checkpoint", "recipe.yaml", *(["dense"] if materialize_dense else []))
        inputs = inputs_of(source, recipe, text)
        model, tokenizer, tokens = inputs.model, inputs.tokenizer, inputs.tokens
        request = request_digest(source, recipe)
        look_at_weights(model)
        state = artifact.open_state(request | {"versions": versions()})
        folder = None if statistics is None else statistics / statistics_digest(source, recipe)
        fitted = method_of(recipe).fit(Context(model, recipe, tokens, state, runner_device, batch, folder))
        summarise(fitted.records)
        dtype = getattr(torch, recipe.checkpoint_dtype)
        size = fitted.size(arch)
        resolved = _resolved(recipe, fitted, arch)
        section = {"source": record_of(source), "recipe_sha256": resolved.digest(), "versions": versions()}
        facts = {"request": request, "ratio": size.ratio, "model_ratio": size.model_ratio, **asdict(size)}
        with artifact.stage("checkpoint", facts=facts, section=section) as folder:
            with ShardWriter(folder, dtype, fitted.structures) as shards:
                for name, tensor in fitted.ends.items():
                    shards.add(name, tensor)
                for file in fitted.files:
                    for name, tensor in load_file(file).items():
                        shards.add(name, tensor)
            config = config_for(arch, fitted.structures, fitted.rotations, **fitted.choices())
            write_config(folder, config, dtype, source.generation_config())
            write_rotations(folder, fitted.rotations)
            tokenizer.save_pretrained(folder)
            (folder / "fit.json").write_text(json.dumps([asdict(r) for r in fitted.records], indent=1) + "\n")
            if tokens is not None:
                facts["activations"] = _watched(folder, tokens, runner_device, batch)
        artifact.write_text("recipe.yaml", resolved.to_yaml())
        if materialize_dense:
            from compress.checkpoint.plain import write_plain

            with artifact.stage("dense", inputs=["checkpoint"]) as folder:
                write_plain(source, model, artifact.path("checkpoint"), folder)
        artifact.clear_state()
    seconds = recipe.budget_latency
    asked = f"{ratio_of(arch, recipe):.4f}" if seconds is None else f"{seconds:g} seconds"
    log(
        f"kept {size.ratio:.4f} of the projection parameters, skips, head map and added biases counted (asked "
        f"{asked if recipe.compresses() else 'all'}), {size.model_ratio:.4f} of the model"
    )
    return artifact


def _watched(checkpoint: Path, tokens: Tensor, device: torch.device, batch: int) -> dict[str, Any]:
    """checkpoint/activations.json, and what the manifest says of it."""
    found = largest_activations(checkpoint, tokens, device, batch)
    (checkpoint / "activations.json").write_text(json.dumps(found.all(), indent=1) + "\n")
    place, value = found.worst()
    log(f"largest activation {value:.4g}: {place}")
    return found.to_dict()


def _resolved(recipe: Recipe, fitted: Fitted, arch: Architecture) -> Recipe:
    """The recipe with every linear's choice written out, dense ones included: fed back, it decides everything.

    Beside each choice stand its parameters, multiply-accumulates per token and predicted loss, for the reader.
    """
    explicit = {}
    for record in fitted.records:
        n, m = arch.linears()[record.name.split(".", 2)[2]]
        structure = fitted.structures.get(record.name) or DenseStructure(in_features=m, out_features=n)
        bytes_ = structure.bytes(getattr(torch, recipe.checkpoint_dtype))
        told = {"predicted_loss": record.predicted_loss, "bytes": bytes_, "macs": structure.macs(1)}
        explicit[record.name] = {**structure.to_config(), **told}
    return recipe.model_copy(update={"layers": explicit})

"""The whole compression: calibrate, plan, fit, write OUT/checkpoint. Resumable at every block."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress import families
from compress.accounting import model_size
from compress.artifact import Artifact
from compress.calibration import token_sequences
from compress.checkpoint import (
    ShardWriter,
    load_model,
    read_rotations,
    structured_state,
    write_config,
    write_rotations,
)
from compress.errors import MissingDependencyError, UsageError
from compress.files import sha256_of
from compress.fitting import FitRecord, LayerFitter, summarise
from compress.inner import InnerRewrites, extra_biases
from compress.invariance import FoldedModel, Rotations, rotate_block
from compress.jrk import frobenius_error, jrk_fit_block
from compress.modeling import ProcrustesConfig, ProcrustesForCausalLM
from compress.models import ModelSource
from compress.planning import Moments, Plan, check_recipe, make_plan, needs_moments, structures_without_text
from compress.progress import log
from compress.recipe import Recipe, parse_recipe, read_yaml
from compress.skips import skip_from_config
from compress.statistics import collect
from compress.streams import Runner, save_whole
from compress.structures import DenseStructure, Structure, structure_from_config
from compress.structures.joint import leader_of
from compress.textdata import load_text

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def torch_device(name: str) -> torch.device:
    """The device called `name`; exit 4 when this machine lacks it, exit 2 when there is no such name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is no device: cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported: cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu, or install "
            f"a CUDA build"
        )
    return device


def folded(source: ModelSource, dtype: torch.dtype = torch.float32) -> FoldedModel:
    """The source with its norms folded, read lazily."""
    arch = source.architecture()
    return FoldedModel(source.reader(), arch, families.tensor_names(arch), dtype)


def config_for(
    arch: Any, structures: Mapping[str, Structure], rotations: Rotations, **choices: Any
) -> ProcrustesConfig:
    """config.json of a checkpoint with these structures and rotations; choices: extra_biases, embedding ranks."""
    layer_norm = arch.norm == "layernorm"
    return ProcrustesConfig.from_architecture(
        arch,
        structures,
        rotation=rotations.kind,
        **rotations.skip_choices(),
        center_embedding=arch.tied and layer_norm,
        head_map=arch.tied,
        head_bias=layer_norm and not arch.tied,
        tie_word_embeddings=arch.tied,
        **choices,
    )


def request_digest(source: ModelSource, recipe: Recipe) -> dict[str, Any]:
    """What decides a checkpoint: equal requests give equal checkpoints."""
    request = {"source": source.to_dict(), "recipe": recipe.digest()}
    text = Path(recipe.calibration.data.removeprefix("wikitext:"))
    if recipe.needs_text() and text.is_file():  # a named text never changes, a file may
        request["text"] = sha256_of(text)
    return request


def statistics_digest(source: ModelSource, recipe: Recipe) -> str:
    """Equal for requests whose second moments are equal."""
    request = {
        **{k: v for k, v in request_digest(source, recipe).items() if k != "recipe"},
        "calibration": recipe.calibration.model_dump(),
        "sensitivity": [recipe.sensitivity == "fisher", recipe.sensitivity_samples],
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def compress_model(
    source: ModelSource,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    batch: int = 4,
    materialize_dense: bool = False,
    statistics: Path | None = None,
) -> Artifact:
    """Compress `source` into OUT/checkpoint, and OUT/dense when asked for. Returns the artefact.

    A run that was interrupted is resumed from OUT/state when source and recipe are the same. `statistics`: a folder in
    which the calibration's second moments are kept, for other runs with the same model and text (not two at a time).
    """
    if batch < 1:
        raise UsageError(f"--batch {batch} runs nothing: give 1 or more calibration sequences at a time")
    artifact = Artifact(out)
    arch = source.architecture()
    check_recipe(arch, recipe)
    request = request_digest(source, recipe)
    runner_device = torch_device(device)
    with artifact.lock():
        state = _state_folder(artifact, request)
        model = folded(source)
        tokenizer = source.tokenizer()
        tokens = None
        if recipe.needs_text():
            c = recipe.calibration
            tokens = token_sequences(
                load_text(c.data),
                tokenizer,
                samples=c.samples,
                length=c.sequence_length,
                seed=c.seed,
                vocab_size=arch.vocab_size,
            )
            _warn_when_short(tokens.numel(), max(m for _, m in arch.linears().values()))
        folder = None if statistics is None else statistics / statistics_digest(source, recipe)
        plan, files, records = _plan_and_fit(model, recipe, tokens, state, runner_device, batch, folder)
        summarise(records)
        dtype = getattr(torch, recipe.checkpoint_dtype)
        skips = sum(form.parameter_count() for form in plan.rotations.forms())
        biases = extra_biases(arch, tuple(arch.linears())) if "bias" in recipe.inner else []
        size = model_size(arch, plan.structures, plan.rotations.kind, biases, skips)
        resolved = _resolved(recipe, plan, arch.linears(), arch.num_layers)
        section = {"source": source.to_dict(), "recipe_sha256": resolved.digest(), "versions": _versions()}
        facts = {"request": request, "ratio": size.ratio, "model_ratio": size.model_ratio, **asdict(size)}
        with artifact.stage("checkpoint", facts=facts, section=section) as folder:
            with ShardWriter(folder, dtype) as shards:
                for name, tensor in model.ends(plan.rotations).items():
                    shards.add(name, tensor)
                for file in files:
                    for name, tensor in load_file(file).items():
                        shards.add(name, tensor)
            write_config(folder, config_for(arch, plan.structures, plan.rotations, extra_biases=biases or None), dtype)
            write_rotations(folder, plan.rotations)
            tokenizer.save_pretrained(folder)
            (folder / "fit.json").write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")
        artifact.write_text("recipe.yaml", resolved.to_yaml())
        if materialize_dense:
            from compress.materialize import write_plain

            with artifact.stage("dense", inputs=["checkpoint"]) as folder:
                write_plain(source, model, artifact.path("checkpoint"), folder)
        artifact.clear_state()
    log(
        f"kept {size.ratio:.4f} of the projection parameters (asked {recipe.ratio}), "
        f"{size.model_ratio:.4f} of the model"
    )
    return artifact


def _warn_when_short(tokens: int, width: int) -> None:
    """Second moments of `width` features from too few tokens are singular or noise, and the fits follow the noise."""
    if tokens < 4 * width:
        log(
            f"warning: {tokens:,} calibration tokens for linears of {width:,} inputs are few; at least {4 * width:,} "
            f"are advisable (--calibration-samples, --sequence-length), perplexity suffers otherwise"
        )


def has_checkpoint(artifact: Artifact, source: ModelSource, recipe: Recipe) -> bool:
    """Whether OUT/checkpoint was made by this very request, and OUT/recipe.yaml with it."""
    if not (artifact.has_stage("checkpoint") and artifact.has_stage("recipe.yaml")):
        return False
    manifest = artifact.read_manifest()
    if manifest["stages"]["checkpoint"].get("request") != request_digest(source, recipe):
        return False
    path = artifact.path("recipe.yaml")
    return parse_recipe(read_yaml(path), str(path)).digest() == manifest.get("recipe_sha256")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _resolved(recipe: Recipe, plan: Plan, linears: Mapping[str, Any], layers: int) -> Recipe:
    """The recipe with every linear's choice written out, dense ones included: fed back, it decides everything."""
    explicit = {}
    for layer in range(layers):
        for role, (n, m) in linears.items():
            name = f"layers.{layer}.{role}"
            structure = plan.structures.get(name)
            explicit[name] = (
                structure.to_config() if structure else {"structure": "dense", "in_features": m, "out_features": n}
            )
    return recipe.model_copy(update={"layers": explicit})


def _state_folder(artifact: Artifact, request: dict[str, Any]) -> Path:
    """OUT/state, emptied when it belongs to another request."""
    state = artifact.state_folder()
    key = state / "request.json"
    text = json.dumps(request, sort_keys=True)
    if key.exists() and key.read_text() == text:
        log("resuming the interrupted run in OUT/state")
        return state
    shutil.rmtree(state)
    state.mkdir()
    key.write_text(text)
    return state


def _plan_and_fit(
    model: FoldedModel,
    recipe: Recipe,
    tokens: Tensor | None,
    state: Path,
    device: torch.device,
    batch: int,
    statistics: Path | None = None,
) -> tuple[Plan, list[Path], list[FitRecord]]:
    if tokens is None:
        return _without_text(model, recipe, state)
    runner = Runner(model.arch, tokens.shape[1], device, batch)
    moments: Moments = {}
    if needs_moments(recipe):
        moments = collect(
            model,
            tokens[: min(recipe.sensitivity_samples, len(tokens))],
            sensitivity=recipe.sensitivity,
            seed=recipe.calibration.seed,
            runner=runner,
            folder=statistics or state / "moments",
        )
    plan = _saved_plan(state) or _save_plan(state, make_plan(model, recipe, moments))
    fitter = LayerFitter(model, plan, recipe, moments, tokens, runner, state)
    files, records = fitter.run()
    return plan, files, records


def _without_text(model: FoldedModel, recipe: Recipe, state: Path) -> tuple[Plan, list[Path], list[FitRecord]]:
    """A dense copy, or joint rank-k: every block by itself, from its weights alone. relative_error is |W - What| / |W|
    in the Frobenius norm."""
    arch, files, records = model.arch, [], []
    structures = structures_without_text(arch, recipe)
    for layer in range(arch.num_layers):
        weights = model.block(layer)
        prefix = f"layers.{layer}."
        here = {name.removeprefix(prefix): s for name, s in structures.items() if name.startswith(prefix)}
        fitted = jrk_fit_block(weights, here)
        tensors = {f"model.{prefix}{n}": w for n, w in weights.items() if n.removesuffix(".weight") not in here}
        for role, (n, m) in arch.linears().items():
            name, weight = prefix + role, weights[f"{role}.weight"]
            structure: Structure = here.get(role) or DenseStructure(in_features=m, out_features=n)
            error = 0.0
            if role in here:
                tensors |= structured_state(name, fitted[role], None)
                leader = leader_of(structures, name)
                shared = {} if leader is None else {"V": fitted[leader.removeprefix(prefix)]["V"]}
                error = frobenius_error(weight, structure, shared | fitted[role])
            records.append(FitRecord(name, structure.name, structure.parameter_count(), n * m, error, None))
        files.append(state / f"block-{layer}.safetensors")
        save_whole(tensors, files[-1])
    return Plan(Rotations.none(), structures, {}), files, records


def _save_plan(state: Path, plan: Plan) -> Plan:
    save_whole({f"q.{i}": q for i, q in enumerate(plan.rotations.matrices)}, state / "plan.safetensors")
    plan.rewrites.save(state / "rewrites.safetensors")
    record = {
        "kind": plan.rotations.kind,
        "skips": [form.to_config() for form in plan.rotations.skips],
        "structures": {name: s.to_config() for name, s in plan.structures.items()},
        "predicted": plan.predicted,
    }
    partial = state / "plan.partial"
    partial.write_text(json.dumps(record))
    partial.rename(state / "plan.json")
    return plan


def _saved_plan(state: Path) -> Plan | None:
    if not (state / "plan.json").exists():
        return None
    record, tensors = json.loads((state / "plan.json").read_text()), load_file(state / "plan.safetensors")
    matrices = tuple(tensors[f"q.{i}"] for i in range(len(tensors)))
    rotations = Rotations(record["kind"], matrices, tuple(skip_from_config(c) for c in record["skips"]))
    structures = {name: structure_from_config(c) for name, c in record["structures"].items()}
    return Plan(rotations, structures, record["predicted"], InnerRewrites.load(state / "rewrites.safetensors"))


def write_dense(source: ModelSource, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The dense, norm-folded, unrotated model in the format of OUT/checkpoint: the baseline for speed."""
    write_rewritten(source, Rotations.none(), folder, dtype)


def write_rewritten(
    source: ModelSource, rotations: Rotations, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """The dense model folded and rotated, nothing approximated, in the format of OUT/checkpoint."""
    model = folded(source, dtype)
    arch = model.arch
    with ShardWriter(folder, dtype) as shards:
        for name, tensor in model.ends(rotations).items():
            shards.add(name, tensor)
        for layer in range(arch.num_layers):
            for name, tensor in rotate_block(model.block(layer), arch, layer, rotations).items():
                shards.add(f"model.layers.{layer}.{name}", tensor)
    write_config(folder, config_for(arch, {}, rotations), dtype)
    write_rotations(folder, rotations)
    source.tokenizer().save_pretrained(folder)


def rewritten_model(source: ModelSource, checkpoint: Path) -> ProcrustesForCausalLM:
    """The source folded and rotated exactly as `checkpoint` was before its weights were approximated (rung 1)."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        write_rewritten(source, read_rotations(checkpoint).exact(), Path(name))
        return load_model(Path(name))

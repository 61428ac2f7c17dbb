"""How each recipe becomes fitted blocks: by plan and fit, as the paper does, by slicing, or without any text."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.allocation.budget import kept_width, ratio_of, unit_of
from compress.allocation.plan import save_plan, saved_plan
from compress.allocation.size import ModelSize, model_size
from compress.architecture import Architecture, extra_biases
from compress.artifact.ledger import KeptFolder
from compress.artifact.state import save_whole
from compress.calibration.measured import measured_losses
from compress.calibration.moments import Moments, collect, shared_folder
from compress.calibration.streams import Runner
from compress.errors import UsageError
from compress.fit.embedding import EmbeddingRanks, compress_embedding, token_counts
from compress.fit.ends import fitted_ends
from compress.fit.fallback import FAILURES
from compress.fit.layers import LayerFitter
from compress.fit.record import FitRecord
from compress.jrk import frobenius_error, jrk_fit_block
from compress.model.blocks import structured_state
from compress.planning import make_plan, needs_moments, structures_without_text
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations, Weights
from compress.structures import DenseStructure, Structure
from compress.structures.joint import leader_of


@dataclass(frozen=True)
class Fitted:
    """A compressed model before it is written: embeddings and head, one file of state-dict entries for each block, and
    what config.json has to say about them."""

    rotations: Rotations
    structures: dict[str, Structure]
    ends: Weights
    files: list[Path]
    records: list[FitRecord]
    ranks: EmbeddingRanks = field(default_factory=EmbeddingRanks)
    extra_biases: list[str] = field(default_factory=list)

    def choices(self) -> dict[str, Any]:
        """Fields of config.json."""
        return {
            "extra_biases": self.extra_biases or None,
            "embedding_rank": self.ranks.embedding,
            "head_rank": self.ranks.head,
        }

    def size(self, arch: Architecture) -> ModelSize:
        """What it stores."""
        skips = sum(form.parameter_count() for form in self.rotations.forms())
        ranks = (self.ranks.embedding, self.ranks.head)
        return model_size(arch, self.structures, self.rotations.kind, self.extra_biases, skips, *ranks)


def fit_model(
    model: FoldedModel,
    recipe: Recipe,
    tokens: Tensor | None,
    state: KeptFolder,
    device: torch.device,
    batch: int,
    statistics: Path | None = None,
) -> Fitted:
    """Compress by `recipe`; tokens (samples, length) int64, None for a recipe that reads no text.

    `state` holds what an interrupted run needs to go on; `statistics` the second moments, for other runs too, which
    wait for each other while they are collected.
    """
    if tokens is None:
        return fit_without_text(model, recipe, state)
    runner = Runner(model.arch, tokens.shape[1], device, batch, recipe.calibration_dtype == "bfloat16")
    if recipe.structure == "slice":
        return fit_sliced(model, recipe, tokens, runner, state)
    moments: Moments = {}
    if needs_moments(recipe):
        few = tokens[: min(recipe.sensitivity_samples, len(tokens))]
        with nullcontext(state) if statistics is None else shared_folder(statistics) as kept:
            moments = collect(
                model, few, sensitivity=recipe.sensitivity, seed=recipe.calibration.seed, runner=runner, kept=kept
            )
    if recipe.fit == "paper":
        return fit_by_the_paper(model, recipe, tokens, moments, state, device)
    if "plan.json" not in state:
        measured = None
        if recipe.sensitivity == "measured":
            measured = measured_losses(model, few, moments, recipe, runner, state)
        try:
            save_plan(state, make_plan(model, recipe, moments, measured, state))
        except FAILURES as error:
            raise UsageError(
                f"the moments of this model and text are singular beyond what damping by {recipe.gram_damping:g} (Gram "
                f"matrices) and {recipe.metric_damping:g} (metrics) makes up for ({str(error).partition(':')[0]}): "
                f"raise gram_damping and metric_damping, e.g. --set gram_damping=1e-3"
            ) from error
    plan = saved_plan(state)
    ends, ranks = fitted_ends(model, recipe, plan.rotations, tokens, moments)
    files, records = LayerFitter(model, plan, recipe, moments, tokens, runner, state, ends).run()
    biases = extra_biases(model.arch, tuple(model.arch.linears())) if "bias" in recipe.inner else []
    return Fitted(plan.rotations, plan.structures, ends, files, records, ranks, biases)


def fit_sliced(model: FoldedModel, recipe: Recipe, tokens: Tensor, runner: Runner, state: KeptFolder) -> Fitted:
    from compress.slicing import slice_model

    found = slice_model(model, tokens, kept_width(model.arch, recipe), runner, state)
    ends, ranks = fitted_ends(model, recipe, found.rotations, tokens, {})
    return Fitted(found.rotations, found.structures, ends, found.files, found.records, ranks)


def fit_by_the_paper(
    model: FoldedModel, recipe: Recipe, tokens: Tensor, moments: Moments, state: KeptFolder, device: torch.device
) -> Fitted:
    from compress.paper.accounting import largest_kept
    from compress.paper.blocks import fit_paper

    kind: Literal["kron", "gs"] = "kron" if recipe.structure == "kron" else "gs"
    kept = largest_kept(model.arch, kind, ratio_of(model.arch, recipe))
    counts = token_counts(tokens, model.arch.vocab_size)
    found = fit_paper(model, kind, kept, moments, counts, device=device, state=state)
    ends, ranks = fitted_ends(model, recipe, found.rotations, tokens, moments)
    return Fitted(found.rotations, found.structures, ends, found.files, found.records, ranks)


def fit_without_text(model: FoldedModel, recipe: Recipe, state: KeptFolder) -> Fitted:
    """A dense copy, or joint rank-k: every block by itself, from its weights alone. relative_error is |W - What| / |W|
    in the Frobenius norm."""
    arch = model.arch
    files, records = list[Path](), list[FitRecord]()
    structures = structures_without_text(arch, recipe)
    for layer in range(arch.num_layers):
        name = f"block-{layer}"
        files.append(state.path(f"{name}.safetensors"))
        if f"{name}.json" not in state:
            tensors, fresh = _block_without_text(model, structures, layer)
            save_whole(tensors, files[-1])
            state.write_value(name, [asdict(record) for record in fresh])
            state.keep(f"{name}.safetensors", f"{name}.json")
        records += [FitRecord(**record) for record in state.read_value(name)]
    ends = model.ends(Rotations.none())
    ends, ranks = compress_embedding(ends, arch, None, None, recipe.embedding, unit_of(arch, recipe))
    return Fitted(Rotations.none(), structures, ends, files, records, ranks)


def _block_without_text(
    model: FoldedModel, structures: dict[str, Structure], layer: int
) -> tuple[dict[str, Tensor], list[FitRecord]]:
    """State-dict entries of one block, and a record for each of its linears."""
    weights, records = model.block(layer), list[FitRecord]()
    prefix = f"layers.{layer}."
    here = {name.removeprefix(prefix): s for name, s in structures.items() if name.startswith(prefix)}
    fitted = jrk_fit_block(weights, here)
    tensors = {f"model.{prefix}{n}": w for n, w in weights.items() if n.removesuffix(".weight") not in here}
    for role, (n, m) in model.arch.linears().items():
        name, weight = prefix + role, weights[f"{role}.weight"]
        structure: Structure = here.get(role) or DenseStructure(in_features=m, out_features=n)
        error = 0.0
        if role in here:
            tensors |= structured_state(name, fitted[role], None)
            leader = leader_of(structures, name)
            shared = {} if leader is None else {"V": fitted[leader.removeprefix(prefix)]["V"]}
            error = frobenius_error(weight, structure, shared | fitted[role])
        records.append(FitRecord(name, structure.name, structure.parameter_count(), n * m, error, None))
    return tensors, records

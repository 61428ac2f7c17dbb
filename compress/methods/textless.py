"""Fits that read no text: every block by itself, from its weights alone, in the Frobenius norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from compress.allocation.budget import unit_of
from compress.allocation.explicit import explicit_layers
from compress.architecture import Architecture
from compress.artifact.state import save_whole
from compress.errors import ArtifactError, UsageError
from compress.fit.embedding import compress_embedding
from compress.fit.record import FitRecord
from compress.methods.base import Context, Fitted, Space
from compress.methods.space import fitted_blocks, memory_alone
from compress.model.blocks import structured_state
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.structures import DenseStructure, LowRankStructure, Structure
from compress.structures.joint import joint_fit, leader_of


def named_structures(arch: Architecture, recipe: Recipe, chosen: Mapping[str, Structure]) -> dict[str, Structure]:
    """The structures of a recipe, dense ones left out: those `chosen` by its method, or what it gives by name.

    Raises UsageError for sharing that does not hold together.
    """
    named = {**chosen, **explicit_layers(arch, recipe)}
    structures = {n: s for n, s in named.items() if s.name != "dense"}
    try:
        for name in structures:
            leader_of(structures, name)
    except ArtifactError as error:
        raise UsageError(f"recipe layers: {error}") from error
    return structures


def space_without_text(arch: Architecture, recipe: Recipe) -> Space:
    """What such a run takes."""
    return Space(fitted_blocks(arch, recipe), memory_alone(arch))


def fit_without_text(context: Context, structures: dict[str, Structure]) -> Fitted:
    """Fit every linear that has a structure. relative_error is |W - What| / |W| in the Frobenius norm."""
    arch, recipe, state = context.arch, context.recipe, context.state
    files, records = list[Path](), list[FitRecord]()
    for layer in range(arch.num_layers):
        name = f"block-{layer}"
        files.append(state.path(f"{name}.safetensors"))
        if f"{name}.json" not in state:
            tensors, fresh = _block_without_text(context.model, structures, layer)
            save_whole(tensors, files[-1])
            state.write_value(name, [asdict(record) for record in fresh])
            state.keep(f"{name}.safetensors", f"{name}.json")
        records += [FitRecord(**record) for record in state.read_value(name)]
    ends = context.model.ends(Rotations.none())
    ends, ranks = compress_embedding(ends, arch, None, None, recipe.embedding, unit_of(arch, recipe))
    return Fitted(Rotations.none(), structures, ends, files, records, ranks)


def _block_without_text(
    model: FoldedModel, structures: dict[str, Structure], layer: int
) -> tuple[dict[str, Tensor], list[FitRecord]]:
    """State-dict entries of one block, and a record for each of its linears."""
    weights, records = model.block(layer), list[FitRecord]()
    prefix = f"layers.{layer}."
    here = {name.removeprefix(prefix): s for name, s in structures.items() if name.startswith(prefix)}
    fitted = fit_alone(weights, here)
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


def fit_alone(weights: Mapping[str, Tensor], structures: Mapping[str, Structure]) -> dict[str, dict[str, Tensor]]:
    """Role -> factors for one block, all fitted in the Frobenius norm, and those that share a V together.

    weights: "{role}.weight" (out, in); structures: role -> structure. Raises UsageError, see `Structure.fit`.
    """
    fitted: dict[str, dict[str, Tensor]] = {}
    for role, structure in structures.items():
        if role in fitted:
            continue
        followers = [r for r, s in structures.items() if isinstance(s, LowRankStructure) and s.shares == role]
        if isinstance(structure, LowRankStructure) and followers:
            V, parts = joint_fit([weights[f"{r}.weight"] for r in (role, *followers)], structure.rank)
            fitted[role] = {"V": V, "U": parts[0]}
            fitted |= {r: {"U": U} for r, U in zip(followers, parts[1:], strict=True)}
        else:
            fitted[role] = structure.fit(weights[f"{role}.weight"])
    return {role: fitted[role] for role in structures}


def frobenius_error(weight: Tensor, structure: Structure, factors: Mapping[str, Tensor]) -> float:
    """|W - What| / |W|, 0 for a zero weight; factors with the V of the leader where it is shared."""
    lost = torch.linalg.matrix_norm(weight.double() - structure.dense(factors).double())
    return float(lost / torch.linalg.matrix_norm(weight.double()).clamp(min=1e-300))

"""Methods that read no text: a dense copy, and joint rank-k."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from compress.allocation.budget import (
    ratio_of,
    unit_of,
)
from compress.allocation.explicit import explicit_layers
from compress.architecture import Architecture
from compress.artifact.ledger import KeptFolder
from compress.artifact.state import save_whole
from compress.errors import ArtifactError, UsageError
from compress.fit.embedding import compress_embedding
from compress.fit.record import FitRecord
from compress.methods.base import Fitted
from compress.methods.jrk import frobenius_error, jrk_fit_block, jrk_structures
from compress.model.blocks import structured_state
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.structures import (
    DenseStructure,
    Structure,
)
from compress.structures.joint import leader_of


def structures_without_text(arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
    """The structures of a recipe that reads no text, dense ones left out: joint rank-k, or what it gives by name.

    Raises UsageError for an impossible ratio and for sharing that does not hold together.
    """
    unit = unit_of(arch, recipe)
    chosen = jrk_structures(arch, ratio_of(arch, recipe), unit) if recipe.structure == "jrk" else {}
    chosen = {n: s for n, s in (chosen | explicit_layers(arch, recipe)).items() if s.name != "dense"}
    try:
        for name in chosen:
            leader_of(chosen, name)
    except ArtifactError as error:
        raise UsageError(f"recipe layers: {error}") from error
    return chosen


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

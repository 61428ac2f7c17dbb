"""A whole model by the paper's method, as the files of state-dict entries that a checkpoint is written from.

Every position's result is a file, so that a run that was interrupted goes on at the next position; block files are put
together at the end. The final factors are the paper's own: nothing is fitted again on the compressed model's stream.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, device

from compress.artifact.ledger import KeptFolder
from compress.artifact.state import save_whole
from compress.fit.record import FitRecord
from compress.methods.paper.shapes import Kind, paper_structures
from compress.methods.paper.solver import (
    ALS_ITERATIONS,
    GD_ITERATIONS,
    PaperMoments,
    PaperPosition,
    PaperRecord,
    paper_positions,
)
from compress.model.blocks import structured_state
from compress.progress import log, track
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations, rotate_block
from compress.structures import Structure


@dataclass(frozen=True)
class PaperFit:
    """Rotations of kind "block", structures of the linears that are not dense, a file of state-dict entries for each
    block ("model.layers.0.attn.q.B"), one record for each linear and one for each position."""

    rotations: Rotations
    structures: dict[str, Structure]
    files: list[Path]
    records: list[FitRecord]
    positions: list[PaperRecord]


def fit_paper(
    model: FoldedModel,
    kind: Kind,
    kept: float,
    moments: PaperMoments,
    token_counts: Tensor,
    *,
    als_iterations: int = ALS_ITERATIONS,
    gd_iterations: int = GD_ITERATIONS,
    device: device,
    state: KeptFolder,
) -> PaperFit:
    """Solve every position and write the blocks to `state`, a folder that belongs to this very request.

    Other arguments and errors as `solver.paper_plan`.
    """
    arch, count = model.arch, 2 * model.arch.num_layers + 1
    start = next((p for p in range(count) if f"paper-{p}.json" not in state), count)
    found = paper_positions(
        model,
        kind,
        kept,
        moments,
        token_counts,
        als_iterations=als_iterations,
        gd_iterations=gd_iterations,
        device=device,
        start=start,
    )
    for result in track(found, description="position", total=count - start):
        _save(state, result)
    matrices, errors, positions = [], dict[str, float](), []
    for p in range(count):
        matrices.append(load_file(_factor_file(state, p))["q"])
        told = state.read_value(f"paper-{p}")
        errors |= told["errors"]
        positions.append(
            PaperRecord(**{**told["record"], "frobenius_errors": tuple(told["record"]["frobenius_errors"])})
        )
    rotations, structures = Rotations("block", tuple(matrices)), paper_structures(arch, kind, kept)
    files = [_write_block(model, layer, rotations, structures, state) for layer in range(arch.num_layers)]
    before, after = (sum(getattr(r, name) for r in positions) for name in ("error_before", "error_after"))
    log(f"{count} rotations: summed weighted error {before:.4g} -> {after:.4g}")
    records = [
        _record(f"layers.{layer}.{role}", n * m, structures, errors)
        for layer in range(arch.num_layers)
        for role, (n, m) in arch.linears().items()
    ]
    return PaperFit(rotations, structures, files, records, positions)


def _factor_file(state: KeptFolder, position: int) -> Path:
    return state.path(f"paper-{position}.safetensors")


def _save(state: KeptFolder, result: PaperPosition) -> None:
    name = f"paper-{result.position}"
    factors = {f"{linear}:{part}": t for linear, parts in result.factors.items() for part, t in parts.items()}
    save_whole({"q": result.q, **factors}, _factor_file(state, result.position))
    state.write_value(name, {"errors": result.errors, "record": asdict(result.record)})
    state.keep(f"{name}.safetensors", f"{name}.json")


def _write_block(
    model: FoldedModel, layer: int, rotations: Rotations, structures: dict[str, Structure], state: KeptFolder
) -> Path:
    file = f"block-{layer}.safetensors"
    if file in state:
        return state.path(file)
    weights = rotate_block(model.block(layer), model.arch, layer, rotations)
    fitted: dict[str, dict[str, Tensor]] = {}
    for position in (2 * layer, 2 * layer + 1, 2 * layer + 2):
        for name, tensor in load_file(_factor_file(state, position)).items():
            linear, _, factor = name.partition(":")
            fitted.setdefault(linear, {})[factor] = tensor
    entries = {f"model.layers.{layer}.{n}": w for n, w in weights.items() if "norm" in n or "skip" in n}
    for role in model.arch.linears():
        name = f"layers.{layer}.{role}"
        factors = fitted[name] if name in structures else {"weight": weights[f"{role}.weight"]}
        entries |= structured_state(name, factors, weights.get(f"{role}.bias"))
    save_whole(entries, state.path(file))
    state.keep(file)
    return state.path(file)


def _record(
    linear: str, dense_parameters: int, structures: dict[str, Structure], errors: dict[str, float]
) -> FitRecord:
    structure = structures.get(linear)
    if structure is None:
        return FitRecord(linear, "dense", dense_parameters, dense_parameters, 0.0, None)
    error = max(errors[linear], 0.0) ** 0.5
    return FitRecord(linear, structure.name, structure.parameter_count(), dense_parameters, error, None)

"""A plan: rotations, structures, exact rewrites; and how an interrupted run finds it again."""

from __future__ import annotations

from dataclasses import dataclass, field

from safetensors.torch import load_file

from compress.artifact.ledger import KeptFolder
from compress.artifact.state import save_whole
from compress.model.skips import skip_from_config
from compress.rewrites.inner import InnerRewrites
from compress.rewrites.rotations import Rotations
from compress.structures import (
    Structure,
    structure_from_config,
)


@dataclass(frozen=True)
class Plan:
    """Rotations, the structure of every linear that is not dense, the predicted loss (nats per token) of each linear
    that was allocated a size, and the exact rewrites of the inner side that `select` structures ask for."""

    rotations: Rotations
    structures: dict[str, Structure]
    predicted: dict[str, float]
    rewrites: InnerRewrites = field(default_factory=InnerRewrites)


def save_plan(state: KeptFolder, plan: Plan) -> None:
    """Keep the plan, in place of what it was made from."""
    matrices = {f"q.{i}": q for i, q in enumerate(plan.rotations.matrices)}
    save_whole(matrices, state.path("plan.safetensors"))
    plan.rewrites.save(state.path("rewrites.safetensors"))
    record = {
        "kind": plan.rotations.kind,
        "skips": [form.to_config() for form in plan.rotations.skips],
        "structures": {name: s.to_config() for name, s in plan.structures.items()},
        "predicted": plan.predicted,
    }
    state.write_value("plan", record)
    pieces = [name for name in state.names() if name.startswith("plan-")]
    state.keep("plan.safetensors", "rewrites.safetensors", "plan.json", drop=pieces)


def saved_plan(state: KeptFolder) -> Plan:
    record, tensors = state.read_value("plan"), load_file(state.path("plan.safetensors"))
    matrices = tuple(tensors[f"q.{i}"] for i in range(len(tensors)))
    rotations = Rotations(record["kind"], matrices, tuple(skip_from_config(c) for c in record["skips"]))
    structures = {name: structure_from_config(c) for name, c in record["structures"].items()}
    return Plan(rotations, structures, record["predicted"], InnerRewrites.load(state.path("rewrites.safetensors")))

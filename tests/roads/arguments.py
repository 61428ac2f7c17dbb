"""What a cell of the matrix says to the commands, as words of a command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.allocation.budget import default_unit
from compress.architecture import Architecture
from compress.options import _FLAGS
from compress.structures import DenseStructure
from tests.roads.cells import METHOD, OPTIONS, UNSET
from validate.latency import INNER, jobs_of

SMALL = ("--calibration-samples", "4", "--sequence-length", "32", "--calibration-batch", "2")
SMALL += tuple(
    word for size in ("rotation_iterations=2", "sensitivity_samples=2", "reflections=4") for word in ("--set", size)
)


def flags_of(cell: Mapping[str, Any]) -> list[str]:
    """What a cell, or a part of one, says to the command about the recipe, its budget aside."""
    choices = [(field, cell[field]) for field in OPTIONS if field in cell]
    choices += zip(METHOD, cell["method"], strict=True) if "method" in cell else []
    words = [word for field, value in choices for word in _flag(field, value)]
    return words if cell.get("embedding", 1.0) == 1.0 else [*words, "--embedding", str(cell["embedding"])]


def _flag(field: str, value: Any) -> list[str]:
    """The flag for a field of the recipe."""
    if value == UNSET:
        return []
    if (field, value) == ("menu", ()):  # the default one, in so many words: a recipe can say so, the flag cannot
        return ["--set", "menu=[]"]
    [dest] = [dest for dest, name in _FLAGS.items() if name == field]
    flag = "--" + dest.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, ",".join(value) or "none"] if isinstance(value, tuple) else [flag, str(value)]


def counted_table(arch: Architecture, kinds: Iterable[str], folder: Path) -> Path:
    """The table for --latency-table of a machine on which time is parameters: a plan must not depend on how busy this
    one is. kinds: the structures in it."""
    structures = {
        structure
        for job in jobs_of(arch, tuple(kinds), INNER, default_unit(arch))
        for structure in (DenseStructure(job.shape.in_features, job.shape.out_features), *job.structures)
    }
    entries = [
        {
            "structure": structure.name,
            "variant": structure.variant,
            "in_features": structure.in_features,
            "out_features": structure.out_features,
            "parameters": structure.parameter_count(),
            "seconds": float(structure.parameter_count()),
        }
        for structure in structures
    ]
    file = folder / "counted.json"
    file.write_text(json.dumps({"tokens": 1, "entries": entries}))
    return file

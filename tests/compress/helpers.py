"""What the tests of the compression share: a calibration text, small recipes, runs in the same process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.models import ModelSource, resolve
from compress.pipeline import compress_model
from compress.recipe import Recipe, parse_recipe
from tests import tiny

SAMPLES, LENGTH = 8, 32

TinyModel = Callable[[str], Path]


def text_file(folder: Path) -> Path:
    """A calibration text of about 1,100 tokens of the tiny tokenizer."""
    path = folder / "text.txt"
    path.write_text(tiny.TEXT)
    return path


def recipe(text: Path, **changes: Any) -> Recipe:
    """A recipe that a tiny model runs in well under a second; `changes` are its fields."""
    calibration = {"data": str(text), "samples": SAMPLES, "sequence_length": LENGTH, **changes.pop("calibration", {})}
    values = {"sensitivity_samples": 4, "rotation_iterations": 6, "calibration": calibration, **changes}
    return parse_recipe(values, "a test")


def tiny_source(tiny_model: TinyModel, name: str) -> ModelSource:
    """A tiny model as the pipeline takes it."""
    return resolve(str(tiny_model(name)))


def compressed(source: ModelSource, folder: Path, **changes: Any) -> Artifact:
    """Compress into folder/out with `recipe(**changes)`."""
    folder.mkdir(parents=True, exist_ok=True)
    return compress_model(source, recipe(text_file(folder), **changes), folder / "out")


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """(batch, length, vocabulary) float32."""
    logits: Tensor = model(ids).logits
    return logits.float()


def relative(seen: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((seen - expected).abs().max() / expected.abs().max())

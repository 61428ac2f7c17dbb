"""What the tests of the compression share: a calibration text, small recipes, runs in the same process."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.allocation.plan import Plan
from compress.artifact.ledger import KeptFolder
from compress.artifact.store import Artifact
from compress.calibration.moments import Moments
from compress.methods.layered import Layered
from compress.methods.registry import method_of
from compress.pipeline import compress_model
from compress.recipe import Recipe, parse_recipe, read_yaml
from compress.rewrites.folding import FoldedModel
from compress.source.model import ModelSource
from compress.source.resolve import resolve
from tests import tiny

SAMPLES, LENGTH = 8, 32
F64 = torch.float64

TinyModel = Callable[[str], Path]


def text_file(folder: Path) -> Path:
    """A calibration text of about 1,100 tokens of the tiny tokenizer."""
    path = folder / "text.txt"
    path.write_text(tiny.TEXT)
    return path


def recipe(text: Path, **changes: Any) -> Recipe:
    """A recipe that a tiny model runs in well under a second; `changes` are its fields. Kronecker and Group-and-Shuffle
    matrices alone where no inner freedoms are asked for, though whole neurons may go by default."""
    if changes.get("structure", "kron") in ("kron", "gs"):
        changes = {"inner": (), **changes}
    calibration = {"data": str(text), "samples": SAMPLES, "sequence_length": LENGTH, **changes.pop("calibration", {})}
    values = {"sensitivity_samples": 6, "rotation_iterations": 6, "calibration": calibration, **changes}
    return parse_recipe(values, "a test")


def make_plan(model: FoldedModel, recipe: Recipe, moments: Moments) -> Plan:
    """The plan of a recipe whose method makes one."""
    method = method_of(recipe)
    assert isinstance(method, Layered)
    return method.make_plan(model, recipe, moments)


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


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made and filled by `make` in the first of the processes (pytest-xdist) that ask for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.parent / f"{folder.name}.done"
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def with_weights(source: ModelSource, folder: Path, change: Any) -> ModelSource:
    """A copy of the model with `change` applied to its state dict."""
    shutil.copytree(source.path, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(folder))


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64, the same ones for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def kept_in(folder: Path) -> KeptFolder:
    """A folder for the pieces of a computation that no pipeline runs; the same folder again goes on from them."""
    return KeptFolder.open(folder, {})


def same_files(a: Artifact, b: Artifact) -> None:
    """OUT/checkpoint and OUT/recipe.yaml are equal byte for byte."""
    folders = [artifact.path("checkpoint") for artifact in (a, b)]
    names = [sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert parse_recipe(read_yaml(a.path("recipe.yaml")), "a") == parse_recipe(read_yaml(b.path("recipe.yaml")), "b")


def interrupted_at(monkeypatch: pytest.MonkeyPatch, place: Any, method: str, call: int) -> list[int]:
    """Raise KeyboardInterrupt at that call of a method; the list's entry counts its calls."""
    original, calls = getattr(place, method), [0]

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(place, method, counting)
    return calls

"""What a method is: from the model, the text and the recipe to a compressed model before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.allocation.explicit import explicit_layers
from compress.allocation.size import ModelSize, model_size
from compress.architecture import Architecture
from compress.artifact.ledger import KeptFolder
from compress.calibration.streams import Runner
from compress.errors import UsageError
from compress.fit.embedding import EmbeddingRanks
from compress.fit.record import FitRecord
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations, Weights
from compress.structures import Structure


@dataclass(frozen=True)
class Context:
    """What a method compresses, and with what.

    tokens: (samples, length) int64, None for a recipe that reads no text. state: the finished pieces of this very
    request, which an interrupted run goes on from. statistics: a folder of second moments that other runs use too,
    which wait for each other while they are collected. batch: calibration sequences at a time.
    """

    model: FoldedModel
    recipe: Recipe
    tokens: Tensor | None
    state: KeptFolder
    device: torch.device
    batch: int
    statistics: Path | None = None

    @property
    def arch(self) -> Architecture:
        """The model's."""
        return self.model.arch

    @property
    def text(self) -> Tensor:
        """The tokens, for a method that reads text."""
        assert self.tokens is not None, f"{self.recipe.label()} reads text"
        return self.tokens

    @cached_property
    def runner(self) -> Runner:
        """Runs blocks over the tokens."""
        fast = self.recipe.calibration_dtype == "bfloat16"
        return Runner(self.arch, self.text.shape[1], self.device, self.batch, fast)


@dataclass(frozen=True)
class Fitted:
    """A compressed model before it is written: embeddings and head, one file of state-dict entries for each block, and
    their fields of config.json."""

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


@dataclass(frozen=True)
class Space:
    """Name -> bytes of what OUT/state holds when it is largest, and of what is in memory when it is most."""

    state: dict[str, int]
    memory: dict[str, int]


class Method(Protocol):
    """One way to compress. compress/catalog.py says by `name` which recipes take it."""

    @property
    def name(self) -> str: ...

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError for what no calibration can make work, before anything is read or computed."""

    def space(self, arch: Architecture, recipe: Recipe) -> Space:
        """What a run takes, from the architecture alone."""

    def fit(self, context: Context) -> Fitted:
        """Compress. Whatever took long is kept in `context.state` as it is found."""


def check_named_layers(arch: Architecture, recipe: Recipe, structures: Mapping[str, Structure]) -> None:
    """Refuse choices by name for a method that has but one: `structures`, dense ones left out. Raises UsageError."""
    for name, given in explicit_layers(arch, recipe).items():
        if structures.get(name) != (None if given.name == "dense" else given):
            raise UsageError(
                f"recipe layers: {name} is given as {given.name}, but sizes of structure {recipe.structure!r} with fit "
                f"{recipe.fit!r} follow from --ratio alone: leave out layers"
            )

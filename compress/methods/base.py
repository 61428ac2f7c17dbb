"""What every method gives back: a compressed model before it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.allocation.size import ModelSize, model_size
from compress.architecture import Architecture
from compress.fit.embedding import EmbeddingRanks
from compress.fit.record import FitRecord
from compress.rewrites.rotations import Rotations, Weights
from compress.structures import Structure


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

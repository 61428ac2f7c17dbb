"""Embeddings and head in the rotated stream, compressed where the recipe asks for it."""

from __future__ import annotations

from torch import Tensor

from compress.allocation.budget import unit_of
from compress.calibration.moments import Moments, StatisticsFolder
from compress.fit.embedding import EmbeddingRanks, compress_embedding, token_counts
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations, Weights


def fitted_ends(
    model: FoldedModel, recipe: Recipe, rotations: Rotations, tokens: Tensor, moments: Moments
) -> tuple[Weights, EmbeddingRanks]:
    """Embeddings and head in the rotated stream, compressed where the recipe asks for it."""
    ends = model.ends(rotations)
    if recipe.embedding >= 1:
        return ends, EmbeddingRanks()
    gram = None
    if isinstance(moments, StatisticsFolder):
        gram, q = moments.final(), rotations.at(2 * model.arch.num_layers)
        gram = gram if q is None else q.T @ gram @ q
    counts = token_counts(tokens, model.arch.vocab_size)
    return compress_embedding(ends, model.arch, counts, gram, recipe.embedding, unit_of(model.arch, recipe))

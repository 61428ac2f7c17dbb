"""`--fit paper`: ProcrustesGPT as a method of this program."""

from __future__ import annotations

from compress.allocation.budget import ratio_of
from compress.architecture import Architecture
from compress.fit.embedding import token_counts
from compress.fit.ends import fitted_ends
from compress.methods.base import Context, Fitted, Space, check_named_layers
from compress.methods.calibrated import moments_of
from compress.methods.paper.accounting import largest_kept
from compress.methods.paper.fit import fit_paper
from compress.methods.paper.shapes import Kind, paper_structures
from compress.methods.space import (
    FLOAT,
    fitted_blocks,
    memory_with_streams,
    moment_bytes,
    projections,
    rotation_bytes,
    with_calibration,
)
from compress.recipe import Recipe


class Paper:
    """The largest of its configurations that keeps to the ratio, fitted and rotated as published."""

    name = "paper"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError where even its smallest model is too large, and for names that are given other sizes."""
        kind, kept = _shape(arch, recipe)
        check_named_layers(arch, recipe, paper_structures(arch, kind, kept))

    def space(self, arch: Architecture, recipe: Recipe) -> Space:
        """See `Method.space`."""
        after = {
            "rotations": rotation_bytes(arch, recipe),
            "factors": FLOAT * projections(arch, recipe),
            **fitted_blocks(arch, recipe),
        }
        memory = memory_with_streams(arch, recipe, moment_bytes(arch, recipe))
        return Space(with_calibration(arch, recipe, after), memory)

    def fit(self, context: Context) -> Fitted:
        """See `Method.fit`."""
        model, recipe, tokens = context.model, context.recipe, context.text
        moments = moments_of(context)
        kind, kept = _shape(model.arch, recipe)
        counts = token_counts(tokens, model.arch.vocab_size)
        found = fit_paper(model, kind, kept, moments, counts, device=context.device, state=context.state)
        ends, ranks = fitted_ends(model, recipe, found.rotations, tokens, moments)
        return Fitted(found.rotations, found.structures, ends, found.files, found.records, ranks)


def _shape(arch: Architecture, recipe: Recipe) -> tuple[Kind, float]:
    """The kind of matrix, and the fraction that each keeps."""
    kind: Kind = "kron" if recipe.structure == "kron" else "gs"
    return kind, largest_kept(arch, kind, ratio_of(arch, recipe))

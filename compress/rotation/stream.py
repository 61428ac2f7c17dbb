"""Which rotation the stream gets: nested subspaces for sums of Kronecker products, Procrustes problems for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS, Architecture
from compress.artifact.ledger import Keeper
from compress.calibration.moments import StreamMoments
from compress.linalg import damped
from compress.progress import log, track
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.rotation.majorised import Member, frobenius_rotation, majorised_rotation
from compress.rotation.nested import StreamTerm, curve_of, nested_rotation, nested_start, whitened_columns
from compress.structures import Structure


class StreamRotations:
    """The rotations of a model whose linears keep leading coordinates of the stream, as they are searched for.

    LayerNorm lets d - 1 directions through: there the search is in these, and the mean becomes the last rotated
    coordinate. Every writer that keeps fewer than all coordinates leaves it at zero, so that the compressed model,
    too, has nothing for LayerNorm to subtract.
    """

    def __init__(self, arch: Architecture, kind: str) -> None:
        self.kind, self.width, self.num_layers = kind, arch.hidden_size, arch.num_layers
        self.count = 1 if kind == "shared" else 2 * arch.num_layers + 1
        self.basis: Tensor | None = None  # (d, d - 1): of the stream without its mean, 1 / sqrt(d)
        if arch.norm == "layernorm":
            ones = torch.ones(self.width, 1, dtype=torch.float64)
            self.basis = torch.linalg.qr(ones, mode="complete").Q[:, 1:]
        self.matrices: list[Tensor] = []

    def term(self, term: StreamTerm, known: dict[int, Tensor] | None = None) -> StreamTerm:
        """The term in the directions that the search is in. `known`, by the identity of P: the P of other terms, so
        that terms that share theirs go on sharing it."""
        if self.basis is None:
            return term
        b, known = self.basis, {} if known is None else known
        if id(term.p) not in known:
            known[id(term.p)] = b.T @ term.p @ b
        return StreamTerm(term.name, known[id(term.p)], b.T @ term.m @ b, term.cost)

    def start(self, terms: Sequence[Callable[[], Iterator[StreamTerm]]], keeper: Keeper) -> None:
        """The closed-form start of each rotation from its terms, which are asked for where it is not kept yet."""

        def found(here: Callable[[], Iterator[StreamTerm]]) -> dict[str, Tensor]:
            # One rotation for all layers has hundreds of terms, one for each position has a few.
            asked = here() if len(terms) > 1 else track(here(), description="terms of the rotation")
            return {"q": nested_start([self.term(t) for t in asked])}

        self.matrices = [
            keeper.tensors(f"plan-start-{index}", partial(found, here))["q"]
            for index, here in enumerate(track(terms, description="start of the rotations"))
        ]

    def improved(self, index: int, terms: Sequence[tuple[StreamTerm, int]], iterations: int) -> Tensor:
        """Descend on the summed losses of (term, kept coordinates) at one rotation from where it is."""
        return nested_rotation(
            [self.term(term) for term, _ in terms],
            [kept for _, kept in terms],
            self.matrices[index],
            iterations=iterations,
            dtype=torch.float32 if self.width >= 256 else torch.float64,
        )

    def columns(self, position: int, p: Tensor) -> Tensor:
        """Z of `whitened_columns` for terms with this P (d, d) at a position of the stream; (d, d) or (d - 1, d)."""
        q = self.matrices[self.index(position)]
        if self.basis is None:
            return whitened_columns(p, q)
        return whitened_columns(self.basis.T @ p @ self.basis, q) @ self.basis.T

    def curves(self, gains: Tensor) -> Tensor:
        """Loss of keeping 0 ... d coordinates (..., d + 1) from the diagonals of Z M Z^T."""
        curve = curve_of(gains)
        return curve if self.basis is None else torch.cat((curve, curve[..., -1:]), dim=-1)

    def index(self, position: int) -> int:
        """Which of the matrices serves a position of the stream."""
        return 0 if self.count == 1 else position

    def layers(self, index: int) -> range:
        """Layers with linears at one of the matrices: a search over all matrices is then linear in layers."""
        if self.count == 1:
            return range(self.num_layers)
        return range(max(0, (index - 1) // 2), min(self.num_layers, index // 2 + 1))

    def result(self) -> Rotations:
        """The rotations in the full width of the stream."""
        if self.basis is None:
            return Rotations(self.kind, tuple(self.matrices))
        mean = torch.full((self.width, 1), self.width**-0.5, dtype=torch.float64)
        return Rotations(self.kind, tuple(torch.cat((self.basis @ q, mean), dim=1) for q in self.matrices))


def rotate_members(
    model: FoldedModel,
    recipe: Recipe,
    moments: Mapping[tuple[int, str], StreamMoments],
    structures: Mapping[str, Structure],
    keeper: Keeper,
) -> Rotations:
    """Frobenius start, then the Gram-weighted solver, for every rotation of the recipe, each kept as it is found."""
    arch = model.arch
    if recipe.rotation == "none":
        return Rotations.none()
    positions = 2 * arch.num_layers + 1
    served = [range(positions)] if recipe.rotation == "shared" else [range(p, p + 1) for p in range(positions)]
    iterations = max(1, recipe.rotation_iterations // 20)

    def solved(number: int) -> dict[str, Tensor]:
        def members() -> Iterator[Member]:
            return _members_at(model, recipe, moments, structures, served[number])

        q = torch.eye(arch.hidden_size, dtype=torch.float64)
        if any(True for _ in members()):
            log(f"rotation {number + 1} of {len(served)}: searching")
            q = frobenius_rotation(members, q, 2 * iterations)
            q, errors = majorised_rotation(members, q, iterations)
            log(f"rotation {number + 1} of {len(served)}: weighted error {errors[0]:.4g} -> {errors[-1]:.4g}")
        return {"q": q}

    matrices = [keeper.tensors(f"plan-rotation-{i}", partial(solved, i))["q"] for i in range(len(served))]
    return Rotations(recipe.rotation, tuple(matrices))


def _members_at(
    model: FoldedModel,
    recipe: Recipe,
    moments: Mapping[tuple[int, str], StreamMoments],
    structures: Mapping[str, Structure],
    positions: range,
) -> Iterator[Member]:
    arch = model.arch
    for layer in range(arch.num_layers):
        wanted = [
            (role, sub)
            for s, sub in enumerate(SUB_BLOCKS)
            for role in (*arch.readers(sub), WRITERS[sub])
            if 2 * layer + s + (role == WRITERS[sub]) in positions and f"layers.{layer}.{role}" in structures
        ]
        weights = model.block(layer) if wanted else {}
        for role, sub in wanted:
            weight, moment = weights[f"{role}.weight"].double(), moments[layer, sub]
            side = arch.side(role)
            gram = damped(moment.gram(role), recipe.gram_damping)
            energy = float(((weight @ gram) * weight).sum())
            yield Member(weight, gram, side, structures[f"layers.{layer}.{role}"], 1 / max(energy, 1e-30))

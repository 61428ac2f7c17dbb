"""Rotations whose leading coordinates serve all their linears: where they start from, and how a round improves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from compress.allocation.groups import LayerMenus
from compress.architecture import position_of
from compress.methods.layered import Planning
from compress.progress import track
from compress.rotation.nested import StreamTerm
from compress.rotation.stream import StreamRotations

Terms = Callable[[int], Iterator[tuple[StreamTerm, int]]]
"""Index of a rotation -> (term, kept coordinates) of each linear that it serves."""


def started(planning: Planning, kind: str) -> StreamRotations:
    """The rotations of a kind ("shared", "block") at their closed-form start, each kept as it is found."""
    rotations = StreamRotations(planning.arch, kind)
    starts = [partial(terms_of, planning.menus, rotations, index) for index in range(rotations.count)]
    rotations.start(starts, planning.keeper)
    return rotations


def improve(rotations: StreamRotations, terms: Terms, planning: Planning, turn: int) -> None:
    """Improve every rotation in round `turn`, each kept as it is found."""
    for index in track(range(rotations.count), description="rotate"):

        def improved(index: int = index) -> dict[str, Tensor]:
            return {"q": rotations.improved(index, list(terms(index)), planning.recipe.rotation_iterations)}

        rotations.matrices[index] = planning.keeper.tensors(f"plan-rotation-{turn}-{index}", improved)["q"]


def terms_of(menus: LayerMenus, rotations: StreamRotations, index: int) -> Iterator[StreamTerm]:
    """One term for every linear at a rotation."""
    for layer in rotations.layers(index):
        for role, linear in menus.linears(layer).items():
            if rotations.index(position_of(layer, role)) == index:
                yield linear.term()

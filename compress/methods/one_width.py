"""One kept width for the whole stream: a rotation at each position, and skips in a cheap exact form."""

from __future__ import annotations

from collections.abc import Iterator

from compress.allocation.budget import kept_width
from compress.allocation.plan import Plan
from compress.allocation.width import leading_structures
from compress.architecture import Architecture
from compress.methods.layered import Layered, Planning
from compress.methods.searching import improve, started, terms_of
from compress.recipe import Recipe
from compress.rotation.gauge import with_skips
from compress.rotation.nested import StreamTerm


class OneWidth(Layered):
    """Every linear keeps as many leading coordinates; the freedom within them makes skips cheap (cs, householder)."""

    name = "one-width"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError where even the smallest width is too much."""
        kept_width(arch, recipe)

    def plan(self, planning: Planning) -> Plan:
        """One round of rotations, then their gauge."""
        arch, recipe = planning.arch, planning.recipe
        kept = kept_width(arch, recipe)
        rotations = started(planning, "block")

        def terms(index: int) -> Iterator[tuple[StreamTerm, int]]:
            return ((term, kept) for term in terms_of(planning.menus, rotations, index))

        improve(rotations, terms, planning, 0)
        reflections = recipe.reflections if recipe.skip == "householder" else None
        found = with_skips(rotations.result(), recipe.skip, kept=kept, reflections=reflections)
        return Plan(found, leading_structures(arch, kept, kept), {})

"""What no calibration can make work, said before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

from compress.allocation.budget import (
    budget_of,
    budget_parameters,
    cost_of,
    kept_width,
    latency_table,
    ratio_of,
    unit_of,
    uses_leading_mix,
)
from compress.allocation.explicit import explicit_layers
from compress.allocation.uniform import uniform_structures
from compress.allocation.width import leading_structures
from compress.architecture import WRITERS, Architecture
from compress.errors import UsageError
from compress.methods.paper.accounting import largest_kept
from compress.methods.paper.shapes import Kind, paper_structures
from compress.methods.textless import structures_without_text
from compress.progress import log
from compress.recipe import Recipe, kinds_of
from compress.structures import (
    DenseStructure,
    Structure,
    cores,
    registry,
)
from compress.structures.select import selection


def check_recipe(arch: Architecture, recipe: Recipe) -> None:
    """Raise UsageError for what no calibration can make work, before anything is read or computed."""
    slower = [s.macs(1) / (s.in_features * s.out_features) for s in explicit_layers(arch, recipe).values()]
    if max(slower, default=0) > 1:
        log(
            f"warning: {sum(x > 1 for x in slower)} linears of this recipe need more arithmetic than dense ones, up to "
            f"{max(slower):.2f} times (Kronecker products of two sides do): smaller, but not faster"
        )
    length = recipe.calibration.sequence_length
    if recipe.needs_text() and length > arch.max_positions:
        raise UsageError(
            f"sequences of {length} tokens are longer than the {arch.max_positions} positions of this model: "
            f"give --sequence-length {arch.max_positions} or less"
        )
    if not recipe.needs_text():
        structures_without_text(arch, recipe)
    elif recipe.structure == "slice" or recipe.skip in ("cs", "householder"):
        width = kept_width(arch, recipe)
        if recipe.structure == "slice":
            _check_fixed(arch, recipe, leading_structures(arch, width, arch.hidden_size))
    elif recipe.fit == "paper":
        kind: Kind = "kron" if recipe.structure == "kron" else "gs"
        kept = largest_kept(arch, kind, ratio_of(arch, recipe))
        _check_fixed(arch, recipe, paper_structures(arch, kind, kept))
    elif recipe.has_menus():
        cost_of(recipe)
        if uses_leading_mix(recipe):
            check_unit(arch, unit_of(arch, recipe))
        if recipe.budget_latency is None:
            _check_smallest(arch, recipe)
        else:
            _check_table(arch, recipe)
    elif recipe.structure != "dense":
        uniform_structures(arch, recipe, unit_of(arch, recipe))


def _check_fixed(arch: Architecture, recipe: Recipe, structures: Mapping[str, Structure]) -> None:
    """Refuse choices by name for a method that has but one: `structures`, dense ones left out."""
    for name, given in explicit_layers(arch, recipe).items():
        if structures.get(name) != (None if given.name == "dense" else given):
            raise UsageError(
                f"recipe layers: {name} is given as {given.name}, but sizes of structure {recipe.structure!r} with fit "
                f"{recipe.fit!r} follow from --ratio alone: leave out layers"
            )


def _check_smallest(arch: Architecture, recipe: Recipe) -> None:
    """Refuse a budget that is below what the menus can make of the model, by a bound that no calibration changes."""
    unit, least = unit_of(arch, recipe), 0.0
    for role, (n, m) in arch.linears().items():
        sizes = [s for kind in kinds_of(recipe) for s in registry()[kind].menu(m, n, arch.side(role), unit=unit)]
        smallest = min((s.parameter_count() for s in sizes), default=n * m)
        if recipe.joint and role not in WRITERS.values():
            smallest = min(smallest, unit * n)  # another linear of the group stores V
        option = "vo" if role in ("attn.v", "attn.o") else "neurons" if role.startswith("mlp.") else None
        least += smallest / 8 if option in recipe.inner else smallest  # selections keep more than an eighth
    least *= arch.num_layers
    if budget_parameters(arch, recipe) < least:
        flag, value = "--ratio", f"{ratio_of(arch, recipe):g}"
        if recipe.budget_bytes is not None:
            flag, value = "--budget-bytes", str(recipe.budget_bytes)
        raise UsageError(
            f"{flag} {value} is too low: the smallest sizes that --unit {unit} allows are {least:,.0f} parameters: "
            f"raise {flag} or lower --unit"
        )


def _check_table(arch: Architecture, recipe: Recipe) -> None:
    """Refuse a table that lacks what the menus hold, before anything is calibrated."""
    table, unit = latency_table(recipe), unit_of(arch, recipe)
    budget_of(arch, recipe)
    for role, (n, m) in arch.linears().items():
        sizes: list[Structure] = [DenseStructure(m, n)]
        for kind in kinds_of(recipe):
            sizes += registry()[kind].menu(m, n, arch.side(role), unit=unit)
        option = "vo" if role in ("attn.v", "attn.o") else "neurons" if role.startswith("mlp.") else None
        if option is not None and option in recipe.inner:
            part = selection(arch, role, (arch.head_dim if option == "vo" else arch.intermediate_size) // 4).reduced
            sizes.append(part)
            for kind in (
                *(k for k in kinds_of(recipe) if k in cores()),
                *(["kron"] if uses_leading_mix(recipe) else []),
            ):
                sizes += registry()[kind].menu(part.in_features, part.out_features, arch.side(role), unit=unit)
        for structure in sizes:
            table.seconds(structure)


def check_unit(arch: Architecture, unit: int) -> None:
    if arch.hidden_size % unit:
        raise UsageError(f"--unit {unit} does not divide the hidden size {arch.hidden_size}")

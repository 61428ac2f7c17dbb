"""Sizes by predicted loss: every linear has a menu, and one budget decides (auto, kron, gs, lowrank, pifa)."""

from __future__ import annotations

from functools import partial

from compress.allocation.budget import (
    budget_of,
    budget_parameters,
    cost_of,
    latency_table,
    ratio_of,
    unit_of,
    uses_leading_mix,
)
from compress.allocation.choose import allocate, allocate_uniformly
from compress.allocation.groups import SELECTED
from compress.allocation.kept_menus import kept_groups
from compress.allocation.plan import Plan
from compress.architecture import WRITERS, Architecture
from compress.errors import UsageError
from compress.methods.layered import ROUNDS, Layered, Planning
from compress.methods.searching import improve, started
from compress.progress import log, track
from compress.recipe import Recipe, kinds_of
from compress.rewrites.rotations import Rotations
from compress.structures import DenseStructure, Structure, cores, registry
from compress.structures.select import selection


class Planned(Layered):
    """One budget over the menus of all groups; with Kronecker sums, in turn with the rotation that they share."""

    name = "planned"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError for a unit, a budget or a table that the menus cannot work with."""
        cost_of(recipe)
        if uses_leading_mix(recipe):
            _check_unit(arch, unit_of(arch, recipe))
        if recipe.budget_latency is None:
            _check_smallest(arch, recipe)
        else:
            _check_table(arch, recipe)

    def plan(self, planning: Planning) -> Plan:
        """Menus, choice and rotation in turn."""
        arch, recipe, menus, keeper = planning.arch, planning.recipe, planning.menus, planning.keeper
        budget, layers = budget_of(arch, recipe), range(arch.num_layers)
        rotations = None
        if uses_leading_mix(recipe):
            _check_unit(arch, planning.unit)
            rotations = started(planning, recipe.rotation)
        rounds = ROUNDS if rotations is not None and recipe.rotation_iterations else 0
        for turn in range(rounds + 1):
            groups = [
                group
                for layer in track(layers, description="plan")
                for group in kept_groups(keeper, menus, layer, rotations, turn)
            ]
            choose = allocate if recipe.allocation == "global" else allocate_uniformly
            chosen = choose([menu for _, menu in groups], budget)
            structures, predicted = dict[str, Structure](), dict[str, float]()
            for ((layer, _), _), choice in zip(groups, chosen, strict=True):
                for role, (structure, loss) in choice.label.items():
                    structures[f"layers.{layer}.{role}"], predicted[f"layers.{layer}.{role}"] = structure, loss
            log(f"plan, round {turn + 1} of {rounds + 1}: predicted loss {sum(predicted.values()):.4g} nats per token")
            if recipe.budget_latency is not None:
                spent = sum(c.cost for c in chosen) + recipe.budget_latency - budget
                log(f"projections take {spent:.4g} of {recipe.budget_latency:g} seconds by {recipe.latency_table}")
            if turn < rounds:
                assert rotations is not None
                improve(rotations, partial(menus.leading_terms, structures, rotations), planning, turn)
        found = rotations.result() if rotations is not None else Rotations.none()
        return Plan(found, structures, predicted)


def _check_smallest(arch: Architecture, recipe: Recipe) -> None:
    """Refuse a budget that is below what the menus can make of the model, by a bound that no calibration changes."""
    unit, least = unit_of(arch, recipe), 0.0
    for role, (n, m) in arch.linears().items():
        sizes = [s for kind in kinds_of(recipe) for s in registry()[kind].menu(m, n, arch.side(role), unit=unit)]
        smallest = min((s.parameter_count() for s in sizes), default=n * m)
        if recipe.joint and role not in WRITERS.values():
            smallest = min(smallest, unit * n)  # another linear of the group stores V
        least += smallest / 8 if _option(role) in recipe.inner else smallest  # selections keep more than an eighth
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
        option = _option(role)
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


def _option(role: str) -> str | None:
    """The inner freedom that drops features of a linear."""
    return next((option for option, roles in SELECTED.items() if role in roles), None)


def _check_unit(arch: Architecture, unit: int) -> None:
    if arch.hidden_size % unit:
        raise UsageError(f"--unit {unit} does not divide the hidden size {arch.hidden_size}")

"""From moments and a budget to rotations and one structure per linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.accounting import overhead_parameters
from compress.allocation import Choice, allocate
from compress.architecture import WRITERS, Architecture
from compress.errors import ArtifactError, UsageError
from compress.invariance import FoldedModel, Rotations
from compress.procrustes import (
    Member,
    StreamTerm,
    damped,
    frobenius_rotation,
    majorised_rotation,
    nested_rotation,
    nested_start,
)
from compress.progress import log
from compress.recipe import Recipe
from compress.statistics import SUB_BLOCKS, StreamMoments
from compress.structures import KroneckerStructure, Structure, registry, structure_from_config
from compress.structures.base import Side

Moments = Mapping[tuple[int, str], StreamMoments]


@dataclass(frozen=True)
class Plan:
    """Rotations, the structure of every linear that is not dense, and the predicted loss (nats per token) of each
    group that was allocated one."""

    rotations: Rotations
    structures: dict[str, Structure]
    predicted: dict[str, float]


def default_unit(arch: Architecture) -> int:
    """Alignment of kept sizes: 64 at production widths, finer where 64 would leave fewer than 16 sizes."""
    return 64 if arch.hidden_size >= 1024 else 32 if arch.hidden_size >= 512 else 8


def budget_parameters(arch: Architecture, recipe: Recipe) -> float:
    """What the projections may cost so that they and the rotation's overhead keep `ratio` of the dense projections.

    Raises UsageError when the overhead alone exceeds the budget.
    """
    overhead = overhead_parameters(arch, recipe.rotation)
    budget = recipe.ratio * arch.projection_parameters() - overhead
    if budget <= 0:
        raise UsageError(
            f"--ratio {recipe.ratio} keeps {recipe.ratio * arch.projection_parameters():,.0f} projection parameters, "
            f"but rotation {recipe.rotation!r} alone adds {overhead:,}: raise --ratio or choose --rotation shared"
        )
    return budget


def uses_leading_mix(recipe: Recipe) -> bool:
    """Whether the mix of each Kronecker sum is absorbed in the rotation, so that only kept widths are to choose."""
    return recipe.structure == "kron" and recipe.rotation != "none"


def make_plan(model: FoldedModel, recipe: Recipe, moments: Moments) -> Plan:
    """Rotations and structures for `recipe`."""
    arch = model.arch
    unit = recipe.unit or default_unit(arch)
    if recipe.structure == "dense":
        plan = Plan(Rotations.none(), {}, {})
    elif uses_leading_mix(recipe):
        plan = _plan_nested(model, recipe, moments, unit)
    else:
        structures = _uniform(arch, recipe, unit)
        for role, (n, m) in arch.linears().items():
            if f"layers.0.{role}" not in structures:
                log(f"{role} ({n} x {m}) stays dense: no {recipe.structure} in steps of {unit} is small enough")
        plan = Plan(_rotate_members(model, recipe, moments, structures), structures, {})
    chosen = {**plan.structures, **explicit_layers(arch, recipe)}
    return Plan(plan.rotations, {n: s for n, s in chosen.items() if s.name != "dense"}, plan.predicted)


def check_recipe(arch: Architecture, recipe: Recipe) -> None:
    """Raise UsageError for what no calibration can make work, before anything is read or computed."""
    explicit_layers(arch, recipe)
    length = recipe.calibration.sequence_length
    if length > arch.max_positions:
        raise UsageError(
            f"sequences of {length} tokens are longer than the {arch.max_positions} positions of this model: "
            f"give --sequence-length {arch.max_positions} or less"
        )
    if uses_leading_mix(recipe):
        unit = recipe.unit or default_unit(arch)
        _check_unit(arch, unit)
        smallest = arch.projection_parameters() * unit // arch.hidden_size
        if budget_parameters(arch, recipe) < smallest:
            raise UsageError(
                f"--ratio {recipe.ratio} is too low: {unit} of {arch.hidden_size} coordinates, the least that --unit "
                f"allows, are {smallest:,} parameters: raise --ratio"
            )
    elif recipe.structure != "dense":
        _uniform(arch, recipe, recipe.unit or default_unit(arch))


def explicit_layers(arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
    """The structures that the recipe gives by name, dense ones included. Raises UsageError naming a wrong entry."""
    names = {f"layers.{i}.{role}": shape for i in range(arch.num_layers) for role, shape in arch.linears().items()}
    explicit = {}
    for name, config in recipe.layers.items():
        if name not in names:
            raise UsageError(f"recipe layers: {name!r} is no linear of this model; names are like layers.0.attn.q")
        try:
            structure = structure_from_config(config)
        except ArtifactError as error:
            raise UsageError(f"recipe layers: {name}: {error}") from error
        seen = (structure.out_features, structure.in_features)
        if seen != names[name]:
            n, m = names[name]
            raise UsageError(f"recipe layers: {name} is {n} x {m}, the recipe gives {seen[0]} x {seen[1]}")
        explicit[name] = structure
    return explicit


def _uniform(arch: Architecture, recipe: Recipe, unit: int) -> dict[str, Structure]:
    """The same kept fraction for every linear. One that no aligned size makes smaller stays dense, and the others pay
    for it; all stay dense where the budget is that of the dense model."""
    kind, budget = registry()[recipe.structure], budget_parameters(arch, recipe) / arch.num_layers
    open_roles, chosen = dict(arch.linears()), dict[str, Structure]()
    while len(chosen) < len(open_roles):
        share = budget / sum(n * m for n, m in open_roles.values())
        if share >= 1:
            return {}
        chosen, asked = {}, dict(open_roles)
        for role, (n, m) in asked.items():
            side: Side = "out" if role in WRITERS.values() else "in"
            try:
                chosen[role] = kind.for_ratio(m, n, side, share, unit)
            except UsageError:
                budget -= n * m
                del open_roles[role]
        if len(open_roles) < len(asked):
            chosen = {}
    if not chosen:
        raise UsageError(
            f"no linear of this model has an aligned {recipe.structure} of ratio {recipe.ratio}: "
            f"lower --unit or raise --ratio"
        )
    return {f"layers.{i}.{role}": structure for i in range(arch.num_layers) for role, structure in chosen.items()}


# ---- nested subspaces: the one-sided Kronecker sum with its mix absorbed in the rotation


@dataclass(frozen=True)
class _Group:
    """Linears that keep the same coordinates: the readers of a sub-block, or its writer."""

    layer: int
    sub_block: str
    kind: str  # "read" or "write"
    term: StreamTerm

    @property
    def position(self) -> int:
        """The stream position whose rotation the group meets."""
        return 2 * self.layer + SUB_BLOCKS.index(self.sub_block) + (self.kind == "write")


def _groups(model: FoldedModel, recipe: Recipe, moments: Moments) -> Iterator[_Group]:
    arch = model.arch
    for (layer, sub_block), moment in moments.items():
        roles, writer = arch.readers(sub_block), WRITERS[sub_block]
        read_cost = sum(arch.linears()[role][0] for role in roles)
        write_cost = arch.linears()[writer][1]
        read = damped(moment.read, recipe.gram_damping)
        if moment.read_gradient is not None and moment.write_gradient is not None:
            read_m, write_p = (
                moment.read_gradient / 2,
                damped(moment.write_gradient, recipe.metric_damping) / 2,
            )
        else:  # every linear's relative error counts the same
            weights = model.block(layer)
            read_m = torch.zeros_like(read)
            for role in roles:
                w = weights[f"{role}.weight"].double()
                energy = float(((w @ read) * w).sum())
                if energy > 0:
                    read_m += w.T @ w / energy
            energy = float(moment.write.trace())
            write_p = torch.eye(len(read), dtype=torch.float64) / (energy if energy > 0 else 1.0)
        name = f"layers.{layer}.{sub_block}"
        yield _Group(layer, sub_block, "read", StreamTerm(f"{name}.read", read, read_m.double(), read_cost))
        yield _Group(
            layer,
            sub_block,
            "write",
            StreamTerm(f"{name}.write", write_p.double(), moment.write.double(), write_cost),
        )


def _check_unit(arch: Architecture, unit: int) -> None:
    if arch.hidden_size % unit:
        raise UsageError(f"--unit {unit} does not divide the hidden size {arch.hidden_size}")


def _plan_nested(model: FoldedModel, recipe: Recipe, moments: Moments, unit: int) -> Plan:
    """Alternate allocation of kept widths at fixed rotations, and rotations at fixed widths."""
    arch, d = model.arch, model.arch.hidden_size
    _check_unit(arch, unit)
    groups = list(_groups(model, recipe, moments))
    count = 1 if recipe.rotation == "shared" else 2 * arch.num_layers + 1
    at: list[list[_Group]] = [[] for _ in range(count)]
    for group in groups:
        at[0 if count == 1 else group.position].append(group)
    rotations = [nested_start([g.term for g in here]) for here in at]
    widths = range(unit, d + 1, unit)
    rounds = 3 if recipe.rotation_iterations else 1
    kept: dict[str, int] = {}
    for turn in range(rounds):
        menus = []
        for q, here in zip(rotations, at, strict=True):
            for g in here:
                curve = g.term.curve(q)
                menus.append([Choice(k, k * g.term.cost, float(curve[k])) for k in widths])
        order = [g.term.name for here in at for g in here]
        choices = allocate(menus, budget_parameters(arch, recipe))
        kept = {name: c.label for name, c in zip(order, choices, strict=True)}
        predicted = {name: c.loss for name, c in zip(order, choices, strict=True)}
        log(f"allocation {turn + 1} of {rounds}: predicted loss {sum(predicted.values()):.4g}")
        if turn + 1 < rounds:
            rotations = [
                nested_rotation(
                    [g.term for g in here],
                    [kept[g.term.name] for g in here],
                    q,
                    iterations=recipe.rotation_iterations,
                )
                for q, here in zip(rotations, at, strict=True)
            ]
    structures: dict[str, Structure] = {}
    for g in groups:
        k = kept[g.term.name]
        if k == d:
            continue
        for role in arch.readers(g.sub_block) if g.kind == "read" else (WRITERS[g.sub_block],):
            n, m = arch.linears()[role]
            structures[f"layers.{g.layer}.{role}"] = KroneckerStructure(
                in_features=m,
                out_features=n,
                blocks=d // unit,
                terms=k // unit,
                side="in" if g.kind == "read" else "out",
                mix="leading",
            )
    return Plan(Rotations(recipe.rotation, tuple(rotations)), structures, predicted)


# ---- any other structure: Procrustes rotations with the structure's own fits


def _rotate_members(
    model: FoldedModel, recipe: Recipe, moments: Moments, structures: Mapping[str, Structure]
) -> Rotations:
    """Frobenius start, then the Gram-weighted solver, for every rotation of the recipe."""
    arch = model.arch
    if recipe.rotation == "none":
        return Rotations.none()
    positions = 2 * arch.num_layers + 1
    served = [range(positions)] if recipe.rotation == "shared" else [range(p, p + 1) for p in range(positions)]
    iterations = max(1, recipe.rotation_iterations // 20)
    matrices: list[Tensor] = []
    for here in served:

        def members(here: range = here) -> Iterator[Member]:
            return _members_at(model, recipe, moments, structures, here)

        q = torch.eye(arch.hidden_size, dtype=torch.float64)
        if any(True for _ in members()):
            q = frobenius_rotation(members, q, 2 * iterations)
            q, errors = majorised_rotation(members, q, iterations)
            log(f"rotation {len(matrices) + 1} of {len(served)}: weighted error {errors[0]:.4g} -> {errors[-1]:.4g}")
        matrices.append(q)
    return Rotations(recipe.rotation, tuple(matrices))


def _members_at(
    model: FoldedModel,
    recipe: Recipe,
    moments: Moments,
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
            gram: Tensor | None = damped(moment.read if side == "in" else _inner(moment), recipe.gram_damping)
            energy = float(((weight @ gram) * weight).sum()) if gram is not None else float(weight.square().sum())
            yield Member(weight, gram, side, structures[f"layers.{layer}.{role}"], 1 / max(energy, 1e-30))


def _inner(moment: StreamMoments) -> Tensor:
    if moment.inner is None:
        raise ValueError("the moments were collected without those of the writers' inputs")
    return moment.inner

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
from compress.jrk import jrk_structures
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
from compress.structures.joint import leader_of

ROUNDS = 2
"""Of rotation and allocation, after the closed-form start. The second took the predicted loss from 0.494 to 0.483."""

Moments = Mapping[tuple[int, str], StreamMoments]


@dataclass(frozen=True)
class Plan:
    """Rotations, the structure of every linear that is not dense, and the predicted loss (nats per token) of each
    linear that was allocated a size."""

    rotations: Rotations
    structures: dict[str, Structure]
    predicted: dict[str, float]


def default_unit(arch: Architecture) -> int:
    """Alignment of kept sizes: 64 at production widths, finer where 64 would leave fewer than 16 sizes."""
    return 64 if arch.hidden_size >= 1024 else 32 if arch.hidden_size >= 512 else 8


def unit_of(arch: Architecture, recipe: Recipe) -> int:
    """The alignment that the recipe asks for, or the default one."""
    return recipe.unit or default_unit(arch)


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
    unit = unit_of(arch, recipe)
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
    elif uses_leading_mix(recipe):
        unit = unit_of(arch, recipe)
        _check_unit(arch, unit)
        smallest = arch.projection_parameters() * unit // arch.hidden_size
        if budget_parameters(arch, recipe) < smallest:
            raise UsageError(
                f"--ratio {recipe.ratio} is too low: {unit} of {arch.hidden_size} coordinates, the least that --unit "
                f"allows, are {smallest:,} parameters: raise --ratio"
            )
    elif recipe.structure != "dense":
        _uniform(arch, recipe, unit_of(arch, recipe))


def structures_without_text(arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
    """The structures of a recipe that reads no text, dense ones left out: joint rank-k, or what it gives by name.

    Raises UsageError for an impossible ratio and for sharing that does not hold together.
    """
    chosen = jrk_structures(arch, recipe.ratio, unit_of(arch, recipe)) if recipe.structure == "jrk" else {}
    chosen = {n: s for n, s in (chosen | explicit_layers(arch, recipe)).items() if s.name != "dense"}
    try:
        for name in chosen:
            leader_of(chosen, name)
    except ArtifactError as error:
        raise UsageError(f"recipe layers: {error}") from error
    return chosen


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
                if issubclass(kind, KroneckerStructure):  # no rotation has brought what matters to the front
                    chosen[role] = kind.for_ratio(m, n, side, share, unit, mix="explicit")
                else:
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
class _Choice:
    """One linear that keeps leading coordinates of the stream: its size is what is to choose."""

    name: str
    role: str
    position: int  # of the stream, whose rotation it meets
    term: StreamTerm


def _choices(model: FoldedModel, recipe: Recipe, moments: Moments) -> Iterator[_Choice]:
    arch = model.arch
    for (layer, sub_block), moment in moments.items():
        position, writer = 2 * layer + SUB_BLOCKS.index(sub_block), WRITERS[sub_block]
        read, write = damped(moment.read, recipe.gram_damping), moment.write.double()
        if moment.read_gradients is not None and moment.write_gradient is not None:
            metrics = {role: gradient.double() / 2 for role, gradient in moment.read_gradients.items()}
            write_metric = damped(moment.write_gradient, recipe.metric_damping) / 2
        else:  # every linear's relative error counts the same
            weights, metrics = model.block(layer), {}
            for role in arch.readers(sub_block):
                w = weights[f"{role}.weight"].double()
                metrics[role] = w.T @ w / _positive(float(((w @ read) * w).sum()))
            write_metric = torch.eye(len(read), dtype=torch.float64) / _positive(float(write.trace()))
        term = _mean_free_term if arch.norm == "layernorm" else StreamTerm
        for role, metric in metrics.items():
            name = f"layers.{layer}.{role}"
            yield _Choice(name, role, position, term(name, read, metric, arch.linears()[role][0]))
        name = f"layers.{layer}.{writer}"
        yield _Choice(name, writer, position + 1, term(name, write_metric, write, arch.linears()[writer][1]))


def _mean_free_term(name: str, p: Tensor, m: Tensor, cost: int) -> StreamTerm:
    """The term in the d - 1 directions that LayerNorm lets through."""
    basis = _mean_free_basis(len(p))
    return StreamTerm(name, basis.T @ p @ basis, basis.T @ m @ basis, cost)


def _mean_free_basis(width: int) -> Tensor:
    """(width, width - 1): an orthonormal basis of what is left of the stream without its mean, 1 / sqrt(width)."""
    whole: Tensor = torch.linalg.qr(torch.ones(width, 1, dtype=torch.float64), mode="complete").Q
    return whole[:, 1:]


def _with_mean(q: Tensor) -> Tensor:
    """The rotation (d, d) of a mean-free one (d - 1, d - 1): the mean becomes the last rotated coordinate.

    Every writer that keeps less than all coordinates leaves it at zero, so that the compressed model, too, has nothing
    for LayerNorm to subtract.
    """
    width = len(q) + 1
    mean = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    return torch.cat((_mean_free_basis(width) @ q, mean), dim=1)


def _positive(energy: float) -> float:
    """A linear that only ever sees zeros loses nothing whatever it becomes."""
    return energy if energy > 0 else 1.0


def _check_unit(arch: Architecture, unit: int) -> None:
    if arch.hidden_size % unit:
        raise UsageError(f"--unit {unit} does not divide the hidden size {arch.hidden_size}")


def _plan_nested(model: FoldedModel, recipe: Recipe, moments: Moments, unit: int) -> Plan:
    """Alternate allocation of kept widths at fixed rotations, and rotations at fixed widths."""
    arch, d = model.arch, model.arch.hidden_size
    _check_unit(arch, unit)
    count = 1 if recipe.rotation == "shared" else 2 * arch.num_layers + 1
    at: list[list[_Choice]] = [[] for _ in range(count)]
    for choice in _choices(model, recipe, moments):
        at[0 if count == 1 else choice.position].append(choice)
    flat = [choice for here in at for choice in here]
    rotations = [nested_start([c.term for c in here]) for here in at]
    kept, predicted = _allocate(arch, recipe, at, rotations, unit)
    for turn in range(ROUNDS if recipe.rotation_iterations else 0):
        rotations = [
            nested_rotation(
                [c.term for c in here],
                [kept[c.name] for c in here],
                q,
                iterations=recipe.rotation_iterations,
                dtype=torch.float32 if d >= 256 else torch.float64,
            )
            for q, here in zip(rotations, at, strict=True)
        ]
        kept, predicted = _allocate(arch, recipe, at, rotations, unit)
        log(f"rotation, round {turn + 1} of {ROUNDS}: predicted loss {sum(predicted.values()):.4g}")
    structures: dict[str, Structure] = {}
    for choice in flat:
        if kept[choice.name] < d:
            n, m = arch.linears()[choice.role]
            structures[choice.name] = KroneckerStructure(
                in_features=m,
                out_features=n,
                blocks=d // unit,
                terms=kept[choice.name] // unit,
                side="out" if choice.role in WRITERS.values() else "in",
                mix="leading",
            )
    if arch.norm == "layernorm":
        rotations = [_with_mean(q) for q in rotations]
    return Plan(Rotations(recipe.rotation, tuple(rotations)), structures, predicted)


def _allocate(
    arch: Architecture, recipe: Recipe, at: list[list[_Choice]], rotations: list[Tensor], unit: int
) -> tuple[dict[str, int], dict[str, float]]:
    """Kept width and predicted loss of every linear at these rotations, within the budget."""
    names, menus = [], []
    for q, here in zip(rotations, at, strict=True):
        for choice in here:
            curve, cost = choice.term.curve(q), choice.term.cost
            names.append(choice.name)
            widths = range(unit, arch.hidden_size + 1, unit)
            menus.append([Choice(k, k * cost, float(curve[min(k, len(q))])) for k in widths])
    chosen = allocate(menus, budget_parameters(arch, recipe))
    return (
        {name: c.label for name, c in zip(names, chosen, strict=True)},
        {name: c.loss for name, c in zip(names, chosen, strict=True)},
    )


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

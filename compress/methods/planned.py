"""From moments and a budget to rotations and one structure per linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

from compress.allocation.budget import (
    budget_of,
    cost_of,
    kept_width,
    unit_of,
    uses_leading_mix,
)
from compress.allocation.choose import allocate, allocate_uniformly
from compress.allocation.explicit import explicit_layers
from compress.allocation.groups import LayerMenus
from compress.allocation.kept_menus import kept_groups
from compress.allocation.plan import Plan
from compress.allocation.uniform import uniform_structures
from compress.allocation.width import leading_structures
from compress.architecture import Architecture, position_of
from compress.artifact.ledger import Keeper, Nowhere
from compress.calibration.moments import Moments
from compress.methods.checks import check_unit
from compress.methods.compot import pooled_structures
from compress.progress import log, track
from compress.recipe import Recipe, kinds_of
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.rotation.gauge import with_skips
from compress.rotation.nested import StreamTerm
from compress.rotation.stream import StreamRotations, rotate_members
from compress.structures import (
    CompotStructure,
    Structure,
    registry,
)

ROUNDS = 2
"""Of rotation and allocation, after the closed-form start. The second took the predicted loss from 0.494 to 0.483."""


def needs_moments(recipe: Recipe) -> bool:
    """Whether planning or fitting uses moments of the dense model, collected before anything is compressed."""
    selects = any(config.get("structure") == "select" for config in recipe.layers.values())
    return selects or recipe.has_menus() or recipe.rotation != "none" or recipe.sensitivity != "none"


def make_plan(
    model: FoldedModel,
    recipe: Recipe,
    moments: Moments,
    measured: Mapping[str, float] | None = None,
    keeper: Keeper | None = None,
) -> Plan:
    """Rotations and structures for `recipe`. measured: the weights of `--sensitivity measured`, by role. keeper: where
    each layer's menus and each rotation are kept as they are found."""
    arch, unit, keeper = model.arch, unit_of(model.arch, recipe), keeper or Nowhere()
    menus = LayerMenus(model, recipe, moments, measured, kinds_of(recipe), unit, cost_of(recipe), keeper)
    if recipe.structure == "dense":
        plan = Plan(Rotations.none(), {}, {})
    elif recipe.has_menus():
        plan = _plan_allocated(menus, recipe, unit, keeper)
    elif recipe.skip in ("cs", "householder"):
        plan = _plan_one_width(menus, recipe, keeper)
    elif issubclass(registry()[recipe.structure], CompotStructure) and recipe.allocation == "global":
        plan = Plan(Rotations.none(), pooled_structures(model, recipe, unit, keeper), {})
    else:
        structures = uniform_structures(arch, recipe, unit)
        for role, (n, m) in arch.linears().items():
            if f"layers.0.{role}" not in structures:
                log(f"{role} ({n} x {m}) stays dense: no {recipe.structure} in steps of {unit} is small enough")
        plan = Plan(rotate_members(model, recipe, moments, structures, keeper), structures, {})
    chosen = {**plan.structures, **explicit_layers(arch, recipe)}
    structures = {n: s for n, s in chosen.items() if s.name != "dense"}
    return Plan(plan.rotations, structures, plan.predicted, menus.rewrites_of(structures))


def _plan_allocated(menus: LayerMenus, recipe: Recipe, unit: int, keeper: Keeper) -> Plan:
    """One budget over the menus of all groups; with Kronecker sums, in turn with the rotation that they share."""
    arch = menus.model.arch
    budget, layers = budget_of(arch, recipe), range(arch.num_layers)
    rotations = StreamRotations(arch, recipe.rotation) if uses_leading_mix(recipe) else None
    if rotations is not None:
        check_unit(arch, unit)
        rotations.start([partial(_terms, menus, rotations, index) for index in range(rotations.count)], keeper)
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
            _turn(rotations, partial(menus.leading_terms, structures, rotations), recipe, keeper, turn)
    found = rotations.result() if rotations is not None else Rotations.none()
    return Plan(found, structures, predicted)


def _turn(
    rotations: StreamRotations,
    terms: Callable[[int], Iterator[tuple[StreamTerm, int]]],
    recipe: Recipe,
    keeper: Keeper,
    turn: int,
) -> None:
    """Improve every rotation by its (term, kept coordinates), each kept as it is found."""
    for index in track(range(rotations.count), description="rotate"):

        def improved(index: int = index) -> dict[str, Tensor]:
            return {"q": rotations.improved(index, list(terms(index)), recipe.rotation_iterations)}

        rotations.matrices[index] = keeper.tensors(f"plan-rotation-{turn}-{index}", improved)["q"]


def within_positions(arch: Architecture, recipe: Recipe) -> Recipe:
    """The recipe with sequences that the model can hold where their length was not given, which is said."""
    calibration = recipe.calibration
    given = "sequence_length" in calibration.model_fields_set
    if given or not recipe.needs_text() or calibration.sequence_length <= arch.max_positions:
        return recipe
    log(
        f"--sequence-length is {arch.max_positions} in place of {calibration.sequence_length}: the model has no more "
        "positions"
    )
    shorter = calibration.model_copy(update={"sequence_length": arch.max_positions})
    return recipe.model_copy(update={"calibration": shorter})


def _plan_one_width(menus: LayerMenus, recipe: Recipe, keeper: Keeper) -> Plan:
    """One rotation at each position, one kept width for the whole stream, and skips in a cheap exact form."""
    arch = menus.model.arch
    reflections = recipe.reflections if recipe.skip == "householder" else None
    kept = kept_width(arch, recipe)
    rotations = StreamRotations(arch, "block")
    rotations.start([partial(_terms, menus, rotations, index) for index in range(rotations.count)], keeper)

    def terms(index: int) -> Iterator[tuple[StreamTerm, int]]:
        return ((term, kept) for term in _terms(menus, rotations, index))

    _turn(rotations, terms, recipe, keeper, 0)
    found = with_skips(rotations.result(), recipe.skip, kept=kept, reflections=reflections)
    return Plan(found, leading_structures(arch, kept, kept), {})


def _terms(menus: LayerMenus, rotations: StreamRotations, index: int) -> Iterator[StreamTerm]:
    """One term for every linear at a rotation, for its closed-form start."""
    for layer in rotations.layers(index):
        for role, linear in menus.linears(layer).items():
            if rotations.index(position_of(layer, role)) == index:
                yield linear.term()

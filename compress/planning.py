"""From moments and a budget to rotations and one structure per linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

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
from compress.allocation.choose import allocate, allocate_uniformly
from compress.allocation.explicit import explicit_layers
from compress.allocation.groups import LayerMenus
from compress.allocation.kept_menus import kept_groups
from compress.allocation.menus import CORES
from compress.allocation.plan import Plan
from compress.allocation.uniform import uniform_structures
from compress.allocation.width import leading_structures
from compress.architecture import WRITERS, Architecture, position_of
from compress.artifact.ledger import Keeper, Nowhere
from compress.calibration.moments import Moments
from compress.errors import ArtifactError, UsageError
from compress.jrk import jrk_structures
from compress.paper.accounting import largest_kept
from compress.paper.shapes import Kind, paper_structures
from compress.pooled import normalised_spectrum, pooled_allocation
from compress.progress import log, track
from compress.recipe import Recipe, kinds_of
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.rotation.gauge import with_skips
from compress.rotation.nested import StreamTerm
from compress.rotation.stream import StreamRotations, rotate_members
from compress.structures import (
    CompotStructure,
    DenseStructure,
    Structure,
    registry,
)
from compress.structures.joint import leader_of
from compress.structures.select import selection

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
            for kind in (*(k for k in kinds_of(recipe) if k in CORES), *(["kron"] if uses_leading_mix(recipe) else [])):
                sizes += registry()[kind].menu(part.in_features, part.out_features, arch.side(role), unit=unit)
        for structure in sizes:
            table.seconds(structure)


def check_unit(arch: Architecture, unit: int) -> None:
    if arch.hidden_size % unit:
        raise UsageError(f"--unit {unit} does not divide the hidden size {arch.hidden_size}")


def structures_without_text(arch: Architecture, recipe: Recipe) -> dict[str, Structure]:
    """The structures of a recipe that reads no text, dense ones left out: joint rank-k, or what it gives by name.

    Raises UsageError for an impossible ratio and for sharing that does not hold together.
    """
    unit = unit_of(arch, recipe)
    chosen = jrk_structures(arch, ratio_of(arch, recipe), unit) if recipe.structure == "jrk" else {}
    chosen = {n: s for n, s in (chosen | explicit_layers(arch, recipe)).items() if s.name != "dense"}
    try:
        for name in chosen:
            leader_of(chosen, name)
    except ArtifactError as error:
        raise UsageError(f"recipe layers: {error}") from error
    return chosen


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


def pooled_structures(model: FoldedModel, recipe: Recipe, unit: int, keeper: Keeper) -> dict[str, Structure]:
    """COMPOT's one-shot allocation: the kept ratio of each linear from the pooled spectra of the weights."""
    arch, kind = model.arch, registry()[recipe.structure]
    names = {f"layers.{i}.{role}": shape for i in range(arch.num_layers) for role, shape in arch.linears().items()}
    spectra = dict[str, Tensor]()
    for layer in track(range(arch.num_layers), description="plan"):
        found = keeper.tensors(f"plan-spectra-{layer}", partial(_spectra, model, layer))
        spectra |= {f"layers.{layer}.{role}": found[role] for role in arch.linears()}
    # A linear that no aligned size makes as small as its share stays dense, and the others pay for it.
    left, open_names = budget_parameters(arch, recipe), dict(names)
    while open_names and left > 0:
        share = min(1.0, left / sum(n * m for n, m in open_names.values()))
        ratios = pooled_allocation({name: spectra[name] for name in open_names}, open_names, share)
        chosen, stuck = dict[str, Structure](), list[str]()
        for name, (n, m) in open_names.items():
            try:
                if ratios[name] < 1:
                    chosen[name] = kind.for_ratio(m, n, arch.side(name.split(".", 2)[2]), ratios[name], unit)
            except UsageError:
                stuck.append(name)
        if not stuck:
            return chosen
        for name in stuck:
            n, m = open_names.pop(name)
            left -= n * m
    raise UsageError(
        f"no linear of this model has an aligned {recipe.structure} of ratio {ratio_of(arch, recipe):g}: "
        f"lower --unit or raise --ratio"
    )


def _spectra(model: FoldedModel, layer: int) -> dict[str, Tensor]:
    weights = model.block(layer)
    return {role: normalised_spectrum(weights[f"{role}.weight"]) for role in model.arch.linears()}


def _terms(menus: LayerMenus, rotations: StreamRotations, index: int) -> Iterator[StreamTerm]:
    """One term for every linear at a rotation, for its closed-form start."""
    for layer in rotations.layers(index):
        for role, linear in menus.linears(layer).items():
            if rotations.index(position_of(layer, role)) == index:
                yield linear.term()

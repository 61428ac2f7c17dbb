"""The groups of linears of each block and their menus, in coordinates in which leading inner features matter most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from compress.allocation.choose import Choice, Cost, convex_hull
from compress.allocation.cuts import Nested
from compress.allocation.menus import (
    Linear,
    core_menu,
    dense_choice,
    every_choice,
    joint_menu,
    leading_menu,
    linear_menu,
    merged,
    reduced,
    selected_menu,
)
from compress.allocation.selection import neuron_order, value_output_basis
from compress.architecture import SUB_BLOCKS, WRITERS, position_of
from compress.artifact.ledger import Keeper, Nowhere
from compress.calibration.metric import loss_metric
from compress.calibration.moments import StreamMoments
from compress.linalg import damped
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.inner import InnerRewrites
from compress.rotation.nested import StreamTerm
from compress.rotation.stream import StreamRotations
from compress.structures import KroneckerStructure, SelectStructure, Structure, core_of, cores

CORE_SIZES = 12
"""Number of selections, about, evenly spaced: each takes a decomposition for each of its linears."""


SELECTED = {"vo": ("attn.v", "attn.o"), "neurons": ("mlp.gate", "mlp.up", "mlp.down")}
"""Inner option -> the linears whose inner features are dropped together."""


class LayerMenus:
    """Menus of all groups of a model, layer by layer. What no rotation changes is computed once."""

    def __init__(
        self,
        model: FoldedModel,
        recipe: Recipe,
        moments: Mapping[tuple[int, str], StreamMoments],
        measured: Mapping[str, float] | None,
        kinds: tuple[str, ...],
        unit: int,
        cost: Cost,
        keeper: Keeper | None = None,
    ) -> None:
        self.model, self.recipe, self.moments, self.measured = model, recipe, moments, measured
        self.leading, self.kinds = "kron" in kinds, tuple(kind for kind in kinds if kind != "kron")
        self.cores = tuple(kind for kind in kinds if kind in cores())
        self.unit, self.cost, self.keeper = unit, cost, keeper or Nowhere()
        self.head_unit = max(1, min(16, model.arch.head_dim // 4))
        self.neuron_unit = 64 if model.arch.intermediate_size >= 1024 else max(1, model.arch.intermediate_size // 16)
        self.orders: dict[int, Tensor] = {}
        self.bases: dict[int, Tensor] = {}
        self.rewrites = InnerRewrites(self.orders, self.bases)
        self.given: dict[int, set[str]] = {}
        self._curves: dict[int, dict[str, Tensor]] = {}
        self._fixed: dict[tuple[int, str, int], list[Choice]] = {}

    def linears(self, layer: int) -> dict[str, Linear]:
        """The linears of a block after its inner rewrites, with damped Gram matrices and loss metrics, in float64."""
        if layer not in self._curves:
            self._take_rewrites(layer)
        arch, recipe, found = self.model.arch, self.recipe, dict[str, Linear]()
        weights = self.rewrites.block(self.model.block(layer), arch, layer)
        for sub in SUB_BLOCKS:
            moment = self.moments[layer, sub].rewritten(self.rewrites, arch, layer, sub)
            read, inner = damped(moment.read, recipe.gram_damping), damped(moment.inner, recipe.gram_damping)
            for role in (*arch.readers(sub), WRITERS[sub]):
                weight = weights[f"{role}.weight"].double()
                metric = loss_metric(recipe, moment, role, weight, self.measured)
                found[role] = Linear(role, weight, inner if role == WRITERS[sub] else read, metric, arch.side(role))
        return found

    def _take_rewrites(self, layer: int) -> None:
        """Make the rewrites of a block its own, as they are kept or found: orders, bases, and the predicted loss by
        kept features of "neurons" and of "vo"."""
        self._curves[layer] = {}  # what `linears` gives meanwhile is not rewritten
        asked = sorted((set(self.recipe.inner) | self.given.get(layer, set())) & {"neurons", "vo"})
        if not asked:
            return
        name = "-".join(("plan-rewrites", str(layer), *asked))
        found = self.keeper.tensors(name, lambda: self._find_rewrites(layer, asked))
        for option, rewrites in (("neurons", self.orders), ("vo", self.bases)):
            if option in asked:
                rewrites[layer], self._curves[layer][option] = found[option], found[f"{option}.curve"]

    def _find_rewrites(self, layer: int, asked: Sequence[str]) -> dict[str, Tensor]:
        arch, found = self.model.arch, dict[str, Tensor]()
        plain = self.linears(layer)
        down, o = plain["mlp.down"], plain["attn.o"]
        # Both curves are 1/2 tr(H E G E^T); the loss metric has its half inside.
        if "neurons" in asked:
            found["neurons"], found["neurons.curve"] = neuron_order(down.weight, down.gram, 2 * down.metric)
        if "vo" in asked:
            found["vo"], found["vo.curve"] = value_output_basis(
                o.weight, o.gram, 2 * o.metric, arch.num_kv_heads, arch.head_dim
            )
        return found

    def fixed(self, layer: int) -> dict[tuple[int, str, int], list[Choice]]:
        """The menus of a block that no rotation changes, as far as they are known; `give_fixed` takes them back."""
        return {key: menu for key, menu in self._fixed.items() if key[0] == layer}

    def give_fixed(self, menus: Mapping[tuple[int, str, int], list[Choice]]) -> None:
        """Spare the decompositions of menus that are known."""
        self._fixed.update(menus)

    def of(self, layer: int, rotations: StreamRotations | None) -> list[tuple[tuple[int, str], list[Choice]]]:
        """((layer, name of the group), menu) of every group of a block."""
        arch, linears = self.model.arch, self.linears(layer)
        curves = self._curves[layer]
        nested = {role: Nested(linear, self._groups(role)) for role, linear in linears.items()}
        sizes = {option: self._sizes(option, rotations) for option in SELECTED if option in curves}
        cut = {role: sizes[option] for option in sizes for role in SELECTED[option]}
        leading = {} if rotations is None else self._leading(layer, nested, cut, rotations)

        def menu_of(role: str, select: SelectStructure | None) -> list[Choice]:
            linear = linears[role]
            n, m = linear.weight.shape
            shape, kept = ((m, n), 0) if select is None else (select.reduced_sizes, select.kept)
            key = (layer, role, kept)
            if key not in self._fixed:
                if select is None:
                    self._fixed[key] = linear_menu(linear, self.kinds, self.unit, self.cost)
                elif self.cores and kept % self._core_step(role, select.group_size) == 0:
                    squares = nested[role].spectrum(kept)
                    self._fixed[key] = core_menu(role, shape, linear.side, squares, self.cores, self.unit, self.cost)
                else:
                    self._fixed[key] = [dense_choice(role, *shape, self.cost)]
            if rotations is None:
                return self._fixed[key]
            menu = leading_menu(role, shape, linear.side, leading[role][kept], self.unit, self.cost)
            return convex_hull(self._fixed[key] + menu)

        alone, found = dict(linears), []
        for option in sizes:
            here = {role: alone.pop(role) for role in SELECTED[option] if role in alone}
            counts = {role: self._groups(role) for role in here}
            found.append(((layer, option), selected_menu(here, counts, curves[option], sizes[option], menu_of)))
        if self.recipe.joint:
            for sub in SUB_BLOCKS:
                together = [role for role in arch.readers(sub) if role in alone]
                if len(together) > 1:
                    shared = joint_menu([alone.pop(role) for role in together], self.unit, self.cost)
                    menu = convex_hull(merged([menu_of(role, None) for role in together]) + shared)
                    found.append(((layer, f"{sub} readers"), menu))
        if self.recipe.allocation == "uniform" and rotations is None:
            # One share for all needs the sizes near it, which may lie above the line from far below it to dense.
            return found + [((layer, r), every_choice(x, self.kinds, self.unit, self.cost)) for r, x in alone.items()]
        return found + [((layer, role), menu_of(role, None)) for role in alone]

    def _groups(self, role: str) -> int:
        """Groups of the inner side of a linear: heads, or 1 for neurons (and for q and k, which have none)."""
        arch = self.model.arch
        return {"attn.v": arch.num_kv_heads, "attn.o": arch.num_heads}.get(role, 1)

    def _sizes(self, option: str, rotations: StreamRotations | None) -> range:
        """The numbers of kept inner features that are on the menu."""
        heads = option == "vo"
        size, unit = (self.model.arch.head_dim if heads else self.model.arch.intermediate_size), self.head_unit
        unit = unit if heads else self.neuron_unit
        step = unit if rotations is None else 2 * unit  # each size then has a curve of its own for each round
        return range(step * max(1, size // (4 * step)), size, step)

    @staticmethod
    def _leading(
        layer: int, nested: Mapping[str, Nested], cut: Mapping[str, range], rotations: StreamRotations
    ) -> dict[str, dict[int, Tensor]]:
        """By role and number of kept inner features (0: of a linear as it is): loss of keeping 0 ... d coordinates of
        the stream. What P and the rotation decide is computed once for all linears that have both in common."""
        columns: dict[tuple[int, int], Tensor] = {}
        found: dict[str, dict[int, Tensor]] = {}
        for role, linear in nested.items():
            position = position_of(layer, role)
            key = (rotations.index(position), id(linear.stream_moment))  # equal ones are one object in `linears`
            if key not in columns:
                columns[key] = rotations.columns(position, linear.stream_moment)
            z, kept = columns[key], cut.get(role, range(0))
            found[role] = {0: rotations.curves(linear.total(z))}
            if kept:
                found[role] |= dict(zip(kept, rotations.curves(linear.gains(z, kept)), strict=True))
        return found

    def _core_step(self, role: str, size: int) -> int:
        """Selections of multiples of this many of `size` features may have a structure of their own in between."""
        unit = self.head_unit if role.startswith("attn.") else self.neuron_unit
        return unit * max(1, size // (CORE_SIZES * unit))

    def leading_terms(
        self, structures: Mapping[str, Structure], rotations: StreamRotations, index: int
    ) -> Iterator[tuple[StreamTerm, int]]:
        """(term, kept coordinates) of each linear that keeps leading coordinates at rotation `index`."""
        for layer in rotations.layers(index):
            names = {role: f"layers.{layer}.{role}" for role in self.model.arch.linears()}
            if not any(isinstance(core_of(structures[name]), KroneckerStructure) for name in names.values()):
                continue
            for role, linear in self.linears(layer).items():
                structure = structures[names[role]]
                core = core_of(structure)
                if isinstance(core, KroneckerStructure) and rotations.index(position_of(layer, role)) == index:
                    kept = reduced(linear, structure) if isinstance(structure, SelectStructure) else linear
                    yield replace(kept.term(), name=names[role]), core.kept

    def rewrites_of(self, structures: Mapping[str, Structure]) -> InnerRewrites:
        """The rewrites that the `select` structures among the chosen ones need, found where the recipe gave these."""
        orders, bases = dict[int, Tensor](), dict[int, Tensor]()
        for layer in range(self.model.arch.num_layers):
            for role, option, known, needed in (
                ("mlp.down", "neurons", self.orders, orders),
                ("attn.o", "vo", self.bases, bases),
            ):
                if isinstance(structures.get(f"layers.{layer}.{role}"), SelectStructure):
                    if layer not in known:
                        self.given.setdefault(layer, set()).add(option)
                        self._curves.pop(layer, None)
                        self.linears(layer)
                    needed[layer] = known[layer]
        return InnerRewrites(orders, bases)

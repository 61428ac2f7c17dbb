"""The groups of linears of each block and their menus, in coordinates in which leading inner features matter most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.allocation import Choice, convex_hull
from compress.architecture import WRITERS
from compress.inner import neuron_order, value_output_basis
from compress.invariance import FoldedModel
from compress.menus import Cost, Linear, leading_menu, linear_menu, reduced, selected_menu
from compress.metrics import loss_metric
from compress.procrustes import StreamTerm, damped
from compress.recipe import Recipe
from compress.rotating import StreamRotations, position_of
from compress.statistics import SUB_BLOCKS, StreamMoments
from compress.structures import KroneckerStructure, SelectStructure, Structure


@dataclass(frozen=True)
class Inner:
    """Exact rewrites of one block that bring the inner features that matter to the front; None: as they are.

    order (inner,): neurons, the most needed first. basis (kv_heads, head_dim, head_dim): v becomes basis @ v.
    """

    order: Tensor | None = None
    basis: Tensor | None = None

    def output_metric(self, role: str, metric: Tensor) -> Tensor:
        """The metric of the outputs of `role` after the rewrites."""
        if self.order is not None and role in ("mlp.gate", "mlp.up"):
            order = self.order.to(metric.device)
            return metric[order][:, order]
        if self.basis is not None and role == "attn.v":
            back = torch.linalg.inv(torch.block_diag(*self.basis.to(metric)))
            return back.T @ metric @ back
        return metric


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
    ) -> None:
        self.model, self.recipe, self.moments, self.measured = model, recipe, moments, measured
        self.leading, self.kinds = "kron" in kinds, tuple(kind for kind in kinds if kind != "kron")
        self.unit, self.cost = unit, cost
        self.head_unit = max(1, min(16, model.arch.head_dim // 4))
        self.neuron_unit = 64 if model.arch.intermediate_size >= 1024 else max(1, model.arch.intermediate_size // 16)
        self._inner: dict[int, tuple[Inner, dict[str, Tensor]]] = {}
        self._fixed: dict[tuple[int, str, int], list[Choice]] = {}

    def linears(self, layer: int) -> dict[str, Linear]:
        """The linears of a block after its inner rewrites, with damped Gram matrices and loss metrics, in float64."""
        arch, recipe = self.model.arch, self.recipe
        weights, found = self.model.block(layer), dict[str, Linear]()
        for sub in SUB_BLOCKS:
            moment = self.moments[layer, sub]
            grams = {True: damped(moment.inner, recipe.gram_damping), False: damped(moment.read, recipe.gram_damping)}
            for role in (*arch.readers(sub), WRITERS[sub]):
                weight = weights[f"{role}.weight"].double()
                metric = loss_metric(recipe, moment, role, weight, self.measured)
                found[role] = Linear(role, weight, grams[role == WRITERS[sub]], metric, arch.side(role))
        if layer not in self._inner:
            self._inner[layer] = self._find_inner(found)
        inner, _ = self._inner[layer]
        return _rewritten(found, inner)

    def _find_inner(self, linears: Mapping[str, Linear]) -> tuple[Inner, dict[str, Tensor]]:
        """The rewrites that `--inner` asks for, and the predicted loss by kept features of "neurons" and "vo"."""
        order, basis, curves = None, None, dict[str, Tensor]()
        if "neurons" in self.recipe.inner:
            down = linears["mlp.down"]
            order, curves["neurons"] = neuron_order(down.weight, down.gram, down.metric)
        if "vo" in self.recipe.inner:
            o = linears["attn.o"]
            basis, curves["vo"] = value_output_basis(o.weight, o.gram, o.metric, self.model.arch.num_kv_heads)
        return Inner(order, basis), curves

    def of(self, layer: int, rotations: StreamRotations | None) -> list[tuple[tuple[int, str], list[Choice]]]:
        """((layer, name of the group), menu) of every group of a block."""
        arch, linears = self.model.arch, self.linears(layer)
        _, curves = self._inner[layer]

        def menu_of(linear: Linear, kept: int) -> list[Choice]:
            key = (layer, linear.role, kept)
            if key not in self._fixed:
                # What is left of a selection stays dense: a structure of its own between kept neurons took the predicted
                # loss of SmolLM2-135M at 0.75 from 0.1810 to 0.1806 only.
                self._fixed[key] = linear_menu(linear, () if kept else self.kinds, self.unit, self.cost)
            if rotations is None:
                return self._fixed[key]
            curve = rotations.curve(position_of(layer, linear.role), linear.term())
            return convex_hull(self._fixed[key] + leading_menu(linear, curve, self.unit, self.cost))

        alone, found = dict(linears), []
        for option, roles, groups, size, unit in (
            ("vo", ("attn.v", "attn.o"), (arch.num_kv_heads, arch.num_heads), arch.head_dim, self.head_unit),
            ("neurons", ("mlp.gate", "mlp.up", "mlp.down"), (1, 1, 1), arch.intermediate_size, self.neuron_unit),
        ):
            if option in curves:
                here = {role: alone.pop(role) for role in roles if role in alone}
                sizes = range(unit * max(1, size // (4 * unit)), size, unit)
                counts = {role: count for role, count in zip(roles, groups, strict=True) if role in here}
                found.append(((layer, option), selected_menu(here, counts, curves[option], sizes, menu_of)))
        return found + [((layer, role), menu_of(linear, 0)) for role, linear in alone.items()]

    def leading_terms(
        self, structures: Mapping[str, Structure], rotations: StreamRotations, index: int
    ) -> Iterator[tuple[StreamTerm, int]]:
        """(term, kept coordinates) of each linear that keeps leading coordinates at rotation `index`."""
        for layer in range(self.model.arch.num_layers):
            names = {role: f"layers.{layer}.{role}" for role in self.model.arch.linears()}
            if not any(isinstance(_core(structures[name]), KroneckerStructure) for name in names.values()):
                continue
            for role, linear in self.linears(layer).items():
                structure = structures[names[role]]
                core = _core(structure)
                if isinstance(core, KroneckerStructure) and rotations.index(position_of(layer, role)) == index:
                    kept = reduced(linear, structure) if isinstance(structure, SelectStructure) else linear
                    yield replace(kept.term(), name=names[role]), core.kept

    def inner_of(self, structures: Mapping[str, Structure]) -> dict[int, Inner]:
        """The rewrites that the chosen `select` structures need, by layer."""
        found = {}
        for layer, (inner, _) in sorted(self._inner.items()):
            used = {
                writer: isinstance(structures[f"layers.{layer}.{writer}"], SelectStructure)
                for writer in WRITERS.values()
            }
            if any(used.values()):
                found[layer] = Inner(
                    inner.order if used["mlp.down"] else None, inner.basis if used["attn.o"] else None
                )
        return found


def _core(structure: Structure) -> Structure:
    return structure.reduced if isinstance(structure, SelectStructure) else structure


def _rewritten(linears: Mapping[str, Linear], inner: Inner) -> dict[str, Linear]:
    """The linears and their moments in the coordinates of the rewrites."""
    found = {role: replace(x, metric=inner.output_metric(role, x.metric)) for role, x in linears.items()}
    if inner.order is not None:
        for role in ("mlp.gate", "mlp.up"):
            if role in found:
                found[role] = replace(found[role], weight=found[role].weight[inner.order])
        down = found["mlp.down"]
        gram = down.gram[inner.order][:, inner.order]
        found["mlp.down"] = replace(down, weight=down.weight[:, inner.order], gram=gram)
    if inner.basis is not None:
        basis, v, o = inner.basis.double(), found["attn.v"], found["attn.o"]
        per_value = o.weight.shape[1] // v.weight.shape[0]  # query heads of a kv head
        values, queries = torch.block_diag(*basis), torch.block_diag(*basis.repeat_interleave(per_value, 0))
        found["attn.v"] = replace(v, weight=values @ v.weight)
        weight = torch.linalg.solve(queries, o.weight, left=False)
        found["attn.o"] = replace(o, weight=weight, gram=queries @ o.gram @ queries.T)
    return found

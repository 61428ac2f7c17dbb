"""What linears may become: for each group that is chosen together, structures with their cost and predicted loss.

A structure predicts its losses itself (`Structure.curve`); nothing is fitted here. 'dense' is always on the menu. A
group is one linear, or several whose choices hang together: v and o when value coordinates may be dropped, the whole
MLP when neurons may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from compress.allocation.choose import Choice, Cost, convex_hull
from compress.rotation.nested import StreamTerm
from compress.structures import DenseStructure, KroneckerStructure, SelectStructure, Structure, registry
from compress.structures.base import Side
from compress.structures.joint import joint_error_by_rank, joint_ranks, joint_structures
from compress.structures.select import refit, with_core

Label = dict[str, tuple[Structure, float]]
"""Role -> (structure, its part of the predicted loss)."""


@dataclass(frozen=True)
class Linear:
    """One linear in float64: weight (out, in), Gram matrix of its input, loss metric of its output (`loss_metric`)."""

    role: str
    weight: Tensor
    gram: Tensor
    metric: Tensor
    side: Side

    def term(self) -> StreamTerm:
        """What it loses when it keeps leading coordinates of a rotated stream."""
        n, m = self.weight.shape
        if self.side == "in":
            return StreamTerm(self.role, self.gram, self.weight.T @ self.metric @ self.weight, n)
        return StreamTerm(self.role, self.metric, self.weight @ self.gram @ self.weight.T, m)


def linear_menu(linear: Linear, kinds: Sequence[str], unit: int, cost: Cost) -> list[Choice]:
    """The lower convex hull of `every_choice`: what a global allocation may choose."""
    return convex_hull(every_choice(linear, kinds, unit, cost))


def every_choice(linear: Linear, kinds: Sequence[str], unit: int, cost: Cost) -> list[Choice]:
    """The linear dense, and every aligned size of the structures `kinds`."""
    n, m = linear.weight.shape
    menu = [dense_choice(linear.role, m, n, cost)]
    for kind in kinds:
        curve = registry()[kind].curve(linear.weight, linear.gram, linear.metric, linear.side, unit=unit)
        menu += [Choice({linear.role: (s, loss)}, cost(s), loss) for s, loss in curve]
    return menu


def dense_choice(role: str, in_features: int, out_features: int, cost: Cost) -> Choice:
    """A linear as it is."""
    dense = DenseStructure(in_features, out_features)
    return Choice({role: (dense, 0.0)}, cost(dense), 0.0)


def leading_menu(role: str, sizes: tuple[int, int], side: Side, curve: Tensor, unit: int, cost: Cost) -> list[Choice]:
    """The sums of Kronecker products of a linear of `sizes` (in, out) with the mix absorbed in the rotation; curve
    (d + 1,): loss by kept."""
    losses = curve.tolist()
    structures = KroneckerStructure.menu(*sizes, side, unit=unit)
    return [Choice({role: (s, losses[s.kept])}, cost(s), losses[s.kept]) for s in structures]


def core_menu(
    role: str, sizes: tuple[int, int], side: Side, squares: Tensor, kinds: Sequence[str], unit: int, cost: Cost
) -> list[Choice]:
    """The hull of what may lie between the features that a selection keeps, of `sizes` (in, out): dense, or one of
    the structures `kinds` by `Structure.ranked`; squares: its squared whitened singular values, descending."""
    menu = [dense_choice(role, *sizes, cost)]
    for kind in kinds:
        ranked = registry()[kind].ranked(*sizes, side, squares, unit=unit)
        menu += [Choice({role: (s, loss)}, cost(s), loss) for s, loss in ranked]
    return convex_hull(menu)


def merged(menus: Sequence[Sequence[Choice]]) -> list[Choice]:
    """The lower hull of all sums of one choice from each of several hulls: their steps in order of slope."""
    at = [0] * len(menus)
    steps = sorted(
        ((b.loss - a.loss) / (b.cost - a.cost), which) for which, menu in enumerate(menus) for a, b in pairwise(menu)
    )
    found = [_together(menus, at)]
    for _, which in steps:
        at[which] += 1
        found.append(_together(menus, at))
    return found


def _together(menus: Sequence[Sequence[Choice]], at: Sequence[int]) -> Choice:
    chosen = [menu[i] for menu, i in zip(menus, at, strict=True)]
    label: Label = {}
    for choice in chosen:
        label |= choice.label
    return Choice(label, sum(c.cost for c in chosen), sum(c.loss for c in chosen))


def joint_menu(linears: Sequence[Linear], unit: int, cost: Cost) -> list[Choice]:
    """Linears that read one input with a low-rank factor V in common, at every aligned rank that saves parameters."""
    sizes = {x.role: (x.weight.shape[0], x.weight.shape[1]) for x in linears}
    losses = joint_error_by_rank([x.weight for x in linears], linears[0].gram, [x.metric for x in linears])
    found = []
    for rank in joint_ranks(sizes, unit):
        structures = joint_structures(sizes, rank)
        first, loss = linears[0].role, float(losses[rank])
        label = {role: (structure, loss if role == first else 0.0) for role, structure in structures.items()}
        found.append(Choice(label, sum(cost(s) for s in structures.values()), loss))
    return found


MenuOf = Callable[[str, SelectStructure | None], list[Choice]]
"""The menu of a linear by role, or of what is left of it after a selection."""


def selected_menu(
    linears: Mapping[str, Linear], groups: Mapping[str, int], curve: Tensor, sizes: Iterable[int], menu_of: MenuOf
) -> list[Choice]:
    """Choices for linears that share an inner side: nothing dropped, or its leading `kept` features of each group kept.

    linears: in the coordinates in which leading features matter most. groups: role -> groups of its inner side (kv
    heads for v, query heads for o, 1 for an MLP). curve[kept]: predicted loss of dropping the others with the best
    compensation. Beside it each linear may take a structure of its own between what is left.
    """
    menu = merged([menu_of(role, None) for role in linears])
    for kept in sizes:
        parts = []
        for role, linear in linears.items():
            n, m = linear.weight.shape
            select = SelectStructure(m, n, kept, groups[role], "out" if linear.side == "in" else "in")
            parts.append([_around(select, choice) for choice in menu_of(role, select)])
        base, writer = float(curve[kept]), next(role for role, linear in linears.items() if linear.side == "out")
        menu += [Choice(_charged(c.label, writer, base), c.cost, c.loss + base) for c in merged(parts)]
    return convex_hull(menu)


def reduced(linear: Linear, select: SelectStructure) -> Linear:
    """The linear between the features that `select` keeps; what reads fewer of them makes the best of those."""
    stay = select.features().to(linear.weight.device)
    if select.side == "out":
        return Linear(linear.role, linear.weight[stay], linear.gram, linear.metric[stay][:, stay], linear.side)
    weight = refit(linear.weight, linear.gram, stay)
    return Linear(linear.role, weight, linear.gram[stay][:, stay], linear.metric, linear.side)


def _around(select: SelectStructure, choice: Choice) -> Choice:
    label: Label = {}
    for role, (structure, loss) in choice.label.items():
        label[role] = (select if structure.name == "dense" else with_core(select, structure), loss)
    return Choice(label, choice.cost, choice.loss)


def _charged(label: Label, role: str, loss: float) -> Label:
    """The label with the loss of what is dropped booked to `role`."""
    structure, own = label[role]
    return {**label, role: (structure, own + loss)}

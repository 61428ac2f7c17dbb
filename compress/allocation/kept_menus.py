"""The menus of a layer as JSON, so that a plan that was interrupted goes on at the next layer."""

from __future__ import annotations

from typing import Any

from compress.allocation.choose import Choice
from compress.allocation.groups import LayerMenus
from compress.artifact.ledger import Keeper
from compress.rotation.stream import StreamRotations
from compress.structures import structure_from_config

Groups = list[tuple[tuple[int, str], list[Choice]]]


def kept_groups(keeper: Keeper, menus: LayerMenus, layer: int, rotations: StreamRotations | None, turn: int) -> Groups:
    """`menus.of(layer, rotations)` in round `turn` of a plan, computed where it is not kept.

    With rotations, what they do not change is kept as well: the next round needs it.
    """

    def found() -> dict[str, Any]:
        groups = {name: _menu_to_json(menu) for (_, name), menu in menus.of(layer, rotations)}
        fixed: list[Any] = []
        if rotations is not None and turn == 0:
            fixed = [[role, size, _menu_to_json(menu)] for (_, role, size), menu in menus.fixed(layer).items()]
        return {"groups": groups, "fixed": fixed}

    value = keeper.value(f"plan-menus-{turn}-{layer}", found)
    menus.give_fixed({(layer, role, size): _menu_from_json(menu) for role, size, menu in value["fixed"]})
    return [((layer, name), _menu_from_json(menu)) for name, menu in value["groups"].items()]


def _menu_to_json(menu: list[Choice]) -> list[Any]:
    return [
        [{role: [s.to_config(), loss] for role, (s, loss) in choice.label.items()}, choice.cost, choice.loss]
        for choice in menu
    ]


def _menu_from_json(menu: list[Any]) -> list[Choice]:
    return [
        Choice({role: (structure_from_config(config), each) for role, (config, each) in label.items()}, cost, loss)
        for label, cost, loss in menu
    ]

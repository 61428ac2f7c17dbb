"""Structured matrices behind one interface: a frozen spec of the dimensions, and factor tensors by name.

The names below load their modules (and with them torch) when first used, so that importing this package is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.structures.base import Structure, cast, cores, register, registry, structure_from_config
    from compress.structures.compot import Compot24Structure, CompotStructure
    from compress.structures.dense import DenseStructure
    from compress.structures.gs import GroupShuffleStructure
    from compress.structures.kron import KroneckerStructure
    from compress.structures.lowrank import LowRankStructure
    from compress.structures.pifa import PivotedStructure
    from compress.structures.select import SelectStructure, core_of

__all__ = [
    "Compot24Structure",
    "CompotStructure",
    "DenseStructure",
    "GroupShuffleStructure",
    "KroneckerStructure",
    "LowRankStructure",
    "PivotedStructure",
    "SelectStructure",
    "Structure",
    "cast",
    "core_of",
    "cores",
    "register",
    "registry",
    "structure_from_config",
]

_HOME = {
    "Compot24Structure": "compot",
    "CompotStructure": "compot",
    "DenseStructure": "dense",
    "GroupShuffleStructure": "gs",
    "KroneckerStructure": "kron",
    "LowRankStructure": "lowrank",
    "PivotedStructure": "pifa",
    "SelectStructure": "select",
    "Structure": "base",
    "cast": "base",
    "core_of": "select",
    "cores": "base",
    "register": "base",
    "registry": "base",
    "structure_from_config": "base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

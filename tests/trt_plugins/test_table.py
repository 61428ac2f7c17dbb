"""The table of ops in C++ (trt_plugins/csrc/ops) against that of the exporter (export/graph/ops)."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from export.graph.ops import BIAS_SUFFIX, DOMAIN, GROUP_SHUFFLE_GRIDS, PLUGIN_VERSION, op, op_types
from trt_plugins.build import PLUGINS


@pytest.fixture(scope="module")
def table(libraries: Path) -> dict[str, dict[str, Any]]:
    """op_type -> what the compiled library says of it."""
    library = ctypes.CDLL(str(libraries / PLUGINS))
    library.describeOps.restype = ctypes.c_char_p
    rows = json.loads(library.describeOps())
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def exported() -> set[str]:
    """Every op_type that an export may contain."""
    grids = [f"GroupShuffleLinear_{left}x{right}" for left, right in GROUP_SHUFFLE_GRIDS]
    return {*op_types(), *grids, *(name + BIAS_SUFFIX for name in grids)}


def test_the_library_has_the_plugins_that_the_contract_names_and_no_others(table: dict[str, dict[str, Any]]) -> None:
    assert set(table) == {name for name in exported() if op(name).plugin is not None}
    assert {name.removesuffix(BIAS_SUFFIX) for name in set(op_types()) - set(table)} == {
        "KroneckerLinearGeneral",
        "KroneckerLinearGeneralMixFirst",
    }
    assert "GroupShuffleLinear_8x8Bias" in table
    assert "GroupShuffleLinear_9x1" not in table


def test_every_row_is_that_of_the_contract(table: dict[str, dict[str, Any]]) -> None:
    """Names, versions, inputs in their order and of which type, and the attributes that the plugin reads."""
    for name, row in table.items():
        known = op(name)
        assert (row["version"], row["namespace"]) == (PLUGIN_VERSION, DOMAIN)
        assert row["inputs"] == [[factor, known.types.get(factor, "own")] for factor in known.inputs], name
        assert known.plugin is not None
        assert row["attributes"] == list(known.plugin), name
        assert set(known.plugin) <= set(known.attributes), name

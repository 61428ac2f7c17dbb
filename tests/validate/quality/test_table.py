"""The quality table's text and bars from made-up results."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from validate.quality import methods, table

ROW = {
    "key": "kron-0.75", "title": "kron", "asked": 0.75, "group": "methods", "error": None, "kept": 0.7499,
    "projection_bytes": 159_000_000, "model_bytes": 216e6, "bytes_per_token": 215e6, "macs_per_token": 108e6,
    "perplexity": 29.1234, "standard_error": 0.4, "x_dense": 1.3483, "x_dense_standard_error": 0.004, "kl": 0.31234,
    "kl_standard_error": 0.002, "top1": 0.7213, "cost": {"seconds": 1234.5, "peak_bytes": 3 << 30, "complete": True},
}  # fmt: skip


def test_table_of_a_made_up_result() -> None:
    killed = ROW | {"title": "again", "cost": {"seconds": 10.0, "peak_bytes": None, "complete": False}}
    one = ROW | {
        "title": "one window",
        "standard_error": None,
        "x_dense_standard_error": None,
        "kl_standard_error": None,
    }
    failed = {"key": "x", "title": "broken", "asked": 0.5, "group": "methods", "error": "a | b"}
    cells = [line.split(" | ") for line in table.table([ROW, killed, one, failed]).splitlines()]
    assert cells[2] == [
        *("| kron", "0.75", "0.7499", "159.0", "216.0", "215.0", "108.0", "29.12 ± 0.40", "1.348 ± 0.004"),
        *("0.3123 ± 0.0020", "72.1%", "1234", "3.00 |"),
    ]
    assert cells[3][-2:] == [">= 10", " |"]
    assert cells[4][7:10] == ["29.12", "1.348", "0.3123"]
    assert cells[5][2] == "**failed**: a / b"
    assert len({len(line) for line in cells}) == 2  # the rule has no spaces


def test_bars_of_a_made_up_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(key: str, x_dense: float, kept: float = 0.75) -> dict[str, Any]:
        return ROW | {"key": key, "x_dense": x_dense, "kept": kept}

    monkeypatch.setattr(table, "BARS", methods.BARS)
    rows = [row("svd-llm-0.75", 5.0), row("kron-0.75", 2.9), row("gs-0.75", 3.1), row("auto-0.75", 1.4, kept=0.751)]
    found = {gate.name: gate for gate in table.gates(rows)}
    assert found["kron-half-of-svd-llm"].limit == 2
    assert {name: gate.passed for name, gate in found.items()} == {
        "auto-0.75": True,
        "auto-0.75-kept": False,  # more bytes than were asked for
        "auto-0.85": False,
        "auto-0.9375": False,
        "kron-half-of-svd-llm": True,
        "kron-half-of-svd-llm-kept": True,
        "gs-half-of-svd-llm": False,
        "gs-half-of-svd-llm-kept": True,
        "compress-minutes": True,
    }
    assert math.isnan(found["auto-0.85"].value)
    without = {gate.name: gate for gate in table.gates(rows[1:])}
    assert not without["kron-half-of-svd-llm"].passed  # nothing to compare with
    assert json.dumps(table.bars_json(list(without.values())), allow_nan=False)

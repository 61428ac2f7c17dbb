"""The load of tests/faults/serving.py: what it finds wrong is an error, and a real server stands it for a while."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.rows import FaultError, Options
from tests.faults.serving import CLIENTS, Load, _differs, _joined, _rows, _said, run
from tests.served import MODEL
from tests.tools import require_server

KINDS = ("valid", "streamed", "malformed", "cancelled", "half-sent", "network", "network, malformed", "afterwards")


def rows(said: str = "", **changes: Any) -> Any:
    """The lines of a load in which nothing went wrong, but for the changes."""
    load = Load(memory={MODEL: [100 << 20] * 10}, handles={MODEL: [20, 60]})
    for kind in KINDS:
        load.count(kind, None)
    for name, value in changes.items():
        setattr(load, name, value)
    after = {MODEL: load.handles[MODEL][-1] - 40}
    return _rows(SimpleNamespace(said=lambda: said), load, {MODEL: 20}, after, Options(minutes=5.0))  # type: ignore[arg-type]


def test_lines_of_a_good_load() -> None:
    found = {row.fault: (row.trials, row.result) for row in rows()}
    assert found[f"{CLIENTS} clients for 5 minutes: valid requests, half of them streamed"][0] == 2
    assert found[f"memory of {MODEL}"] == (10, "100.0 MB early in the run, 100.0 MB late")
    assert found[f"file handles of {MODEL}"] == (2, "20 before, 60 at most, 20 after")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrong": ["valid: other text"]}, "1 of 8 requests went wrong: valid: other text"),
        ({"memory": {MODEL: [100 << 20] * 5 + [110 << 20] * 5}}, "memory of tiny-text grew from 100.0 to 110.0 MB"),
        ({"handles": {MODEL: [20, 90]}}, "file handles of tiny-text grew from 20 to 50"),
        ({"said": "launch.sh: the server is started again, time 1"}, "was started again under the load"),
    ],
)
def test_what_goes_wrong_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FaultError, match=message):
        rows(**changes)


def test_a_stream_is_compared_with_an_answer_in_one() -> None:
    piece = {"text_output": "a", "tokens": 1, "finish_reason": ""}  # a list of one token comes without its brackets
    last = {"text_output": "bc", "tokens": [2, 3], "finish_reason": "stop"}
    whole = _said({"status": 200, "text_output": "abc", "tokens": [1, 2, 3], "finish_reason": "stop"})
    assert _differs(_joined({"status": 200, "pieces": [piece, last]}), whole) is None
    assert _differs(_joined({"status": 200, "pieces": [last]}), whole) is not None
    assert _differs(_joined({"status": 200, "pieces": [{"error": "no"}]}), whole) is not None
    assert _differs(_said({"status": 400, "error": "no"}), whole) is not None


@pytest.mark.slow
def test_a_server_under_load(tmp_path: Path) -> None:
    require_server()
    found = run(tmp_path, Options(minutes=float(os.environ.get("LOAD_MINUTES", "1"))))
    assert all(row.trials > 0 for row in found)
    print(*found, sep="\n")

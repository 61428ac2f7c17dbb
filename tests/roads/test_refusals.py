"""What the recipe refuses, the commands refuse: exit 2 and one sentence, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.roads.arguments import flags_of
from tests.roads.cells import METHODS, PLAIN, RECIPE, REFUSED_METHODS, refusal, split_pairs
from tests.roads.commands import refuse


@pytest.mark.parametrize("structure", RECIPE["structure"])
def test_methods(structure: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model(PLAIN["model"])
    refused = [method for method in REFUSED_METHODS if method[0] == structure]
    assert refused
    for method in refused:
        words = ["--model", model, "--out", tmp_path / "out", "--dry-run", *flags_of({"method": method})]
        done = refuse("compress.run", *words)
        assert "is not a valid recipe: " in done.sentence
        # What is wrong, whatever it is said of: the command line here, the cell there.
        assert done.sentence.partition(": ")[2] == str(refusal({"method": method})).partition(": ")[2]
        assert any(f"'{name}'" in done.sentence for name in method), str(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["compress.run", "export.build"])
def test_pairs(module: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, refused = tiny_model(PLAIN["model"]), split_pairs()[1]
    assert len(refused) > 100
    for pair in refused:
        part: dict[str, Any] = dict(pair)
        words = ["--model", model, "--out", tmp_path / "out", "--dry-run"]
        words += ["--budget-latency", "1", "--latency-table", "table.json"] if part.get("budget") == "latency" else []
        # Where a pair says nothing of the method, it is refused with any: the first one.
        done = refuse(module, *words, *flags_of({"method": METHODS[0], **part}))
        assert "is not a valid recipe" in done.sentence, str(done)
    assert not (tmp_path / "out").exists()

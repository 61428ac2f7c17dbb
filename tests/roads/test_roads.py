"""Every road through the commands, on tiny models; see `tests.roads.cells` for which, `tests.roads.road` for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.roads.cells import Cell, diagonal, label, matrix
from tests.roads.road import Road
from tests.roads.sources import source

ROAD = "processor seconds of this road"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        quick = diagonal()
        cells = [pytest.param(cell, id=label(cell)) for cell in quick]
        rest = [cell for cell in matrix() if cell not in quick]
        cells += [pytest.param(cell, id=label(cell), marks=pytest.mark.slow) for cell in rest]
        metafunc.parametrize("cell", cells)


def test_road(cell: Cell, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """All steps, though one fails, as far as what they need was made: one defect must not hide another."""
    torch.set_num_threads(1)
    start, broken = time.process_time(), list[str]()
    with source(cell["source"], cell["model"], cell["tokenizer"], tmp_path / "source") as model:
        road = Road(cell, model, tmp_path)
        for name, step in road.steps():
            try:
                step()
            except AssertionError as error:
                broken.append(f"{name}: {error}")
                if name in Road.NEEDED:
                    break
    record_property(ROAD, time.process_time() - start)
    if broken:
        pytest.fail(f"{len(broken)} steps of {cell}\n\n" + "\n\n".join(broken), pytrace=False)

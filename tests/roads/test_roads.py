"""Every road through the commands, on tiny models; see `tests.roads.cells` for which, `tests.roads.road` for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress.allocation.budget import default_unit
from compress.source import families
from compress.structures import registry
from compress.structures.select import selection
from tests import tiny
from tests.roads.cells import PLAIN, Cell, diagonal, label, matrix
from tests.roads.commands import ROAD
from tests.roads.road import Road
from tests.roads.sources import source
from tests.serve import free_ports, ready, running
from tests.tools import require_server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        quick = diagonal()
        cells = [pytest.param(cell, id=label(cell)) for cell in quick]
        rest = [cell for cell in matrix() if cell not in quick]
        cells += [pytest.param(cell, id=label(cell), marks=pytest.mark.slow) for cell in rest]
        metafunc.parametrize("cell", cells)


def test_every_registered_structure(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """One model that has each of them, by a recipe that names it: none can be registered without this road."""
    torch.set_num_threads(1)
    start = time.process_time()
    cell = {**PLAIN, "method": ("dense", "loss-aware", "none", "none"), "model": "tiny_llama"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"structure": "dense", "layers": every_structure()}))
    with source(cell["source"], cell["model"], cell["tokenizer"], tmp_path / "source") as model:
        road = Road(cell, model, tmp_path, tmp_path / "recipe.yaml")
        for _, step in road.steps():
            step()
    assert road.found == set(registry())
    record_property(ROAD, time.process_time() - start)


def every_structure() -> dict[str, dict[str, Any]]:
    """Linear -> structure, each of the registry once. What selects features does so in a whole MLP."""
    arch = families.architecture(tiny.config("tiny_llama"))
    linears, unit = arch.linears(), default_unit(arch)
    places = (f"layers.1.{role}" for role in linears)
    chosen = {}
    for name, structure in registry().items():
        if name == "select":
            kept = arch.intermediate_size // 2
            chosen |= {f"layers.0.{r}": selection(arch, r, kept) for r in linears if r.startswith("mlp.")}
        elif name != "dense":
            place = next(places)
            n, m = linears[role := place.split(".", 2)[2]]
            chosen[place] = structure.for_ratio(m, n, arch.side(role), 0.75, unit)
    return {place: structure.to_config() for place, structure in chosen.items()}


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["auto", "kron", "gs"])
def test_by_a_real_server(structure: str, tmp_path: Path) -> None:
    """What the backend in this process stands for, by Triton itself."""
    require_server()
    cell = next(cell for cell in diagonal() if cell["method"][0] == structure and cell["method"][2] == "none")
    with source(cell["source"], cell["model"], cell["tokenizer"], tmp_path / "source") as model:
        road = Road(cell, model, tmp_path)
        for step in (road.dry_run, road.compress, road.build, road.generate):
            step()
        outs, (http, grpc, metrics) = [road.out, road.dense_model()], free_ports(3)
        (tmp_path / "server").mkdir()
        log = tmp_path / "server.log"
        process = running(outs, tmp_path / "server", http=http, grpc=grpc, metrics=metrics, log=log)
        try:
            while not ready(http):
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                time.sleep(0.2)
            road.answers(f"http://127.0.0.1:{http}")
        finally:
            process.terminate()
            process.wait(60)


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

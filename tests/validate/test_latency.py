"""The measured cost table: every shape that a plan asks for, plausible times, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.allocation.latency import LatencyTable
from compress.architecture import Architecture
from compress.checkpoint.reader import CheckpointReader
from compress.cli.entry import run_cli
from compress.errors import UsageError
from compress.methods.registry import check_recipe
from compress.structures import (
    Compot24Structure,
    CompotStructure,
    DenseStructure,
    KroneckerStructure,
    SelectStructure,
    Structure,
    registry,
)
from compress.structures.select import selection
from tests.compress import helpers
from tests.compress.helpers import compressed, tiny_source
from tests.validate.conftest import LLAMA, OPT
from validate import latency
from validate.speed import layers
from validate.speed.timing import Paired, Quartiles

QUICK = ("--seconds", "0.001", "--working-set", "1")
WIDE = replace(LLAMA, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)
"""The shapes of SmolLM2-135M."""


def measured(jobs: list[latency.Job]) -> set[Structure]:
    dense = {DenseStructure(job.shape.in_features, job.shape.out_features) for job in jobs}
    return dense | {s for job in jobs for s in job.structures}


def perfect(arch: Architecture, structures: tuple[str, ...], inner: tuple[str, ...], unit: int) -> LatencyTable:
    """The table of a machine on which time is parameters."""
    entries = [
        {
            "structure": s.name,
            "variant": s.variant,
            "in_features": s.in_features,
            "out_features": s.out_features,
            "parameters": s.parameter_count(),
            "seconds": float(s.parameter_count()),
        }
        for s in measured(latency.jobs_of(arch, structures, inner, unit))
    ]
    return LatencyTable.of(entries, 1)


@pytest.mark.parametrize(("arch", "unit"), [(LLAMA, 8), (OPT, 8), (WIDE, 32)])
def test_all_that_a_plan_may_ask_for_is_there(arch: Architecture, unit: int) -> None:
    """Every size of every menu, every part that a selection leaves, and what rotations add; all exact on a machine on
    which time is parameters, so that no lookup confuses shapes."""
    table = perfect(arch, ("lowrank", "kron", "gs"), ("neurons", "vo"), unit)
    for role, (n, m) in arch.linears().items():
        for kind in ("lowrank", "kron", "gs"):
            menu = registry()[kind].menu(m, n, arch.side(role), unit=unit)
            assert menu
            for s in menu:
                assert table.seconds(s) == pytest.approx(s.parameter_count())
        if role in ("attn.q", "attn.k"):
            continue
        size = arch.intermediate_size if role.startswith("mlp") else arch.head_dim
        for kept in range(size // 4, size):
            select = selection(arch, role, kept)
            assert table.seconds(select) == pytest.approx(select.parameter_count())
            cores = KroneckerStructure.menu(*select.reduced_sizes, arch.side(role), unit=unit)
            for core in cores:
                assert table.seconds(core) == pytest.approx(core.parameter_count())
    assert table.dense(arch.hidden_size, arch.hidden_size) == arch.hidden_size**2


def test_only_what_is_asked_for_is_measured() -> None:
    plain = measured(latency.jobs_of(WIDE, ["lowrank"], [], 32))
    assert {s.name for s in plain} == {"dense", "lowrank"}
    shapes = {(s.in_features, s.out_features) for s in plain}
    assert shapes == {(576, 576), (576, 192), (576, 1536), (1536, 576)}
    more = measured(latency.jobs_of(WIDE, ["lowrank"], ["neurons"], 32)) - plain
    assert {s.name for s in more} == {"dense"}
    assert {s.in_features for s in more if s.out_features == 576} == {192, 576, 960} - {576}


def test_sizes_reach_from_the_smallest_to_the_largest() -> None:
    shape = layers.Shape("", "up", 576, 1536, "in")
    for kind in ("lowrank", "kron", "gs", "compot", "compot24"):
        sizes = latency.sizes_of(kind, shape, 32)
        menu = registry()[kind].menu(576, 1536, "in", unit=32)
        for variant in {s.variant for s in menu}:
            counts = [s.parameter_count() for s in menu if s.variant == variant]
            seen = [s.parameter_count() for s in sizes if s.variant == variant]
            assert (min(seen), max(seen)) == (min(counts), max(counts))
            assert len(seen) == min(latency.SIZES, len(set(counts)))
            assert seen == sorted(seen)


def test_a_unit_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="64"):
        latency.jobs_of(LLAMA, ["kron"], [], 24)


def test_times_are_ratios_to_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that gets slower by the minute the table is that of a steady one."""
    load = [1.0]

    class Fake:
        def __init__(self, structure: Structure, threads: int, working_set: int) -> None:
            self.structure, self.sessions = structure, [None]

        def runner(self, tokens: int) -> Any:
            return lambda: 5.0 + tokens * self.structure.parameter_count()

    def paired(a: Callable[[], float], b: Callable[[], float], **options: Any) -> Paired:
        load[0] *= 1.01
        x, y = load[0] * a(), load[0] * b()
        ratio = Quartiles.of([x / y])
        return Paired("a clock", 1, x, y, ratio, ratio)

    monkeypatch.setattr(layers, "Copies", Fake)
    monkeypatch.setattr("validate.speed.timing.paired", paired)
    jobs = latency.jobs_of(LLAMA, ["lowrank", "kron"], ["neurons"], 8)
    entries, call = latency.measure(jobs, 3)
    scale = entries[0]["seconds"] / (5 + 3 * entries[0]["parameters"])
    assert scale > 1.01
    # The call of a session is taken off: here 5 and the 3 of a 1 x 1 matrix.
    base = (entries[0]["seconds"] + call) / (5 + 3 * entries[0]["parameters"])
    assert call == pytest.approx(base * 8)
    for e in entries:
        assert e["seconds"] == pytest.approx(
            max(base * (3 * e["parameters"] - 3), base * (5 + 3 * e["parameters"]) / 10)
        )


def test_the_forecast_counts_the_making_of_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock of its own: 40 s for the weights of a matrix and 2 s for its pairs; only the 2 s were foretold."""
    clock = [0.0]

    class Fake:
        def __init__(self, structure: Structure, threads: int, working_set: int) -> None:
            clock[0] += 40.0 if structure.parameter_count() > 1 else 0.0
            self.structure, self.sessions = structure, [None]

        def runner(self, tokens: int) -> Any:
            return lambda: None

    def paired(a: Any, b: Any, *, seconds: float, **options: Any) -> Paired:
        clock[0] += seconds
        return Paired("a clock", 1, 1.0, 1.0, Quartiles.of([1.0]), Quartiles.of([1.0]))

    monkeypatch.setattr(layers, "Copies", Fake)
    monkeypatch.setattr("validate.speed.timing.paired", paired)
    monkeypatch.setattr("validate.speed.timing.now", lambda: (clock[0], 0.0))
    entries, _ = latency.measure(latency.jobs_of(LLAMA, ["lowrank"], [], 8), 1, seconds=2.0)
    foretold = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("about "))
    assert foretold.startswith(f"about {len(entries) * 42 / 60:.1f} minutes")
    assert len(entries) * 42 == pytest.approx(clock[0], rel=0.1)


def run(folder: Path, model: Path, *flags: str) -> int:
    return run_cli(latency.main, ["--model", str(model), "--out", str(folder / "table.json"), *QUICK, *flags])


def test_command_to_plan(tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured, read back, and planned with: what the plan takes by the table is within the budget."""
    assert run(tmp_path, tiny_model("tiny_llama"), "--structures", "lowrank", "--inner", "neurons") == 0
    out, err = capsys.readouterr()
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["tokens"] == 1
    assert table["unit"] == 8
    assert "onnxruntime" in table["machine"]["versions"]
    assert all(e["seconds"] > 0 for e in table["entries"])
    assert {e["structure"] for e in table["entries"]} == {"dense", "lowrank"}
    assert f"{len(table['entries'])} matrices in" in out
    assert "64 -> 160" in out
    assert f"measure {len(table['entries'])}/{len(table['entries'])}" in err
    source = tiny_source(tiny_model, "tiny_llama")
    costs = LatencyTable.read(tmp_path / "table.json")
    method = {"structure": "lowrank", "inner": ["neurons"], "latency_table": str(tmp_path / "table.json")}
    budget = 2 * table["dense_seconds"]  # of a few microseconds each, whose order is noise
    check_recipe(source.architecture(), helpers.recipe(tmp_path, budget_latency=budget, **method))
    artifact = compressed(source, tmp_path, budget_latency=budget, **method)
    reader = CheckpointReader(artifact.path("checkpoint"))
    assert sum(costs.seconds(reader.structure(linear)) for linear in reader.linears()) <= budget


def test_json_and_tokens(tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--structures", "compot,gs", "--inner", "none", "--tokens", "7", "--json")
    assert run(tmp_path, tiny_model("tiny_opt"), *flags) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "table.json").read_text())
    assert said["tokens"] == 7
    assert {e["structure"] for e in said["entries"]} == {"dense", "compot", "gs"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--structures", "slice"), "'slice' is not among pifa, lowrank, kron, gs"),
        (("--inner", "heads"), "'heads' is not among neurons, vo"),
        (("--tokens", "0"), "--tokens must be at least 1"),
        (("--working-set", "0"), "--working-set must be at least 1"),
        (("--seconds", "0"), "--seconds"),
        (("--out", "no/such/folder/table.json"), "a folder that exists"),
    ],
)
def test_usage_errors(
    flags: tuple[str, ...], message: str, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tiny_model("tiny_opt"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


# ---- the layers that are timed


@pytest.mark.parametrize(
    "structure", [CompotStructure(32, 24, 16, 8), CompotStructure(32, 24, 15, 4), Compot24Structure(32, 24, 16, 8)]
)
def test_a_dictionary_layer_computes_its_factors(structure: CompotStructure) -> None:
    import onnxruntime
    import torch

    from export.graph.ops import graph_factors

    factors = graph_factors(structure, structure.random_factors(torch.Generator().manual_seed(0)))
    support = factors["S"] != 0
    assert (support.sum(1) == structure.kept).all()
    assert structure._follows_pattern(support)
    model = layers.layer_model(structure)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, x @ factors["D"].numpy().T @ factors["S"].numpy().T, rtol=1e-4, atol=1e-5)


def test_all_known_structures_can_be_timed() -> None:
    shape = layers.Shape("m", "q", 128, 256, "in")
    rows = list(layers.benchmark([shape], [2], layers.known(), seconds=0, working_set=1))
    assert len(rows) == len(layers.known())
    assert all(row.timing.ratio.median > 0 for row in rows)
    assert "compot24 32 of 64" in layers.table(rows)


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(UsageError, match="does not know 'slice'; it has kron"):
        layers.choose("slice", layers.SHAPES[0])
    with pytest.raises(UsageError, match="between its kept features"):
        layers.layer_model(SelectStructure(8, 8, 4))

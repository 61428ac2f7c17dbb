"""Timing, the layer benchmark and the memory probe: that they measure what they say."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from compress.cli.entry import run_cli
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.structures import DenseStructure, Structure, structure_from_config
from export.graph.decoder import export_onnx
from validate.baseline import Baseline
from validate.graphfacts import GraphFacts
from validate.report.markdown import marks, surroundings
from validate.speed import __main__ as speed
from validate.speed import layers
from validate.speed.pairs import measure_model, peak_memory
from validate.speed.timing import Quartiles, now, paired


class Clock:
    """Stands still but for what is said to take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 0.0
        monkeypatch.setattr("validate.speed.timing.now", lambda: (self.wall, self.cpu))

    def work(self, wall: float, cpu: float) -> Any:
        def run() -> None:
            self.wall += wall
            self.cpu += cpu

        return run


@pytest.mark.parametrize(("one_thread", "ratio", "name"), [(True, 3.0, "thread CPU time"), (False, 1.5, "wall time")])
def test_paired_ratio_is_a_over_b(monkeypatch: pytest.MonkeyPatch, one_thread: bool, ratio: float, name: str) -> None:
    clock = Clock(monkeypatch)
    timing = paired(clock.work(6.0, 3.0), clock.work(4.0, 1.0), seconds=80, one_thread=one_thread)
    assert (timing.clock, timing.pairs) == (name, 8)  # 80 seconds at 6 + 4 a pair, the warm-up not counted
    assert timing.ratio == Quartiles(ratio, ratio, ratio)
    assert timing.wall_ratio.median == 1.5
    assert (timing.seconds_a, timing.seconds_b) == ((3.0, 1.0) if one_thread else (6.0, 4.0))


def test_paired_stops_at_most_pairs_and_not_before_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for seconds, pairs in ((1.0, 5), (1e9, 7)):
        assert paired(clock.work(1, 1), clock.work(1, 1), seconds=seconds, least=5, most=7).pairs == pairs


def test_the_clocks_of_timing_advance() -> None:
    (wall, cpu), total = now(), 0
    while now()[1] == cpu:
        total += 1
    assert now()[0] > wall


def test_pairs_alternate_after_a_warm_up() -> None:
    calls: list[str] = []
    timing = paired(lambda: calls.append("a"), lambda: calls.append("b"), seconds=0, least=4, warm_up=2)
    assert calls == ["a", "b"] * 6
    assert timing.pairs == 4


def test_quartiles() -> None:
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)


def test_a_model_over_itself_has_a_limit_of_1(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("validate.speed.timing.now", lambda: (float(next(ticks)),) * 2)
    path = built.out / "onnx" / "model.onnx"
    with Baseline(built.out, model=str(built.source)) as baseline:
        cost = baseline.costs()[1]
    result = measure_model(path, path, (cost, cost), batch_sizes=(1, 2), prefill=16, past=8, seconds=0.05)
    assert [case["name"] for case in result["cases"]] == ["decode, batch 1", "decode, batch 2", "prefill of 16 tokens"]
    for case in result["cases"]:
        assert case["limit"] == 1
        assert case["speedup"] == 1  # each takes one tick
    assert result["graph"]["dense"] == result["graph"]["compressed"]
    memory = result["peak_memory"]["dense"]
    assert 0 < memory["before_load"] < memory["peak"]
    per_token = result["bytes_per_token"]
    assert per_token["dense"] == sum(per_token["dense_by_part"].values())
    json.dumps(result, allow_nan=False)


def test_graphs_that_are_not_alike_are_not_compared(built: Any, tmp_path: Path) -> None:
    export_onnx(built.out / "checkpoint", tmp_path, logits="last")
    with pytest.raises(ArtifactError, match="cannot be compared"):
        measure_model(tmp_path / "model.onnx", built.out / "onnx" / "model.onnx", (None, None))  # type: ignore[arg-type]


def test_graph_facts(built: Any, tmp_path: Path) -> None:
    facts = GraphFacts.of(built.out / "onnx" / "model.onnx")
    assert (facts.dtype, facts.logits) == ("float32", "all")
    assert facts.structured_nodes > 0
    assert facts.nodes > facts.structured_nodes
    info = export_onnx(built.out / "checkpoint", tmp_path, logits="last")
    assert GraphFacts.of(info.path).logits == "last"


def test_peak_memory_of_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="process of its own"):
        peak_memory(tmp_path / "model.onnx", 1, 4)


@pytest.mark.parametrize(
    ("ending", "error", "said"),
    [
        ("sys.exit(run_cli(lambda argv: bytearray(1 << 62)))", MissingDependencyError, "of its own: out of memory"),
        ("os.kill(os.getpid(), 9)", MissingDependencyError, "ended by SIGKILL, perhaps for want of memory"),
        ("sys.exit(run_cli(lambda argv: OrtRunner(Path('no'))))", ArtifactError, r"of its own \(no does not exist"),
        ("sys.exit(7)", ArtifactError, r"of its own \(no message\)"),
    ],
)
def test_a_memory_probe_that_fails(
    ending: str, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports = "import os, sys\nfrom pathlib import Path\nfrom compress.cli.entry import run_cli\n"
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\n{imports}from export.runtime.ort import OrtRunner\n{ending}\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(error, match=said):
        peak_memory(tmp_path / "model.onnx", 1, 4)


def test_a_memory_probe_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho 'ImportError: libm.so: failed to map segment' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert run_cli(lambda argv: peak_memory(tmp_path / "model.onnx", 1, 4)["peak"], []) == 4
    assert capsys.readouterr().err.startswith("error: out of memory (ImportError: libm.so")


def test_the_memory_probe_is_not_charged_with_its_parent(built: Any) -> None:
    """Linux hands ru_maxrss down to children; 400 MB here must not show there."""
    ballast = np.ones(50_000_000)
    assert peak_memory(built.out / "onnx" / "model.onnx", 1, 4)["peak"] < ballast.nbytes


def test_speed_of_an_artefact(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.copy(tmp_path / "out")
    flags = ["--model", str(copy.source), "--batch-sizes", "1", "--prefill", "8", "--past", "4", "--seconds", "0.05"]
    assert run_cli(speed.main, [str(copy.out), *flags]) == 0
    assert capsys.readouterr().out.startswith("decode, batch 1: ")
    assert not (copy.out / "state").exists()


def test_speed_takes_out_or_layers() -> None:
    for arguments in ([], ["out", "--layers"]):
        with pytest.raises(SystemExit) as exit_:
            speed.main(arguments)
        assert exit_.value.code == 2


# --- Layers ---


def some_structures() -> list[Structure]:
    sizes = {"in_features": 64, "out_features": 96}
    kron = {"structure": "kron", "blocks": 4, "terms": 3, **sizes}
    configs = [
        {"structure": "lowrank", "rank": 8, **sizes},
        {"structure": "gs", "left_blocks": 2, "right_blocks": 2, "rank": 16, **sizes},
        *({**kron, "side": side, "mix": mix} for side in ("in", "out") for mix in ("explicit", "leading")),
    ]
    return [DenseStructure(64, 96), *map(structure_from_config, configs)]


@pytest.mark.parametrize("structure", some_structures(), ids=lambda s: "-".join(map(str, s.to_config().values())))
def test_the_benchmarked_graph_computes_the_structure(structure: Structure) -> None:
    from onnx import numpy_helper

    model = layers.layer_model(structure, seed=3)
    factors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    x = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    assert np.abs(y - (torch.from_numpy(x) @ structure.dense(factors).T).numpy()).max() < 1e-5


@pytest.mark.parametrize("shape", layers.SHAPES, ids=lambda s: f"{s.model} {s.roles}")
@pytest.mark.parametrize("name", layers.STRUCTURES)
def test_choices_keep_three_quarters(shape: layers.Shape, name: str) -> None:
    structure = layers.choose(name, shape)
    kept = structure.parameter_count() / (shape.in_features * shape.out_features)
    assert 0.72 < kept <= 0.75
    assert (structure.out_features, structure.in_features) == (shape.out_features, shape.in_features)


def test_weights_are_rotated_over_copies() -> None:
    structure = DenseStructure(64, 96)
    copies = layers.Copies(structure, working_set=5 * structure.bytes(torch.float32))
    assert len(copies.sessions) == 5
    run = copies.runner(3)
    for _ in range(7):
        run()


BEGIN, END = marks(layers.MARK)


def test_benchmark_table_and_document(tmp_path: Path) -> None:
    shape = layers.Shape("tiny", "q", 128, 128, "in")
    rows = list(layers.benchmark([shape], (1, 4), seconds=0.02, working_set=1 << 16))
    assert [(row.structure, row.tokens) for row in rows] == [(s, t) for s in layers.STRUCTURES for t in (1, 4)]
    table = layers.table(rows)
    assert table.count("\n") == 4
    assert f"{rows[0].timing.ratio.median:.2f}" in table
    file = tmp_path / "speed.md"
    file.write_text(layers.document(rows, file, 1))
    assert table in file.read_text()
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert layers.document(rows, file, 1).startswith(f"before\n{BEGIN}\nTime of dense")
    assert layers.document(rows, file, 1).endswith(f"{END}\nafter\n")
    json.dumps([row.to_dict() for row in rows], allow_nan=False)


@pytest.mark.parametrize("text", ["no marks", BEGIN, f"{END}\n{BEGIN}"])
def test_a_document_without_marks_is_not_overwritten(tmp_path: Path, text: str) -> None:
    file = tmp_path / "speed.md"
    file.write_text(text)
    with pytest.raises(UsageError, match="no single pair"):
        surroundings(file, layers.MARK, "")


def test_memory_module_is_a_command(built: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "validate.speed.memory", str(built.out / "onnx" / "model.onnx"), "1", "4"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(speed.__file__).parents[1],
    )
    assert set(json.loads(done.stdout)) == {"before_load", "peak"}

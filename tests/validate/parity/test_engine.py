"""What `validate.run --gpu` does with an engine, with ONNX Runtime on the CPU in the engine's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint.loading import load_model
from compress.cli.entry import run_cli
from export.graph.decoder import export_onnx
from export.runtime.device import DeviceRunner
from export.runtime.profiles import Span, Spans
from export.tensorrt import build as trt
from tests.export.runtime.narrow import NarrowExecutor
from tests.validate.damaging import damage
from tests.validate.parity.prompts import PROMPTS
from validate.graphfacts import graph_dtype
from validate.parity.engine import compare_runners, divergence, engine_prompts, rung_4
from validate.report.console import console
from validate.report.summary import Report, summary
from validate.run import main

SPANS = Spans(Span(1, 1, 6), Span(1, 16, 40), Span(1, 32, 120))


def runner_of(built: Any, folder: Path, dtype: str = "float32", spans: Spans = SPANS) -> DeviceRunner:
    info = export_onnx(built.out / "checkpoint", folder, dtype=dtype)
    assert graph_dtype(info.path) == dtype
    return DeviceRunner(NarrowExecutor(info.path, spans))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rung_4_passes_for_what_the_checkpoint_says(built: Any, tmp_path: Path, dtype: str) -> None:
    runner = runner_of(built, tmp_path, dtype)
    prompts = engine_prompts(PROMPTS, SPANS, runner.vocabulary, 128)
    assert [prompt.name for prompt in prompts][-2:] == ["longest prompt", "largest batch"]
    assert prompts[-2].ids.shape == (1, 40)
    assert prompts[-1].ids.shape == (6, 1)
    rung = rung_4(load_model(built.out / "checkpoint"), runner, prompts, dtype)
    assert rung.passed, rung
    assert rung.value < rung.tolerance / 10
    # Near ties may fall otherwise in float16, on one processor and not on another; `passed` holds for all clear ones.
    assert 0 < rung.facts["clear_positions"] <= rung.facts["positions"]
    assert dtype == "float16" or rung.facts["top1_agreement"] == 1
    assert len(rung.cases) == 2 * len(prompts)


@pytest.mark.parametrize("which", [0, -1])
def test_rung_4_catches_one_wrong_weight(built: Any, tmp_path: Path, which: int) -> None:
    runner_of(built, tmp_path / "onnx")
    damage(tmp_path / "onnx", which)
    runner = DeviceRunner(NarrowExecutor(tmp_path / "onnx" / "model.onnx", SPANS))
    prompts = engine_prompts(PROMPTS, SPANS, runner.vocabulary, 128)
    assert not rung_4(load_model(built.out / "checkpoint"), runner, prompts, "float32").passed


class _Late(DeviceRunner):
    """A runner that forgets to enter new keys and values into the cache."""

    def _run_step(self, step: Any) -> None:
        kept = {name: step.feeds[name].clone() for name in self._names}
        super()._run_step(step)
        for name, value in kept.items():
            step.feeds[name].copy_(value)


def test_rung_4_catches_a_cache_that_is_not_kept(built: Any, tmp_path: Path) -> None:
    runner = _Late(runner_of(built, tmp_path).executor)
    rung = rung_4(load_model(built.out / "checkpoint"), runner, PROMPTS, "float32")
    assert not rung.passed
    assert rung.cases["one sequence: prefill"] < rung.tolerance < rung.cases["one sequence: decode with cache"]


def test_prompts_that_an_engine_does_not_take_are_left_out() -> None:
    narrow = Spans(Span(2, 2, 2), Span(4, 8, 16), Span(1, 64, 70))
    prompts = engine_prompts(PROMPTS, narrow, 100, 128)
    assert [(prompt.name, tuple(prompt.ids.shape)) for prompt in prompts] == [
        ("longest prompt", (2, 16)),
        ("largest batch", (2, 4)),
    ]


def test_divergence() -> None:
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.nn.functional.kl_div(q.double().log_softmax(-1), p.double().softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(divergence(p, q), expected)
    assert divergence(p, q * torch.nan).isnan().all()


def test_speed_and_its_report(built: Any, tmp_path: Path) -> None:
    runners = {name: runner_of(built, tmp_path / name) for name in ("dense", "native", "cpp")}
    cases = compare_runners(runners, SPANS, batch_sizes=(1, 4, 99), seconds=0.2)
    assert [case["name"] for case in cases] == ["decode, batch 1", "decode, batch 4", "prefill, batch 1"]
    for case in cases:
        for way in ("native", "cpp"):
            assert np.isfinite(case[way]["speedup"])
            assert case[way]["seconds"] > 0
    engine = {"gpu": {"name": "H100"}, "versions": {"tensorrt": "11.4"}, "kept": "cpp", "cases": cases}
    size = {"dense_parameters": 1e6, "parameters": 5e5, "ratio": 0.5, "model_ratio": 0.6}
    size |= {"dense_linears": 1, "structured_linears": 2}
    recipe = {"structure": "kron", "rotation": "none", "ratio": 0.5}
    recipe["calibration"] = {"data": "x", "samples": 1, "sequence_length": 8}  # type: ignore[assignment]
    facts = {"processor": "p", "cores": 2, "memory_bytes": None, "python": "3", "versions": {}}
    report = Report("m", {"source": {"id": "m"}, "family": "llama"}, recipe, size, [], [], facts, engine=engine)
    assert "| decode, batch 4, 32 tokens |" in summary(report)
    assert "OUT/engine is cpp" in summary(report)
    assert "prefill, batch 1, GPU" in console(report)


def test_without_a_gpu_it_says_so_at_once(
    built: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trt, "find_gpu", lambda: None)
    assert run_cli(main, [str(built.out), "--gpu", "--no-plot"]) == 4
    assert "an NVIDIA GPU with its driver" in capsys.readouterr().err
    assert run_cli(main, [str(built.out), "--trust-engine", "--no-plot"]) == 2

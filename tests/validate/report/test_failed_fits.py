"""A fit that failed is told in the report, and its model passes the parity ladder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.fit import fallback
from compress.pipeline import compress_model
from compress.recipe import parse_recipe
from compress.source.resolve import resolve
from export.graph.decoder import export_onnx
from tests.validate.conftest import Built


def test_report_lists_failed_fits(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = fallback._factors

    def factors(parts: Any, gram: Any) -> Any:
        if parts[0].weight.shape == (64, 160):
            raise torch.linalg.LinAlgError("eigh did not converge")  # type: ignore[attr-defined]
        return true(parts, gram)

    calibration = {"data": str(built.text), "samples": 2, "sequence_length": 16}
    layers = {
        f"layers.{i}.mlp.down": {"structure": "lowrank", "in_features": 160, "out_features": 64, "rank": 24}
        for i in (0, 2)
    }
    values = {"structure": "lowrank", "sensitivity": "none", "calibration": calibration, "layers": layers}
    with monkeypatch.context() as patch:
        patch.setattr(fallback, "_factors", factors)
        artifact = compress_model(resolve(str(built.source)), parse_recipe(values, "a test"), tmp_path / "out")
    with artifact.stage("onnx", inputs=["checkpoint"]) as folder:
        export_onnx(artifact.path("checkpoint"), folder)
    capsys.readouterr()
    made = Built(tmp_path / "out", built.source, built.text)
    assert made.run("--skip", "speed", "--skip", "perplexity", "--no-plot", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert {"layers.0.mlp.down", "layers.2.mlp.down"} <= set(said["failed_fits"])
    summary = (tmp_path / "out" / "reports" / "summary.md").read_text()
    assert "**Warning**" in summary
    assert "| layers.2.mlp.down | left dense: eigh did not converge |" in summary
    records = json.loads((tmp_path / "out" / "checkpoint" / "fit.json").read_text())
    damped = [record["structure"] for record in records if record["damped"]]
    assert "dense" in damped  # nothing of theirs rests on the moments
    assert f"\n{len(damped) - damped.count('dense')} fits rest on damped singular moments" in summary
    assert made.run("--skip", "speed", "--skip", "perplexity", "--no-plot") == 0
    assert "failed fits" in capsys.readouterr().out


def test_figures_of_a_model_that_no_text_was_read_for(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """jrk: the first of linears that share a factor stores it; it was told to keep more than all of its weights."""
    recipe = parse_recipe({"structure": "jrk", "ratio": 0.9, "unit": 4}, "a test")
    artifact = compress_model(resolve(str(built.source)), recipe, tmp_path / "out")
    records = json.loads((artifact.path("checkpoint") / "fit.json").read_text())
    assert max(record["parameters"] / record["dense_parameters"] for record in records) > 1
    capsys.readouterr()
    made = Built(tmp_path / "out", built.source, built.text)
    with artifact.stage("onnx", inputs=["checkpoint"]) as folder:
        export_onnx(artifact.path("checkpoint"), folder)
    assert made.run("--skip", "speed", "--skip", "perplexity", "--no-plot") == 0
    printed, summary = capsys.readouterr().out, (tmp_path / "out" / "reports" / "summary.md").read_text()
    shares = re.findall(r"\| lowrank \| ([0-9.]+)% \|", summary)
    assert len(shares) == 5
    assert all(70 < float(share) < 95 for share in shares)
    assert "Relative error of the weight, in the Frobenius norm" in summary
    assert "| calibrated on | nothing: no text was read |" in summary
    rows = {line.split()[0]: line for line in printed.splitlines() if line.startswith(("attn.", "mlp."))}
    assert len(rows) == 7
    assert not any(int(share) > 95 for line in rows.values() for share in re.findall(r"(\d+)%", line))
    assert rows["attn.q"].split()[1:3] == rows["attn.k"].split()[1:3]


def test_report_is_silent_where_all_went_well(built: Built, tmp_path: Path) -> None:
    made = built.copy(tmp_path / "out")
    assert made.run("--skip", "speed", "--skip", "perplexity", "--no-plot") == 0
    assert "Warning" not in (made.out / "reports" / "summary.md").read_text()

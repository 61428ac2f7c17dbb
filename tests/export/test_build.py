"""`python -m export.build` on a tiny model: what it makes, what it uses again, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.artifact.store import Artifact
from compress.checkpoint.loading import load_model
from compress.cli.entry import run_cli
from export.build import main
from export.runtime.ort import OrtRunner
from export.stages import build_info
from tests import tiny
from tests.hostile.artefacts import sign


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 3)
    return path


@pytest.fixture
def command(tiny_model: Callable[[str], Path], text: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small build into tmp_path/out."""

    def arguments(*more: str, name: str = "tiny_llama") -> list[str]:
        model = ["--model", str(tiny_model(name)), "--out", str(tmp_path / "out"), "--structure", "lowrank"]
        small = ["--ratio", "0.7", "--unit", "4", "--calibration-data", str(text)]
        return [*model, *small, "--calibration-samples", "2", "--sequence-length", "32", *more]

    return arguments


def test_build_from_name_to_running_model(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_cli(main, command("--engine", "ort")) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"OK {out}"
    artifact = Artifact(out)
    artifact.verify()
    assert OrtRunner(artifact.require_stage("onnx") / "model.onnx").generate([[5, 6]], max_new_tokens=3)
    graph, engine = build_info(artifact, "onnx"), build_info(artifact, "engine")
    assert graph["initializer_bytes"] > 0
    assert graph["peak_rss_bytes"] > 0
    assert engine["providers"] == ["CPUExecutionProvider"]
    assert engine["executed_nodes"]["Gemm"] == graph["nodes"]["Gemm"]
    assert {"onnx", "onnxruntime", "torch"} <= set(artifact.read_manifest()["versions"])

    # Again: nothing is made anew, and --json says the same in one object.
    before = artifact.read_manifest()
    assert run_cli(main, command("--engine", "ort", "--json")) == 0
    printed = capsys.readouterr()
    assert printed.err.count("re-using") == 4
    said = json.loads(printed.out)
    assert said["custom_operator_nodes"] == graph["structured_nodes"]
    assert said["structured_linears"] + said["dense_linears"] == 21
    assert ("note" in said) == (said["ratio"] < 0.99 * 0.7)
    assert artifact.read_manifest() == before

    # Another type makes the graph anew, and with it the engine, but not the checkpoint.
    digest = artifact.stage_digest("checkpoint")
    assert run_cli(main, command("--dtype", "float16")) == 0
    assert capsys.readouterr().err.count("re-using") == 1
    assert artifact.stage_digest("checkpoint") == digest
    assert build_info(artifact, "onnx")["dtype"] == "float16"
    artifact.require_stage("engine")

    # A damaged file is found and made again.
    data = out / "onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    assert run_cli(main, command("--dtype", "float16")) == 0
    assert "making onnx again" in capsys.readouterr().err
    artifact.verify()

    # So is a recipe that is none, though the manifest vouches for it.
    (out / "recipe.yaml").write_text("layers: [[[")
    sign(out)
    assert run_cli(main, command("--dtype", "float16")) == 0
    assert f"compressing again: the recipe {out / 'recipe.yaml'} " in capsys.readouterr().err
    artifact.verify()


def test_a_model_that_is_not_served_says_why(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, served in (("tiny_mistral", False), ("tiny_llama", True)):
        assert run_cli(main, command("--engine", "ort", "--json", name=name)) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["triton"] is not None) == served
        note = "no Triton repository was written, because a model with a sliding window cannot be batched continuously"
        assert said.get("triton_note") == (None if served else note)


def test_another_recipe_compresses_again(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, command("--engine", "none")) == 0
    assert not (tmp_path / "out" / "engine").exists()
    first = Artifact(tmp_path / "out").stage_digest("checkpoint")
    capsys.readouterr()
    assert run_cli(main, command("--engine", "none", "--ratio", "0.6")) == 0
    assert "re-using" not in capsys.readouterr().err
    assert Artifact(tmp_path / "out").stage_digest("checkpoint") != first


def test_state_that_a_kill_left_beside_a_finished_checkpoint_goes(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kill came between the last rename and the clearing, and the checkpoint is used again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifact, "clear_state", lambda self: None)
        assert run_cli(main, command("--engine", "none")) == 0
    assert (tmp_path / "out" / "state").is_dir()
    capsys.readouterr()
    assert run_cli(main, command("--engine", "none")) == 0
    assert "re-using" in capsys.readouterr().err
    assert not (tmp_path / "out" / "state").exists()


def test_bfloat16_does_not_run_in_onnx_runtime(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, command("--dtype", "bfloat16")) == 2
    assert "--engine none" in capsys.readouterr().err
    assert run_cli(main, command("--dtype", "bfloat16", "--engine", "none")) == 0
    assert build_info(Artifact(tmp_path / "out"), "onnx")["dtype"] == "bfloat16"


def test_dry_run_writes_nothing(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, command("--dry-run", "--json", "--dtype", "float16")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == ["compress", "export onnx (float16, all logits)", "prepare ort"]
    assert plan["onnx_bytes_about"] == plan["checkpoint_bytes_about"] // 2
    assert not (tmp_path / "out").exists()


def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, ["--model", "smollm2-136m", "--out", str(tmp_path / "out")]) == 2
    assert "smollm2-135m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tiny_opt", "--structure kron --rotation shared --unit 8"),
        ("tiny_llama_tied", "--structure kron --rotation shared --unit 8"),
        ("tiny_qwen3", "--structure gs --rotation none --unit 4"),
        ("tiny_opt_untied", "--structure kron --rotation block --ratio 0.95 --unit 8"),
        ("tiny_mistral", "--structure kron --rotation none --unit 8"),
    ],
)
def test_what_is_built_equals_the_checkpoint(
    command: Callable[..., list[str]], name: str, flags: str, tmp_path: Path
) -> None:
    """A real compression of each family through the whole chain; PyTorch and ONNX Runtime agree on the result."""
    assert run_cli(main, command(*flags.split(), name=name)) == 0
    artifact = Artifact(tmp_path / "out")
    model = load_model(artifact.require_stage("checkpoint"))
    ids = np.random.default_rng(0).integers(3, 200, (2, 21))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    got = OrtRunner(artifact.require_stage("onnx") / "model.onnx").run_full(ids)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert artifact.read_manifest()["stages"]["checkpoint"]["structured_linears"] > 0

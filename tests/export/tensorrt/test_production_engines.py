"""TensorRT-RTX engines of a model of SmolLM2-135M's shape with the default sizes of `export.build`, without a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from compress.artifact.store import Artifact
from compress.errors import ArtifactError
from compress.pipeline import compress_model
from compress.recipe import parse_recipe
from compress.source.model import ModelSource
from compress.structures import GroupShuffleStructure, KroneckerStructure, PivotedStructure, Structure
from export.graph.header import read_header
from export.runtime.profiles import Spans
from export.stages import build_onnx, structured_ops
from export.tensorrt.jobs import Job, run_job
from tests.export.cases import Case, export
from tests.export.helpers import llama
from trt_plugins.build import PLUGINS

SMOLLM2 = llama(
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_positions=8192,
)
POSITIONS = 8192


def kron(name: str, n: int, m: int, side: str) -> Structure:
    return KroneckerStructure(m, n, 9, 6, side=side, mix="leading" if name.endswith("attn.q") else "explicit")  # type: ignore[arg-type]


def gs(name: str, n: int, m: int, side: str) -> Structure:
    return GroupShuffleStructure(m, n, 2, 3, 64)


def pifa(name: str, n: int, m: int, side: str) -> Structure:
    return PivotedStructure(m, n, 128, "in" if m < n else "out")


def built(onnx: Path, plan: Path, plugins: tuple[str, ...] = (), **options: object) -> dict[str, object]:
    profiles = tuple(Spans.parse(None, None, None, POSITIONS).profiles(read_header(onnx).axes))
    job = Job(str(onnx), str(plan), profiles, rtx=True, capabilities=(80, 89, 120), plugins=plugins)
    return run_job(dataclasses.replace(job, **options))  # type: ignore[arg-type]


@pytest.mark.usefixtures("rtx_environment")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("structure", [kron, gs, pifa])
def test_engines_with_plugins_and_without(structure: object, dtype: str, libraries: Path, tmp_path: Path) -> None:
    _, info = export(Case(SMOLLM2, structure), tmp_path, dtype=dtype)  # type: ignore[arg-type]
    native = built(info.path, tmp_path / "native.plan")
    assert native["plugin_layers"] == 0
    with_plugins = built(info.path, tmp_path / "cpp.plan", (str(libraries / PLUGINS),))
    assert with_plugins["plugin_layers"] == info.structured_nodes == 14
    weights = info.initializer_bytes
    for result in (native, with_plugins):
        assert result["plan_bytes"] > 0.9 * weights  # type: ignore[operator]


@pytest.mark.usefixtures("rtx_environment")
def test_a_library_that_is_none_and_a_profile_that_does_not_fit(tmp_path: Path) -> None:
    _, info = export(Case(llama(), kron_of_32), tmp_path, dtype="float16")
    (tmp_path / "empty.so").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"does not load .*empty\.so"):
        built(info.path, tmp_path / "plan", (str(tmp_path / "empty.so"),))
    profiles = Spans.parse(None, None, None, 64).profiles(read_header(info.path).axes)
    for profile in profiles:
        least, best, most = profile["past_key_values.0.key"]
        profile["past_key_values.0.key"] = ((least[0], 7, *least[2:]), (best[0], 7, *best[2:]), (most[0], 7, *most[2:]))
    with pytest.raises(ArtifactError, match="built no engine"):
        built(info.path, tmp_path / "plan", profiles=tuple(profiles))
    assert not (tmp_path / "plan").exists()


def kron_of_32(name: str, n: int, m: int, side: str) -> Structure:
    return KroneckerStructure(m, n, 4, 3, side=side, mix="explicit")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("rtx_environment")
@pytest.mark.parametrize("structure", ["kron", "gs", "auto"])
def test_engines_of_the_real_model(structure: str, libraries: Path, real_model: ModelSource, tmp_path: Path) -> None:
    """All of SmolLM2-135M, compressed with a few sequences: what it answers is not looked at here."""
    recipe = parse_recipe(
        {"structure": structure, "calibration": {"samples": 2, "sequence_length": 512}, "correction": 0.0}, "the test"
    )
    artifact = Artifact(tmp_path / "out")
    compress_model(real_model, recipe, artifact.out)
    build_onnx(artifact, dtype="float16", logits="last")
    onnx = artifact.require_stage("onnx") / "model.onnx"
    result = built(onnx, tmp_path / "cpp.plan", (str(libraries / PLUGINS),))
    assert result["plugin_layers"] == sum(structured_ops(artifact).values()) > 100
    assert built(onnx, tmp_path / "native.plan")["plugin_layers"] == 0

"""A kill, or a loss of power, at every change of the file system: what is published, and what a run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.artifact.store import Artifact
from compress.pipeline import compress_model
from tests.compress import helpers
from tests.compress.helpers import TinyModel, same_files, text_file, tiny_source
from tests.crashing import deaths, died

POWER = pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])


def publish(out: Path, text: str) -> None:
    """Two stages, the second made from the first."""
    artifact = Artifact(out)
    with artifact.stage("checkpoint", section={"source": {"id": text}}) as folder:
        (folder / "config.json").write_text(text * 100)
    with artifact.stage("onnx", inputs=["checkpoint"]) as folder:
        (folder / "model.onnx").write_text(text * 200)
    artifact.write_text("recipe.yaml", text * 50)


@POWER
def test_a_death_at_any_moment_leaves_whole_stages(power: bool, tmp_path: Path) -> None:
    seen, moment, alive = [], 0, False
    while not alive:
        moment += 1
        root = tmp_path / str(moment)
        root.mkdir()
        publish(root / "out", "old")
        alive = not died(lambda root=root: publish(root / "out", "new"), root, moment, power=power)  # type: ignore[misc]
        artifact = Artifact(root / "out")
        with artifact.lock():
            pass
        artifact.verify()
        assert {path.name for path in artifact.out.iterdir()} == {"checkpoint", "manifest.json", "onnx", "recipe.yaml"}
        text = artifact.read_manifest()["source"]["id"]
        assert (artifact.path("checkpoint") / "config.json").read_text() == text * 100
        seen.append(text)
        publish(root / "out", "third")  # nothing is in the way of the next one
    assert seen == sorted(seen, reverse=True)
    assert {"old", "new"} == set(seen)
    assert moment > 20


@pytest.mark.slow
@POWER
@pytest.mark.parametrize("structure", ["kron", "auto", "slice", "jrk"])
def test_a_compression_that_died_goes_on_to_the_same_bytes(
    structure: str, power: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With statistics of their own folder where there are any, and at every 23rd change, of several hundred."""
    source = tiny_source(tiny_model, "tiny_llama_tied")
    recipe = helpers.recipe(text_file(tmp_path), structure=structure, ratio=0.75)

    def work(root: Path) -> None:
        compress_model(source, recipe, root / "out", statistics=root / "statistics")

    (tmp_path / "whole").mkdir()
    work(tmp_path / "whole")
    count = 0
    for root in deaths(work, tmp_path, power=power, step=23):
        work(root)
        count += 1
        artifact = Artifact(root / "out")
        artifact.verify()
        same_files(artifact, Artifact(tmp_path / "whole" / "out"))
        assert not artifact.path("state").exists()
        for file in (tmp_path / "whole" / "statistics").rglob("*.safetensors"):
            assert file.read_bytes() == (root / file.relative_to(tmp_path / "whole")).read_bytes()
    assert count > 3

"""Every value of every JSON and YAML file replaced by what nobody expects there: a result, or a sentence. Minutes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hostile.artefacts import sign
from tests.hostile.conftest import is_told, validation
from tests.hostile.mutate import mutations
from tests.hostile.sandbox import Outcome, Sandbox

pytestmark = pytest.mark.slow


def read(path: Path) -> Any:
    """A JSON or a YAML file."""
    text = path.read_text()
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def complaint(what: str, outcome: Outcome, sound_codes: tuple[int, ...]) -> list[str]:
    """What is wrong with an outcome, nothing for one that is in order."""
    if outcome.code in sound_codes or is_told(outcome):
        return []
    last = (outcome.err.strip().splitlines() or [""])[-1]
    return [f"{what}: exit code {outcome.code}, {last[:200]}"]


def complaints(document: Any, every: int, command: Callable[[Any], Outcome], out: Path) -> list[str]:
    """What is wrong with the outcomes of a command, given each `every`-th mutation; `out` is removed before each."""
    found = []
    for what, mutated in list(mutations(document))[::every]:
        shutil.rmtree(out, ignore_errors=True)
        found += complaint(what, command(mutated), (0,))
    return found


@pytest.mark.parametrize(
    ("model", "file", "every"),
    [
        *((model, "config.json", 1) for model in ("tiny_llama", "tiny_opt", "tiny_llama3rope", "tiny_mistral")),
        ("tiny_llama", "generation_config.json", 1),
        ("tiny_llama", "tokenizer_config.json", 1),
        ("tiny_llama", "tokenizer.json", 3),
        ("shards", "model.safetensors.index.json", 3),
    ],
)
def test_models(
    model: str,
    file: str,
    every: int,
    sandbox: Sandbox,
    sound: Callable[[str], Path],
    small: tuple[object, ...],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound(model), folder)

    def command(document: Any) -> Outcome:
        (folder / file).write_text(json.dumps(document))
        flags = ("--structure", "lowrank", "--sensitivity", "none", "--out", tmp_path / "out")
        return sandbox.run("compress.run", "--model", folder, *small, *flags)

    assert complaints(read(folder / file), every, command, tmp_path / "out") == []


@pytest.mark.parametrize(
    ("file", "every"),
    [
        ("manifest.json", 3),
        ("recipe.yaml", 5),
        ("checkpoint/config.json", 5),
        ("checkpoint/fit.json", 1),
        ("checkpoint/model.safetensors.index.json", 2),
        ("onnx/build.json", 3),
    ],
)
def test_artefacts(
    file: str,
    every: int,
    whole: Path,
    sandbox: Sandbox,
    sound: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
) -> None:
    out, found = tmp_path / "out", []
    for what, document in list(mutations(read(whole / file)))[::every]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        (out / file).write_text(json.dumps(document))  # which is YAML as well
        if file != "manifest.json":
            sign(out)
        outcome = sandbox.run("validate.run", out, "--model", sound("tiny_llama"), *validation(text))
        found += complaint(what, outcome, (0, 3))
        outcome = sandbox.run("export.build", "--resume", "--out", out)
        found += complaint(f"{what}, resumed", outcome, (0,))
    assert found == []


@pytest.mark.parametrize("every", [2])
def test_recipes(
    every: int,
    whole: Path,
    sandbox: Sandbox,
    sound: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
) -> None:
    def command(document: Any) -> Outcome:
        (tmp_path / "r.yaml").write_text(json.dumps(document))  # which is YAML as well
        flags = ("--recipe", tmp_path / "r.yaml", "--calibration-data", text, "--out", tmp_path / "out")
        return sandbox.run("compress.run", "--model", sound("tiny_llama"), *flags)

    assert complaints(read(whole / "recipe.yaml"), every, command, tmp_path / "out") == []

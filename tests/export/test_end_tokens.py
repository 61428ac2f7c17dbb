"""A chat model whose second end token is in generation_config.json (or a GGUF's eot key) alone stops everywhere."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.source.resolve import resolve
from export.build import main
from export.runtime.ort import OrtRunner
from tests import tiny
from tests.tools import triton_utilities

PROMPT = [5, 60, 100, 7]
LONGEST = 24
NAME = "tiny_llama"
SAMPLING = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}  # transformers reads these and refuses to write them


def greedy(model: Any, end: int | list[int] | None) -> list[int]:
    """The new tokens of the model itself."""
    made = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=LONGEST, eos_token_id=end, pad_token_id=0
    )
    return list(made[0, len(PROMPT) :].tolist())


@pytest.fixture(scope="module")
def answer() -> list[int]:
    """What the model says when nothing stops it."""
    model = tiny.model(NAME)
    return greedy(model, None)


@pytest.fixture(scope="module")
def end(answer: list[int]) -> int:
    """A token that it says, not first and not special: the second end token."""
    return next(token for i, token in enumerate(answer) if i >= 3 and token > 2 and token not in answer[:i])


def folder(path: Path, end: int) -> Path:
    tiny.write(NAME, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end], **SAMPLING}))
    return path


def gguf(path: Path, end: int) -> Path:
    path.mkdir()
    return tiny.write_gguf(NAME, path / "m.gguf", lambda writer: writer.add_eot_token_id(end))


@pytest.fixture(scope="module", params=[folder, gguf])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, end: int) -> tuple[Path, bool]:
    """OUT of the whole road with a model of this kind, and whether the source is a folder."""
    make: Callable[[Path, int], Path] = request.param
    base = tmp_path_factory.mktemp("ends")
    command = ["--model", str(make(base / "source", end)), "--out", str(base / "out"), "--structure", "dense"]
    assert run_cli(main, [*command, "--engine", "ort", "--materialize-dense"]) == 0
    return base / "out", make is folder


def test_both_ids_are_in_every_file(built: tuple[Path, bool], end: int) -> None:
    out, has_file = built
    for place in ("checkpoint", "dense"):
        assert json.loads((out / place / "config.json").read_text())["eos_token_id"] == [2, end]
        generation = out / place / "generation_config.json"
        assert generation.is_file() == has_file
        if has_file:
            assert json.loads(generation.read_text()) == {"eos_token_id": [2, end], **SAMPLING}
            assert GenerationConfig.from_pretrained(out / place).eos_token_id == [2, end]
    assert OrtRunner(out / "onnx" / "model.onnx").metadata["eos_token_id"] == [2, end]


@pytest.mark.parametrize("place", ["checkpoint", "dense"])
def test_from_pretrained_stops(place: str, built: tuple[Path, bool], answer: list[int], end: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(built[0] / place, dtype=torch.float32)
    made = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=LONGEST, pad_token_id=0)
    assert made[0, len(PROMPT) :].tolist() == answer[: answer.index(end) + 1]


def test_the_runner_stops(built: tuple[Path, bool], answer: list[int], end: int) -> None:
    runner = OrtRunner(built[0] / "onnx" / "model.onnx")
    assert runner.generate([PROMPT], max_new_tokens=LONGEST) == [answer[: answer.index(end) + 1]]
    assert runner.generate([PROMPT], max_new_tokens=LONGEST, eos=[]) == [answer]


def test_the_triton_model_stops(
    built: tuple[Path, bool], answer: list[int], end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = triton_model(built[0])
    try:
        from export.triton.settings import Settings
        from tests.export.triton.clients import Client

        client = Client()
        served.batcher.submit(PROMPT, Settings(max_tokens=LONGEST), client)
        client.wait()
        assert client.tokens == answer[: answer.index(end) + 1]
        assert client.finish == "stop"
    finally:
        served.finalize()


def triton_model(out: Path) -> Any:
    """The text model of OUT/triton, initialised outside of a server."""
    backend: Any = types.ModuleType("triton_python_backend_utils")
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

    class Family:
        COUNTER, GAUGE, HISTOGRAM = 0, 1, 2

        def __init__(self, **options: Any) -> None: ...

        def Metric(self, **options: Any) -> Any:  # noqa: N802
            return types.SimpleNamespace(increment=lambda value: None, set=lambda value: None)

    backend.MetricFamily = Family
    with triton_utilities(backend):
        from export.triton.model import TritonPythonModel

    folder = Artifact(out).require_stage("triton")
    parameters = {"artifact": "..", "sequences": "2", "engine": "ort", "threads": "1"}
    config = json.dumps({"parameters": {name: {"string_value": value} for name, value in parameters.items()}})
    model = TritonPythonModel()
    model.initialize({"model_config": config, "model_repository": str(folder), "model_name": "text"})
    return model


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, 2),
        (2, 2, 2),
        (2, [2, 9], [2, 9]),
        ([2, 8], [9, 2], [2, 8, 9]),
        (None, [9], 9),
        (None, None, None),
        (2, [2, 4_000_000, -1], 2),
    ],
)
def test_the_union_of_both_files(config: Any, generation: Any, expected: Any, tmp_path: Path) -> None:
    path = tiny.write(NAME, tmp_path / "m")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"eos_token_id": config}))
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    source = resolve(str(path))
    assert source.architecture().eos_token_id == expected
    assert source.config().eos_token_id == expected
    found = source.generation_config()
    assert found == (None if generation is None else {"eos_token_id": expected})


@pytest.mark.parametrize("value", ["2", [2, "9"], 2.5, True, {"a": 1}])
def test_ids_that_are_none(value: Any, tmp_path: Path) -> None:
    from compress.errors import ArtifactError

    path = tiny.write(NAME, tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ArtifactError, match=r"generation_config\.json has eos_token_id"):
        resolve(str(path)).architecture()

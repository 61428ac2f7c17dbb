"""export_model and validate_artifact: what the commands do, with the commands' defaults."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
import export
import export.build
import validate
import validate.run
from compress.errors import ArtifactError, UsageError
from tests import tiny
from tests.compress.helpers import LENGTH, SAMPLES, TinyModel


@pytest.fixture(scope="module")
def out(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = compress.Recipe(
        structure="lowrank", ratio=0.8, sensitivity="none", calibration={"samples": SAMPLES, "sequence_length": LENGTH}
    )
    folder = tmp_path_factory.mktemp("public")
    return compress.compress(str(tiny_model("tiny_llama")), recipe, out=folder / "out", calibration=[tiny.TEXT])


@pytest.mark.parametrize(
    ("function", "parser", "renamed", "none_of_its"),
    [
        (export.export_model, export.build.parser(), {}, {"model", "revision", "trust_remote_code", "resume"}),
        (validate.validate_artifact, validate.run.parser(), {"no_plot": "plot"}, set[str]()),
    ],
    ids=["export", "validate"],
)
def test_defaults_are_those_of_the_command(
    function: Callable[..., Any], parser: ArgumentParser, renamed: dict[str, str], none_of_its: set[str]
) -> None:
    """Every flag is a parameter, apart from those of the compression and of the command line itself."""
    given = {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "progress"}
    from compress.options import add_compress_arguments

    compression = ArgumentParser()
    add_compress_arguments(compression)
    left_out = {a.dest for a in compression._actions} | {"help", "json", "debug", "dry_run"} | none_of_its
    if function is validate.validate_artifact:
        left_out -= {"model", "trust_remote_code", "sequence_length", "batch", "skip"}
    flags = {a.dest: a.default for a in parser._actions if a.dest not in left_out}
    assert {renamed.get(name, name) for name in flags} == set(given)
    for name, default in flags.items():
        value = given[renamed.get(name, name)]
        if name in ("out", "data"):
            continue
        if name == "no_plot":
            value = not value
        if isinstance(value, tuple):
            value = [] if not value else ",".join(map(str, value))
        assert value == default, name
    assert given.get("data", "boolq-heldout") == "boolq-heldout"


def test_modules_keep_their_names() -> None:
    code = (
        "import sys, export, validate\n"
        "assert not {'torch', 'onnx', 'transformers'} & set(sys.modules)\n"
        "import export.build, validate.run\n"
        "assert callable(export.build.main) and callable(validate.run.main)\n"
        "assert callable(export.export_model) and callable(validate.validate_artifact)\n"
        "assert not {'torch', 'onnx', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_and_validate(
    out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate is made to fail: compression does not reliably harm a model of random weights."""
    monkeypatch.setattr("validate.gates.failures", lambda gates: [f"{gates[-1].name}: too much"])
    seen: list[compress.Progress] = []
    made = export.export_model(out, progress=seen.append)
    assert made["dtype"] == "float32"
    assert made["engine"] == "ort"
    assert (out / "onnx" / "model.onnx").is_file()
    assert any("exported" in each.text for each in seen)
    again = export.export_model(out, progress=seen.append)
    assert "re-using" in seen[-1].text + seen[-2].text
    assert again["weight_bytes"] == made["weight_bytes"]
    (tmp_path / "held.txt").write_text(tiny.TEXT)
    report = validate.validate_artifact(
        out,
        data=tmp_path / "held.txt",
        sequence_length=64,
        skip=["speed"],
        plot=False,
        max_ppl_increase=0.99,
        progress=seen.append,
    )
    assert report["passed"] is False
    assert report["failed"] == ["max-ppl-increase: too much"]
    assert "max-ppl-increase" in report["gates"]
    assert json.loads((out / "reports" / "quality.json").read_text()) == report["quality"]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert not [each.text for each in seen if each.text in captured.err]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "onnx"}, "engine must be one of ort, trt, trt-rtx, none, not 'onnx'"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"dtype": "bfloat16"}, "no bfloat16"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_wrong_options_of_export(out: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export.export_model(out, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "everything"}, "skip must be of parity, perplexity, speed, not 'everything'"),
        ({"perplexity_runtime": "jax"}, "perplexity_runtime must be of"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_ppl_increase": "much"}, "much"),
    ],
)
def test_wrong_options_of_validation(out: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate.validate_artifact(out, **options)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        export.export_model(tmp_path)

"""Packages that are missing or too old: exit 4, with the version that is needed, before any work."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from compress.cli.entry import run_cli
from compress.errors import MissingDependencyError
from compress.lazy import CORE, LEAST, check_versions, require, version_of
from compress.run import main as compress_main
from export.build import main as build_main
from validate.run import main as validate_main
from validate.speed.__main__ import main as speed_main

ROOT = Path(__file__).resolve().parents[2]


def test_the_versions_are_those_of_pyproject() -> None:
    asked = dict(re.findall(r'"([a-z0-9-]+)>=([0-9.]+)', (ROOT / "pyproject.toml").read_text()))
    assert LEAST.keys() <= asked.keys()
    assert {name: asked[name] for name in LEAST} == LEAST


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.24.2", (1, 24, 2)), ("2.6.0+cu124", (2, 6, 0)), ("1.25rc1", (1, 25)), ("unknown", ())]
)
def test_version_of(text: str, numbers: tuple[int, ...]) -> None:
    assert version_of(text) == numbers


def fake(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    module = ModuleType(name)
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


def test_an_old_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "onnxruntime", "1.9.0")
    with pytest.raises(
        MissingDependencyError,
        match=r"^onnxruntime 1\.9\.0 is installed, but 1\.23\.2 or later is needed to run it\. Run: pip install --up",
    ):
        require("onnxruntime", pip="onnxruntime", purpose="run it")


@pytest.mark.parametrize("version", ["1.23.2", "1.100.1", None, "source"])
def test_what_will_do_or_does_not_say_passes(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    fake(monkeypatch, "onnxruntime", version)
    assert require("onnxruntime", pip="onnxruntime", purpose="run it") is sys.modules["onnxruntime"]


def test_an_old_or_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else installed(name)
    )
    with pytest.raises(MissingDependencyError, match=r"transformers 4\.57\.1 is installed, but 5\.6 or later"):
        check_versions(*CORE, purpose="compress")

    def gone(name: str) -> str:
        if name == "onnx":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    with pytest.raises(MissingDependencyError, match=r"'onnx' is not installed.*pip install 'onnx>=1\.19'"):
        check_versions("onnx", purpose="export")


def test_commands_say_so_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is looked for, and long before the hours of a compression."""
    fake(monkeypatch, "onnxruntime", "1.17.0")
    commands = (
        (build_main, ["--model", str(tmp_path / "nothing"), "--engine", "ort", "--out", str(tmp_path / "out")]),
        (validate_main, [str(tmp_path / "out"), "--no-plot"]),
        (speed_main, [str(tmp_path / "out")]),
    )
    for main, arguments in commands:
        assert run_cli(main, arguments) == 4
        assert "onnxruntime 1.17.0 is installed, but 1.23.2 or later" in capsys.readouterr().err
    assert run_cli(build_main, ["--model", str(tmp_path / "nothing"), "--engine", "none"]) == 2  # does without it
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "torch" else installed(name))
    assert run_cli(compress_main, ["--model", str(tmp_path / "nothing")]) == 4
    assert "torch 2.1.0 is installed" in capsys.readouterr().err

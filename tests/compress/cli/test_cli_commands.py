"""What all commands share: their parsers, --json and --debug, and how a result is told."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest

from compress.cli.commands import add_common_arguments, command_parser, listed, tell

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = {
    "compress.methods.paper.compare": "compress.methods.paper.compare",
    "compress.run": "compress.run",
    "export.build": "export.build",
    "trt_plugins.build": "trt_plugins.build",
    "validate.latency": "validate.latency",
    "validate.quality": "validate.quality.__main__",
    "validate.run": "validate.run",
    "validate.serving": "validate.serving",
    "validate.speed": "validate.speed.__main__",
    "validate.tasks": "validate.tasks.__main__",
}
"""What follows `python -m` -> the module with the parser."""


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_the_common_flags(command: str) -> None:
    parser = importlib.import_module(COMMANDS[command]).parser()
    assert parser.prog == f"python -m {command}"
    assert parser.formatter_class is argparse.RawDescriptionHelpFormatter
    flags = {text: action for action in parser._actions for text in action.option_strings}
    assert flags["--json"].default is flags["--debug"].default is False
    assert flags["--debug"].help == "show a traceback when something fails"


def test_the_common_flags_stand_in_one_place() -> None:
    found = [
        str(path.relative_to(ROOT))
        for package in ("compress", "export", "trt_plugins", "validate")
        for path in sorted((ROOT / package).rglob("*.py"))
        if '"--json"' in path.read_text() and "add_argument" in path.read_text()
    ]
    assert found == ["compress/cli/commands.py"]


def test_a_result_is_one_line_of_json_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("x.y", "What it does.\n  as it stands", "example")
    add_common_arguments(parser)
    assert "  as it stands" in parser.format_help()
    result = {"out": "here", "kept": 0.5}
    tell(parser.parse_args(["--json"]), result, lambda: 1 / 0)  # the text is not made
    assert json.loads(capsys.readouterr().out) == result
    tell(parser.parse_args([]), result, lambda: listed(result))
    assert capsys.readouterr().out == "out: here\nkept: 0.5\n"
    with pytest.raises(ValueError, match="JSON"):
        tell(parser.parse_args(["--json"]), {"kept": float("nan")}, str)
    assert capsys.readouterr().out == ""

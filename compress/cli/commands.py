"""What the commands have in common: how a parser looks, the flags that all have, how a result is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from compress.cli.parser import CommandParser


def command_parser(module: str, description: str | None, examples: str | None = None) -> CommandParser:
    """The parser of `python -m MODULE`; `--help` shows `description` and `examples` line by line as they are."""
    return CommandParser(
        prog=f"python -m {module}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_common_arguments(parser: argparse.ArgumentParser, json_help: str = "the result as one JSON object") -> None:
    """--json and --debug, the last of every command: `tell` reads the one, `run_cli` the other."""
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")


def listed(result: Mapping[str, Any]) -> str:
    """`name: value`, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in result.items())


def tell(args: argparse.Namespace, result: Any, text: Callable[[], str]) -> None:
    """The result on stdout: with --json as one line, else as `text()`. A number that is not finite, which JSON does not
    have, raises ValueError."""
    print(json.dumps(result, allow_nan=False) if args.json else text())

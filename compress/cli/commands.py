"""What the commands have in common: how a parser looks, the flags that all have, how a result is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from compress.cli.parser import CommandParser
from compress.errors import UsageError


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


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise UsageError for a number below `least`; names: those of the flags in `args`. What was not given is None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def check_seconds(args: argparse.Namespace) -> None:
    """Raise UsageError for --seconds that no timing takes."""
    if args.seconds is not None and not 0 < args.seconds < 3600:
        raise UsageError(f"--seconds must be above 0 and below 3600, not {args.seconds}")


def listed(result: Mapping[str, Any]) -> str:
    """`name: value`, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in result.items())


def tell(args: argparse.Namespace, result: Any, text: Callable[[], str]) -> None:
    """The result on stdout: with --json as one line, else as `text()`. A number that is not finite, which JSON does not
    have, raises ValueError."""
    print(json.dumps(result, allow_nan=False) if args.json else text())

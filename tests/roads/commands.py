"""Commands as a user gives them, run in this process: importing torch anew takes longer than tiny models do."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.cli.entry import run_cli

ROAD = "processor seconds of a road"
"""Property of the tests that drive one."""


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    command: str
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The one object of --json."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def sentence(self) -> str:
        """What `error: ` says."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"{self.command}\nhas no single error line:\n{self.err[-2000:]}"
        return lines[0].removeprefix("error: ")

    def __str__(self) -> str:
        return f"{self.command}\nexit {self.code}\n{self.out[-1500:]}\n{self.err[-1500:]}"


def command_module(name: str) -> Any:
    """The module that `python -m name` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def run(module: str, arguments: Sequence[object]) -> Done:
    """`python -m module arguments`: exit code and streams of the real thing, but for an interpreter of its own."""
    words = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    main = command_module(module).main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_cli(main, words)
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        except Exception:  # as the interpreter does it
            code = 1
            traceback.print_exc()
    return Done(f"python -m {module} {shlex.join(words)}", code, out.getvalue(), err.getvalue())


def succeed(module: str, *arguments: object) -> Done:
    """`run`; the exit code is 0."""
    done = run(module, arguments)
    assert done.code == 0, str(done)
    return done


def refuse(module: str, *arguments: object, code: int = 2) -> Done:
    """`run`; it is refused with that exit code and one sentence."""
    done = run(module, arguments)
    assert done.code == code, str(done)
    assert len(done.sentence) > 20, str(done)
    assert done.out == "", str(done)
    return done

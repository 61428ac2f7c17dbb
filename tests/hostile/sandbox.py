"""Runs commands of this project one by one, each in a forked child with limits on memory and time.

The process that forks has imported what is heavy and runs no threads, so that a case costs little more than its own
work. It is started as `python -m tests.hostile.sandbox`, reads requests as lines of JSON and answers with outcomes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "compress.pipeline",
    "compress.forecast",
    "compress.checkpoint.plain",
)
CPU_SECONDS = 20
EXTRA_BYTES = 1 << 30
"""Address space beyond what the imports take: far more than a tiny model needs."""
BLOCKED_SECONDS = 90
"""By the clock of the wall: for what waits (a FIFO without a writer) and takes no processor time at all."""


@dataclass(frozen=True)
class Outcome:
    """`code` is the exit code, or minus the signal that ended the child (a limit, most likely)."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """What stands after `error: ` on stderr, or ''."""
        found = [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]
        return found[-1] if found else ""


class Sandbox:
    """A handle of the process that forks."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.sandbox", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def run(self, module: str, *arguments: object) -> Outcome:
        """`python -m module arguments`, through `run_cli`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, [str(argument) for argument in arguments]]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(BLOCKED_SECONDS)


def _serve(folder: Path) -> None:
    for name in HEAVY:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        module, arguments = json.loads(line)
        print(json.dumps(asdict(_forked(folder, module, arguments))), file=answers, flush=True)


def _forked(folder: Path, module: str, arguments: Sequence[str]) -> Outcome:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out, err = Path(name, "out"), Path(name, "err")
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = _child(module, arguments, out, err)
            os._exit(code)
        status = _wait(child)
        code = os.waitstatus_to_exitcode(status)
        return Outcome(code, *(path.read_text(errors="replace") if path.exists() else "" for path in (out, err)))


def _wait(child: int) -> int:
    deadline = time.monotonic() + BLOCKED_SECONDS
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(0.05, 1.2 * pause)


def _child(module: str, arguments: Sequence[str], out: Path, err: Path) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="backslashreplace", closefd=False) for n in (1, 2))
    limit = _address_space() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from compress.cli.entry import run_cli

    code = 1
    with _told():
        try:
            code = run_cli(importlib.import_module(module).main, arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """As the interpreter does at the end: a traceback on stderr, and everything flushed."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _address_space() -> int:
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))

"""The commands that faults happen to, on a tiny model, each in a forked child that has all imports behind it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from tests import tiny
from tests.faults.rows import FaultError

Main = Callable[[Sequence[str] | None], int]
MODEL, TEXT = "tiny_llama", "text.txt"


@dataclass(frozen=True)
class Command:
    """One command line. OUT is always `folder`/out: its name is part of some results."""

    name: str
    main: Main
    argv: tuple[str, ...]
    folder: Path
    before: Path | None = None  # what OUT is at the start; nothing where None

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def reset(self) -> None:
        """OUT as it is before the command."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.out)

    def start(self, limit: Callable[[], None] | None = None) -> int:
        """Run it in a child whose id is returned; its output goes to `folder`.log. limit: called there first."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            log = os.open(self.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            if limit is not None:
                limit()
            code = _run(self.main, list(self.argv))
        finally:
            os._exit(code)

    def finish(self, limit: Callable[[], None] | None = None) -> int:
        """Run it to its end; the exit code, negative for a signal."""
        return wait(self.start(limit))

    def log(self) -> str:
        """What the last run printed."""
        return (self.folder.with_suffix(".log")).read_text(errors="replace")

    def require(self, what: str) -> None:
        """Run it to its end, which must be exit 0."""
        code = self.finish()
        if code != 0:
            raise FaultError(f"{self.name}, {what}: exit {code}\n{self.log()}")

    def result(self) -> dict[str, str]:
        """SHA-256 of every file of the artefact, which must be whole and have nothing else beside it."""
        artifact = Artifact(self.out)
        artifact.verify()
        with artifact.lock():
            pass
        stages = {"manifest.json", *artifact.read_manifest()["stages"]}
        strange = {path.name for path in self.out.iterdir()} - stages
        if strange:
            raise FaultError(f"{self.name}: {sorted(strange)} is left in OUT")
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {p.relative_to(self.out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run gives: files that are the same in every run, those that hold measured times left out, and
    the CPU seconds that it takes."""

    files: dict[str, str]
    names: frozenset[str]
    seconds: float

    @classmethod
    def of(cls, command: Command) -> Reference:
        """From two runs."""
        found, seconds = [], 0.0
        for _ in range(2):
            command.reset()
            before = os.times().children_user + os.times().children_system
            command.require("undisturbed")
            seconds = os.times().children_user + os.times().children_system - before
            found.append(command.result())
        same = {name: digest for name, digest in found[0].items() if found[1].get(name) == digest}
        return cls(same, frozenset(found[0]), seconds)

    def require(self, command: Command, what: str) -> None:
        """Raise FaultError where the command's result is another."""
        found = command.result()
        if found.keys() != self.names:
            raise FaultError(f"{command.name}, {what}: other files, {sorted(found.keys() ^ self.names)}")
        other = [name for name, digest in self.files.items() if found[name] != digest]
        if other:
            raise FaultError(f"{command.name}, {what}: other bytes in {', '.join(other)}")


def commands(folder: Path) -> list[Command]:
    """compress, export and validate, each going on from the one before; the imports are done here."""
    import onnxruntime  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import compress.methods.registry
    import compress.run
    import export.build
    import export.graph.decoder
    import export.runtime.ort
    import validate.run

    for name in ("compress", "export", "validate"):
        (folder / name).mkdir()
    model, text = tiny.write(MODEL, folder / "model"), folder / TEXT
    text.write_text(tiny.TEXT)
    recipe = ("--structure", "auto", "--ratio", "0.75", "--calibration-data", str(text), "--calibration-samples", "4")
    recipe = (*recipe, "--sequence-length", "32", "--model", str(model))
    out = ("--out", str(folder / "compress" / "out"))
    first = Command("compress", compress.run.main, (*recipe, *out), folder / "compress")
    first.require("undisturbed")
    compressed = shutil.copytree(first.out, folder / "compressed")
    out = ("--out", str(folder / "export" / "out"))
    second = Command("export", export.build.main, (*recipe, *out), folder / "export", compressed)
    second.reset()
    second.require("undisturbed")
    exported = shutil.copytree(second.out, folder / "exported")
    out = (
        str(folder / "validate" / "out"),
        "--model",
        str(model),
        "--skip",
        "speed",
        "--skip",
        "perplexity",
        "--no-plot",
    )
    third = Command("validate", validate.run.main, out, folder / "validate", exported)
    return [first, second, third]


def wait(child: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """SIGKILL a child once it has used so much CPU time; False where it had ended before."""
    clock = (~child << 3) | 2  # clock_getcpuclockid(3): however busy the machine is, the moment is as far into the work
    while True:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            wait(child)
            return False
        if time.clock_gettime(clock) >= seconds:
            os.kill(child, signal.SIGKILL)
            return wait(child) == -signal.SIGKILL
        time.sleep(0.001)


def _run(main: Main, argv: list[str]) -> int:
    import traceback

    try:
        return run_cli(main, argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
